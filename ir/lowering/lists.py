"""Lists: the launches that make the indices of a TopK, or the buffers of a list the user gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from spcomp.errors import CannotLower
from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.expr import FALSE, TRUE, Expr, Lit, Sym, conjunction, op
from spcomp.ir.launches import PoolLaunch, ScoreLaunch, ScoreRule, SelectLaunch, TopKLaunch
from spcomp.ir.lowering.builder import PlanBuilder, rows_of
from spcomp.ir.nodes import (
    Argument,
    Captured,
    Downsample,
    Given,
    Input,
    Local,
    Node,
    Score,
    Sink,
    State,
    TopK,
    TopP,
)
from spcomp.ir.passes.check_selection import straddle
from spcomp.ir.types import list_heads, source_type
from spcomp.ir.units import Units, position, sums_below, units_of


@dataclass(frozen=True, slots=True)
class ListRef:
    """Buffers of one list and its geometry; `unit` in tokens, `count` units in all."""

    indices: str
    counts: str
    batch: Dim
    heads: Dim
    granule: int
    unit: int
    width: Dim
    count: Dim


@dataclass(frozen=True, slots=True)
class Pooled:
    """Buffers of a tensor in units: itself, or what a PoolLaunch wrote; `low` holds minima."""

    main: str
    low: str


def lower_list(plan: PlanBuilder, selection: Node) -> ListRef:
    """Give the list of a TopK or a Given, adding its launches once."""
    if selection not in plan.made:
        plan.made[selection] = (
            _given(plan, selection) if isinstance(selection, Given) else _topk(plan, selection)
        )
    found = plan.made[selection]
    assert isinstance(found, ListRef)
    return found


def _given(plan: PlanBuilder, node: Given) -> ListRef:
    """Take the user's list; `compile` has put it in the canonical form of indices and counts."""
    assert isinstance(node.tensor, Captured)
    if node.form != "indices" or not isinstance(node.counts, Captured):
        raise CannotLower(
            where=node.where,
            what="a block mask that is not yet a list",
            why="plans read lists",
            way_out="lower it through spcomp.compile, which turns masks into lists.",
        )
    batch, heads, _, width = node.tensor.dims
    plan.rows_multiple_of(node.block_q)
    return ListRef(
        plan.captured(node.tensor),
        plan.captured(node.counts),
        dims.B if batch != 1 else 1,
        _whose(plan, heads),
        node.block_q,
        node.block_k,
        width,
        dims.ceildiv(dims.Skv, node.block_k),
    )


def _refuse(node: Node) -> NoReturn:
    what = type(node).__name__
    if isinstance(node, (TopK, TopP)) and sums_below(node.scores) is not None:
        what = "Sums"
    elif isinstance(node, TopK):
        what = type(node.scores).__name__ if node.k_from is None else "k_from"
    raise CannotLower(
        where=node.where,
        what={
            "Softmax": "a list chosen by probabilities",
            "Regroup": "a list chosen by regrouped scores",
            "TopP": "a list as long as a share of the scores needs",
            "Sums": "a list for all queries, chosen by sums along lines of a map",
            "Diagonals": "a selection of diagonals",
            "Covered": "a cover of diagonals by blocks of keys",
            "Alike": "a choice between selections by what two estimates say",
            "k_from": "a list whose length is not the same for every head",
        }[what],
        why="no kernel makes it yet",
        way_out="use backend='reference'.",
    )


def _whose(plan: PlanBuilder, heads: Dim) -> Dim:
    """Give the heads of a list as Hkv where there are as many, so that query heads can share it."""
    hq, hkv = plan.heads
    return dims.Hkv if heads == hkv != hq else heads


def _topk(plan: PlanBuilder, node: Node) -> ListRef:
    if not (isinstance(node, TopK) and isinstance(node.scores, Score)) or node.k_from is not None:
        _refuse(node)
    scores = node.scores
    rows, units = units_of(scores.q), units_of(scores.k)
    granule, count, heads = rows.stride, units.count(dims.Skv), list_heads(scores)
    plan.rows_multiple_of(granule)
    forced = sum(a.count for a in node.always if isinstance(a, (Sink, Local)))
    width = dims.least(dims.largest(node.k, forced) + straddle(node), count)
    shape = (dims.B, heads, rows_of(granule))
    indices = plan.scratch("indices", (*shape, width), "int32")
    counts = plan.scratch("counts", shape, "int32")
    q, k = pooled(plan, scores.q), pooled(plan, scores.k)
    weights = scores.weights.name if isinstance(scores.weights, Argument) else ""
    rule = _rule(node, scores, units)
    _choose(plan, node, rule, (q, k), weights, (indices, counts), (*shape, count), width)
    return ListRef(indices, counts, dims.B, heads, granule, units.stride, width, count)


