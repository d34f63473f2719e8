"""The reference backend: patterns and plans interpreted in plain torch.

It is an ordinary backend and the living definition of every stage and launch; it knows only `ir/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spcomp.backends.base import (
    Executable,
    Export,
    Refusal,
    Source,
    SourceFile,
    Specialisation,
)
from spcomp.backends.reference.axes import AXES, TORCH
from spcomp.errors import Refused
from spcomp.ir.plan import Plan
from spcomp.ir.schedule import AxisSpace, KernelAxes
from spcomp.ir.target import Target
from spcomp.ir.text import print_plan

if TYPE_CHECKING:
    from spcomp.ir.program import Program


class ReferenceBackend:
    """Plans and patterns in plain torch, on any device and in any float dtype."""

    name = "reference"

    def targets(self) -> Mapping[str, Target]:
        """The one target: whatever torch runs on."""
        return {TORCH.name: TORCH}

    def target_of(self, device: str) -> Target:
        """Give the target of a torch device, whichever it is."""
        return TORCH

    def axes(self, target: Target, spec: Specialisation) -> KernelAxes:
        """The schedule axes that shape a plan."""
        return AXES

    def lacking(self, target: Target, spec: Specialisation) -> Mapping[str, str]:
        """Everything it has runs."""
        return {}

    def space(self, target: Target, spec: Specialisation) -> AxisSpace:
        """One value an axis: what shapes a plan for an interpreter is not worth a search."""
        return {k: {name: (value,) for name, value in axes} for k, axes in AXES}

    def refuses(self, plan: Plan, target: Target, spec: Specialisation) -> Refusal | None:
        """Refuse what has no softmax: dtypes that are not floats."""
        if "float" in spec.dtype:
            return None
        return Refusal(
            f"{spec.dtype} tensors",
            "attention is computed in floating point",
            "cast q, k and v to float32, float16 or bfloat16.",
        )

    def emit(self, plan: Plan, target: Target, spec: Specialisation) -> Source:
        """Give the plan as text: what is interpreted is the plan itself."""
        return Source(plan, spec, target, (SourceFile(0, "plan", print_plan(plan)),))

    def export(self, source: Source, program: Program) -> Export:
        """Refuse: there is nothing to compile."""
        raise Refused(
            backend=self.name,
            what=f"to make binaries for {source.target.name}",
            reason="it interprets plans",
            way_out="name a target that has a compiler, such as sm90.",
        )

    def compile_ahead(self, source: Source) -> Mapping[str, int]:
        """Compile nothing: plans are interpreted."""
        return {}

    def build(self, source: Source) -> Executable:
        """Make a plan runnable: its launches are interpreted one by one."""
        from spcomp.backends.reference.executable import PlanExecutable

        return PlanExecutable(source.plan)

    def interpret(self, program: Program) -> Executable:
        """Make a pattern runnable without a plan: its stages are interpreted one by one."""
        from spcomp.backends.reference.executable import ProgramExecutable

        return ProgramExecutable(program)


BACKEND = ReferenceBackend()
