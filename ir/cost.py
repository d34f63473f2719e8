"""What a plan costs: FLOPs, bytes and scratch of every launch as formulas, and its roofline.

The symbols are those of `ir/dims.py` and three more:

| symbol | meaning |
|---|---|
| E | bytes of one element of q, k and v |
| W | keys a query row of the launch sees at most |
| P | (query, key) pairs of the launch for one batch item and query head |

Formulas are for a whole call, all slabs together. They bound from above what the data decides: a
list is taken to be full.

| figure | meaning |
|---|---|
| flops | multiplications and additions of matrix products and pooling; no comparisons, no exp |
| floor_bytes | every buffer moved once between memory and chip: nobody can do with less |
| l2_bytes | what programs ask of the level-2 cache: a tile counts for each program reading it |
| scratch_bytes | buffers the launch writes that are neither input nor result |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import sympy

from spcomp.ir import dims
from spcomp.ir.dims import Dim, Env
from spcomp.ir.expr import TRUE
from spcomp.ir.launches import (
    AttendLaunch,
    BlockScoresLaunch,
    GatherLaunch,
    InvertLaunch,
    KeysLaunch,
    MapRule,
    PartsLaunch,
    PoolLaunch,
    ScoreLaunch,
    SelectLaunch,
    TilesLaunch,
    TopKLaunch,
    TopPLaunch,
    WarpsLaunch,
)
from spcomp.ir.passes.place_buffers import ITEM_BYTES, E, bytes_of, slab_rows
from spcomp.ir.plan import Launch, Plan, Slabs
from spcomp.ir.plan_rules import base
from spcomp.ir.target import Target
from spcomp.ir.widths import Reach, reach_of

W, P = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("W", "P"))
RANKING_PASSES = 34  # a row of keys is written once, counted against 32 thresholds, and compacted
LSE_BYTES = 4
FIGURES = ("flops", "floor_bytes", "l2_bytes", "scratch_bytes")
Attending: TypeAlias = AttendLaunch | GatherLaunch | KeysLaunch


@dataclass(frozen=True, slots=True)
class Cost:
    """The formulas of one launch; `width` and `pairs` define its W and P (pairs may hold W)."""

    kernel: str
    flops: Dim
    floor_bytes: Dim
    l2_bytes: Dim
    scratch_bytes: Dim
    width: Dim = 0
    pairs: Dim = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """A cost evaluated for one shape."""

    kernel: str
    flops: int
    floor_bytes: int
    l2_bytes: int
    scratch_bytes: int
    pairs: int = 0


def evaluate(cost: Cost, env: Env) -> Figures:
    """Evaluate formulas. env: B, Hq, Hkv, Sq, Skv, D, Dv, and E (bytes of an element)."""
    here = {**env, "W": dims.evaluate(cost.width, env)}
    here["P"] = dims.evaluate(cost.pairs, here)
    numbers = {name: dims.evaluate(getattr(cost, name), here) for name in FIGURES}
    return Figures(cost.kernel, pairs=here["P"], **numbers)


def costs_of(plan: Plan) -> tuple[Cost, ...]:
    """Give the cost of each launch of a plan, in order."""
    return tuple(_cost(plan, launch) for launch in plan.launches())


def total(figures: Iterable[Figures], name: str = "total") -> Figures:
    """Add figures up; scratch too, as if no buffer shared its place with another."""
    held = tuple(figures)
    sums = {f: sum(getattr(x, f) for x in held) for f in (*FIGURES, "pairs")}
    return Figures(name, **sums)


def runs_of(plan: Plan, env: Env, element_bytes: int) -> tuple[int, ...]:
    """Give how often a call runs each launch: once, or once a slab; env: B, Hq, Hkv, Sq, Skv, D,
    Dv."""
    slabs = -(-env["Sq"] // slab_rows(plan, env, element_bytes))
    counts: list[int] = []
    for step in plan.steps:
        counts += [slabs] * len(step.launches) if isinstance(step, Slabs) else [1]
    return tuple(counts)


def roofline_ms(figures: Figures, target: Target, dtype: str, launches: int = 1) -> float:
    """Give the least time a target can take, in ms.

    It is the slowest of compute, memory and level-2 cache, and the launches' own cost on top.
    """
    compute_s = figures.flops / (target.rate(dtype) * 1e12)
    memory_s = figures.floor_bytes / (target.bandwidth_tbs * 1e12)
    cache_s = figures.l2_bytes / (target.l2_tbs * 1e12)
    return max(compute_s, memory_s, cache_s) * 1e3 + launches * target.launch_us * 1e-3


# ---- pairs ---------------------------------------------------------------------------------------


def pairs_within(width: Dim, causal: bool) -> Dim:
    """Count the (query, key) pairs of one head when a row sees at most `width` keys, width <= Skv.

    Causal rows see no later key: the row at position t sees min(width, t + 1).
    """
    if not causal:
        return dims.plain(dims.Sq * width)
    before = dims.largest(0, dims.Skv - dims.Sq)
    return dims.plain(
        _triangle(dims.Skv, width, width) - _triangle(before, dims.least(before, width), width)
    )


def _triangle(rows: Dim, rising: Dim, width: Dim) -> Dim:
    """Sum min(width, t + 1) over the positions t < rows; the first `rising` see t + 1 keys."""
    early = sympy.sympify(rising)
    return early * (early + 1) / 2 + width * (rows - early)


def dense_cost(causal: bool = True) -> Cost:
    """Give the cost of dense attention, the yardstick: one launch, nothing materialised."""
    q_rows, kv_rows = dims.B * dims.Hq * dims.Sq, dims.B * dims.Hkv * dims.Skv
    results = q_rows * (dims.Dv * E + LSE_BYTES)
    floor = q_rows * dims.D * E + kv_rows * (dims.D + dims.Dv) * E + results
    return Cost("dense", _attend_flops(), floor, floor, 0, dims.Skv, pairs_within(W, causal))


def visited_pairs(plan: Plan) -> Dim:
    """Bound the pairs that the attend launches of a plan compute, for one batch item and head."""
    found = [replaced(c.pairs, {W: c.width}) for c in costs_of(plan) if c.pairs != 0]
    return dims.plain(sympy.Add(*found))


def replaced(dim: Dim, values: Mapping[sympy.Symbol, Dim]) -> Dim:
    """Replace symbols in a dim, leaving Min and Max as they are."""
    return dim if isinstance(dim, int) else dims.plain(_replaced(dim, values))


def _replaced(e: sympy.Expr, values: Mapping[sympy.Symbol, Dim]) -> sympy.Expr:
    if e in values:
        return sympy.sympify(values[e])
    if not e.args:
        return e
    args = [_replaced(a, values) for a in e.args]
    # See `dims.least`: sympy's own evaluation of Min and Max drops arguments it must not drop.
    return e.func(*args, evaluate=False) if isinstance(e, (sympy.Min, sympy.Max)) else e.func(*args)


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


# ---- launches ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    """What one launch computes and moves, where that is not each of its buffers once.

    `least` bounds the bytes of a buffer that must be read at all, `asked` gives those that programs
    ask of the L2 cache.
    """

    flops: Dim = 0
    least: Mapping[str, Dim] = field(default_factory=dict)
    asked: Mapping[str, Dim] = field(default_factory=dict)
    width: Dim = 0
    pairs: Dim = 0


def _cost(plan: Plan, launch: Launch) -> Cost:
    make = _WORK.get(type(launch))
    work = make(plan, launch) if make else _Work()
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
    moved, reread, made = (dims.plain(sympy.Add(*parts)) for parts in (floor, asked, scratch))
    flops = dims.plain(work.flops)
    return Cost(launch.kernel, flops, moved, reread, made, work.width, work.pairs)


def _bytes(plan: Plan, name: str) -> Dim:
    """Give the bytes of a buffer, or of one part of a stack, over the whole call."""
    buffer = plan.buffer(base(name))
    size = whole_call(bytes_of(buffer))
    return size / buffer.dims[0] if base(name) != name else size


def _item(plan: Plan, name: str) -> Dim:
    return ITEM_BYTES[plan.buffer(name).dtype]


def whole_call(dim: Dim) -> Dim:
    """Give a dim of a slab for the slab that is the whole call, R = Sq and R0 = 0."""
    return replaced(dim, {dims.R: dims.Sq, dims.R0: 0})


def _attend_flops() -> Dim:
    return 2 * dims.B * dims.Hq * P * (dims.D + dims.Dv)


def _pool(plan: Plan, launch: PoolLaunch) -> _Work:
    size: Dim = 2 if launch.by == "minmax" else 1
    for dim in plan.buffer(launch.x_buf).dims:
        size = size * dim
    return _Work(size)


def _passes_over_units(plan: Plan, launch: SelectLaunch | ScoreLaunch, rows: Dim) -> Dim:
    """Give how often all units are read: by a row tile of a query head, or by a row of a list."""
    if isinstance(launch, SelectLaunch):
        heads = plan.buffer(launch.rows_buf).dims[1]
        return dims.B * heads * dims.ceildiv(rows, launch.axis("block_r"))
    return dims.B * plan.buffer(launch.scores_buf).dims[1] * rows


def _ranked(plan: Plan, launch: SelectLaunch | ScoreLaunch) -> _Work:
    """Score every unit for every row of every query head, also where heads share a list."""
    made = launch.indices_buf if isinstance(launch, SelectLaunch) else launch.scores_buf
    rows = whole_call(plan.buffer(made).dims[2])
    units = plan.buffer(launch.units_buf).dims[2]
    products = 2 if launch.low_buf else 1
    _, heads, _, width = plan.buffer(launch.rows_buf).dims
    flops = 2 * products * dims.B * heads * rows * units * width
    reread = _passes_over_units(plan, launch, rows) * units * width * _item(plan, launch.units_buf)
    asked: dict[str, Dim] = {launch.units_buf: reread}
    if launch.low_buf:
        asked[launch.low_buf] = reread
    if isinstance(launch, SelectLaunch):
        asked[launch.keys_buf] = RANKING_PASSES * _bytes(plan, launch.keys_buf)
    else:
        # Query heads of a KV head are scored together, but each row of queries apart.
        asked[launch.rows_buf] = dims.ceildiv(units, launch.axis("block_u")) * _bytes(
            plan, launch.rows_buf
        )
    return _Work(flops, asked=asked)


def _multiplied(launch: PartsLaunch | BlockScoresLaunch, rule: MapRule) -> Dim:
    """Count the multiplications and additions that give a map its logits once. Tiles that no row
    sees are left out; those that are partly seen count by what is seen."""
    rows = dims.ceildiv(dims.Sq, rule.granule)
    products = (2 if launch.low_buf else 1) * rule.size
    return 2 * products * dims.B * dims.Hq * rows * launch.units * dims.D * _seen(rule)


def _seen(rule: MapRule) -> Dim:
    """Give the share of a map that its rows see."""
    return 1 if rule.visible == TRUE else pairs_within(dims.Skv, True) / (dims.Sq * dims.Skv)


def _parts(plan: Plan, launch: PartsLaunch) -> _Work:
    """Multiply once; every step reads its units, and its rows too where they are folded."""
    rule = launch.rule
    flops, seen = _multiplied(launch, rule), _seen(rule)
    rows = dims.ceildiv(whole_call(plan.buffer(launch.parts_buf).dims[2]), launch.axis("block_r"))
    tiles = dims.ceildiv(launch.units, launch.axis("block_u")) if rule.size > 1 else 1
    units = launch.units * rule.size * dims.D * E
    asked = {
        launch.rows_buf: tiles * _bytes(plan, launch.rows_buf) * (seen if rule.size > 1 else 1),
        launch.units_buf: dims.B * dims.Hq * rows * units * seen,
    }
    return _Work(flops, asked=_at_least_once(plan, launch, asked))


def _block_scores(plan: Plan, launch: BlockScoresLaunch) -> _Work:
    """Multiply a unit for each block it touches; every step reads its rows and its units."""
    rule, starting = launch.logits, launch.block // launch.stride
    reach = starting + -(-launch.span // launch.stride) - 1
    flops, seen = _multiplied(launch, rule) * reach / starting, _seen(rule)
    _, _, rows, blocks = (whole_call(d) for d in plan.buffer(launch.scores_buf).dims)
    tiles = dims.ceildiv(blocks, launch.axis("block_n")) * reach
    row_tiles = dims.ceildiv(rows, launch.axis("block_r")) * (launch.rule.granule // rule.granule)
    units = blocks * reach * rule.size * dims.D * E
    asked = {
        launch.rows_buf: tiles * _bytes(plan, launch.rows_buf) * seen,
        launch.units_buf: dims.B * dims.Hq * row_tiles * units * seen,
    }
    return _Work(flops, asked=_at_least_once(plan, launch, asked))


def _at_least_once(
    plan: Plan, launch: PartsLaunch | BlockScoresLaunch, asked: dict[str, Dim]
) -> dict[str, Dim]:
    """Count each side of a map once at least; a pair's smallest values as its largest."""
    if launch.low_buf:
        asked = {**asked, launch.low_buf: asked[launch.units_buf]}
    return {name: dims.largest(_bytes(plan, name), dims.plain(n)) for name, n in asked.items()}


