"""The Python side of the emulator: what it compiles, what it keeps, what it refuses."""

from __future__ import annotations

import gc
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spcomp.backends.ascendc import emulate
from spcomp.backends.ascendc.emulate import (
    Buffer,
    EmulatedKernel,
    EmulatorFault,
    KernelDoesNotCompile,
    Launch,
    NoCompiler,
    NotALaunch,
    compile_kernel,
)

SOURCE = """#include "kernel_operator.h"
struct Tiling { int32_t count; float factor; };
__global__ __aicore__ void scale(GM_ADDR x, GM_ADDR y, Tiling tiling, uint8_t first) {
  AscendC::GlobalTensor<float> from, to;
  from.SetGlobalBuffer((__gm__ float*)x);
  to.SetGlobalBuffer((__gm__ float*)y);
  for (int32_t i = first; i < tiling.count; ++i) to.SetValue(i, tiling.factor * from.GetValue(i));
  AscendC::DataCacheCleanAndInvalid<float, AscendC::CacheLine::ENTIRE_DATA_CACHE>(to);
}
"""
TILING = struct.pack("if", 4, 2.5)


@pytest.fixture(scope="module")
def scale() -> EmulatedKernel:
    return compile_kernel(SOURCE, "scale")


def test_numpy_and_torch_buffers_are_used_in_place(scale: EmulatedKernel) -> None:
    for x, y in (
        (np.arange(4, dtype=np.float32), np.zeros(4, np.float32)),
        (torch.arange(4.0), torch.zeros(4)),
    ):
        statistics = scale.run([Buffer("x", x, read_only=True), Buffer("y", y), TILING, 1])
        assert y.tolist() == [0.0, 2.5, 5.0, 7.5]
        assert statistics.instructions == 6


def test_a_fault_leaves_the_buffers_alone(scale: EmulatedKernel) -> None:
    y = np.zeros(3, np.float32)
    with pytest.raises(EmulatorFault) as found:
        scale.run([Buffer("x", np.ones(4, np.float32), True), Buffer("out", y), TILING, 0])
    assert str(found.value) == (
        "EmulatorFault: the emulated kernel 'scale' is faulty: AIV 0: SetValue on pipe S: the "
        "tensor writes the bytes 12 to 16 of 'out', which has 12.\n"
        "  help: correct the kernel; the values it left behind mean nothing."
    )
    assert not y.any()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([1], "the kernel takes 4 arguments and was given 1"),
        ([1, 2, 3, 4], "argument 0 has to be a tensor"),
        (
            ["x", "y", b"1234", 0],
            "argument 2 has another kind or size than the kernel's",
        ),
        (["x", "y", TILING, 256], "argument 3: 256 does not fit its 1 bytes"),
        (["x", "y", TILING, -1], "argument 3: -1 does not fit its 1 bytes"),
        (["x", "y", TILING, 1.5], "argument 3 has another kind or size"),
    ],
)
def test_arguments_that_do_not_fit(
    scale: EmulatedKernel, arguments: list[object], said: str
) -> None:
    made = [Buffer(a, np.ones(4, np.float32)) if isinstance(a, str) else a for a in arguments]
    with pytest.raises(EmulatorFault) as found:
        scale.run(made)  # type: ignore[arg-type]
    assert said in str(found.value)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (Buffer("x", np.ones((4, 4), np.float32).T), "'x', an array that is not contiguous or"),
        (Buffer("x", torch.ones(4, 4).T), "'x' on cpu with strides (1, 4)"),
        (Buffer("x", [1.0]), "was given 'x' as list"),
        (2**63, "the integer 9223372036854775808"),
    ],
)
def test_what_no_launch_can_have(scale: EmulatedKernel, argument: object, said: str) -> None:
    with pytest.raises(NotALaunch) as found:
        scale.run([argument])  # type: ignore[list-item]
    assert said in str(found.value)


@pytest.mark.parametrize("launch", [Launch(blocks=0), Launch(ratio=3), Launch(kind="gpu")])  # type: ignore[arg-type]
def test_launches_that_do_not_exist(scale: EmulatedKernel, launch: Launch) -> None:
    with pytest.raises(NotALaunch, match="the kind is vector, cube or mix"):
        scale.run([], launch)


def test_a_kernel_is_compiled_once(scale: EmulatedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(emulate, "_compile", refuse)
    assert compile_kernel(SOURCE, "scale").library == scale.library
    with pytest.raises(AssertionError):
        compile_kernel(SOURCE + "\n", "scale")


def test_a_read_only_cache_compiles_into_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SPCOMP_CACHE_READ_ONLY", "1")
    kernel = compile_kernel(SOURCE, "scale")
    assert not list(tmp_path.iterdir())
    assert compile_kernel(SOURCE, "scale").library == kernel.library


def test_the_compilers_errors_are_shown_without_our_folders() -> None:
    with pytest.raises(KernelDoesNotCompile) as found:
        compile_kernel('#include "kernel_operator.h"\nvoid k() { Nonsense(); }\n', "k")
    assert str(found.value) == (
        "KernelDoesNotCompile: the kernel 'k' does not compile against the emulator:\n"
        "kernel.cpp:2:12: error: 'Nonsense' was not declared in this scope\n"
        "  help: the emulator has only what the generator may use; "
        "correct the kernel or its template."
    )


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoCompiler, match="needs g\\+\\+"):
        compile_kernel(SOURCE, "scale")


def test_launches_in_several_threads_do_not_meet(scale: EmulatedKernel) -> None:
    results = [np.zeros(4, np.float32) for _ in range(8)]

    def work(number: int) -> None:
        x = np.full(4, number, np.float32)
        for _ in range(50):
            scale.run([Buffer("x", x, True), Buffer("y", results[number]), TILING, 0])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r[0] for r in results] == [2.5 * n for n in range(8)]


def test_faults_release_what_they_held(scale: EmulatedKernel) -> None:
    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    y = Buffer("y", np.zeros(3, np.float32))
    x = Buffer("x", np.ones(4, np.float32), True)
    for count in (20, 200):
        gc.collect()
        before = memory()
        for _ in range(count):
            with pytest.raises(EmulatorFault):
                scale.run([x, y, TILING, 0], Launch(blocks=4))
    assert memory() - before < 2000  # pages


def test_the_headers_give_no_warning(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cpp"
    source.write_text(f'{SOURCE}\n#include "host.h"\nSPCOMP_EMULATED_ENTRY(scale)\n')
    compiler = shutil.which("g++")
    assert compiler
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-c"]
    command += [f"-I{emulate.HEADERS}", str(source), "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"no header")])
def test_headers_compiled_once_are_a_help_and_no_need(
    harm: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path))
    source = 'extern "C" __global__ __aicore__ void k(GM_ADDR) {}\n'
    first = compile_kernel(f'#include "kernel_operator.h"\n{source}', "k")
    folder = tmp_path / "built" / "ascendc-emulator"
    (compiled,) = folder.glob("*.h.gch")
    assert first.library.parent == folder
    harm(compiled)
    second = compile_kernel(f'#include "kernel_operator.h"\n{source}// another\n', "k")
    assert second.library != first.library
    assert not second.run([Buffer("x", np.zeros(1, np.float32))]).warnings
    assert list((tmp_path / "staging").iterdir()) == []
