"""What tuning leaves behind, as values: which call was tuned, and a row for every candidate.

A candidate is one way to run one meaning: a loop order and values of schedule axes. Its row says
how far it got and why it went no further, so that no candidate disappears without a reason."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from spcomp.autotune.report.record import Rung
from spcomp.ir.plan import Axes, LoopOrder, Phase
from spcomp.ir.schedule import KernelAxes

SCHEMA = 1
"""Version of the file form; it grows when a field changes its meaning or goes."""

Status: TypeAlias = Literal[
    "best", "ok", "wrong", "refused", "failed", "timeout", "pruned", "skipped"
]
"""
| status | meaning |
|---|---|
| best | the one to take |
| ok | right, and timed or ranked |
| wrong | differs from the reference |
| refused | spcomp will not build it |
| failed | the compiler of kernels or the launch raised |
| timeout | it hung, and cost its process |
| pruned | not tried, since the cost model rules it out |
| skipped | not tried, since the time was up or the search was stopped |
"""

FINAL: tuple[Status, ...] = ("best", "ok", "wrong", "refused", "failed", "timeout")
"""What need not be tried again for the same call."""


@dataclass(frozen=True, slots=True)
class TunedCall:
    """What a tuning belongs to, and the only thing its results are used for.

    pattern: its title with every hyper-parameter; program_sha256: of its IR text; tables_sha256: of
    the tensors it captured, "" without any; shape: B, Hq, Hkv, Sq, Skv, D, Dv; device: the card's
    name, or "none" where candidates are ranked by the cost model; toolchain: versions by name
    (spcomp, torch, triton, …); sample: "random, seed 0", or the SHA-256 of the tensors given."""

    pattern: str
    program_sha256: str
    tables_sha256: str
    phase: Phase
    shape: Mapping[str, int]
    dtype: str
    backend: str
    target: str
    device: str
    toolchain: Mapping[str, str]
    sample: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A loop order (None: the lowering chooses) and the axes of every kernel that differs from the
    backend's default, all axes of such a kernel written out. () is the default schedule."""

    order: LoopOrder | None
    axes: KernelAxes

    def with_kernel(self, kernel: str, axes: Axes) -> Candidate:
        """Give the candidate with other axes of one kernel."""
        return replace(self, axes=tuple(sorted({**dict(self.axes), kernel: axes}.items())))


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a candidate.

    rung: the highest one reached; of a row that was not tried, the lowest there is. reason: empty
    for best and ok. predicted_ms: the cost model's roofline. median_ms, spread_ms (distance between
    the quartiles) and runs: of the whole call on the device. error and allowed: against the
    reference. spill_bytes: of all its kernels, where the compiler told."""

    candidate: Candidate
    status: Status
    rung: Rung
    reason: str = ""
    predicted_ms: float | None = None
    median_ms: float | None = None
    spread_ms: float | None = None
    runs: int | None = None
    error: float | None = None
    allowed: float | None = None
    spill_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """How much of dense attention the pattern keeps on the first `tokens` tokens of the sample;
    mass as in `spcomp.autotune.fidelity`, density the visible share of causal pairs."""

    tokens: int
    mass_mean: float
    mass_p5: float
    out_error: float
    density: float


@dataclass(frozen=True, slots=True)
class Tuning:
    """All that is known of one call. Without a card, times are predicted and `kept` may be None.

    rows: one for each candidate, in the fixed order (`precedence`), as `settled` leaves them.
    is_partial: the budget ended or the user stopped it before every candidate had its turn.
    elapsed_s: of all its sessions; seed and created (ISO 8601, UTC): of the last one.
    dense_ms: dense causal attention of the same call, measured or (no card) predicted."""

    call: TunedCall
    rows: tuple[Row, ...]
    is_partial: bool
    seed: int
    elapsed_s: float
    dense_ms: float | None = None
    dense_by: str = ""
    kept: Kept | None = None
    notes: tuple[str, ...] = ()
    created: str = ""

    @property
    def best(self) -> Row | None:
        """The row to take, or None where every candidate failed."""
        return next((row for row in self.rows if row.status == "best"), None)


# ---- which one to take ---------------------------------------------------------------------------

LEAST_NOISE = 0.01
"""Share of the lowest median below which two measured times count as equal."""

PREDICTED_NOISE = 0.05
"""The same for times of the cost model, which knows nothing of latency, warps and stages."""

RIGHT: tuple[Status, ...] = ("best", "ok")


def precedence(candidate: Candidate) -> tuple[Any, ...]:
    """Give a candidate's place in the one fixed order, which no seed and no time changes.

    The default schedule comes first; the lowering's own loop order before those that are asked for;
    fewer changed kernels before more; then axes by name and value.
    """
    order = 0 if candidate.order is None else 1 + get_args(LoopOrder).index(candidate.order)
    return order, len(candidate.axes), candidate.axes


def noise_ms(row: Row, other: Row) -> float:
    """Give the difference of two measured medians that says nothing: the larger half spread of the
    two, at least 1 % of the lower median."""
    assert row.median_ms is not None and other.median_ms is not None
    spreads = (row.spread_ms or 0.0, other.spread_ms or 0.0)
    return max(max(spreads) / 2, LEAST_NOISE * min(row.median_ms, other.median_ms))


def winner(rows: Iterable[Row]) -> Row | None:
    """Give the row to take, or None where no candidate came out right.

    Among right rows, those whose median is within the noise of the lowest one count as equal, and
    the first of them in the fixed order is taken, so that noise changes no choice. Where nothing
    was measured, predicted times decide in the same way; a measured row beats every predicted one.
    """
    right = sorted(
        (row for row in rows if row.status in RIGHT), key=lambda row: precedence(row.candidate)
    )
    timed = [row for row in right if row.median_ms is not None]
    if timed:
        lowest = min(timed, key=_measured)
        return next(
            row for row in timed if _measured(row) - _measured(lowest) <= noise_ms(row, lowest)
        )
    limit = min(map(_predicted, right), default=math.inf) * (1 + PREDICTED_NOISE)
    return next((row for row in right if _predicted(row) <= limit), None)


def settled(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Give the rows in the fixed order: one for each candidate (of several, the last), the one to
    take as `best` and every other right one as `ok`."""
    last = {row.candidate: row for row in rows}
    best = winner(last.values())
    ordered = sorted(last.values(), key=lambda row: precedence(row.candidate))
    return tuple(_marked(row, row is best) for row in ordered)


def _marked(row: Row, is_best: bool) -> Row:
    return replace(row, status="best" if is_best else "ok") if row.status in RIGHT else row


def _measured(row: Row) -> float:
    assert row.median_ms is not None
    return row.median_ms


def _predicted(row: Row) -> float:
    return math.inf if row.predicted_ms is None else row.predicted_ms
