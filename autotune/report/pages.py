"""Write a report: HTML that needs nothing but itself, Markdown and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from plotly.offline import get_plotlyjs

from spcomp.autotune.report import tables
from spcomp.autotune.report.json_text import from_json, to_json
from spcomp.autotune.report.plots import MapPicture, Plot, map_picture, plots
from spcomp.autotune.report.record import ReportRecord, check
from spcomp.codegen.render import render


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure that the report leads with."""

    figure: str
    words: str


@dataclass(frozen=True, slots=True)
class MapGroup:
    """Block maps of one pattern, block size and budget."""

    title: str
    pictures: tuple[MapPicture, ...]


@dataclass(frozen=True, slots=True)
class HtmlContext:
    """Values of ``templates/report/report.html.jinja``; ``plotly_js`` is the whole library."""

    title: str
    subtitle: str
    findings: tuple[Finding, ...]
    plots: tuple[Plot, ...]
    map_groups: tuple[MapGroup, ...]
    row_table: tables.Table
    priced: str
    kernel_table: tables.Table
    environment: tables.Table
    notes: tuple[str, ...]
    has_kernels: bool
    has_maps: bool
    has_notes: bool
    plotly_js: str


@dataclass(frozen=True, slots=True)
class MarkdownContext:
    """Values of ``templates/report/report.md.jinja``; '|' in a cell is already escaped."""

    title: str
    subtitle: str
    findings: tuple[Finding, ...]
    row_table: tables.Table
    priced: str
    kernel_table: tables.Table
    environment: tables.Table
    notes: tuple[str, ...]
    has_kernels: bool
    has_notes: bool


def write_all(record: ReportRecord, folder: Path) -> tuple[Path, Path, Path]:
    """Write report.html, report.json and report.md into a folder, making it where needed.

    Raises: ReportContradiction.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "report.html", folder / "report.json", folder / "report.md")
    for write, path in zip((write_html, write_json, write_md), paths, strict=True):
        write(record, path)
    return paths


def write_html(record: ReportRecord, path: Path) -> None:
    """Write the page: plots, block maps and every figure, in one file that asks for no other.

    Raises: ReportContradiction.
    """
    check(record)
    path.write_text(render("report/report.html.jinja", html_context(record)), encoding="utf-8")


def write_md(record: ReportRecord, path: Path) -> None:
    """Write the tables as Markdown.

    Raises: ReportContradiction.
    """
    check(record)
    path.write_text(render("report/report.md.jinja", markdown_context(record)), encoding="utf-8")


def write_json(record: ReportRecord, path: Path) -> None:
    """Write the record; `read_json` gives it back.

    Raises: ReportContradiction.
    """
    path.write_text(to_json(record), encoding="utf-8")


def read_json(path: Path) -> ReportRecord:
    """Read a record that `write_json` wrote.

    Raises: ReportUnreadable, ReportContradiction.
    """
    return from_json(path.read_text(encoding="utf-8"))


def html_context(record: ReportRecord) -> HtmlContext:
    """Lay the record out for the page."""
    groups = _map_groups(record)
    return HtmlContext(
        title=record.title,
        subtitle=subtitle(record),
        findings=findings(record),
        plots=plots(record),
        map_groups=groups,
        row_table=tables.row_table(record),
        priced=str(record.priced),
        kernel_table=tables.kernel_table(record),
        environment=tables.environment_table(record),
        notes=record.notes,
        has_kernels=bool(record.kernels),
        has_maps=bool(groups),
        has_notes=bool(record.notes),
        plotly_js=get_plotlyjs(),
    )


def markdown_context(record: ReportRecord) -> MarkdownContext:
    """Lay the record out for Markdown."""
    return MarkdownContext(
        title=record.title,
        subtitle=subtitle(record),
        findings=findings(record),
        row_table=escaped(tables.row_table(record)),
        priced=str(record.priced),
        kernel_table=escaped(tables.kernel_table(record)),
        environment=escaped(tables.environment_table(record)),
        notes=record.notes,
        has_kernels=bool(record.kernels),
        has_notes=bool(record.notes),
    )


def subtitle(record: ReportRecord) -> str:
    """Name the model, the text and the machine in one line."""
    subject = record.subject
    card = record.environment.card or "no card"
    return f"{subject.model} on {subject.tokens} tokens of {subject.text}; {card}"


def findings(record: ReportRecord) -> tuple[Finding, ...]:
    """Choose the figures the report leads with, each only where its rows exist."""
    found = [_whole_budget(record), _best_sparse(record), _fastest(record), _compiled(record)]
    return tuple(finding for finding in found if finding is not None)


def _whole_budget(record: ReportRecord) -> Finding | None:
    whole = [row.out_error for row in record.rows if row.budget == 1]
    if not whole:
        return None
    return Finding(f"{max(whole):.1e}", "largest output error of a 100 % budget against dense")


def _best_sparse(record: ReportRecord) -> Finding | None:
    sparse = [row for row in record.rows if row.density <= 0.5]
    if not sparse:
        return None
    best = max(sparse, key=lambda row: row.mass.mean)
    return Finding(
        tables.percent(best.mass.mean),
        f"of attention kept by {tables.named(best.pattern, best.block)}, which reads "
        f"{tables.percent(best.density)} of the pairs (the most of all that read half or less)",
    )


def _fastest(record: ReportRecord) -> Finding | None:
    timed = [(row.timing.vs_dense, row) for row in record.rows if row.timing is not None]
    if not timed:
        return None
    ratio, row = max(timed, key=lambda pair: pair[0])
    assert row.timing is not None
    name, budget = tables.named(row.pattern, row.block), tables.percent(row.budget)
    return Finding(
        f"{ratio:.1f}×",
        f"faster than dense, {row.timing.kind}: {name}, at a budget of {budget} "
        f"({row.timing.where})",
    )


def _compiled(record: ReportRecord) -> Finding | None:
    if not record.kernels:
        return None
    targets = ", ".join(dict.fromkeys(kernel.target for kernel in record.kernels))
    spilling = sum(1 for kernel in record.kernels if kernel.spill_bytes)
    words = "none spills registers" if not spilling else f"{spilling} spill registers"
    return Finding(str(len(record.kernels)), f"kernels compiled for {targets}; {words}")


def _map_groups(record: ReportRecord) -> tuple[MapGroup, ...]:
    groups: dict[str, list[MapPicture]] = {}
    for entry in record.block_maps:
        title = f"{entry.pattern}, block {entry.block}, budget {tables.percent(entry.budget)}"
        groups.setdefault(title, []).append(map_picture(entry))
    return tuple(MapGroup(title, tuple(pictures)) for title, pictures in groups.items())


def escaped(table: tables.Table) -> tables.Table:
    """Give a table whose cells may stand in Markdown."""
    rows = tuple(
        tuple(tables.Cell(cell.text.replace("|", "\\|"), cell.kind) for cell in row)
        for row in table.rows
    )
    return tables.Table(table.caption, table.columns, rows)
