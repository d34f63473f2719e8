"""One candidate without a device: its plan, why it cannot be built, and its predicted time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from spcomp.autotune.record import Candidate
from spcomp.backends.base import Backend, Specialisation, default_schedule
from spcomp.compiler import normalise
from spcomp.dsl.pattern import Pattern
from spcomp.dsl.tensors import canonical_lists
from spcomp.errors import SpcompError
from spcomp.ir import cost
from spcomp.ir.passes import cut
from spcomp.ir.plan import Axes, Phase, Plan
from spcomp.ir.target import Target


@dataclass(frozen=True, slots=True)
class Judged:
    """What is known of a candidate before it is tried.

    plan: None where lowering refuses. reason: why it is not to be tried, "" where it may be. times:
    the cost model's milliseconds by kernel, all its launches together."""

    plan: Plan | None
    reason: str = ""
    times: tuple[tuple[str, float], ...] = ()

    @property
    def predicted_ms(self) -> float:
        """The roofline of all launches, which run one after the other; infinite without a plan."""
        return sum(ms for _, ms in self.times) if self.times else math.inf

    def shares(self) -> dict[str, float]:
        """Give the share of each kernel in the predicted time."""
        whole = self.predicted_ms
        return {kernel: ms / whole for kernel, ms in self.times}


class Judge:
    """Lowers the candidates of one call and remembers each plan: callable, Candidate -> Judged.

    It takes the steps of `spcomp.compiler.lower`, but keeps a plan that the backend refuses, since
    which axes matter shows in the plan alone.
    """

    def __init__(
        self,
        pattern: Pattern,
        backend: Backend,
        target: Target,
        spec: Specialisation,
        phase: Phase,
        shape: Mapping[str, int],
    ) -> None:
        self._program = normalise(canonical_lists(pattern).program)
        self._backend, self._target, self._spec = backend, target, spec
        self._env = {**shape, "E": spec.element_bytes}
        self._schedule = default_schedule(backend, target, spec)
        self._judged: dict[Candidate, Judged] = {}
        self._of_plan: dict[Plan, Judged] = {}
        self.title = pattern.program.title()
        self.phase = phase

    def __call__(self, candidate: Candidate) -> Judged:
        """Judge a candidate.

        Raises: UnknownChoice for a kernel or an axis that the backend does not know.
        """
        if candidate not in self._judged:
            self._judged[candidate] = self._judge(candidate)
        return self._judged[candidate]

    def default_axes(self, kernel: str) -> dict[str, int]:
        """Give the axes a kernel has when nobody changes them."""
        return self._schedule.of(kernel)

    def axes_of(self, kernel: str, **changes: int) -> Axes:
        """Give all axes of a kernel with some of them changed, as a candidate holds them."""
        return tuple(sorted({**self._schedule.of(kernel), **changes}.items()))

    def _judge(self, candidate: Candidate) -> Judged:
        schedule = self._schedule.changed({k: dict(axes) for k, axes in candidate.axes})
        try:
            plan = cut(self._program, self.phase, schedule, candidate.order, self._spec.heads)
        except SpcompError as error:
            return Judged(None, first_line(error))
        if plan not in self._of_plan:
            refusal = self._backend.refuses(plan, self._target, self._spec)
            reason = "" if refusal is None else refusal.reason
            self._of_plan[plan] = Judged(plan, reason, self._times(plan))
        return self._of_plan[plan]

    def _times(self, plan: Plan) -> tuple[tuple[str, float], ...]:
        runs = cost.runs_of(plan, self._env, self._spec.element_bytes)
        times: dict[str, float] = {}
        for one, count in zip(cost.costs_of(plan), runs, strict=True):
            figures = cost.evaluate(one, self._env)
            ms = cost.roofline_ms(figures, self._target, self._spec.dtype, count)
            times[one.kernel] = times.get(one.kernel, 0.0) + ms
        return tuple(times.items())


def first_line(error: BaseException) -> str:
    """Give the class and the first line of an error, the class once."""
    name = type(error).__name__
    text = next(iter(str(error).strip().splitlines()), "").strip()
    if text == "" or text == name or text.startswith(f"{name}:"):
        return text or name
    return f"{name}: {text}"
