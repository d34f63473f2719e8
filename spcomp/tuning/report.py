"""What a tuning gives: the figures of every candidate, the line to paste, the pinned callable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from spcomp import api
from spcomp.autotune.pin import line_to_paste
from spcomp.autotune.record import Candidate, Row, Tuning
from spcomp.autotune.report import needs_plotly
from spcomp.backends import registry
from spcomp.backends.base import Specialisation, default_schedule
from spcomp.dsl.pattern import Pattern
from spcomp.errors import NothingToTune
from spcomp.tuning.setting import WITHOUT_DEVICE


@dataclass(frozen=True, slots=True)
class Tuned:
    """One meaning: the pattern, the backend it was tuned on, and all that is known of it.

    is_reused: nothing was tried this time, since the record knew every candidate."""

    pattern: Pattern
    backend: str
    tuning: Tuning
    is_reused: bool = False

    @property
    def best(self) -> Row:
        """The row to take.

        Raises: NothingToTune, where every candidate failed.
        """
        best = self.tuning.best
        if best is None:
            raise NothingToTune(
                pattern=self.tuning.call.pattern,
                why=f"none of its {len(self.tuning.rows)} candidates can be taken",
                way_out="the rows of the tuning say why; `fresh=True` tries them again.",
            )
        return best

    @property
    def ms(self) -> float:
        """Milliseconds of the winner: measured, or predicted where there was no card."""
        best = self.best
        found = best.median_ms if best.median_ms is not None else best.predicted_ms
        return math.inf if found is None else found

    @property
    def mass(self) -> float | None:
        """Mean attention probability that is kept, in [0, 1]; None where it was not measured."""
        return None if self.tuning.kept is None else self.tuning.kept.mass_mean

    def changes(self, candidate: Candidate) -> str:
        """Name a candidate by the axes that differ from the backend's default."""
        call = self.tuning.call
        spec = Specialisation(call.dtype, call.shape["D"], call.shape["Dv"])
        target = registry.target(call.target)
        default = default_schedule(registry.backend(call.backend), target, spec)
        kernels = []
        for kernel, axes in candidate.axes:
            usual = default.of(kernel)
            kernels.append(f"{kernel} {' '.join(f'{n}={v}' for n, v in axes if usual[n] != v)}")
        return ", ".join(kernels) or "default"


@dataclass(frozen=True, slots=True)
class TuningReport:
    """The result of `sp.tune`: one entry a meaning, the default meaning first.

    left_out: titles of meanings that had no turn, since the search was stopped."""

    tuned: tuple[Tuned, ...]
    left_out: tuple[str, ...] = ()

    @property
    def tunings(self) -> tuple[Tuning, ...]:
        """The records, one a meaning."""
        return tuple(one.tuning for one in self.tuned)

    @property
    def is_partial(self) -> bool:
        """Whether some candidates had no turn."""
        return bool(self.left_out) or any(tuning.is_partial for tuning in self.tunings)

    @property
    def best(self) -> Row:
        """The row of `choose()`."""
        return self.choose().best

    def choose(self, *, least_mass: float = 0.0) -> Tuned:
        """Give the fastest meaning among those that keep at least `least_mass` of dense attention.

        least_mass: mean attention probability kept, in [0, 1]; 0 takes any meaning. Where it was
        not measured, only 0 can be met.
        Raises: NothingToTune, with the most that any meaning keeps.
        """
        right = [one for one in self.tuned if one.tuning.best is not None]
        fitting = [one for one in right if (one.mass or 0.0) >= least_mass]
        if not fitting:
            known = [one.mass for one in right if one.mass is not None]
            most = f"the most is {max(known):.3f}" if known else "it was not measured"
            raise NothingToTune(
                pattern=self.tuned[0].pattern.name,
                why=f"no meaning keeps {least_mass:.3f} of attention ({most})",
                way_out="ask for less, or tune with other hyper-parameters and a sample.",
            )
        return min(fitting, key=lambda one: one.ms)

    def line(self, *, least_mass: float = 0.0) -> str:
        """Give the Python line that pins the winner."""
        chosen = self.choose(least_mass=least_mass)
        return line_to_paste(chosen.tuning.call.pattern, chosen.best.candidate)

    def compile(self, *, least_mass: float = 0.0) -> api.Attention:
        """Give the winner as a callable; its loop order and axes are pinned."""
        chosen = self.choose(least_mass=least_mass)
        candidate = chosen.best.candidate
        axes = {kernel: dict(values) for kernel, values in candidate.axes}
        backend = chosen.backend if chosen.tuning.call.device != WITHOUT_DEVICE else None
        return api.compile(chosen.pattern, backend=backend, order=candidate.order, axes=axes)

    def remarks(self) -> tuple[str, ...]:
        """Give what a reader has to know beside the rows."""
        reused = (one for one in self.tuned if one.is_reused)
        return (
            *(f"{o.tuning.call.pattern}: from the record of {o.tuning.created}" for o in reused),
            *(f"{title}: not tried, since the search was stopped" for title in self.left_out),
            *(("partial: not every candidate had its turn",) if self.is_partial else ()),
        )

    def write(self, folder: str | Path) -> tuple[Path, Path, Path]:
        """Write report.html, report.json and report.md into a folder, made where needed.

        Raises: MissingPackage, without plotly; OSError.
        """
        with needs_plotly():
            from spcomp.autotune.report import tuning_pages

        return tuning_pages.write_all(self.tunings, Path(folder))

    def __str__(self) -> str:
        from spcomp.autotune.report import tuning_tables

        return "\n".join((tuning_tables.text(self.tunings), *self.remarks()))
