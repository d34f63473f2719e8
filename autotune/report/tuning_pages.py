"""Write the report of a tuning: HTML that needs nothing but itself, Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plotly.offline import get_plotlyjs

from spcomp.autotune.pin import line_to_paste
from spcomp.autotune.record import Row, Tuning
from spcomp.autotune.report import tuning_facts as facts
from spcomp.autotune.report import tuning_tables as tables
from spcomp.autotune.report.pages import Finding, escaped
from spcomp.autotune.report.plots import Plot
from spcomp.autotune.report.tables import NOTHING, Table, percent
from spcomp.autotune.report.tuning_json import to_json
from spcomp.autotune.report.tuning_plots import plots
from spcomp.codegen.render import render


@dataclass(frozen=True, slots=True)
class Winner:
    """A meaning's best schedule: what is known of it, and the line that pins it."""

    pattern: str
    words: str
    line: str


@dataclass(frozen=True, slots=True)
class Section:
    """The candidates of a meaning."""

    pattern: str
    groups: tuple[tables.Group, ...]


@dataclass(frozen=True, slots=True)
class TuningHtmlContext:
    """Values of ``templates/report/tuning.html.jinja``; ``plotly_js`` is the whole library."""

    title: str
    subtitle: str
    warnings: tuple[Finding, ...]
    findings: tuple[Finding, ...]
    winners: tuple[Winner, ...]
    plots: tuple[Plot, ...]
    meanings: Table
    sections: tuple[Section, ...]
    environment: Table
    notes: tuple[str, ...]
    has_winners: bool
    has_notes: bool
    plotly_js: str


@dataclass(frozen=True, slots=True)
class TuningMarkdownContext:
    """Values of ``templates/report/tuning.md.jinja``; '|' in a cell is already escaped."""

    title: str
    subtitle: str
    warnings: tuple[Finding, ...]
    findings: tuple[Finding, ...]
    winners: tuple[Winner, ...]
    meanings: Table
    sections: tuple[Section, ...]
    environment: Table
    notes: tuple[str, ...]
    has_winners: bool
    has_notes: bool


def write_all(tunings: Sequence[Tuning], folder: Path) -> tuple[Path, Path, Path]:
    """Write report.html, report.json and report.md into a folder, making it where needed.

    tunings: one a meaning, at least one. Raises: OSError.
    """
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
    notes, best = notes_of(tunings), winners(tunings)
    return TuningHtmlContext(
        title=title(tunings),
        subtitle=subtitle(tunings),
        warnings=warnings(tunings),
        findings=findings(tunings),
        winners=best,
        plots=plots(tunings),
        meanings=tables.meaning_table(tunings),
        sections=tuple(Section(one.call.pattern, tables.groups(one)) for one in tunings),
        environment=tables.environment_table(tunings),
        notes=notes,
        has_winners=bool(best),
        has_notes=bool(notes),
        plotly_js=get_plotlyjs(),
    )


def markdown_context(tunings: tuple[Tuning, ...]) -> TuningMarkdownContext:
    """Lay tunings out for Markdown, where nothing is folded away."""
    notes, best = notes_of(tunings), winners(tunings)
    return TuningMarkdownContext(
        title=title(tunings),
        subtitle=subtitle(tunings),
        warnings=warnings(tunings),
        findings=findings(tunings),
        winners=best,
        meanings=escaped(tables.meaning_table(tunings)),
        sections=tuple(Section(one.call.pattern, _unfolded(one)) for one in tunings),
        environment=escaped(tables.environment_table(tunings)),
        notes=notes,
        has_winners=bool(best),
        has_notes=bool(notes),
    )


def title(tunings: Sequence[Tuning]) -> str:
    """Name the pattern that was tuned, with its hyper-parameters where there is one meaning."""
    pattern = tunings[0].call.pattern
    return f"Tuning of {pattern if len(tunings) == 1 else pattern.partition('(')[0]}"


def subtitle(tunings: Sequence[Tuning]) -> str:
    """Name the call and the device in one line."""
    call = tunings[0].call
    shape = ", ".join(f"{name} {size}" for name, size in call.shape.items())
    where = call.device if call.device != "none" else f"no card, for {call.target}"
    return f"{call.phase} of {shape}, {call.dtype}; {where}"


def warnings(tunings: Sequence[Tuning]) -> tuple[Finding, ...]:
    """Give what a reader must know before any figure."""
    found = []
    best = [one for one in tunings if one.best is not None]
    untimed = [one.call.pattern for one in best if not facts.is_timed(one)]
    if untimed:
        where = "no card was there" if tunings[0].call.device == "none" else "no time was taken"
        whose = "every time on this page" if len(untimed) == len(best) else ", ".join(untimed)
        words = f"{where}: {whose} is predicted"
        found.append(Finding("Ranked by the cost model, not timed", words))
    for one in tunings:
        if one.best is None:
            words = f"none of {facts.counted(len(one.rows))} came out right; the tables say why"
            found.append(Finding("No winner", f"{one.call.pattern}: {words}"))
    if any(one.is_partial for one in tunings):
        skipped = sum(1 for one in tunings for row in one.rows if row.status == "skipped")
        words = f"the search ended early, and {facts.counted(skipped)} had no turn"
        found.append(Finding("Partial", words))
    return tuple(found)


