"""What tuning leaves behind, as values: which call was tuned, and a row for every candidate.

A candidate is one way to run one meaning: a loop order and values of schedule axes. Its row says
how far it got and why it went no further, so that no candidate disappears without a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from spcomp.autotune.report.record import Rung
from spcomp.ir.plan import LoopOrder, Phase
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


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a candidate.

    reason: empty for best and ok. predicted_ms: the cost model's roofline. median_ms, spread_ms
    (distance between the quartiles) and runs: of the whole call on the device. error and allowed:
    against the reference. spill_bytes: of all its kernels, where the compiler told."""

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

    is_partial: the budget ended or the user stopped it before every candidate had its turn.
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

    @property
    def best(self) -> Row | None:
        """The row to take, or None where every candidate failed."""
        return next((row for row in self.rows if row.status == "best"), None)
