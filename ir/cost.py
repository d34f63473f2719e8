"""What a plan costs, as formulas: FLOPs, bytes and scratch of every launch, and time on a target's roofline.

The symbols are those of `ir/dims.py` and E, the bytes of one element of q, k and v. Formulas are for a whole call, all slabs
together. They bound from above what the data decides: a list is taken to be full, and a tile to be computed
wherever a row can see one of its keys.

| figure | meaning |
|---|---|
| flops | multiplications and additions of matrix products and of pooling; comparisons and exp are not counted |
| floor_bytes | every buffer moved once between memory and chip: nobody can do with less |
| l2_bytes | what programs ask of the level-2 cache: a tile counts once for each program that reads it |
| scratch_bytes | buffers the launch writes that are neither input nor result |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import sympy

from spcomp.ir import dims
from spcomp.ir.dims import Dim, Env
from spcomp.ir.launches import (
    AttendLaunch,
    GatherLaunch,
    InvertLaunch,
    KeysLaunch,
    PoolLaunch,
    ScoreLaunch,
    SelectLaunch,
    TilesLaunch,
    TopKLaunch,
)
from spcomp.ir.passes.place_buffers import E, bytes_of
from spcomp.ir.plan import Launch, Plan
from spcomp.ir.plan_rules import base
from spcomp.ir.target import Target
from spcomp.ir.widths import Reach, reach_of

RANKING_PASSES = 34  # a row of keys is written once, counted against 32 thresholds, and compacted
LSE_BYTES = 4
Attending: TypeAlias = AttendLaunch | GatherLaunch | KeysLaunch


@dataclass(frozen=True, slots=True)
class Cost:
    """The formulas of one launch, or of several together."""

    kernel: str
    flops: Dim
    floor_bytes: Dim
    l2_bytes: Dim
    scratch_bytes: Dim


@dataclass(frozen=True, slots=True)
class Figures:
    """A cost evaluated for one shape."""

    kernel: str
    flops: int
    floor_bytes: int
    l2_bytes: int
    scratch_bytes: int


def evaluate(cost: Cost, env: Env) -> Figures:
    """Evaluate formulas. env: B, Hq, Hkv, Sq, Skv, D, Dv, and E (bytes of an element)."""
    numbers = {f.name: dims.evaluate(getattr(cost, f.name), env) for f in fields(cost)[1:]}
    return Figures(cost.kernel, **numbers)


def costs_of(plan: Plan) -> tuple[Cost, ...]:
    """Give the cost of each launch of a plan, in order."""
    return tuple(_cost(plan, launch) for launch in plan.launches())


def total(costs: tuple[Cost, ...], name: str = "total") -> Cost:
    """Add costs up; scratch too, as if no buffer shared its place with another."""

    def summed(figure: str) -> Dim:
        return dims.plain(sympy.Add(*(getattr(c, figure) for c in costs)))

    return Cost(name, *(summed(f.name) for f in fields(Cost)[1:]))


def roofline_ms(figures: Figures, target: Target, dtype: str, launches: int = 1) -> float:
    """Give the least time a target can take, in ms: its slowest of compute, memory and L2, and the launches' own cost."""
    compute_s = figures.flops / (target.rate(dtype) * 1e12)
    memory_s = figures.floor_bytes / (target.bandwidth_tbs * 1e12)
    cache_s = figures.l2_bytes / (target.l2_tbs * 1e12)
    return max(compute_s, memory_s, cache_s) * 1e3 + launches * target.launch_us * 1e-3


# ---- pairs ---------------------------------------------------------------------------------------


def pairs_within(width: Dim | None, causal: bool) -> Dim:
    """Count the (query, key) pairs of one head when a row sees at most `width` keys (None: all).

    Causal rows see no later key: the row at position t sees min(width, t + 1).
    """
    if not causal:
        return dims.plain(dims.Sq * (dims.Skv if width is None else dims.least(width, dims.Skv)))
    return dims.plain(
        _triangle(dims.Skv, width) - _triangle(dims.largest(0, dims.Skv - dims.Sq), width)
    )


def _triangle(rows: Dim, width: Dim | None) -> Dim:
    """Sum min(width, t + 1) over the positions t below `rows`."""
    early = rows if width is None else dims.least(rows, width)
    rising = early * (early + 1) / 2 if not isinstance(early, int) else early * (early + 1) // 2
    return rising if width is None else rising + width * (rows - early)


def dense_cost(causal: bool = True) -> Cost:
    """Give the cost of dense attention, the yardstick: one launch, nothing materialised."""
    pairs = pairs_within(None, causal)
    q_rows, kv_rows = dims.B * dims.Hq * dims.Sq, dims.B * dims.Hkv * dims.Skv
    results = q_rows * (dims.Dv * E + LSE_BYTES)
    floor = q_rows * dims.D * E + kv_rows * (dims.D + dims.Dv) * E + results
    return Cost("dense", _attend_flops(pairs), floor, floor, 0)


