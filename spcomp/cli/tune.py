"""`spcomp tune`: try the schedules of a pattern for one shape; print what pins the best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from spcomp.autotune.record import Row, Tuning
from spcomp.autotune.report import tuning_json
from spcomp.autotune.report.tuning_facts import TRIED, ordered, time_of
from spcomp.cli.options import ORDERS, as_json, dtype_option, shape_option
from spcomp.cli.output import print_table, say
from spcomp.cli.patterns import function_or_pattern
from spcomp.cli.sweeps import Sweep, swept_argument
from spcomp.errors import MissingPackage
from spcomp.tuning.report import Tuned, TuningReport
from spcomp.tuning.tuner import Progress

MOST_ROWS = 10  # right candidates of a meaning that are printed without --all
COLUMNS = (
    "schedule", "order", "median ms", "spread", "predicted", "vs dense", "rung", "status",
)  # fmt: skip


@click.command(short_help="Find the fastest schedule of a pattern for one shape.")
@swept_argument
@shape_option("The call to tune; at most 16 query rows are decode.", required=True)
@dtype_option
@click.option("--target", help="The chip to rank for where no card is; default sm90.")
@click.option(
    "--order", "orders", type=click.Choice(ORDERS), multiple=True, help="Look at this loop order."
)
@click.option(
    "--budget-s",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds for all hyper-parameters together.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--fresh", is_flag=True, help="Forget what is known of this call.")
@click.option("--all", "is_whole", is_flag=True, help="Print every candidate.")
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("report"),
    show_default=True,
    help="Where the report goes.",
)
@as_json
def tune(
    pattern: str,
    settings: tuple[tuple[str, Sweep], ...],
    shape: Mapping[str, int],
    dtype: str,
    target: str | None,
    orders: tuple[Any, ...],
    budget_s: float,
    seed: int,
    fresh: bool,
    is_whole: bool,
    folder: Path,
    json_: bool,
) -> None:
    """Try the schedules of PATTERN on random tensors of one shape, within a budget.

    On a card every candidate is checked and timed; without one the cost model ranks them. A setting
    with commas, --set block=64,128, is tried value by value. Ctrl-C ends the search and keeps what
    was measured. Prints a table and the line that pins the winner, and writes a report.
    """
    from spcomp.tuning import tune as run

    chosen: dict[str, Any] = dict(settings)
    with _progress() as progress:
        report = run(
            function_or_pattern(pattern),
            shape=shape,
            dtype=dtype,
            target=target,
            orders=orders or None,
            budget_s=budget_s,
            seed=seed,
            fresh=fresh,
            progress=progress,
            **chosen,
        )
    if json_:
        click.echo(tuning_json.to_json(report.tunings), nl=False)
    else:
        _print(report, is_whole)
    try:
        say(f"wrote {', '.join(str(path) for path in report.write(folder))}")
    except MissingPackage as error:
        say(str(error))


def _print(report: TuningReport, is_whole: bool) -> None:
    for one in report.tuned:
        tuning = one.tuning
        dense = "" if tuning.dense_ms is None else f", dense {tuning.dense_ms:.4f} ms"
        click.echo(f"{tuning.call.pattern}  {tuning.call.phase}{dense}")
        shown = _shown(tuning, is_whole)
        print_table(COLUMNS, (_cells(one, row) for row in shown), numbers_from=2, numbers_to=-2)
        for line in (*_left(tuning, shown), *tuning.notes):
            click.echo(f"  {line}")
        click.echo()
    for remark in report.remarks():
        click.echo(remark)
    click.echo(report.line())


def _shown(tuning: Tuning, is_whole: bool) -> list[Row]:
    """Give the rows to print: the fastest ones, and what was tried and did not come out right."""
    rows = ordered(tuning.rows)
    if is_whole:
        return rows
    right = [row for row in rows if row.status in ("best", "ok")]
    wrong = [row for row in rows if row.status in TRIED and row not in right]
    return right[:MOST_ROWS] + wrong


def _cells(one: Tuned, row: Row) -> list[str]:
    dense_ms = one.tuning.dense_ms
    is_comparable = row.status in ("best", "ok") and dense_ms is not None
    ratio = f"{dense_ms / time_of(row):.2f}x" if is_comparable and dense_ms is not None else "-"
    return [
        one.changes(row.candidate),
        row.candidate.order or "chosen",
        _ms(row.median_ms),
        _ms(row.spread_ms),
        _ms(row.predicted_ms),
        ratio,
        row.rung,
        f"{row.status}: {row.reason}" if row.reason else row.status,
    ]


def _left(tuning: Tuning, shown: list[Row]) -> Iterator[str]:
    """Say how many rows are not printed, by what became of them."""
    left = Counter(row.status for row in tuning.rows) - Counter(row.status for row in shown)
    if left:
        counts = ", ".join(f"{count} {status}" for status, count in left.items())
        yield f"and {counts}: --all prints them, and the report holds them with their reasons"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show a bar on stderr with the best time so far; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("tuning", total=None)
        best: dict[str, float] = {}

        def told(title: str, row: Row, done: int, total: int) -> None:
            if row.status in ("best", "ok"):
                best[title] = min(best.get(title, time_of(row)), time_of(row))
            so_far = f"  best so far {best[title]:.4f} ms" if title in best else ""
            bar.update(task, completed=done, total=total, description=title + so_far)

        yield told
