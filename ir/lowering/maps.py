"""Maps of scores: the launches that make the block scores of a Softmax, of a Regroup, or of scores
whose share is kept."""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.errors import CannotLower
from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.expr import FALSE, TRUE, Sym, op
from spcomp.ir.launches import (
    BlockScoresLaunch,
    BlockSumsLaunch,
    MapRule,
    PartsLaunch,
    RowLseLaunch,
    ScoreRule,
)
from spcomp.ir.lowering.builder import PlanBuilder, rows_of
from spcomp.ir.lowering.sides import Pooled, pooled, unit_rules
from spcomp.ir.nodes import Argument, Fold, Node, Regroup, Score, Softmax
from spcomp.ir.nodes.score import HeadSharing, Joining, Reduction
from spcomp.ir.types import source_of
from spcomp.ir.units import Units, position, rows_ranking, units_of, units_ranked

PARTS_LEAST = 8
"""Dot products behind a number of a part from which storing parts costs less than multiplying a
second time: 8 of 128 channels take a card as long as 12 bytes of traffic."""

FEW_ROWS = {"block_r": 16, "warps": 4}  # of a tile in decode


@dataclass(frozen=True, slots=True)
class Map:
    """A map of scores taken apart, from the units of keys up to the blocks that are chosen."""

    score: Score
    softmax: Softmax | None
    regroup: Regroup | None

    @property
    def heads(self) -> HeadSharing:
        """Who shares a row of the map."""
        return self.score.heads if self.softmax is None else self.softmax.heads or "query"

    @property
    def reduce(self) -> Reduction:
        """How their values are joined."""
        return self.score.reduce if self.softmax is None else self.softmax.reduce

    @property
    def units(self) -> Units:
        """The units that logits are of."""
        return units_of(self.score.k)

    @property
    def fine(self) -> int:
        """The query rows of a fine row."""
        return units_of(self.score.q).stride

    @property
    def block(self) -> int:
        """The tokens from one block to the next."""
        return self.units.stride if self.regroup is None else self.regroup.block

    @property
    def by(self) -> Joining:
        """How units and fine rows are joined."""
        return "sum" if self.regroup is None else self.regroup.by

    @property
    def part(self) -> int:
        """The units of a block where sums over parts are the block scores, else 0."""
        is_sum = self.by == "sum" and (self.heads == "query" or self.reduce != "max")
        is_tiled = self.units.block == self.units.stride
        if self.softmax is None or not (is_sum and is_tiled):
            return 0
        part = self.block // self.units.stride
        size = self.score.k.size if isinstance(self.score.k, Fold) else 1
        return part if part * size >= PARTS_LEAST else 0


def map_of(node: Node) -> Map:
    """Take a map of scores apart.

    Raises: CannotLower where heads share logits under a softmax.
    """
    regroup = node if isinstance(node, Regroup) else None
    inner = node if regroup is None else regroup.scores
    softmax = inner if isinstance(inner, Softmax) else None
    score = inner if softmax is None else softmax.scores
    assert isinstance(score, Score), score
    over = None if softmax is None else softmax.over
    for below in (score, over):
        if softmax is not None and isinstance(below, Score) and below.heads != "query":
            raise CannotLower(
                where=below.where,
                what=f"probabilities of scores with heads='{below.heads}'",
                why="the kernels make probabilities head by head",
                way_out="leave score(heads='query') and join with softmax(heads=...), or use "
                "backend='reference'.",
            )
    return Map(score, softmax, regroup)


def need_kernels(plan: PlanBuilder, node: Node, *kernels: str) -> None:
    """Refuse what a backend has no kernels for.

    Raises: CannotLower.
    """
    lacking = [name for name in kernels if not plan.offers(name)]
    if lacking:
        raise CannotLower(
            where=node.where,
            what=_WHAT[type(node).__name__],
            why=f"this backend has no kernel {', '.join(lacking)}",
            way_out="use another backend, such as backend='reference'.",
        )


_WHAT = {
    "Score": "a share of scores",
    "Softmax": "a list chosen by probabilities",
    "Regroup": "a list chosen by regrouped scores",
    "TopP": "a list as long as a share of the scores needs",
}


def lower_map(
    plan: PlanBuilder,
    node: Node,
    always: tuple[Node, ...],
    shape: tuple[Dim, Dim, Dim, Dim],
    *,
    marks_forced: bool,
) -> str:
    """Add the launches of a map and give the buffer of its block scores, of shape
    [B,Hl,rows,blocks] f32.

    -inf marks blocks that are no candidate; with `marks_forced` +inf marks those of `always`, else
    they keep their value.
    """
    parts = map_of(node)
    _check_sides(plan, node, parts.score)
    visible, forced = unit_rules(always, units_ranked(node), parts.score.causal)
    rule = ScoreRule(
        heads=parts.heads,
        reduce=parts.reduce,
        scale=1.0,
        granule=rows_ranking(node).stride,
        visible=visible,
        forced=forced if marks_forced else FALSE,
    )
    work = _Work(plan, node, parts)
    if parts.part:
        need_kernels(plan, node, "part_lse", "row_lse", "block_sums")
        return work.sums(rule, shape)
    kernels = () if parts.softmax is None else ("part_lse", "row_lse")
    need_kernels(plan, node, *kernels, "block_scores")
    return work.scores(rule, shape)


