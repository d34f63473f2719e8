"""`spcomp list`: the shipped patterns, their hyper-parameters and what they are."""

from __future__ import annotations

import inspect
from typing import Any

import click

from spcomp.cli.options import as_json
from spcomp.cli.output import print_json, print_table
from spcomp.dsl import PatternFunction
from spcomp.patterns import SHIPPED


@click.command("list")
@as_json
def list_patterns(json_: bool) -> None:
    """List the shipped patterns."""
    rows = [_described(function) for function in SHIPPED.values()]
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
