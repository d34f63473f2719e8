"""The target of the reference backend and the schedule axes of its plans.

The axes shape buffers (rows of a tile, keys of a tile, programs of a split) and change no result.
They are those a plan or its cost formulas read; there is no axis for what only a kernel has, such
as warps.
"""

from __future__ import annotations

from spcomp.ir.schedule import frozen
from spcomp.ir.target import Target

AXES = frozen(
    {
        "attend": {"block_q": 64, "block_k": 64},
        "attend_gather": {"block_m": 16, "block_k": 64, "programs": 4, "max_splits": 4},
        "attend_keys": {"block_m": 64, "block_k": 64},
        "block_scores": {"block_r": 16, "block_n": 16},
        "block_sums": {"block_r": 8, "block_n": 128},
        "invert_count": {"rows": 128},
        "invert_fill": {"rows": 128},
        "invert_scan": {},
        "merge": {},
        "part_lse": {"block_r": 16, "block_u": 64, "part": 16, "tiles": 1},
        "pool": {"unit_tile": 1, "token_tile": 64},
        "row_lse": {"block_r": 8, "block_n": 128},
        "score": {"block_u": 64},
        "select": {"block_r": 16, "block_u": 64},
        "tiles": {},
        "topk": {"block_u": 1024},
        "topp": {"block_u": 1024},
    }
)

TORCH = Target(
    name="torch",
    title="plain torch",
    backend="reference",
    arch="torch",
    warp_size=1,
    multiprocessors=1,
    shared_bytes=1 << 40,
    registers=1 << 20,
    tflops=(("float32", 0.1), ("float64", 0.05)),
    bandwidth_tbs=0.02,
    l2_tbs=0.1,
)
"""Rates of a common desktop processor; predictions for it are no measurement."""
