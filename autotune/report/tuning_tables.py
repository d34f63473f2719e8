"""A tuning as tables: every candidate one row with its reason, for pages and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from spcomp.autotune.pin import line_to_paste
from spcomp.autotune.record import RIGHT, Row, Status, Tuning
from spcomp.autotune.report.tables import NOTHING, Cell, Column, Table, percent
from spcomp.autotune.report.tuning_facts import (
    TRIED,
    against_dense,
    changed,
    counted,
    default_of,
    dense_ms_for,
    is_random,
    is_timed,
    leaves_out,
    ms,
    ordered,
    ratio,
    time_of,
)

GROUPS: tuple[tuple[str, tuple[Status, ...]], ...] = (
    ("that came out right", RIGHT),
    ("that did not come out right", ("wrong", "failed", "timeout")),
    ("that spcomp refuses to build", ("refused",)),
    ("that the cost model ruled out", ("pruned",)),
    ("that had no turn", ("skipped",)),
)
"""What a reader looks for apart: the words for a group of statuses."""

MOST_SHOWN = 20
"""Rows of a table that are in view at once; a reader opens the others."""

MOST_PRINTED = 10
"""The same for a terminal."""


@dataclass(frozen=True, slots=True)
class _Figure:
    """A column, and how a row fills it."""

    column: Column
    cell: Callable[[Row, Tuning], Cell]


def _plain(text: Callable[[Row], str], kind: str = "number") -> Callable[[Row, Tuning], Cell]:
    return lambda row, tuning: Cell(text(row), kind)


def _against(reference_ms: Callable[[Tuning, bool], float | None]) -> Callable[[Row, Tuning], Cell]:
    def cell(row: Row, tuning: Tuning) -> Cell:
        is_predicted = row.median_ms is None
        text = ratio(reference_ms(tuning, is_predicted), row)
        return Cell(text, "predicted" if is_predicted else "number")

    return cell


def _default_ms(tuning: Tuning, is_predicted: bool) -> float | None:
    default = default_of(tuning)
    if default is None or default.status not in RIGHT:
        return None
    return default.predicted_ms if is_predicted else default.median_ms


SCHEDULE = (
    _Figure(
        Column("schedule", "all axes of the kernels that differ from the default", is_number=False),
        _plain(lambda row: changed(row.candidate), "text"),
    ),
    _Figure(
        Column("order", "loop order; 'chosen' is the lowering's own choice", is_number=False),
        _plain(lambda row: row.candidate.order or "chosen", "name"),
    ),
)
PREDICTED = _Figure(
    Column("predicted ms", "of the whole call, by the cost model's roofline"),
    _plain(lambda row: ms(row.predicted_ms), "predicted"),
)
RUNG = _Figure(
    Column("rung", "how far it got", is_number=False),
    lambda row, tuning: Cell(row.rung, f"rung rung-{row.rung}"),
)
STATUS = _Figure(
    Column("status", "what became of it", is_number=False),
    lambda row, tuning: Cell(row.status, "best" if row.status == "best" else "name"),
)
RIGHT_FIGURES = (
    *SCHEDULE,
    _Figure(
        Column("median ms", "of the whole call on the device"),
        _plain(lambda row: ms(row.median_ms)),
    ),
    _Figure(
        Column("spread ms", "between the quartiles of its runs"),
        _plain(lambda row: ms(row.spread_ms)),
    ),
    _Figure(
        Column("vs dense", "how many times faster than dense causal attention"),
        _against(dense_ms_for),
    ),
    _Figure(
        Column("vs default", "how many times faster than the default schedule"),
        _against(_default_ms),
    ),
    PREDICTED,
    _Figure(
        Column("error", "against the reference, over all rows but 0.5 %"),
        _plain(lambda row: NOTHING if row.error is None else f"{row.error:.1e}"),
    ),
    _Figure(
        Column("spills", "bytes of registers spilled to memory, of all its kernels"),
        _plain(lambda row: NOTHING if row.spill_bytes is None else str(row.spill_bytes)),
    ),
    RUNG,
    STATUS,
)
OTHER_FIGURES = (
    *SCHEDULE,
    PREDICTED,
    RUNG,
    STATUS,
    _Figure(
        Column("reason", "why it went no further", is_number=False),
        _plain(lambda row: row.reason, "text"),
    ),
)

MEANING_COLUMNS = (
    Column("pattern", "with its hyper-parameters", is_number=False),
    Column("ms", "of the best schedule"),
    Column("vs dense", "how many times faster than dense causal attention"),
    Column("mass mean", "dense attention probability kept, mean over rows and heads"),
    Column("p5", "the same at the 5th percentile of rows"),
    Column("output error", "relative Frobenius norm against dense attention"),
    Column("density", "visible pairs over causal pairs"),
    Column("tried", "candidates that had their turn, of all"),
)


@dataclass(frozen=True, slots=True)
class Group:
    """The candidates of one fate: those in view, and those a reader opens."""

    shown: Table
    folded: Table
    has_shown: bool
    has_folded: bool


def groups(tuning: Tuning, most_shown: int = MOST_SHOWN) -> tuple[Group, ...]:
    """Lay out every candidate, grouped by what became of it.

    What had no turn is folded whole; of the others the first `most_shown` rows are in view.
    """
    found = []
    for words, statuses in GROUPS:
        rows = [row for row in ordered(tuning.rows) if row.status in statuses]
        if not rows:
            continue
        shown = rows[: most_shown if statuses[0] in TRIED else 0]
        folded = rows[len(shown) :]
        figures = RIGHT_FIGURES if statuses is RIGHT else OTHER_FIGURES
        more = "more " if shown else ""
        found.append(
            Group(
                _table(f"{counted(len(rows))} {words}", figures, shown, tuning),
                _table(f"{counted(len(folded), more)} {words}", figures, folded, tuning),
                has_shown=bool(shown),
                has_folded=bool(folded),
            )
        )
    return tuple(found)


def meaning_table(tunings: Sequence[Tuning]) -> Table:
    """Lay out one row a meaning: its best schedule, and what it keeps of attention."""
    return Table("Every meaning", MEANING_COLUMNS, tuple(_meaning(one) for one in tunings))


def environment_table(tunings: Sequence[Tuning]) -> Table:
    """Lay out what the figures belong to."""
    call = tunings[0].call
    shape = ", ".join(f"{name}={size}" for name, size in call.shape.items())
    entries = {
        "device": call.device if call.device != "none" else "no card: times are predicted",
        "target": call.target,
        "call": f"{call.phase}, {shape}, {call.dtype}",
        "sample": call.sample if is_random(tunings[0]) else f"given, SHA-256 {call.sample[:12]}",
        "density": _all(_density(one) for one in tunings),
        "attention kept": _all(_kept_over(one) for one in tunings if one.kept is not None),
        "dense attention": _all(
            f"{ms(one.dense_ms)} ms, {one.dense_by}" for one in tunings if one.dense_ms
        ),
        "backend": call.backend,
        **dict(call.toolchain),
        "seed": _all(str(one.seed) for one in tunings),
        "made": _all(one.created for one in tunings if one.created),
        "search": f"{sum(one.elapsed_s for one in tunings):.0f} s",
    }
    columns = (Column("what", "", is_number=False), Column("value", "", is_number=False))
    rows = tuple((Cell(name, "text"), Cell(value, "text")) for name, value in entries.items())
    return Table("What the figures belong to", columns, rows)


def text(tunings: Sequence[Tuning]) -> str:
    """Write the tunings for a terminal: the best rows of each meaning and the line to paste."""
    lines: list[str] = []
    for tuning in tunings:
        dense = f", dense {ms(tuning.dense_ms)} ms" if tuning.dense_ms else ""
        lines += ["", f"{tuning.call.pattern}{dense}"]
        shown = [row for row in ordered(tuning.rows) if row.status in TRIED][:MOST_PRINTED]
        for row in shown:
            reason = f"  {row.reason}" if row.reason else ""
            time = ms(time_of(row)) if row.status in RIGHT else NOTHING
            lines.append(
                f"  {row.status:<8} {time:>9} ms  {row.rung:<8} "
                f"{row.candidate.order or 'chosen'}  {changed(row.candidate)}{reason}"
            )
        left = len(tuning.rows) - len(shown)
        if left:
            lines.append(f"  … and {left} more, each with its reason in the report")
        lines += [f"  {note}" for note in tuning.notes]
        if tuning.best is not None:
            lines.append(f"  {line_to_paste(tuning.call.pattern, tuning.best.candidate)}")
    return "\n".join(lines[1:])


def _table(caption: str, figures: Sequence[_Figure], rows: Sequence[Row], tuning: Tuning) -> Table:
    cells = tuple(tuple(figure.cell(row, tuning) for figure in figures) for row in rows)
    return Table(caption, tuple(figure.column for figure in figures), cells)


def _meaning(tuning: Tuning) -> tuple[Cell, ...]:
    best, kept = tuning.best, tuning.kept
    tried = sum(1 for row in tuning.rows if row.status in TRIED)
    kind = "number" if is_timed(tuning) else "predicted"
    shares = [NOTHING] * 3
    if kept is not None:
        masses = (percent(kept.mass_mean, 2), percent(kept.mass_p5, 2))
        shares = [*masses, f"{kept.out_error:.2e}"]
    return (
        Cell(tuning.call.pattern, "text"),
        Cell(NOTHING if best is None else ms(time_of(best)), kind),
        Cell(against_dense(tuning), kind),
        *(Cell(share) for share in shares),
        Cell(_density(tuning)),
        Cell(f"{tried} of {len(tuning.rows)}"),
    )


def _kept_over(tuning: Tuning) -> str:
    assert tuning.kept is not None
    too_few = "" if leaves_out(tuning) else ", too few for the pattern to leave anything out"
    return f"over the first {tuning.kept.tokens} tokens{too_few}"


def _density(tuning: Tuning) -> str:
    return NOTHING if tuning.kept is None else percent(tuning.kept.density)


def _all(texts: Iterable[str]) -> str:
    """Join what the meanings say; what they agree on stands once."""
    return " / ".join(dict.fromkeys(texts)) or NOTHING
