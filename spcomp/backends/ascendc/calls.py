"""What the lengths and strides of a call must hold beside what its plan does. A rule is written
once: the host's tiling has it in C++, and a call that breaks it here is refused before any
compile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from spcomp.backends.ascendc.contexts.base import NARROW_STRIDE
from spcomp.backends.ascendc.contexts.score import TILE_ROWS
from spcomp.backends.ascendc.contexts.topk import MAX_WIDTH
from spcomp.backends.base import Refusal
from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.launches import GatherLaunch, ScoreLaunch, TopKLaunch
from spcomp.ir.plan import Plan


@dataclass(frozen=True, slots=True)
class CallRule:
    """A figure of a call that must be `least` … `most`, where the length `where` is above 1.

    figure: a formula over the lengths, or the name of a stride (`q_s`: rows of q). what: with
    {figure} in it. subject, reason: the sentence without the figure.
    """

    figure: Dim | str
    least: int
    most: int
    where: Dim
    what: str
    subject: str
    reason: str
    way_out: str


def call_rules(plan: Plan) -> Iterator[CallRule]:
    """Give the rules of the launches that a plan has."""
    loaded = {
        name
        for launch in plan.launches()
        if isinstance(launch, (ScoreLaunch, GatherLaunch))
        for name in launch.reads()
    }
    for tensor, rows in (("q", dims.Sq), ("k", dims.Skv), ("v", dims.Skv)):
        if tensor in loaded:
            yield CallRule(
                figure=f"{tensor}_s",
                least=1,
                most=NARROW_STRIDE,
                where=rows,
                what=f"rows of {tensor} that lie {{figure}} elements apart",
                subject=f"the rows of {tensor}",
                reason=f"a load of the cube core steps 1 to {NARROW_STRIDE} elements",
                way_out=f"call {tensor}.contiguous() first, or use backend='reference'.",
            )
    yield CallRule(
        figure=dims.ceildiv(dims.Hq, dims.Hkv),
        least=1,
        most=TILE_ROWS,
        where=dims.Hq,
        what="{figure} query heads for each KV head",
        subject="the query heads of a KV head",
        reason=f"they share a tile of the cube core, which has {TILE_ROWS} rows",
        way_out=f"repeat k and v for groups of at most {TILE_ROWS} query heads, or use "
        "backend='reference'.",
    )
    for launch in plan.launches():
        if isinstance(launch, TopKLaunch):
            yield CallRule(
                figure=launch.width,
                least=0,
                most=MAX_WIDTH,
                where=dims.Skv,
                what="lists of {figure} units",
                subject="the units of a list",
                reason=f"top-k keeps at most {MAX_WIDTH} of them on chip",
                way_out="choose fewer or larger units, or use backend='reference'.",
            )


def call_refusal(
    plan: Plan, lengths: Mapping[str, int], strides: Mapping[str, int]
) -> Refusal | None:
    """Give the first rule that a call breaks; strides: by name, in elements."""
    for rule in call_rules(plan):
        if dims.evaluate(rule.where, lengths) <= 1:
            continue
        known = rule.figure
        figure = strides[known] if isinstance(known, str) else dims.evaluate(known, lengths)
        if not rule.least <= figure <= rule.most:
            return Refusal(rule.what.format(figure=figure), rule.reason, rule.way_out)
    return None
