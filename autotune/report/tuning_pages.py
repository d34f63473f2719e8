"""Write the report of a tuning: HTML that needs nothing but itself, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plotly.offline import get_plotlyjs

from spcomp.autotune.pin import line_to_paste
from spcomp.autotune.record import Tuning
from spcomp.autotune.report import tuning_tables as tables
from spcomp.autotune.report.pages import Finding, escaped
from spcomp.autotune.report.plots import Plot
from spcomp.autotune.report.tables import Table
from spcomp.autotune.report.tuning_json import to_json
from spcomp.autotune.report.tuning_plots import plots
from spcomp.codegen.render import render


@dataclass(frozen=True, slots=True)
class Pinned:
    """A meaning, and the line that pins its winner."""

    pattern: str
    line: str


@dataclass(frozen=True, slots=True)
class TuningHtmlContext:
    """Values of ``templates/report/tuning.html.jinja``; ``plotly_js`` is the whole library."""

    title: str
    subtitle: str
    findings: tuple[Finding, ...]
    pinned: tuple[Pinned, ...]
    plots: tuple[Plot, ...]
    meanings: Table
    tried: tuple[Table, ...]
    untried: tuple[Table, ...]
    environment: Table
    notes: tuple[str, ...]
    has_notes: bool
    plotly_js: str


@dataclass(frozen=True, slots=True)
class TuningMarkdownContext:
    """Values of ``templates/report/tuning.md.jinja``; '|' in a cell is already escaped."""

    title: str
    subtitle: str
    findings: tuple[Finding, ...]
    pinned: tuple[Pinned, ...]
    meanings: Table
    tried: tuple[Table, ...]
    untried: tuple[Table, ...]
    environment: Table
    notes: tuple[str, ...]
    has_notes: bool


def write_all(tunings: Sequence[Tuning], folder: Path) -> tuple[Path, Path, Path]:
    """Write report.html, report.json and report.md into a folder, making it where needed."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "report.html", folder / "report.json", folder / "report.md")
    held = tuple(tunings)
    texts = (
        render("report/tuning.html.jinja", html_context(held)),
        to_json(held),
        render("report/tuning.md.jinja", markdown_context(held)),
    )
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def html_context(tunings: tuple[Tuning, ...]) -> TuningHtmlContext:
    """Lay tunings out for the page."""
    notes = notes_of(tunings)
    return TuningHtmlContext(
        title=title(tunings),
        subtitle=subtitle(tunings),
        findings=findings(tunings),
        pinned=pinned(tunings),
        plots=plots(tunings),
        meanings=tables.meaning_table(tunings),
        tried=tuple(tables.candidate_table(one, was_tried=True) for one in tunings),
        untried=_untried(tunings),
        environment=tables.environment_table(tunings),
        notes=notes,
        has_notes=bool(notes),
        plotly_js=get_plotlyjs(),
    )


def markdown_context(tunings: tuple[Tuning, ...]) -> TuningMarkdownContext:
    """Lay tunings out for Markdown."""
    notes = notes_of(tunings)
    return TuningMarkdownContext(
        title=title(tunings),
        subtitle=subtitle(tunings),
        findings=findings(tunings),
        pinned=pinned(tunings),
        meanings=escaped(tables.meaning_table(tunings)),
        tried=tuple(escaped(tables.candidate_table(one, was_tried=True)) for one in tunings),
        untried=tuple(escaped(table) for table in _untried(tunings)),
        environment=escaped(tables.environment_table(tunings)),
        notes=notes,
        has_notes=bool(notes),
    )


def title(tunings: Sequence[Tuning]) -> str:
    """Name the pattern that was tuned."""
    return f"Tuning of {tunings[0].call.pattern.partition('(')[0]}"


def subtitle(tunings: Sequence[Tuning]) -> str:
    """Name the call and the device in one line."""
    call = tunings[0].call
    shape = ", ".join(f"{name} {size}" for name, size in call.shape.items())
    where = call.device if call.device != "none" else f"no card, for {call.target}"
    return f"{call.phase} of {shape}, {call.dtype}; {where}"


def findings(tunings: Sequence[Tuning]) -> tuple[Finding, ...]:
    """Choose the figures the report leads with."""
    found: list[Finding] = []
    if not all(tables.is_timed(one) for one in tunings):
        found.append(Finding("not timed", "candidates are ranked by the cost model"))
    for one in tunings:
        best, default, second = one.best, tables.default_of(one), tables.runner_up(one)
        if best is None:
            continue
        name = one.call.pattern
        found.append(Finding(f"{tables.time_of(best):.4f} ms", f"{name}, best schedule"))
        if default is not None and default is not best and default.status == "ok":
            gain = tables.time_of(default) / tables.time_of(best)
            found.append(Finding(f"{gain:.2f}×", f"of the default schedule's speed, {name}"))
        if second is not None:
            apart = tables.time_of(second[0]) - tables.time_of(best)
            words = f"to the runner-up of {name}, where the noise is {second[1]:.4f} ms"
            found.append(Finding(f"{apart:+.4f} ms", words))
    if any(one.is_partial for one in tunings):
        found.append(Finding("partial", "some candidates had no turn; see their reasons below"))
    return tuple(found)


def pinned(tunings: Sequence[Tuning]) -> tuple[Pinned, ...]:
    """Give the lines that pin the winners."""
    return tuple(
        Pinned(one.call.pattern, line_to_paste(one.call.pattern, one.best.candidate))
        for one in tunings
        if one.best is not None
    )


def notes_of(tunings: Sequence[Tuning]) -> tuple[str, ...]:
    """Give every note once."""
    return tuple(dict.fromkeys(note for one in tunings for note in one.notes))


def _untried(tunings: Sequence[Tuning]) -> tuple[Table, ...]:
    made = (tables.candidate_table(one, was_tried=False) for one in tunings)
    return tuple(table for table in made if table.rows)
