"""`spcomp report`: a record as pages, whichever of the three kinds it is."""

from __future__ import annotations

import json
from pathlib import Path

import click

from spcomp.autotune import record_text
from spcomp.autotune.report import json_text, needs_plotly, tuning_json
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

    if path.suffix == ".jsonl":
        paths = tuning_pages.write_all((record_text.read(path),), folder)
    else:
        text = path.read_text(encoding="utf-8", errors="replace")
        kind = _kind(text, path)
        if kind == tuning_json.KIND:
            paths = tuning_pages.write_all(tuning_json.from_json(text), folder)
        else:
            paths = pages.write_all(json_text.from_json(text), folder)
    say(f"wrote {', '.join(str(one) for one in paths)}")


def _kind(text: str, path: Path) -> str:
    try:
        document = json.loads(text)
    except ValueError:
        raise NotAReport(path=path, problem="it is no JSON") from None
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind not in (tuning_json.KIND, json_text.KIND):
        raise NotAReport(path=path, problem=f"its kind is {kind!r}")
    return str(kind)