def visited_pairs(plan: Plan) -> Dim:
    """Bound the (query, key) pairs that the attend launches of a plan compute, for one batch item and head."""
    found: Dim = 0
    for launch in plan.launches():
        if isinstance(launch, (AttendLaunch, GatherLaunch, KeysLaunch)):
            found = found + _pairs(plan, launch)
    return dims.plain(found)


def reach(plan: Plan, launch: Attending) -> Reach:
    """Bound the keys a row sees in an attend launch: its rule, and the list it walks."""
    lists = _walked(plan, launch)
    if isinstance(lists, TilesLaunch):
        named = zip(lists.list_bufs, lists.leaves, strict=True)
        widths = {
            f"chosen{n}": _width(plan, buffer) * leaf.unit for n, (buffer, leaf) in enumerate(named)
        }
        return reach_of(lists.predicate, widths)
    rule = reach_of(launch.rule.predicate, {})
    listed = dims.plain(_width(plan, lists) * _unit(launch))
    width = listed if rule.width is None else dims.least(listed, rule.width)
    return Reach(width, rule.upper, rule.lower)


def _walked(plan: Plan, launch: Attending) -> TilesLaunch | str:
    """Give the tile list a launch walks, or the buffer of the selection's own list."""
    if isinstance(launch, KeysLaunch):
        for other in plan.launches():
            if isinstance(other, InvertLaunch) and other.entries_buf == launch.entries_buf:
                return other.list_buf
        raise AssertionError(f"no launch fills {launch.entries_buf}")
    walked = launch.tiles_buf if isinstance(launch, AttendLaunch) else launch.list_buf
    for other in plan.launches():
        if isinstance(other, TilesLaunch) and other.tiles_buf == walked:
            return other
    return walked


def _unit(launch: Attending) -> int:
    return launch.axis("block_k") if isinstance(launch, AttendLaunch) else launch.unit


def _width(plan: Plan, list_buf: str) -> Dim:
    return plan.buffer(list_buf).dims[3]


def _pairs(plan: Plan, launch: Attending) -> Dim:
    found = reach(plan, launch)
    width = None if found.width is None else dims.least(found.width, dims.Skv)
    return pairs_within(width, found.is_causal)


