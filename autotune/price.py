"""What a pattern costs on a target that is not here: FLOPs, bytes, and the roofline's time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from spcomp import compiler
from spcomp.autotune.report.record import Dense, PricedShape, Timing
from spcomp.autotune.survey import Price
from spcomp.backends import registry
from spcomp.backends.base import Source, Specialisation
from spcomp.codegen.header import without_header
from spcomp.dsl.pattern import Pattern
from spcomp.ir import cost
from spcomp.ir.plan import Plan
from spcomp.ir.target import Target


def source_for(pattern: Pattern, shape: PricedShape, target_name: str) -> Source:
    """Generate the kernels of a pattern's prefill for a target, without a card.

    Raises: UnknownTarget, Refused, and what lowering raises.
    """
    target = registry.target(target_name)
    backend = registry.backend(target.backend)
    spec = Specialisation(shape.dtype, shape.head_dim, shape.head_dim)
    plan = compiler.lower(pattern, backend=backend, target=target, spec=spec)
    return compiler.emit(plan, backend, target, spec)


def predicted(source: Source, shape: PricedShape) -> Price:
    """Evaluate the cost model of a plan for one shape; the time is labelled predicted."""
    lengths = _lengths(shape, source.spec)
    figures = cost.total(cost.evaluate(one, lengths) for one in cost.costs_of(source.plan))
    timing = Timing(
        "predicted",
        predicted_ms(source.plan, lengths, source.spec, source.target),
        None,
        dense_ms(lengths, source.spec, source.target),
        roofline_name(source.target),
    )
    return Price(figures.flops, figures.floor_bytes, timing)


def dense_price(shape: PricedShape, perplexity: float | None) -> Dense:
    """Evaluate the cost model of dense causal attention for one shape."""
    figures = _dense_figures(shape)
    return Dense(perplexity, figures.flops, figures.floor_bytes)


def dense_ms(shape: Mapping[str, int], spec: Specialisation, target: Target) -> float:
    """Predict dense causal attention; shape: B, Hq, Hkv, Sq, Skv, D, Dv."""
    env = {**shape, "E": spec.element_bytes}
    return cost.roofline_ms(cost.evaluate(cost.dense_cost(), env), target, spec.dtype)


def predicted_ms(
    plan: Plan, shape: Mapping[str, int], spec: Specialisation, target: Target
) -> float:
    """Predict a plan: launches run one after the other, so each has a roofline of its own."""
    env = {**shape, "E": spec.element_bytes}
    runs = cost.runs_of(plan, env, spec.element_bytes)
    return sum(
        cost.roofline_ms(cost.evaluate(one, env), target, spec.dtype, count)
        for one, count in zip(cost.costs_of(plan), runs, strict=True)
    )


def floors_ms(
    costs: Iterable[cost.Cost], shape: Mapping[str, int], spec: Specialisation, target: Target
) -> tuple[float, float]:
    """Give the time that FLOPs alone, and bytes alone, take at the target's rates."""
    env = {**shape, "E": spec.element_bytes}
    figures = cost.total(cost.evaluate(one, env) for one in costs)
    compute_s = figures.flops / (target.rate(spec.dtype) * 1e12)
    return compute_s * 1e3, figures.floor_bytes / (target.bandwidth_tbs * 1e12) * 1e3


def roofline_name(target: Target) -> str:
    """Name the source of a predicted time."""
    return f"the roofline of {target.title} ({target.name})"


def same_kernels(source: Source) -> tuple[str, ...]:
    """Give the kernels' texts without their headers: equal for plans that run the same code."""
    return tuple(without_header(file.text) for file in source.files)


def _dense_figures(shape: PricedShape) -> cost.Figures:
    spec = Specialisation(shape.dtype, shape.head_dim, shape.head_dim)
    return cost.evaluate(cost.dense_cost(), _lengths(shape, spec))


def _lengths(shape: PricedShape, spec: Specialisation) -> dict[str, int]:
    return {
        "B": shape.batch,
        "Hq": shape.query_heads,
        "Hkv": shape.kv_heads,
        "Sq": shape.tokens,
        "Skv": shape.tokens,
        "D": spec.head_dim,
        "Dv": spec.value_dim,
        "E": spec.element_bytes,
    }