def _check_sides(plan: PlanBuilder, node: Node, score: Score) -> None:
    for side in (score.q, score.k):
        source = source_of(side)
        if isinstance(source, Argument):
            raise CannotLower(
                where=node.where,
                what=f"a map of scores of the tensor {source.name}",
                why="its kernels read q and k",
                way_out="use backend='reference'.",
            )
    if score.activation != "none" or score.weights is not None:
        raise CannotLower(
            where=node.where,
            what="a map of scores with an activation or weights",
            why="its kernels take plain products",
            way_out="rank the scores themselves, or use backend='reference'.",
        )
    if plan.is_packed:
        raise CannotLower(
            where=node.where,
            what="a map of scores of packed sequences",
            why="no kernel counts the units of each sequence there",
            way_out="use backend='reference', or call the pattern on a batch.",
        )


class _Work:
    """One map being lowered."""

    def __init__(self, plan: PlanBuilder, node: Node, parts: Map) -> None:
        self.plan, self.node, self.map = plan, node, parts

    def sums(self, rule: ScoreRule, shape: tuple[Dim, ...]) -> str:
        """Add a launch that multiplies and two that only read what it stored."""
        softmax, score = self.map.softmax, self.map.score
        assert softmax is not None
        own = self._parts(score, self.map.part)
        lse = self._lse(own if softmax.over is None else self._parts(softmax.over))
        scores = self.plan.scratch("scores", shape, "float32")
        self.plan.each_slab.append(
            BlockSumsLaunch(
                stages=("softmax", "regroup"),
                axes=self.plan.axes("block_sums"),
                parts_buf=own,
                lse_buf=lse,
                scores_buf=scores,
                fine=self.map.fine,
                rule=rule,
            )
        )
        return scores

    def scores(self, rule: ScoreRule, shape: tuple[Dim, ...]) -> str:
        """Add the launches that give each fine row its sum, and one that multiplies again."""
        softmax, score = self.map.softmax, self.map.score
        lse = ""
        if softmax is not None:
            lse = self._lse(self._parts(softmax.over or score))
        scores = self.plan.scratch("scores", shape, "float32")
        q, k = self._sides(score)
        units = self.map.units
        self.plan.each_slab.append(
            BlockScoresLaunch(
                stages=("score", "softmax", "regroup") if lse else ("score", "regroup"),
                axes=self._tile("block_scores"),
                rows_buf=q.main,
                units_buf=k.main,
                low_buf=k.low,
                lse_buf=lse,
                scores_buf=scores,
                logits=self._logits(score),
                units=units.count(dims.Skv),
                span=units.block,
                stride=units.stride,
                block=self.map.block,
                by=self.map.by,
                rule=rule,
            )
        )
        return scores

    def _parts(self, score: Node, part: int = 0) -> str:
        """Add the launch that sums parts of rows; part 0: as many units as its schedule says."""
        assert isinstance(score, Score)
        plan = self.plan
        part = part or plan.axis("part_lse", "part")
        q, k = self._sides(score)
        count = units_of(score.k).count(dims.Skv)
        fine = rows_of(units_of(score.q).stride)
        made = plan.scratch("parts", (dims.B, dims.Hq, fine, dims.ceildiv(count, part)), "float32")
        plan.each_slab.append(
            PartsLaunch(
                stages=("score",),
                axes=self._tile("part_lse", part=part),
                rows_buf=q.main,
                units_buf=k.main,
                low_buf=k.low,
                parts_buf=made,
                rule=self._logits(score),
                units=count,
            )
        )
        return made

    def _lse(self, parts: str) -> str:
        plan = self.plan
        made = plan.scratch("row_lse", plan.buffers[parts].dims[:3], "float32")
        plan.each_slab.append(
            RowLseLaunch(
                stages=("softmax",), axes=plan.axes("row_lse"), parts_buf=parts, lse_buf=made
            )
        )
        return made

    def _sides(self, score: Score) -> tuple[Pooled, Pooled]:
        q, k = (pooled(self.plan, s.x if isinstance(s, Fold) else s) for s in (score.q, score.k))
        return q, k

    def _logits(self, score: Score) -> MapRule:
        softmax, units = self.map.softmax, units_of(score.k)
        q, k = score.q, score.k
        size = k.size if isinstance(k, Fold) else 1
        scale = 1.0 if softmax is None or softmax.scale is None else softmax.scale
        last = op("le", units.last(Sym("k")), position("q_hi"))
        return MapRule(
            size=size,
            is_crossed=size > 1 and _is_reversed(q) != _is_reversed(k),
            scale=score.scale * scale,
            is_head_scaled=softmax is not None and softmax.scale is None,
            granule=units_of(q).stride,
            visible=last if score.causal else TRUE,
        )

    def _tile(self, kernel: str, **fixed: int) -> tuple[tuple[str, int], ...]:
        few = FEW_ROWS if self.plan.phase == "decode" else {}
        return self.plan.axes(kernel, **few, **fixed)


def _is_reversed(side: Node) -> bool:
    return isinstance(side, Fold) and side.reverse
