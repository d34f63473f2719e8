"""The chips the AscendC backend writes kernels for. Rates are public figures of the 910B series,
for the cost model alone; nothing was measured."""

from __future__ import annotations

from spcomp.backends.ascendc.contexts.base import L1_BYTES
from spcomp.ir.target import Target

TARGETS: dict[str, Target] = {
    "ascend910b": Target(
        name="ascend910b",
        title="Ascend 910B (Atlas A2, A3)",
        backend="ascendc",
        arch="dav-2201",
        warp_size=1,
        multiprocessors=24,
        shared_bytes=L1_BYTES,
        registers=0,
        tflops=(("bfloat16", 376.0), ("float16", 376.0), ("float32", 94.0)),
        bandwidth_tbs=1.6,
        l2_tbs=4.0,
        launch_us=5.0,
    )
}