def _topk(plan: Plan, launch: TopKLaunch | TopPLaunch) -> _Work:
    """Rank rows of scores; a row longer than a program holds is read once for every threshold."""
    units = plan.buffer(launch.scores_buf).dims[3]
    longer = dims.least(1, dims.ceildiv(units, launch.axis("block_u")) - 1)
    passes = 1 + (RANKING_PASSES - 2) * longer
    return _Work(asked={launch.scores_buf: passes * _bytes(plan, launch.scores_buf)})


def _attend(plan: Plan, launch: AttendLaunch) -> _Work:
    heads = plan.buffer(launch.tiles_buf).dims[1]
    rows = launch.axis("block_q")
    sharing = launch.axis("heads") if isinstance(launch, WarpsLaunch) else 1
    reads = dims.B * dims.Hq * P / (dims.least(rows, dims.Sq) * sharing)
    return _keyed(plan, launch, reads, _list_rows(heads, rows))


def _gather(plan: Plan, launch: GatherLaunch) -> _Work:
    heads = plan.buffer(launch.list_buf).dims[1]
    per_program: Dim = 1 if heads == dims.Hq else dims.G
    rows = dims.least(launch.granule, dims.Sq) if launch.granule > 1 else 1
    tiles = dims.ceildiv(dims.plain(rows * per_program), launch.axis("block_m"))
    reads = dims.B * dims.Hq / per_program * tiles * P / rows
    return _keyed(plan, launch, reads, _list_rows(heads, launch.granule))


