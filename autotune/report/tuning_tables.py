"""A tuning as tables: every candidate one row with its reason, for pages and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from spcomp.autotune.pin import line_to_paste
from spcomp.autotune.record import Candidate, Row, Status, Tuning, noise_ms
from spcomp.autotune.report.tables import NOTHING, Cell, Column, Table, percent

TRIED: tuple[Status, ...] = ("best", "ok", "wrong", "failed", "timeout")
"""Statuses of candidates that had their turn; the others are ruled out or were not reached."""

PLACE = {
    status: place
    for place, status in enumerate(
        ("best", "ok", "wrong", "failed", "timeout", "refused", "pruned", "skipped")
    )
}

COLUMNS = (
    Column("order", "loop order; 'chosen' is the lowering's own choice", is_number=False),
    Column("changed from the default", "axes of the kernels that differ", is_number=False),
    Column("median", "ms of the whole call on the device"),
    Column("spread", "ms between the quartiles of its runs"),
    Column("vs dense", "how many times faster than dense causal attention"),
    Column("vs default", "how many times faster than the default schedule"),
    Column("predicted", "ms by the cost model's roofline"),
    Column("error", "against the reference, all rows but 0.5 %"),
    Column("rung", "how far it got", is_number=False),
    Column("status", "what became of it", is_number=False),
    Column("reason", "why it went no further", is_number=False),
)

MEANING_COLUMNS = (
    Column("pattern", "with its hyper-parameters", is_number=False),
    Column("ms", "of the best schedule"),
    Column("vs dense", "how many times faster than dense causal attention"),
    Column("mass mean", "dense attention probability kept, mean over rows and heads"),
    Column("p5", "the same at the 5th percentile of rows"),
    Column("density", "visible pairs over causal pairs"),
    Column("candidates", "tried of all"),
)


def is_timed(tuning: Tuning) -> bool:
    """Tell whether the winner was measured; else it was ranked by the cost model."""
    return tuning.best is not None and tuning.best.median_ms is not None


def candidate_table(tuning: Tuning, *, was_tried: bool) -> Table:
    """Lay out the candidates that had their turn, or those that had none."""
    rows = [row for row in ordered(tuning.rows) if (row.status in TRIED) == was_tried]
    words = "that were tried" if was_tried else "that were not tried"
    caption = f"{tuning.call.pattern}: {len(rows)} candidates {words}"
    return Table(caption, COLUMNS, tuple(_cells(row, tuning) for row in rows))


def meaning_table(tunings: Sequence[Tuning]) -> Table:
    """Lay out one row a meaning: its best schedule, and what it keeps of attention."""
    return Table("Every meaning", MEANING_COLUMNS, tuple(_meaning(one) for one in tunings))


def environment_table(tunings: Sequence[Tuning]) -> Table:
    """Lay out what the figures belong to."""
    tuning = tunings[0]
    call = tuning.call
    shape = ", ".join(f"{name}={size}" for name, size in call.shape.items())
    is_random = call.sample.startswith("random")
    dense = f"{_ms(tuning.dense_ms)} ms, {tuning.dense_by}" if tuning.dense_ms else NOTHING
    entries = {
        "device": call.device if call.device != "none" else "no card: times are predicted",
        "target": call.target,
        "call": f"{call.phase}, {shape}, {call.dtype}",
        "sample": call.sample if is_random else f"given, SHA-256 {call.sample[:12]}",
        "density": " / ".join(_density(one) for one in tunings),
        "dense attention": dense,
        **dict(call.toolchain),
        "seed": str(tuning.seed),
        "made": f"{tuning.created} in {sum(one.elapsed_s for one in tunings):.0f} s",
    }
    columns = (Column("what", "", is_number=False), Column("value", "", is_number=False))
    rows = tuple((Cell(name, "text"), Cell(value, "text")) for name, value in entries.items())
    return Table("What the figures belong to", columns, rows)


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Order rows: the best, the right ones by time, then the others by what became of them."""
    return sorted(rows, key=lambda row: (PLACE[row.status], time_of(row)))


def time_of(row: Row) -> float:
    """Give the time a row is ranked by."""
    found = row.median_ms if row.median_ms is not None else row.predicted_ms
    return float("inf") if found is None else found


