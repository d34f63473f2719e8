"""`spcomp bench`: one schedule of a pattern against dense attention, measured or predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch

from spcomp import api, compiler
from spcomp.autotune import measure, price
from spcomp.cli.options import (
    ORDERS,
    Axis,
    as_json,
    dim_option,
    dtype_option,
    own_sizes,
    pattern_argument,
    shape_option,
    values_of,
)
from spcomp.cli.output import print_json, print_table, say
from spcomp.cli.patterns import load_pattern
from spcomp.dsl.pattern import Pattern
from spcomp.ir import cost
from spcomp.tuning import sample


@dataclass(frozen=True, slots=True)
class Line:
    """One competitor: milliseconds, how they came about, and the floors of its FLOPs and bytes."""

    name: str
    ms: float
    spread_ms: float | None
    kind: str
    vs_dense: float | None
    compute_floor_ms: float
    bytes_floor_ms: float


@click.command(short_help="Time a pattern against dense attention.")
@pattern_argument
@shape_option("The call; at most 16 query rows are decode.", required=True)
@dtype_option
@dim_option
@click.option("--order", type=click.Choice(ORDERS), help="Insist on a loop order of prefill.")
@click.option("--axis", "axes", type=Axis(), multiple=True, help="A schedule axis.")
@click.option("--target", default="sm90", show_default=True, help="The chip, where no card is.")
@click.option("--seed", type=int, default=0, show_default=True)
@as_json
def bench(
    pattern: str,
    settings: tuple[Any, ...],
    shape: Mapping[str, int],
    dtype: str,
    own: tuple[tuple[str, int], ...],
    order: Any,
    axes: tuple[tuple[str, str, int], ...],
    target: str,
    seed: int,
    json_: bool,
) -> None:
    """Time PATTERN on random tensors of one shape beside dense causal attention.

    Without a card both are predicted by the cost model, and the table says so.
    """
    made = load_pattern(pattern, values_of(settings))
    shape = {**shape, **own_sizes(made.program, own, is_whole=True)}
    changes: dict[str, dict[str, int]] = {}
    for kernel, axis, value in axes:
        changes.setdefault(kernel, {})[axis] = value
    if torch.cuda.is_available():
        say(f"timing on {torch.cuda.get_device_name()}")
        attention = api.compile(made, backend="triton", order=order, axes=changes)
        lines = _measured(attention, shape, dtype, seed)
    else:
        say(f"no card here: predicted by the cost model for {target}")
        lines = _predicted(made, shape, dtype, order, changes, target)
    if json_:
        print_json([asdict(line) for line in lines])
    else:
        _print(lines)


def _measured(
    attention: api.Attention, shape: Mapping[str, int], dtype: str, seed: int
) -> list[Line]:
    q, k, v = sample.random_sample(shape, dtype, "cuda", seed)
    own = sample.random_arguments(attention.takes, shape, dtype, "cuda", seed + 1)
    built = attention.built(q, k, v, scale=None, **own)
    with torch.no_grad():
        ours = _timed(lambda: attention(q, k, v, scale=None, return_lse=False, **own))
        dense = _timed(measure.dense_attention(q, k, v))
    assert built.plan is not None
    floors = price.floors_ms(cost.costs_of(built.plan), shape, built.spec, built.target)
    beside = price.floors_ms([cost.dense_cost()], shape, built.spec, built.target)
    name, ratio = attention.pattern.program.title(), dense.median_ms / ours.median_ms
    return [
        Line(name, ours.median_ms, ours.spread_ms, "measured", ratio, *floors),
        Line("dense", dense.median_ms, dense.spread_ms, "measured", 1.0, *beside),
    ]


def _timed(run: Callable[[], object]) -> measure.Times:
    """Time the device's work alone; where that cannot be, say so."""
    graph = measure.graphed(run)
    if graph is None:
        say("not captured in a CUDA graph: the time includes the host's")
    return measure.time_ms(graph or run)


def _predicted(
    pattern: Pattern,
    shape: Mapping[str, int],
    dtype: str,
    order: Any,
    changes: Mapping[str, Mapping[str, int]],
    target: str,
) -> list[Line]:
    plan, spec, chip = compiler.plan_for(pattern, shape, dtype, order, changes, target)
    costs = cost.costs_of(plan)
    dense_ms = price.dense_ms(shape, spec, chip)
    ours_ms = price.predicted_ms(plan, shape, spec, chip)
    floors = price.floors_ms(costs, shape, spec, chip)
    beside = price.floors_ms([cost.dense_cost()], shape, spec, chip)
    name, ratio = pattern.program.title(), dense_ms / ours_ms
    return [
        Line(name, ours_ms, None, "predicted", ratio, *floors),
        Line("dense", dense_ms, None, "predicted", 1.0, *beside),
    ]


def _print(lines: list[Line]) -> None:
    print_table(
        ("what", "ms", "spread", "kind", "vs dense", "FLOP floor ms", "byte floor ms"),
        (
            (
                line.name,
                f"{line.ms:.4f}",
                "-" if line.spread_ms is None else f"{line.spread_ms:.4f}",
                line.kind,
                "-" if line.vs_dense is None else f"{line.vs_dense:.2f}x",
                f"{line.compute_floor_ms:.4f}",
                f"{line.bytes_floor_ms:.4f}",
            )
            for line in lines
        ),
    )