def _keys(plan: Plan, launch: KeysLaunch) -> _Work:
    """Each program reads its unit's keys once, also when only few queries chose the unit."""
    heads = plan.buffer(launch.entries_buf).dims[1]
    per_program: Dim = 1 if heads == dims.Hq else dims.G
    every_unit = dims.B * dims.Hq / per_program * launch.keys
    reads = dims.B * dims.Hq * P / launch.axis("block_m") + every_unit
    work = _keyed(plan, launch, reads, _list_rows(heads, 1))
    q_reads = dims.B * dims.Hq * P / launch.unit * dims.D * E
    return replace(work, asked={**work.asked, launch.q_buf: q_reads})


def _list_rows(heads: Dim, granule: int) -> Dim:
    """Count the rows of keys that the KV heads are read for."""
    of_heads = dims.Hq if heads == dims.Hq else dims.Hkv
    return dims.B * of_heads * dims.ceildiv(dims.Sq, granule)


def _keyed(plan: Plan, launch: Attending, reads: Dim, list_rows: Dim) -> _Work:
    """Give the work of an attend-like launch.

    reads: keys that programs load; list_rows: rows of W keys, each of which must come from memory
    at least once when no two of them share a key.
    """
    found = reach(plan, launch)
    width = launch.keys if found.width is None else dims.least(found.width, launch.keys)
    least: dict[str, Dim] = {}
    asked: dict[str, Dim] = {}
    for name, dim in ((launch.k_buf, dims.D), (launch.v_buf, dims.Dv)):
        asked[name] = reads * dim * E
        if found.width is not None:
            least[name] = list_rows * W * dim * E
    return _Work(_attend_flops(), least, asked, width, pairs_within(W, found.is_causal))


_WORK: dict[type[Launch], Callable[[Plan, Any], _Work]] = {
    PoolLaunch: _pool,
    SelectLaunch: _ranked,
    ScoreLaunch: _ranked,
    TopKLaunch: _topk,
    PartsLaunch: _parts,
    BlockScoresLaunch: _block_scores,
    TopPLaunch: _topk,
    AttendLaunch: _attend,
    WarpsLaunch: _attend,
    GatherLaunch: _gather,
    KeysLaunch: _keys,
}
