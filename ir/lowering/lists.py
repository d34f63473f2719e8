"""Lists: the launches that make the indices of a TopK, or the buffers of a list the user gave."""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.errors import CannotLower, ShapeMismatch
from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.launches import ScoreLaunch, ScoreRule, SelectLaunch, TopKLaunch, TopPLaunch
from spcomp.ir.lowering.builder import PlanBuilder, rows_of
from spcomp.ir.lowering.maps import lower_map, need_kernels
from spcomp.ir.lowering.sides import Pooled, pooled, unit_rules
from spcomp.ir.lowering.unmade import refuse_unmade_list
from spcomp.ir.nodes import Argument, Captured, Fold, Given, Local, Node, Score, Sink, TopK, TopP
from spcomp.ir.passes.check_selection import straddle
from spcomp.ir.types import list_heads
from spcomp.ir.units import (
    Units,
    rows_ranking,
    score_below,
    units_of,
    units_ranked,
)


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


def lower_list(plan: PlanBuilder, selection: Node) -> ListRef:
    """Give the list of a TopK, a TopP or a Given, adding its launches once."""
    if selection not in plan.made:
        refuse_unmade_list(selection)
        assert isinstance(selection, (Given, TopK, TopP)), selection
        plan.made[selection] = (
            _given(plan, selection) if isinstance(selection, Given) else _chosen(plan, selection)
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


def _whose(plan: PlanBuilder, heads: Dim) -> Dim:
    """Give the heads of a list as Hkv where there are as many, so that query heads can share it."""
    hq, hkv = plan.heads
    return dims.Hkv if heads == hkv != hq else heads


def _chosen(plan: PlanBuilder, node: TopK | TopP) -> ListRef:
    scores = node.scores
    rows, units = rows_ranking(scores), units_ranked(scores)
    granule, count = rows.stride, units.count(dims.Skv)
    heads = list_heads(scores)
    plan.rows_multiple_of(granule)
    width = count
    if isinstance(node, TopK):
        forced = sum(a.count for a in node.always if isinstance(a, (Sink, Local)))
        width = dims.least(dims.largest(node.k, forced) + straddle(node), count)
    shape = (dims.B, heads, rows_of(granule))
    indices = plan.scratch("indices", (*shape, width), "int32")
    counts = plan.scratch("counts", shape, "int32")
    if isinstance(node, TopP):
        _share(plan, node, (indices, counts), (*shape, count))
    elif isinstance(scores, Score) and not isinstance(scores.k, Fold):
        q, k = pooled(plan, scores.q), pooled(plan, scores.k)
        weights = scores.weights.name if isinstance(scores.weights, Argument) else ""
        rule = _rule(node, scores, units)
        _choose(plan, node, rule, (q, k), weights, (indices, counts), (*shape, count), width)
    else:
        made = lower_map(plan, scores, node.always, (*shape, count), marks_forced=True)
        _best(plan, node, made, (indices, counts), width)
    return ListRef(indices, counts, dims.B, heads, granule, units.stride, width, count)


def _share(
    plan: PlanBuilder, node: TopP, kept: tuple[str, str], scored: tuple[Dim, Dim, Dim, Dim]
) -> None:
    """Add the launches of a list as long as a share needs. Forced units keep their scores, which
    count in the share, so the launch that keeps is told which they are."""
    need_kernels(plan, node, "topp")
    table = node.p_by_head
    if isinstance(table, Captured):
        _check_heads(plan, table, scored[1])
    scores = lower_map(plan, node.scores, node.always, scored, marks_forced=False)
    causal = score_below(node.scores).causal
    _, forced = unit_rules(node.always, units_ranked(node.scores), causal)
    plan.each_slab.append(
        TopPLaunch(
            stages=("topp",),
            axes=plan.axes("topp"),
            scores_buf=scores,
            indices_buf=kept[0],
            counts_buf=kept[1],
            share_buf=plan.captured(table) if isinstance(table, Captured) else "",
            p=node.p or 0.0,
            crossing=node.crossing,
            least=node.least,
            granule=rows_ranking(node.scores).stride,
            forced=forced,
            width=scored[3],
        )
    )


def _check_heads(plan: PlanBuilder, table: Captured, heads: Dim) -> None:
    """Refuse a table of shares with another number of heads than the list has."""
    have = {1: 1, dims.Hq: plan.heads[0], dims.Hkv: plan.heads[1]}[heads]
    if have and table.dims[0] != have:
        raise ShapeMismatch(
            where=table.where,
            left=f"topp's p of shape [{table.dims[0]}]",
            right=f"a list of {have} heads",
            problem=f"{table.dims[0]} numbers for {have} heads",
            way_out="give one number for each head of the list.",
        )


def _best(plan: PlanBuilder, node: TopK, scores: str, kept: tuple[str, str], width: Dim) -> None:
    plan.each_slab.append(
        TopKLaunch(
            stages=("topk",),
            axes=plan.axes("topk"),
            scores_buf=scores,
            indices_buf=kept[0],
            counts_buf=kept[1],
            k=node.k,
            width=width,
        )
    )


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
        _best(plan, node, scores, (indices, counts), width)
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


def _rule(node: TopK, scores: Score, units: Units) -> ScoreRule:
    visible, forced = unit_rules(node.always, units, scores.causal)
    return ScoreRule(
        heads=scores.heads,
        reduce=scores.reduce,
        scale=scores.scale,
        granule=units_of(scores.q).stride,
        visible=visible,
        forced=forced,
        activation=scores.activation,
    )
