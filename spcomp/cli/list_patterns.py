"""`spcomp list`: the shipped patterns, their hyper-parameters and what they are."""

from __future__ import annotations

import inspect
from typing import Any

import click

from spcomp.cli.options import as_json
from spcomp.cli.output import print_json, print_table
from spcomp.cli.standing import merged, standing_of
from spcomp.dsl import PatternFunction
from spcomp.patterns import SHIPPED


@click.command("list")
@click.option(
    "--targets",
    is_flag=True,
    help="Say where each pattern runs, in bfloat16 with a head dimension of 128.",
)
@as_json
def list_patterns(targets: bool, json_: bool) -> None:
    """List the shipped patterns.

    With --targets, what runs each of them: `emitted` means that its kernels are generated, and a
    sentence is the refusal that takes their place.
    """
    rows = [_described(function) for function in SHIPPED.values()]
    if targets:
        _list_targets(rows, json_)
        return
    if json_:
        print_json(rows)
        return
    print_table(
        ("pattern", "hyper-parameters", "what it is"),
        (
            (r["name"], " ".join(f"{k}={v}" for k, v in r["parameters"].items()), r["summary"])
            for r in rows
        ),
        numbers_from=3,
    )


def _list_targets(rows: list[dict[str, Any]], json_: bool) -> None:
    standings = {name: standing_of(function()) for name, function in SHIPPED.items()}
    if json_:
        print_json([{**row, "targets": standings[row["name"]]} for row in rows])
        return
    print_table(
        ("pattern", "target", "phase", "what runs"),
        (
            ("" if n else name, *line)
            for name, standing in standings.items()
            for n, line in enumerate(merged(standing))
        ),
        numbers_from=4,
    )


def _described(function: PatternFunction) -> dict[str, Any]:
    module = inspect.getmodule(function.function)
    title = (module.__doc__ or "").strip().splitlines()[0] if module else ""
    text = inspect.getdoc(function.function) or ""
    return {
        "name": function.name,
        "title": title,
        "parameters": function.defaults,
        "summary": text.splitlines()[0] if text else title,
        "doc": text,
    }