# ---- launches ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    """What one launch computes and moves, where that is not each of its buffers once.

    `least` bounds the bytes of a buffer that must be read at all, `asked` gives those that programs ask of the L2 cache.
    """

    flops: Dim = 0
    least: Mapping[str, Dim] = field(default_factory=dict)
    asked: Mapping[str, Dim] = field(default_factory=dict)


def _cost(plan: Plan, launch: Launch) -> Cost:
    work = _WORK.get(type(launch), lambda *_: _Work())(plan, launch)
    written = set(launch.writes())
    floor: list[Dim] = []
    asked: list[Dim] = []
    scratch: list[Dim] = []
    for name in dict.fromkeys((*launch.reads(), *launch.writes())):
        once = _bytes(plan, name)
        floor.append(dims.least(once, work.least[name]) if name in work.least else once)
        asked.append(work.asked.get(name, once))
        if name in written and plan.buffer(base(name)).kind == "scratch":
            scratch.append(once)
    sums = (dims.plain(sympy.Add(*parts)) for parts in ([work.flops], floor, asked, scratch))
    return Cost(launch.kernel, *sums)


def _bytes(plan: Plan, name: str) -> Dim:
    """Give the bytes of a buffer over the whole call; of one part when the name is that of a part of a stack."""
    buffer = plan.buffer(base(name))
    size = whole_call(bytes_of(buffer))
    return size / buffer.dims[0] if base(name) != name else size


def whole_call(dim: Dim) -> Dim:
    """Give a dim of a slab for the slab that is the whole call, R = Sq and R0 = 0."""
    return dim if isinstance(dim, int) else dims.plain(_of_whole_call(dim))


def _of_whole_call(e: sympy.Expr) -> sympy.Expr:
    if e == dims.R:
        return dims.Sq
    if e == dims.R0:
        return sympy.Integer(0)
    if not e.args:
        return e
    args = [_of_whole_call(a) for a in e.args]
    # See `dims.least`: sympy's own evaluation of Min and Max drops arguments it must not drop.
    return e.func(*args, evaluate=False) if isinstance(e, (sympy.Min, sympy.Max)) else e.func(*args)


def _attend_flops(pairs: Dim) -> Dim:
    return 2 * dims.B * dims.Hq * pairs * (dims.D + dims.Dv)


def _pool(plan: Plan, launch: PoolLaunch) -> _Work:
    size: Dim = 2 if launch.by == "minmax" else 1
    for dim in plan.buffer(launch.x_buf).dims:
        size = size * dim
    return _Work(size)


def _ranked(plan: Plan, launch: SelectLaunch | ScoreLaunch) -> _Work:
    """Score every unit for every row of every query head; heads that share a list are scored one by one."""
    made = launch.indices_buf if isinstance(launch, SelectLaunch) else launch.scores_buf
    rows = whole_call(plan.buffer(made).dims[2])
    units = plan.buffer(launch.units_buf).dims[2]
    products = 2 if launch.low_buf else 1
    flops = 2 * products * dims.B * dims.Hq * rows * units * dims.D
    tiles = dims.ceildiv(rows, launch.axis("block_r"))
    reread = dims.B * dims.Hq * tiles * units * dims.D * E
    asked: dict[str, Dim] = {launch.units_buf: reread}
    if launch.low_buf:
        asked[launch.low_buf] = reread
    if isinstance(launch, SelectLaunch):
        asked[launch.keys_buf] = RANKING_PASSES * _bytes(plan, launch.keys_buf)
    else:
        steps = dims.ceildiv(units, launch.axis("block_u"))
        asked[launch.rows_buf] = steps * _bytes(plan, launch.rows_buf)
    return _Work(flops, asked=asked)


def _topk(plan: Plan, launch: TopKLaunch) -> _Work:
    """Rank rows of scores; a row longer than a program holds is read once for every threshold."""
    units = plan.buffer(launch.scores_buf).dims[3]
    longer = dims.least(1, dims.ceildiv(units, launch.axis("block_u")) - 1)
    passes = 1 + (RANKING_PASSES - 2) * longer
    return _Work(asked={launch.scores_buf: passes * _bytes(plan, launch.scores_buf)})


def _attend(plan: Plan, launch: AttendLaunch) -> _Work:
    pairs = _pairs(plan, launch)
    heads = plan.buffer(launch.tiles_buf).dims[1]
    rows = launch.axis("block_q")
    reads = dims.B * dims.Hq * pairs / dims.least(rows, dims.Sq)
    return _keyed(plan, launch, pairs, reads, _list_rows(heads, rows))


def _gather(plan: Plan, launch: GatherLaunch) -> _Work:
    pairs = _pairs(plan, launch)
    heads = plan.buffer(launch.list_buf).dims[1]
    per_program: Dim = 1 if heads == dims.Hq else dims.G
    tiles = dims.ceildiv(launch.granule * per_program, launch.axis("block_m"))
    per_list_row = pairs * dims.ceildiv(dims.Sq, launch.granule) / dims.Sq
    reads = dims.B * dims.Hq / per_program * tiles * per_list_row
    return _keyed(plan, launch, pairs, reads, _list_rows(heads, launch.granule))


def _keys(plan: Plan, launch: KeysLaunch) -> _Work:
    pairs = _pairs(plan, launch)
    heads = plan.buffer(launch.entries_buf).dims[1]
    per_program: Dim = 1 if heads == dims.Hq else dims.G
    every_unit = dims.B * dims.Hq / per_program * dims.Skv
    reads = dims.B * dims.Hq * pairs / launch.axis("block_m") + every_unit
    work = _keyed(plan, launch, pairs, reads, _list_rows(heads, 1))
    q_reads = dims.B * dims.Hq * pairs / launch.unit * dims.D * E
    return replace(work, asked={**work.asked, launch.q_buf: q_reads})


def _list_rows(heads: Dim, granule: int) -> Dim:
    """Count the rows of keys that the KV heads are read for."""
    of_heads = dims.Hq if heads == dims.Hq else dims.Hkv
    return dims.B * of_heads * dims.ceildiv(dims.Sq, granule)


def _keyed(plan: Plan, launch: Attending, pairs: Dim, reads: Dim, list_rows: Dim) -> _Work:
    """Give the work of an attend-like launch.

    reads: keys that programs load; list_rows: rows of keys, each of the row's reach, that must come from memory at least
    once when no two of them share a key.
    """
    width = reach(plan, launch).width
    least: dict[str, Dim] = {}
    asked: dict[str, Dim] = {}
    for name, dim in ((launch.k_buf, dims.D), (launch.v_buf, dims.Dv)):
        asked[name] = reads * dim * E
        if width is not None:
            least[name] = list_rows * width * dim * E
    return _Work(_attend_flops(pairs), least, asked)


_WORK: dict[type[Launch], Callable[[Plan, Any], _Work]] = {
    PoolLaunch: _pool,
    SelectLaunch: _ranked,
    ScoreLaunch: _ranked,
    TopKLaunch: _topk,
    AttendLaunch: _attend,
    GatherLaunch: _gather,
    KeysLaunch: _keys,
}
