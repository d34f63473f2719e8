"""`spcomp report`: a record as pages, whichever of the three kinds it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from spcomp.autotune import record_lines, record_text
from spcomp.autotune.record import Tuning
from spcomp.autotune.report import json_text, needs_plotly, tuning_json
from spcomp.autotune.report.json_form import kind_of
from spcomp.autotune.report.record import ReportRecord
from spcomp.cli.output import say
from spcomp.errors import NotAReport


@click.command(short_help="Write the pages of a tuning record or of a report's JSON.")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o", "--output", "folder", type=click.Path(file_okay=False, path_type=Path),
    default=Path("report"), show_default=True, help="Where the pages go.",
)  # fmt: skip
def report(path: Path, folder: Path) -> None:
    """Write report.html, report.json and report.md from PATH.

    PATH is a tuning record (*.jsonl in the cache's folder `tuning`), the report.json of
    `spcomp tune`, or that of `make demo`.
    """
    with needs_plotly():
        from spcomp.autotune.report import pages, tuning_pages

    with _told():
        held = _read(path)
    try:
        if isinstance(held, ReportRecord):
            paths = pages.write_all(held, folder)
        else:
            paths = tuning_pages.write_all(held, folder)
    except OSError as error:
        raise click.BadParameter(
            f"cannot write into {folder}: {error.strerror}.", param_hint="-o"
        ) from None
    say(f"wrote {', '.join(str(one) for one in paths)}")


def _read(path: Path) -> ReportRecord | tuple[Tuning, ...]:
    """Read a file of any of the three kinds; its content says which one it is."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise click.BadParameter(f"cannot read {path}: {error.strerror}.") from None
    if path.suffix == record_text.SUFFIX or _is_record(text.partition("\n")[0]):
        return (record_text.read(path),)
    try:
        kind = kind_of(text)
    except ValueError as error:
        raise NotAReport(path=path, problem=f"it is no JSON ({error})") from None
    if kind == tuning_json.FORM.kind:
        return tuning_json.from_json(text, str(path))
    if kind == json_text.FORM.kind:
        return json_text.from_json(text, str(path))
    problem = "it names no kind" if kind is None else f"its kind is '{kind}'"
    raise NotAReport(path=path, problem=problem)


def _is_record(first_line: str) -> bool:
    try:
        return kind_of(first_line) == record_lines.KIND
    except ValueError:
        return False


@contextmanager
def _told() -> Iterator[None]:
    """Say warnings, such as that of a cut line, without the place in the code that warns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        say(str(warning.message))
