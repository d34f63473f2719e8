"""Every head dimension and unit that is not refused has tiles that fit on chip."""

from __future__ import annotations

from itertools import product

import pytest

from spcomp.backends.ascendc.contexts.attend_gather import (
    AttendGatherContext,
    attend_gather_context,
)
from spcomp.backends.ascendc.contexts.pool import PoolKind, pool_context
from spcomp.backends.ascendc.contexts.score import score_context
from spcomp.backends.ascendc.contexts.topk import topk_context

DIMS = range(16, 257, 16)
UNITS = (16, 32, 48, 64, 80, 112, 128, 144, 192, 256, 272, 512, 1008, 1024, 4096)
BYTES = {"L1": 524032, "L0A": 65536, "L0B": 65536, "L0C": 131072, "UB": 188160}
NAMED = {"name": "n", "struct": "s", "tiling_header": "t", "header": ()}


def attend_bytes(made: AttendGatherContext) -> dict[str, int]:
    """Add up what the kernel allocates: two slots of keys and values, halves of L0, and UB."""
    d, dv, rows, chunk = made.head_dim, made.value_dim, made.tile_rows, made.chunk
    half = rows // 2
    of_rows = 4 * 4 * 64 + 32 + 4 * 4 * 8 * half
    return {
        "L1": 2 * (rows * d + rows * chunk + 2 * chunk * d + 2 * chunk * dv),
        "L0A": 2 * (rows * d + rows * chunk),
        "L0B": 2 * (chunk * d + chunk * dv),
        "L0C": 4 * (rows * chunk + rows * dv),
        "UB": half * (2 * 4 * chunk + 2 * chunk + 2 * 4 * dv + 2 * dv) + of_rows,
    }


def test_tiles_of_attend_gather_fit() -> None:
    for d, dv, unit in product(DIMS, DIMS, UNITS):
        made = attend_gather_context(
            **NAMED, dtype="float16", head_dim=d, value_dim=dv, unit=unit, granule=1
        )
        assert made.chunk % 16 == 0
        assert (made.pieces - 1) * made.chunk < unit <= made.pieces * made.chunk
        for memory, used in attend_bytes(made).items():
            assert used <= BYTES[memory], (d, dv, unit, memory)


def test_tiles_of_score_fit() -> None:
    for d in DIMS:
        made = score_context(
            **NAMED, dtype="float16", head_dim=d, heads="query", reduce="mean", scale="1.0f",
            granule=1, visible=(),
        )  # fmt: skip
        rows, units, slots = made.tile_rows, made.unit_tile, made.slots
        used = {
            "L1": 2 * d * (rows + slots * units),
            "L0A": 2 * d * rows,
            "L0B": 2 * d * slots * units,
            "L0C": 4 * rows * units * slots,
            "UB": 4 * rows * units * slots,
        }
        assert all(used[memory] <= BYTES[memory] for memory in used), (d, used)


@pytest.mark.parametrize("by", ["mean", "max", "min"])
def test_tiles_of_pool_fit(by: PoolKind) -> None:
    for d, block, stride in product(DIMS, (1, 3, *UNITS), (1, 8, 16, 64, 100, 1024, 4096)):
        made = pool_context(**NAMED, dtype="float16", by=by, head_dim=d, block=block, stride=stride)
        # The fold of a part leaves room for the row of the parts before.
        rows = made.part + 1 if made.is_split else made.block
        floats = made.units * rows * d + (made.units * d if by == "mean" else 0)
        assert 2 * 2 * (made.span + made.units) * d + 4 * floats == made.ub_bytes
        assert made.ub_bytes <= BYTES["UB"], (d, block, stride)


def test_tiles_of_topk_fit() -> None:
    made = topk_context(header=(), name="n", tiling_header="t", struct="s")
    assert made.ub_bytes <= BYTES["UB"]
