"""The kernels this backend has, and the tiles they work in. The lowering reads here what it may
plan with, the cost formulas how often a tile is loaded again.

No tile is a choice: each is the largest that fits on chip beside its double."""

from __future__ import annotations

from spcomp.backends.ascendc.contexts.attend_gather import widest_tile
from spcomp.backends.ascendc.contexts.score import units_of_tile
from spcomp.backends.ascendc.contexts.topk import CHUNK
from spcomp.backends.base import Specialisation
from spcomp.ir.schedule import KernelAxes, frozen


def axes_of(spec: Specialisation) -> KernelAxes:
    """Give the tiles of each kernel: units of a product, lanes of a sort, rows of a product."""
    return frozen(
        {
            "pool": {},
            "score": {"block_u": units_of_tile(spec.head_dim)},
            "topk": {"block_u": CHUNK},
            "attend_gather": {"block_m": widest_tile(spec.head_dim, spec.value_dim)},
        }
    )
