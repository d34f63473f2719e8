"""The meaning of a plan: its launches interpreted in plain torch, over real buffers.

It shows what every kernel has to write into every buffer, so passes and kernels are checked against
it. Buffers start as NaN or `UNWRITTEN`, so that reading what no launch wrote shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spcomp.backends.reference import plan_attend, plan_lists, plan_maps
from spcomp.backends.reference.attending import Result
from spcomp.backends.reference.pattern import LOGITS_AT_ONCE
from spcomp.backends.reference.slab import Slab
from spcomp.ir import dims
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
from spcomp.ir.plan import Launch, Plan, Slabs

RUNNERS: Mapping[type[Launch], Callable[[Any, Slab], None]] = {
    PoolLaunch: plan_lists.run_pool,
    ScoreLaunch: plan_lists.run_score,
    TopKLaunch: plan_lists.run_topk,
    SelectLaunch: plan_lists.run_select,
    PartsLaunch: plan_maps.run_parts,
    RowLseLaunch: plan_maps.run_row_lse,
    BlockSumsLaunch: plan_maps.run_block_sums,
    BlockScoresLaunch: plan_maps.run_block_scores,
    TopPLaunch: plan_maps.run_topp,
    TilesLaunch: plan_lists.run_tiles,
    InvertLaunch: plan_lists.run_invert,
    AttendLaunch: plan_attend.run_attend,
    WarpsLaunch: plan_attend.run_attend,
    GatherLaunch: plan_attend.run_gather,
    KeysLaunch: plan_attend.run_keys,
    MergeLaunch: plan_attend.run_merge,
}


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The buffers after the launches of one slab: rows [begin, begin + rows) of the call."""

    begin: int
    rows: int
    buffers: Mapping[str, Tensor]


def env_of(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Give the symbols of a call from its q, k, v and what it brings beside them."""
    env = _lengths(tensors)
    for buffer in plan.buffers:
        if buffer.kind == "input":
            dims.bind(buffer.dims, tensors[buffer.name].shape, env)
    return env


def _lengths(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    q, k, v = (tensors[n] for n in ("q", "k", "v"))
    return {
        "B": int(q.shape[0]),
        "Hq": int(q.shape[1]),
        "Hkv": int(k.shape[1]),
        "Sq": int(q.shape[2]),
        "Skv": int(k.shape[2]),
        "D": int(q.shape[3]),
        "Dv": int(v.shape[3]),
    }


def run_plan(
    plan: Plan,
    inputs: Mapping[str, Tensor],
    *,
    slab_rows: int | None = None,
    kept: Mapping[str, Tensor] | None = None,
    trace: list[Trace] | None = None,
) -> Result:
    """Run a plan.

    inputs: q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv] and the captured tables by buffer name.
    slab_rows: query rows of a slab, rounded up to the plan's alignment (default: what keeps the
    logits of a slab near 128 MiB). kept: state buffers by `Buffer.state`, read instead of being
    pooled. trace: collects the buffers of each slab.
    Returns: out [B,Hq,Sq,Dv] in q's dtype, lse [B,Hq,Sq] float32 (float64 for float64), natural
    log.
    """
    env = env_of(plan, inputs)
    rows = _rows(plan, env, slab_rows)
    whole = Slab(plan, dict(inputs), {**env, "R": min(rows, env["Sq"]), "R0": 0})
    _allocate(whole, (b.name for b in plan.buffers if b.kind == "output"), {})
    _allocate(whole, (b.name for b in plan.scratch() if not _per_slab(plan, b.name)), kept or {})
    for step in plan.steps:
        if isinstance(step, Slabs):
            for begin in range(0, env["Sq"], rows):
                _run_slab(step, whole, begin, min(rows, env["Sq"] - begin), trace)
        elif not _is_kept(step, plan, kept or {}):
            RUNNERS[type(step)](step, whole)
    return whole.tensors[plan.out], whole.tensors[plan.lse]


def _rows(plan: Plan, env: Mapping[str, int], wanted: int | None) -> int:
    align = max((s.align for s in plan.steps if isinstance(s, Slabs)), default=1)
    most = wanted or max(1, LOGITS_AT_ONCE // (env["B"] * env["Hq"] * max(env["Skv"], 1)))
    return min(-(-most // align), -(-env["Sq"] // align)) * align


def _per_slab(plan: Plan, name: str) -> bool:
    return any(dims.symbols_of(d) & {"R", "R0"} for d in plan.buffer(name).dims)


def _allocate(slab: Slab, names: Iterable[str], kept: Mapping[str, Tensor]) -> None:
    for name in names:
        buffer = slab.plan.buffer(name)
        if buffer.state and buffer.state in kept:
            units = slab.number(buffer.dims[2])
            slab.tensors[name] = kept[buffer.state][:, :, :units]
        else:
            slab.tensors[name] = slab.allocate(buffer)


def _is_kept(launch: Launch, plan: Plan, kept: Mapping[str, Tensor]) -> bool:
    return isinstance(launch, PoolLaunch) and plan.buffer(launch.out_buf).state in kept


def _run_slab(step: Slabs, whole: Slab, begin: int, rows: int, trace: list[Trace] | None) -> None:
    plan = whole.plan
    slab = Slab(plan, dict(whole.tensors), {**whole.env, "R": rows, "R0": begin})
    _allocate(slab, (b.name for b in plan.scratch() if _per_slab(plan, b.name)), {})
    for launch in step.launches:
        RUNNERS[type(launch)](launch, slab)
    if trace is not None:
        trace.append(Trace(begin, rows, slab.tensors))