def default_of(tuning: Tuning) -> Row | None:
    """Give the row of the default schedule."""
    return next((row for row in tuning.rows if row.candidate == Candidate(None, ())), None)


def runner_up(tuning: Tuning) -> tuple[Row, float] | None:
    """Give the second of the timed rows, and the noise between it and the best, in ms."""
    right = [row for row in ordered(tuning.rows) if row.status in ("best", "ok")]
    timed = [row for row in right if row.median_ms is not None]
    return (timed[1], noise_ms(timed[0], timed[1])) if len(timed) > 1 else None


def changed(candidate: Candidate) -> str:
    """Name a candidate's schedule: what it changes, or 'default'."""
    kernels = (f"{k}: " + " ".join(f"{n}={v}" for n, v in axes) for k, axes in candidate.axes)
    return "; ".join(kernels) or "default"


def text(tunings: Sequence[Tuning]) -> str:
    """Write the tunings for a terminal: the best rows of each meaning and the line to paste."""
    lines: list[str] = []
    for tuning in tunings:
        dense = f", dense {_ms(tuning.dense_ms)} ms" if tuning.dense_ms else ""
        lines += ["", f"{tuning.call.pattern}{dense}"]
        shown = [row for row in ordered(tuning.rows) if row.status in TRIED]
        for row in shown[:10]:
            reason = f"  {row.reason}" if row.reason else ""
            lines.append(
                f"  {row.status:<8} {_ms(time_of(row)):>9} ms  {row.rung:<8} "
                f"{row.candidate.order or 'chosen'}  {changed(row.candidate)}{reason}"
            )
        left = len(tuning.rows) - len(shown[:10])
        if left:
            lines.append(f"  … and {left} more, each with its reason in the report")
        lines += [f"  {note}" for note in tuning.notes]
        if tuning.best is not None:
            lines.append(f"  {line_to_paste(tuning.call.pattern, tuning.best.candidate)}")
    return "\n".join(lines[1:])


def _cells(row: Row, tuning: Tuning) -> tuple[Cell, ...]:
    default = default_of(tuning)
    predicted = row.median_ms is None
    kind = "predicted" if predicted else "number"
    return (
        Cell(row.candidate.order or "chosen", "text"),
        Cell(changed(row.candidate), "text"),
        Cell(_ms(row.median_ms)),
        Cell(_ms(row.spread_ms)),
        Cell(_ratio(tuning.dense_ms, row, predicted), kind),
        Cell(_ratio(None if default is None else time_of(default), row, predicted), kind),
        Cell(_ms(row.predicted_ms), "predicted"),
        Cell(NOTHING if row.error is None else f"{row.error:.1e}"),
        Cell(row.rung, f"rung rung-{row.rung}"),
        Cell(row.status, "best" if row.status == "best" else "text"),
        Cell(row.reason, "text"),
    )


def _meaning(tuning: Tuning) -> tuple[Cell, ...]:
    best, kept = tuning.best, tuning.kept
    tried = sum(1 for row in tuning.rows if row.status in TRIED)
    kind = "number" if is_timed(tuning) else "predicted"
    shares = (NOTHING, NOTHING)
    if kept is not None:
        shares = (percent(kept.mass_mean, 2), percent(kept.mass_p5, 2))
    ratio = NOTHING if best is None else _ratio(tuning.dense_ms, best, not is_timed(tuning))
    return (
        Cell(tuning.call.pattern, "text"),
        Cell(NOTHING if best is None else _ms(time_of(best)), kind),
        Cell(ratio, kind),
        *(Cell(share) for share in shares),
        Cell(_density(tuning)),
        Cell(f"{tried} of {len(tuning.rows)}"),
    )


def _ratio(reference_ms: float | None, row: Row, is_predicted: bool) -> str:
    """Compare like with like: a measured time is never set against a predicted one."""
    if reference_ms is None or row.status not in ("best", "ok"):
        return NOTHING
    time = row.predicted_ms if is_predicted else row.median_ms
    return NOTHING if not time else f"{reference_ms / time:.2f}×"


def _density(tuning: Tuning) -> str:
    return NOTHING if tuning.kept is None else percent(tuning.kept.density)


def _ms(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"
