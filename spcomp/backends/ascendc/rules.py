"""What is refused before anything is written: rules of the chip, and stages without a kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spcomp.backends.ascendc.axes import axes_of
from spcomp.backends.ascendc.contexts.base import C_TYPES, FRACTAL
from spcomp.backends.ascendc.expr_text import NotInteger, spans_text
from spcomp.backends.ascendc.forms import FORMS
from spcomp.backends.ascendc.spans import NotRanges, ranges_of
from spcomp.backends.base import MAX_HEAD_DIM, Refusal, Specialisation
from spcomp.ir import dims
from spcomp.ir.expr import Expr, symbols
from spcomp.ir.launches import AttendRule, GatherLaunch, PoolLaunch, ScoreLaunch
from spcomp.ir.plan import Launch, Plan

REFERENCE = "use backend='reference'."
NO_TEMPLATE = "there is no AscendC template for it"
POOLINGS = ("mean", "max", "min")
ROW_SCALARS = frozenset({"q", "q_lo", "q_hi", "k", "Sq", "Skv"})


def refusal_of(plan: Plan, spec: Specialisation) -> Refusal | None:
    """Give the first rule that a plan breaks."""
    return next(_refusals(plan, spec), None)


def _refusals(plan: Plan, spec: Specialisation) -> Iterator[Refusal]:
    if spec.is_packed:
        yield Refusal("packed sequences", "its kernels read one length for all", REFERENCE)
    if spec.dtype not in C_TYPES:
        yield Refusal(
            f"{spec.dtype} tensors",
            "its templates multiply 16-bit elements alone",
            f"cast q, k and v to {' or '.join(C_TYPES)}, or use backend='reference'.",
        )
    for name, size in (("D", spec.head_dim), ("Dv", spec.value_dim)):
        if size % FRACTAL or size > MAX_HEAD_DIM:
            yield Refusal(
                f"the head dimension {name} = {size}",
                f"a cube core multiplies fractals of {FRACTAL} x {FRACTAL} elements, so {name} "
                f"must be a multiple of {FRACTAL} and at most {MAX_HEAD_DIM}",
                "pad the heads, or use backend='reference'.",
            )
    for buffer in plan.buffers:
        if buffer.kind == "input" and buffer.name not in ("q", "k", "v"):
            yield Refusal(
                f"the tensor {buffer.name} of a call", "none of its kernels reads it", REFERENCE
            )
    for launch in plan.launches():
        yield from _of_launch(launch)
        yield from _of_axes(launch, spec)
    for buffer in plan.buffers:
        if buffer.state or buffer.kind == "captured":
            what = "the state" if buffer.state else "the pattern's own tensor"
            yield Refusal(f"{what} {buffer.name}", "none of its kernels reads it", REFERENCE)


def _of_launch(launch: Launch) -> Iterator[Refusal]:
    if type(launch) not in FORMS:
        yield Refusal(f"the stage {launch.kernel}", NO_TEMPLATE, REFERENCE)
    if getattr(launch, "sinks_buf", ""):
        yield Refusal("sink logits", "its template ends the softmax without them", REFERENCE)
    if isinstance(launch, PoolLaunch) and launch.by not in POOLINGS:
        yield Refusal(
            f"pooling by {launch.by}", f"its template has {', '.join(POOLINGS)}", REFERENCE
        )
    if isinstance(launch, ScoreLaunch):
        if launch.low_buf:
            yield Refusal("scores by the bounds of a unit", NO_TEMPLATE, REFERENCE)
        if launch.weights_buf or launch.rule.activation != "none":
            yield Refusal("scores with an activation or weights", NO_TEMPLATE, REFERENCE)
        if launch.rule.heads not in ("query", "group"):
            yield Refusal(
                f"scores with heads={launch.rule.heads!r}",
                "its template makes one list a query head or one a KV head",
                REFERENCE,
            )
        yield from _of_scale(launch.rule.scale)
        yield from _of_predicate("units a row may take", launch.rule.visible)
        yield from _of_predicate("units a row must take", launch.rule.forced)
    if isinstance(launch, GatherLaunch):
        if launch.keys != dims.Skv:
            yield Refusal("attention over a stream of units", NO_TEMPLATE, REFERENCE)
        if launch.unit % FRACTAL:
            yield Refusal(
                f"units of {launch.unit} tokens",
                f"a block of keys is loaded as fractals of {FRACTAL} rows",
                f"use units that are multiples of {FRACTAL}, or use backend='reference'.",
            )
        if launch.splits != 1 or launch.rule.flags:
            yield Refusal("attention over several lists", NO_TEMPLATE, REFERENCE)
        yield from _of_attend(launch.rule)


def _of_attend(rule: AttendRule) -> Iterator[Refusal]:
    if rule.score_mod is not None:
        yield Refusal("a score_mod", "no vector code is generated for it", REFERENCE)
    if rule.scale is not None:
        yield from _of_scale(rule.scale)
    yield from _of_predicate("keys a query sees", rule.predicate)


def _of_scale(scale: float) -> Iterator[Refusal]:
    if not math.isfinite(scale):
        yield Refusal(f"the scale {scale}", "it is a finite constant of a kernel", REFERENCE)


def _of_axes(launch: Launch, spec: Specialisation) -> Iterator[Refusal]:
    fixed = dict(dict(axes_of(spec)).get(launch.kernel, ()))
    for name, value in launch.axes:
        if fixed.get(name, value) != value:
            yield Refusal(
                f"{launch.kernel}.{name} = {value}",
                f"its tiles are fixed, and this one is {fixed[name]}",
                "leave the axis out.",
            )


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
