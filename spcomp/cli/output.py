"""What commands print: text, tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

WIDE = 240  # columns of a table that goes to a file, where no terminal wraps it


def say(text: str) -> None:
    """Tell progress on stderr."""
    click.echo(text, err=True)


def print_json(value: Any) -> None:
    """Print a value as JSON with its own order of keys."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers_from: int = 1,
    numbers_to: int | None = None,
) -> None:
    """Print a table; columns [numbers_from:numbers_to] are set right. Colour follows NO_COLOR."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDE)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    numbers = range(len(columns))[numbers_from:numbers_to]
    for n, name in enumerate(columns):
        right = n in numbers
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


def scaled(value: float, unit: str) -> str:
    """Give a number with a decimal prefix: 1.23 GFLOP."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.2f} {prefix}{unit}"
    return f"{value:g} {unit}"


def mebibytes(value: float) -> str:
    """Give bytes in MiB."""
    return f"{value / (1 << 20):.2f} MiB"
