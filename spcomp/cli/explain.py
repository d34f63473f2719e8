"""`spcomp explain`: what a call of a shape runs, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from spcomp import compiler
from spcomp.cli.costs import cost_rows
from spcomp.cli.options import (
    Setup,
    as_json,
    lowering_options,
    own_sizes,
    pattern_argument,
    schedule_of,
    setup_for,
    shape_option,
    values_of,
    widths_of,
)
from spcomp.cli.output import mebibytes, print_json, print_table, scaled
from spcomp.cli.patterns import load_pattern
from spcomp.ir import dims
from spcomp.ir.plan import Plan


@click.command(short_help="Say what a call of a shape runs, and why.")
@pattern_argument
@lowering_options
@shape_option("The lengths of the call.", required=True)
@as_json
def explain(
    pattern: str,
    settings: tuple[Any, ...],
    order: Any,
    target: str,
    dtype: str,
    head_dim: int,
    value_dim: int | None,
    own: tuple[tuple[str, int], ...],
    axes: tuple[Any, ...],
    shape: Mapping[str, int],
    json_: bool,
) -> None:
    """Say what a call of PATTERN with these lengths runs on a target, and why.

    The phase follows from the number of query rows, as it does in a call; the head dimensions are
    those of the shape.
    """
    del head_dim, value_dim
    made = load_pattern(pattern, values_of(settings))
    sizes = own_sizes(made.program, own, is_whole=True)
    widths = widths_of(made.program, sizes)
    setup = setup_for(target, dtype, shape["D"], shape["Dv"], widths)
    shape = {**shape, **sizes}
    phase = compiler.phase_for(shape["Sq"])
    plan = compiler.lower(
        made,
        backend=setup.backend,
        target=setup.target,
        spec=setup.spec,
        phase=phase,
        order=order if phase == "prefill" else None,
        schedule=schedule_of(setup, axes),
    )
    rows = {
        **cost_rows(plan, setup, shape),
        "notes": list(plan.notes),
        "buffers": _buffers(plan, setup, shape),
    }
    if json_:
        print_json(rows)
    else:
        _print(plan, setup, rows)


def _buffers(plan: Plan, setup: Setup, shape: Mapping[str, int]) -> list[dict[str, Any]]:
    rows = cost_rows(plan, setup, shape)["slab_rows"]
    here = {**shape, "R": rows, "R0": 0}
    return [
        {
            "name": b.name,
            "dtype": b.dtype,
            "shape": [dims.evaluate(d, here) for d in b.dims],
            "state": b.state,
        }
        for b in plan.scratch()
    ]


def _print(plan: Plan, setup: Setup, rows: Mapping[str, Any]) -> None:
    shape = rows["shape"]
    click.echo(plan.pattern)
    click.echo(f"  target   {setup.target.title} ({setup.target.name}), {setup.spec.dtype}")
    click.echo(f"  phase    {plan.phase}: {shape['Sq']} query rows, {shape['Skv']} keys")
    for note in plan.notes:
        click.echo(f"  order    {note}")
    for state in dict.fromkeys(b["state"].partition(".")[0] for b in rows["buffers"]):
        if state:
            click.echo(f"  state    {state}: a cache keeps it, and pool makes only the new units")
    click.echo(
        f"  slabs    {rows['slabs']} of {rows['slab_rows']} rows, "
        f"{mebibytes(rows['slab_scratch_bytes'])} of scratch"
    )
    click.echo(
        f"  density  at most {rows['density']:.4f} of the causal pairs, "
        f"{scaled(rows['total']['flops'], 'FLOP')} against {scaled(rows['dense']['flops'], 'FLOP')}"
    )
    click.echo(
        f"  time     {rows['roofline_ms']:.4f} ms predicted, "
        f"dense {rows['dense_roofline_ms']:.4f} ms\n"
    )
    print_table(
        ("launch", "stages", "axes", "runs", "predicted ms"),
        (
            (
                launch.kernel,
                " + ".join(launch.stages),
                " ".join(f"{k}={v}" for k, v in launch.axes),
                row["runs"],
                f"{row['roofline_ms']:.4f}",
            )
            for launch, row in zip(plan.launches(), rows["launches"], strict=True)
        ),
        numbers_from=3,
    )
    click.echo()
    print_table(
        ("scratch", "dtype", "shape", "state"),
        ((b["name"], b["dtype"], b["shape"], b["state"]) for b in rows["buffers"]),
        numbers_from=4,
    )
