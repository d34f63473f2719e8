"""`spcomp show`: a pattern at one level of the compiler, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from spcomp import compiler
from spcomp.cli.costs import cost_rows, print_costs
from spcomp.cli.options import (
    Setup,
    as_json,
    lowering_options,
    own_sizes,
    pattern_argument,
    phase_option,
    schedule_of,
    setup_for,
    shape_option,
    values_of,
    widths_of,
)
from spcomp.cli.output import print_json
from spcomp.cli.patterns import load_pattern
from spcomp.dsl import Pattern
from spcomp.ir import graph
from spcomp.ir.passes import PATTERN_PIPELINE
from spcomp.ir.plan import Plan
from spcomp.ir.program import Program
from spcomp.ir.text import print_plan, print_program

LEVELS = ("pattern", "plan", "source", "graph")
PASSES = tuple(step.__name__ for step in PATTERN_PIPELINE)
FORMATS = ("tree", "dot", "mermaid")


@click.command(short_help="Print a pattern at a level, or what it costs.")
@pattern_argument
@click.option("--at", "level", type=click.Choice(LEVELS), default="plan", show_default=True)
@click.option("--after", type=click.Choice(PASSES), help="The pattern level after this pass.")
@click.option("--format", "drawn", type=click.Choice(FORMATS), default="tree", show_default=True)
@phase_option
@lowering_options
@click.option("--cost", is_flag=True, help="Print the cost formulas, and values with --shape.")
@shape_option("The lengths to evaluate the cost for.")
@as_json
def show(
    pattern: str,
    settings: tuple[Any, ...],
    level: str,
    after: str | None,
    drawn: str,
    phase: Any,
    order: Any,
    target: str,
    dtype: str,
    head_dim: int,
    value_dim: int | None,
    own: tuple[tuple[str, int], ...],
    axes: tuple[Any, ...],
    cost: bool,
    shape: Mapping[str, int] | None,
    json_: bool,
) -> None:
    """Print PATTERN at a level: its stages, the plan, the generated source, or the graph."""
    if shape is not None:
        head_dim, value_dim = shape["D"], shape["Dv"]
    made = load_pattern(pattern, values_of(settings))
    sizes = own_sizes(made.program, own, is_whole=shape is not None)
    shape = None if shape is None else {**shape, **sizes}
    widths = widths_of(made.program, sizes)
    setup = setup_for(target, dtype, head_dim, value_dim, widths)

    def plan() -> Plan:
        return compiler.lower(
            made,
            backend=setup.backend,
            target=setup.target,
            spec=setup.spec,
            phase=phase,
            order=order if phase == "prefill" else None,
            schedule=schedule_of(setup, axes),
        )

    if cost:
        _show_cost(plan(), setup, shape, json_)
    elif level == "pattern":
        _show_pattern(made, after, json_)
    elif level == "graph":
        _show_graph(made.program, plan(), drawn, json_)
    elif level == "source":
        _show_source(plan(), setup, json_)
    else:
        _show_plan(plan(), setup, json_)


def _show_pattern(made: Pattern, after: str | None, json_: bool) -> None:
    program = made.program
    for step in PATTERN_PIPELINE if after else ():
        program = step(program)
        if step.__name__ == after:
            break
    text = print_program(program)
    if json_:
        print_json({"pattern": program.name, "level": "pattern", "text": text})
    else:
        click.echo(text, nl=False)


def _show_plan(plan: Plan, setup: Setup, json_: bool) -> None:
    text = print_plan(plan)
    if not json_:
        click.echo(text, nl=False)
        return
    launches = [{"kernel": x.kernel, "axes": dict(x.axes)} for x in plan.launches()]
    buffers = [
        {"name": b.name, "dtype": b.dtype, "dims": [str(d) for d in b.dims], "kind": b.kind}
        for b in plan.buffers
    ]
    print_json(
        {
            "pattern": plan.pattern,
            "level": "plan",
            "phase": plan.phase,
            "order": plan.order,
            "target": setup.target.name,
            "notes": list(plan.notes),
            "launches": launches,
            "buffers": buffers,
            "text": text,
        }
    )


def _show_source(plan: Plan, setup: Setup, json_: bool) -> None:
    source = compiler.emit(plan, setup.backend, setup.target, setup.spec)
    if json_:
        files = [{"name": f.file_name, "text": f.text} for f in source.files]
        print_json({"pattern": plan.pattern, "level": "source", "files": files})
        return
    for file in source.files:
        comment = "#" if file.suffix == ".py" else "//"
        click.echo(f"{comment} ==== {file.file_name}\n{file.text}")


def _show_graph(program: Program, plan: Plan, drawn: str, json_: bool) -> None:
    stages, launches = graph.stage_graph(program), graph.launch_graph(plan)
    if json_:
        both = {"stages": graph.to_json(stages), "launches": graph.to_json(launches)}
        print_json({"pattern": program.title(), "level": "graph", **both})
        return
    if drawn == "tree":
        click.echo(f"{program.title()}\n{graph.to_tree(program)}")
        click.echo(graph.to_lines(plan), nl=False)
        return
    draw = graph.to_dot if drawn == "dot" else graph.to_mermaid
    click.echo(f"{draw(stages)}\n{draw(launches)}", nl=False)


def _show_cost(plan: Plan, setup: Setup, shape: Mapping[str, int] | None, json_: bool) -> None:
    if json_:
        print_json(cost_rows(plan, setup, shape))
    else:
        print_costs(plan, setup, shape)
