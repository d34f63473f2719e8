"""From a launch to kernel arguments: which buffer each pointer and stride is of, counts, the grid.

A binding is made once a launch. Its functions read layouts and evaluate small integer formulas,
once for each new shape of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from spcomp.backends.triton.bind_attend import (
    bind_attend,
    bind_attend_ws,
    bind_gather,
    bind_keys,
    bind_merge,
)
from spcomp.backends.triton.bind_lists import (
    bind_invert,
    bind_pool,
    bind_score,
    bind_select,
    bind_tiles,
    bind_topk,
)
from spcomp.backends.triton.bind_maps import (
    bind_block_scores,
    bind_block_sums,
    bind_parts,
    bind_row_lse,
    bind_topp,
)
from spcomp.backends.triton.layouts import Binding
from spcomp.ir.launches import (
    AttendLaunch,
    BlockScoresLaunch,
    BlockSumsLaunch,
    GatherLaunch,
    InvertLaunch,
    KeysLaunch,
    MergeLaunch,
    PartsLaunch,
    PoolLaunch,
    RowLseLaunch,
    ScoreLaunch,
    SelectLaunch,
    TilesLaunch,
    TopKLaunch,
    TopPLaunch,
    WarpsLaunch,
)
from spcomp.ir.plan import Launch, Plan


def bind(launch: Launch, plan: Plan) -> Binding:
    """Give the binding of a launch; a packed plan's kernels take where sequences begin besides."""
    binding = BINDINGS[type(launch)](launch, plan)
    if not plan.is_packed:
        return binding
    return replace(binding, pointers=(*binding.pointers, *_STARTS))


_STARTS = (("cu_q_ptr", "cu_q"), ("cu_k_ptr", "cu_k"))

BINDINGS: dict[type[Launch], Callable[..., Binding]] = {
    PoolLaunch: bind_pool,
    SelectLaunch: bind_select,
    ScoreLaunch: bind_score,
    TopKLaunch: bind_topk,
    PartsLaunch: bind_parts,
    RowLseLaunch: bind_row_lse,
    BlockSumsLaunch: bind_block_sums,
    BlockScoresLaunch: bind_block_scores,
    TopPLaunch: bind_topp,
    TilesLaunch: bind_tiles,
    AttendLaunch: bind_attend,
    WarpsLaunch: bind_attend_ws,
    GatherLaunch: bind_gather,
    InvertLaunch: bind_invert,
    KeysLaunch: bind_keys,
    MergeLaunch: bind_merge,
}
