"""The chips the Triton backend compiles for. Rates are dense datasheet figures; measured ceilings
go into reports."""

from __future__ import annotations

from spcomp.ir.target import Target

_ROWS = (
    # name, title, arch, warp, multiprocessors, shared bytes, registers, TFLOP/s 16-bit, f32, TB/s,
    # L2 TB/s
    ("sm80", "NVIDIA A100", "cuda:80", 32, 108, 166912, 65536, 312.0, 19.5, 2.0, 4.0),
    ("sm90", "NVIDIA H100", "cuda:90", 32, 132, 232448, 65536, 989.0, 67.0, 3.35, 5.5),
    ("sm100", "NVIDIA B200", "cuda:100", 32, 148, 232448, 65536, 2250.0, 80.0, 8.0, 10.0),
    ("gfx942", "AMD MI300X", "hip:gfx942", 64, 304, 65536, 65536, 1307.0, 163.0, 5.3, 10.0),
)

TARGETS: dict[str, Target] = {
    name: Target(
        name=name,
        title=title,
        backend="triton",
        arch=arch,
        warp_size=warp,
        multiprocessors=count,
        shared_bytes=shared,
        registers=registers,
        tflops=(("bfloat16", half), ("float16", half), ("float32", single)),
        bandwidth_tbs=bandwidth,
        l2_tbs=l2,
    )
    for name, title, arch, warp, count, shared, registers, half, single, bandwidth, l2 in _ROWS
}

INTERPRETER = Target(
    name="interpreter",
    title="Triton's interpreter on the CPU",
    backend="triton",
    arch="interpreter",
    warp_size=32,
    multiprocessors=2,
    shared_bytes=1 << 30,
    registers=1 << 20,
    tflops=(("bfloat16", 0.05), ("float16", 0.05), ("float32", 0.05)),
    bandwidth_tbs=0.02,
    l2_tbs=0.02,
    launch_us=1000.0,
)