def findings(tunings: Sequence[Tuning]) -> tuple[Finding, ...]:
    """Choose the figures the report leads with."""
    best = [one for one in tunings if one.best is not None and math.isfinite(_best_ms(one))]
    best = [one for one in best if facts.is_timed(one)] or best
    if not best:
        return ()
    fastest = min(best, key=_best_ms)
    name = "" if len(tunings) == 1 else f": {facts.setting_of(fastest)}"
    kind = "measured" if facts.is_timed(fastest) else "predicted"
    found = [Finding(_ms(_best_ms(fastest)), f"best schedule, {kind}{name}")]
    if (ratio := facts.against_dense(fastest)) != NOTHING:
        found.append(Finding(ratio, f"faster than dense attention, {kind}{name}"))
    if (gain := _gain(fastest)) is not None:
        found.append(Finding(f"{gain:.2f}×", f"faster than the default schedule{name}"))
    if (second := facts.runner_up(fastest)) is not None:
        found.append(_runner_up(fastest, *second, name))
    if kept := [one for one in best if facts.leaves_out(one)]:
        found.append(_most_kept(kept, is_alone=len(tunings) == 1))
    return tuple(found)


def winners(tunings: Sequence[Tuning]) -> tuple[Winner, ...]:
    """Give the winner of each meaning, with the line that pins it."""
    return tuple(
        Winner(
            one.call.pattern,
            _winner_words(one),
            line_to_paste(one.call.pattern, one.best.candidate),
        )
        for one in tunings
        if one.best is not None
    )


def notes_of(tunings: Sequence[Tuning]) -> tuple[str, ...]:
    """Give every note once."""
    return tuple(dict.fromkeys(note for one in tunings for note in one.notes))


def _best_ms(tuning: Tuning) -> float:
    assert tuning.best is not None
    return facts.time_of(tuning.best)


def _gain(tuning: Tuning) -> float | None:
    """Give how many times faster than the default schedule the best one is, if it is another."""
    default = facts.default_of(tuning)
    if default is None or default.status != "ok":
        return None
    return facts.time_of(default) / _best_ms(tuning)


def _runner_up(tuning: Tuning, second: Row, noise_ms: float, name: str) -> Finding:
    apart = facts.time_of(second) - _best_ms(tuning)
    if apart > noise_ms:
        words = f"to the runner-up, where the noise is {_ms(noise_ms)}{name}"
        return Finding(f"+{_ms(apart)}", words)
    words = f"with the runner-up: {_ms(abs(apart))} apart, where the noise is {_ms(noise_ms)}{name}"
    return Finding("a tie", words)


def _most_kept(kept: Sequence[Tuning], is_alone: bool) -> Finding:
    most = max(kept, key=lambda one: one.kept.mass_mean if one.kept is not None else 0.0)
    assert most.kept is not None
    source = "of random input" if facts.is_random(most) else "of the sample"
    what = (
        f"of dense attention's probability kept over the first {most.kept.tokens} tokens {source}"
    )
    name = "" if is_alone else f", the most of all: {facts.setting_of(most)}"
    return Finding(percent(most.kept.mass_mean), what + name)


def _winner_words(tuning: Tuning) -> str:
    """Say in a sentence how sure the choice is."""
    best, second, gain = tuning.best, facts.runner_up(tuning), _gain(tuning)
    assert best is not None
    spread = "" if best.spread_ms is None else f" (spread {_ms(best.spread_ms)})"
    kind = "measured" if facts.is_timed(tuning) else "predicted"
    words = [f"{_ms(_best_ms(tuning))}{spread} {kind}"]
    if (ratio := facts.against_dense(tuning)) != NOTHING:
        words.append(f"{ratio} faster than dense attention")
    if facts.default_of(tuning) is best:
        words.append("the default schedule itself")
    elif gain is not None:
        words.append(f"{gain:.2f}× faster than the default schedule")
    text = ", ".join(words) + "."
    return text if second is None else f"{text} {_runner_up_words(best, *second)}"


def _runner_up_words(best: Row, second: Row, noise_ms: float) -> str:
    apart = facts.time_of(second) - facts.time_of(best)
    if apart > noise_ms:
        return f"The runner-up takes {_ms(apart)} more, where the noise is {_ms(noise_ms)}."
    side = "more" if apart >= 0 else "less"
    return (
        f"The runner-up takes {_ms(abs(apart))} {side}, which is within the noise of "
        f"{_ms(noise_ms)}: equal ones are taken in a fixed order."
    )


def _ms(value: float) -> str:
    """Write milliseconds; a no-break space keeps the figure and its unit on one line."""
    return f"{facts.ms(value)}\u00a0ms"


def _unfolded(tuning: Tuning) -> tuple[tables.Group, ...]:
    found = []
    for group in tables.groups(tuning, most_shown=len(tuning.rows)):
        shown = escaped(group.shown if group.has_shown else group.folded)
        found.append(tables.Group(shown, group.folded, has_shown=True, has_folded=False))
    return tuple(found)