def _choose(
    plan: PlanBuilder,
    node: TopK,
    rule: ScoreRule,
    sides: tuple[Pooled, Pooled],
    weights: str,
    kept: tuple[str, str],
    scored: tuple[Dim, ...],
    width: Dim,
) -> None:
    """Add the launches that score and keep: one for many rows, two for the few rows of decode and
    where no kernel does both."""
    q, k = sides
    indices, counts = kept
    if plan.phase == "decode" or not plan.offers("select"):
        scores = plan.scratch("scores", scored, "float32")
        plan.each_slab.append(
            ScoreLaunch(
                stages=("score",),
                axes=plan.axes("score"),
                rows_buf=q.main,
                units_buf=k.main,
                low_buf=k.low,
                weights_buf=weights,
                scores_buf=scores,
                rule=rule,
            )
        )
        plan.each_slab.append(
            TopKLaunch(
                stages=("topk",),
                axes=plan.axes("topk"),
                scores_buf=scores,
                indices_buf=indices,
                counts_buf=counts,
                k=node.k,
                width=width,
            )
        )
        return
    plan.each_slab.append(
        SelectLaunch(
            stages=("score", "topk"),
            axes=plan.axes("select"),
            rows_buf=q.main,
            units_buf=k.main,
            low_buf=k.low,
            weights_buf=weights,
            keys_buf=_keys_buffer(plan, scored[:3], scored[3]),
            indices_buf=indices,
            counts_buf=counts,
            rule=rule,
            k=node.k,
            width=width,
        )
    )


def _keys_buffer(plan: PlanBuilder, shape: tuple[Dim, ...], units: Dim) -> str:
    """Declare the scratch of rows longer than one tile; it has no columns when all rows fit one."""
    block_r, block_u = plan.axis("select", "block_r"), plan.axis("select", "block_u")
    rows = shape[0] * shape[1] * dims.ceildiv(shape[2], block_r) * block_r
    longer = dims.least(
        1, (units - 1) // block_u if isinstance(units, int) else _over(units, block_u)
    )
    return plan.scratch("keys", (rows, units * longer), "int32")


def _over(units: Dim, block: int) -> Dim:
    return dims.ceildiv(units, block) - 1


def pooled(plan: PlanBuilder, side: Node) -> Pooled:
    """Give the buffers of q, k or a downsampled one, adding its pool launch once."""
    if isinstance(side, (Input, Argument)):
        return Pooled(side.name, "")
    if side in plan.made:
        found = plan.made[side]
        assert isinstance(found, Pooled)
        return found
    state = side.name if isinstance(side, State) else ""
    value = side.value if isinstance(side, State) else side
    assert isinstance(value, Downsample), value
    if value.tail == "pad":
        raise CannotLower(
            where=value.where,
            what="pooling a short last unit with zeros",
            why="no kernel does it yet",
            way_out="use backend='reference', or tail='keep'.",
        )
    assert isinstance(value.x, (Input, Argument)), value
    source = source_type(value)
    batch, heads, tokens, width = source.dims
    shape = (batch, heads, units_of(value).count(tokens), width)
    prefix = f"{value.x.name}_{value.by}"
    main = plan.scratch(
        prefix.replace("minmax", "max"), shape, source.dtype, f"{state}.max" if state else ""
    )
    low = ""
    if value.by == "minmax":
        low = plan.scratch(
            prefix.replace("minmax", "min"), shape, source.dtype, f"{state}.min" if state else ""
        )
    launch = PoolLaunch(
        stages=("downsample",),
        axes=plan.axes("pool", **_pool_tile(plan, value.block)),
        x_buf=value.x.name,
        out_buf=main,
        low_buf=low,
        block=value.block,
        stride=value.stride,
        by=value.by,
    )
    plan.once.append(launch)
    plan.made[side] = Pooled(main, low)
    return Pooled(main, low)


def _pool_tile(plan: PlanBuilder, block: int) -> dict[str, int]:
    """Fill a program of short units with several of them."""
    tokens = plan.schedule.of("pool").get("token_tile", 0)
    short = 1 << (block - 1).bit_length()
    if short >= tokens:
        return {}
    return {"token_tile": short, "unit_tile": tokens // short}


def _rule(node: TopK, scores: Score, units: Units) -> ScoreRule:
    """Say which units a row may and must take.

    A unit is a candidate when its last token is visible to the row's last query; a forced unit is
    taken as soon as its first token is, since the query's own unit is seldom complete."""
    unit, newest = Sym("k"), position("q_hi")
    complete: Expr = op("le", units.last(unit), newest) if scores.causal else TRUE
    begun: Expr = op("le", units.first(unit), newest) if scores.causal else TRUE
    forced: Expr = FALSE
    for anchor in node.always:
        forced = op("or", forced, _anchor(anchor, unit, units.stride))
    forced = conjunction(forced, begun)
    return ScoreRule(
        heads=scores.heads,
        reduce=scores.reduce,
        scale=scores.scale,
        granule=units_of(scores.q).stride,
        visible=op("or", complete, forced),
        forced=forced,
        activation=scores.activation,
    )


def _anchor(anchor: Node, unit: Expr, stride: int) -> Expr:
    if isinstance(anchor, Sink):
        return op("lt", unit, Lit(anchor.count))
    assert isinstance(anchor, Local), anchor
    first = op("floordiv", position("q_lo"), Lit(stride))
    last = op("floordiv", position("q_hi"), Lit(stride))
    oldest = op("sub", first, Lit(anchor.count))
    return conjunction(op("gt", unit, oldest), op("le", unit, last))
