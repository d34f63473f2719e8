"""What a tuning says, a figure or a name at a time; tables, plots and pages say the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spcomp.autotune.record import RIGHT, Candidate, Row, Status, Tuning, noise_ms
from spcomp.autotune.report.tables import NOTHING

TRIED: tuple[Status, ...] = ("best", "ok", "wrong", "failed", "timeout")
"""Statuses of candidates that had their turn; the others are ruled out or were not reached."""

PLACE = {status: place for place, status in enumerate((*TRIED, "refused", "pruned", "skipped"))}


def is_timed(tuning: Tuning) -> bool:
    """Tell whether the winner was measured; else it was ranked by the cost model."""
    return tuning.best is not None and tuning.best.median_ms is not None


def is_random(tuning: Tuning) -> bool:
    """Tell whether the sample was random; then what it keeps says nothing of a model."""
    return tuning.call.sample.startswith("random")


def leaves_out(tuning: Tuning) -> bool:
    """Tell whether what is kept of attention was looked at, and over enough tokens for the pattern
    to leave anything out."""
    return tuning.kept is not None and tuning.kept.density < 1.0


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Order rows: the best, the right ones by time, then the others by what became of them."""
    return sorted(rows, key=lambda row: (PLACE[row.status], time_of(row)))


def time_of(row: Row) -> float:
    """Give the time a row is ranked by, in ms; infinite where there is none."""
    found = row.median_ms if row.median_ms is not None else row.predicted_ms
    return math.inf if found is None else found


def default_of(tuning: Tuning) -> Row | None:
    """Give the row of the default schedule."""
    return next((row for row in tuning.rows if row.candidate == Candidate(None, ())), None)


def runner_up(tuning: Tuning) -> tuple[Row, float] | None:
    """Give the second of the timed rows, and the noise between it and the best, in ms."""
    right = [row for row in ordered(tuning.rows) if row.status in RIGHT]
    timed = [row for row in right if row.median_ms is not None]
    return (timed[1], noise_ms(timed[0], timed[1])) if len(timed) > 1 else None


def changed(candidate: Candidate) -> str:
    """Name a candidate's schedule: the axes of every kernel that differs, or 'default'."""
    kernels = (f"{k}: " + " ".join(f"{n}={v}" for n, v in axes) for k, axes in candidate.axes)
    return "; ".join(kernels) or "default"


def setting_of(tuning: Tuning) -> str:
    """Give what sets a meaning apart: its hyper-parameters without the pattern's name."""
    name, _, inner = tuning.call.pattern.partition("(")
    return inner.removesuffix(")") or name


def ms(value: float | None) -> str:
    """Write milliseconds to a tenth of a microsecond."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.4f}"


def against_dense(tuning: Tuning) -> str:
    """Write how many times faster than dense attention the best schedule is."""
    best = tuning.best
    if best is None:
        return NOTHING
    return ratio(dense_ms_for(tuning, not is_timed(tuning)), best)


def dense_ms_for(tuning: Tuning, is_predicted: bool) -> float | None:
    """Give dense attention's time if it is of the same kind: a measured time is never set against a
    predicted one."""
    return tuning.dense_ms if is_predicted != is_timed(tuning) else None


def ratio(reference_ms: float | None, row: Row) -> str:
    """Write how many times faster than a reference a row is."""
    time = time_of(row)
    return f"{reference_ms / time:.2f}×" if reference_ms and 0 < time < math.inf else NOTHING


def counted(count: int, more: str = "") -> str:
    """Write a number of candidates."""
    return f"{count} {more}candidate{'' if count == 1 else 's'}"
