"""How a pattern is run: the loop order and the axes of each kernel.

An axis is declared once, in the manifest beside the kernel templates
(`templates/<backend>/axes.json`), with its choices and default; a `Schedule` is a loop order plus a
frozen value for each axis of each kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NoReturn

from spcomp.errors import NegativeCount, UnknownChoice
from spcomp.ir.plan import Axes, LoopOrder

KernelAxes = tuple[tuple[str, Axes], ...]
AxisChanges = Mapping[str, Mapping[str, int]]
"""Values of some axes, by kernel and axis."""
AxisSpace = Mapping[str, Mapping[str, tuple[int, ...]]]
"""The values axes may take, by kernel and axis."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A loop order and the axis values of every kernel a backend may launch; `reason` says why.

    lacking: kernels of the chip that the tensors cannot have, and why."""

    order: LoopOrder
    kernels: KernelAxes
    reason: str = field(default="", compare=False)
    lacking: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def of(self, kernel: str) -> dict[str, int]:
        """Give the axes of one kernel."""
        return dict(dict(self.kernels).get(kernel, ()))

    def with_axes(self, kernel: str, **values: int) -> Schedule:
        """Give the schedule with some axes of one kernel changed."""
        merged = {**self.of(kernel), **values}
        kernels = {**dict(self.kernels), kernel: tuple(sorted(merged.items()))}
        return replace(self, kernels=tuple(sorted(kernels.items())))

    def changed(self, changes: AxisChanges) -> Schedule:
        """Give the schedule with other values of some axes.

        Raises: UnknownChoice for a kernel or an axis that is not there, NegativeCount below 1.
        """
        schedule = self
        for kernel, values in changes.items():
            known = schedule.of(kernel)
            if not known:
                _refuse("kernel", kernel, dict(schedule.kernels))
            for axis, value in values.items():
                if axis not in known:
                    _refuse("axis", f"{kernel}.{axis}", known)
                if value < 1:
                    raise NegativeCount(
                        verb="axes",
                        name=f"{kernel}.{axis}",
                        value=value,
                        least=1,
                        counts="what its manifest says",
                    )
            schedule = schedule.with_axes(kernel, **values)
        return schedule

    def __str__(self) -> str:
        return self.order


def frozen(axes: Mapping[str, Mapping[str, int]]) -> KernelAxes:
    """Freeze a table of kernel -> axis -> value."""
    return tuple((k, tuple(sorted(v.items()))) for k, v in sorted(axes.items()))


def _refuse(kind: str, name: str, known: Iterable[str]) -> NoReturn:
    raise UnknownChoice(verb="axes", name=f"the {kind}", value=name, choices=", ".join(known))
