"""What is refused before anything is written: rules of the chip, and stages without a kernel."""

from __future__ import annotations

from collections.abc import Iterator

from spcomp.backends.ascendc.contexts.base import C_TYPES, FRACTAL
from spcomp.backends.ascendc.expr_text import NotInteger, spans_text
from spcomp.backends.ascendc.forms import FORMS
from spcomp.backends.ascendc.spans import NotRanges, ranges_of
from spcomp.backends.base import MAX_HEAD_DIM, Refusal, Specialisation
from spcomp.ir.expr import Expr, symbols
from spcomp.ir.launches import GatherLaunch, PoolLaunch, ScoreLaunch
from spcomp.ir.plan import Launch, Plan

REFERENCE = "use backend='reference'."
POOLINGS = ("mean", "max", "min")
ROW_SCALARS = frozenset({"q", "q_lo", "q_hi", "k", "Sq", "Skv"})


def refusal_of(plan: Plan, spec: Specialisation) -> Refusal | None:
    """Give the first rule that a plan breaks."""
    return next(_refusals(plan, spec), None)


def _refusals(plan: Plan, spec: Specialisation) -> Iterator[Refusal]:
    if spec.dtype not in C_TYPES:
        yield Refusal(
            f"{spec.dtype} tensors",
            "the cube core multiplies float32 at a quarter of the rate, and no template does it",
            "cast q, k and v to float16 or bfloat16.",
        )
    for name, size in (("D", spec.head_dim), ("Dv", spec.value_dim)):
        if size % FRACTAL or size > MAX_HEAD_DIM:
            yield Refusal(
                f"head dimension {name} = {size}",
                f"a cube core multiplies fractals of {FRACTAL} x {FRACTAL} elements, so {name} "
                f"must be a multiple of {FRACTAL} and at most {MAX_HEAD_DIM}",
                "pad the heads.",
            )
    for buffer in plan.buffers:
        if buffer.state or buffer.kind == "captured":
            held = "a cache's state" if buffer.state else "a tensor of the user's"
            yield Refusal(
                f"the buffer '{buffer.name}', {held}", "no kernel reads it yet", REFERENCE
            )
    for launch in plan.launches():
        yield from _of_launch(launch)


def _of_launch(launch: Launch) -> Iterator[Refusal]:
    if type(launch) not in FORMS:
        yield Refusal(f"the stage {launch.kernel}", "there is no AscendC template", REFERENCE)
    if isinstance(launch, PoolLaunch) and launch.by not in POOLINGS:
        yield Refusal(f"pooling by {launch.by}", "the template has mean, max and min", REFERENCE)
    if isinstance(launch, ScoreLaunch):
        if launch.low_buf:
            yield Refusal("scores by bounds (Quest)", "there is no AscendC template", REFERENCE)
        if launch.rule.heads not in ("query", "group"):
            yield Refusal(
                f"scores with heads='{launch.rule.heads}'",
                "the template has one list a query head or one a KV head",
                REFERENCE,
            )
        yield from _of_predicate("units a row may take", launch.rule.visible)
        yield from _of_predicate("units a row must take", launch.rule.forced)
    if isinstance(launch, GatherLaunch):
        if launch.unit % FRACTAL:
            yield Refusal(
                f"units of {launch.unit} tokens",
                f"a block of keys is loaded as fractals of {FRACTAL} rows",
                f"use units that are multiples of {FRACTAL}.",
            )
        if launch.rule.score_mod is not None:
            yield Refusal("a score hook", "no vector code is generated for it yet", REFERENCE)
        if launch.splits != 1 or launch.rule.flags:
            yield Refusal("attention over several lists", "there is no AscendC template", REFERENCE)
        yield from _of_predicate("keys a query sees", launch.rule.predicate)


def _of_predicate(what: str, predicate: Expr) -> Iterator[Refusal]:
    strange = sorted(symbols(predicate) - ROW_SCALARS)
    if strange:
        why = f"they depend on {', '.join(strange)}"
    else:
        try:
            spans_text(ranges_of(predicate))
            return
        except (NotRanges, NotInteger) as part:
            why = f"they are no ranges of k ({part})"
    yield Refusal(
        f"the {what}",
        f"{why}, and a vector core masks ranges that the query alone decides",
        REFERENCE,
    )
