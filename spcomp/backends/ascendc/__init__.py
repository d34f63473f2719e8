"""The AscendC backend: kernels for Ascend 910B and 910_93 (Atlas A2, A3), run here in an emulator.

No card and no vendor toolkit is needed: what is generated is plain AscendC for that toolkit, and
the same text compiled by g++ against our emulator is what runs and what is tested. Nothing here has
run on the hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from spcomp.backends.ascendc.axes import axes_of
from spcomp.backends.ascendc.targets import TARGETS
from spcomp.backends.base import (
    Executable,
    Export,
    Refusal,
    Source,
    Specialisation,
)
from spcomp.errors import NotOnThisDevice
from spcomp.ir.plan import Plan
from spcomp.ir.program import Program
from spcomp.ir.schedule import AxisSpace, KernelAxes
from spcomp.ir.target import Target

TARGET = TARGETS["ascend910b"]


class AscendCBackend:
    """Plans as AscendC kernels; on the CPU they run in the emulator, slowly and checked."""

    name = "ascendc"

    def targets(self) -> Mapping[str, Target]:
        """The chips it makes code for."""
        return TARGETS

    def target_of(self, device: str) -> Target:
        """Give the target of a torch device: the emulator stands for a card on the CPU.

        Raises: NotOnThisDevice, NoCompiler.
        """
        from spcomp.backends.ascendc.emulate import compiler, version_of

        if device.partition(":")[0] != "cpu":
            raise NotOnThisDevice(
                backend=self.name,
                device=device,
                why=", since it runs kernels in its emulator alone",
                way_out="move the tensors to the CPU to emulate, or build the project that "
                "`spcomp compile --target ascend910b -o DIR` writes with CANN.",
            )
        made_by = f"g++ {version_of(compiler()).split()[-1]}"
        return replace(TARGET, title=f"the emulator of {TARGET.title}, compiled by {made_by}")

    def axes(self, target: Target, spec: Specialisation) -> KernelAxes:
        """The kernels it has, and their tiles."""
        return axes_of(spec)

    def lacking(self, target: Target, spec: Specialisation) -> Mapping[str, str]:
        """Everything it has runs."""
        return {}

    def space(self, target: Target, spec: Specialisation) -> AxisSpace:
        """One value an axis: no tile is a choice."""
        return {k: {name: (value,) for name, value in axes} for k, axes in axes_of(spec)}

    def refuses(self, plan: Plan, target: Target, spec: Specialisation) -> Refusal | None:
        """Say what an Ascend core cannot do, or these templates do not do yet."""
        from spcomp.backends.ascendc.rules import refusal_of

        return refusal_of(plan, spec)

    def interpret(self, program: Program) -> Executable | None:
        """Need a plan."""
        return None

    def emit(self, plan: Plan, target: Target, spec: Specialisation) -> Source:
        """Render every launch."""
        from spcomp.backends.ascendc.emit import emit

        return emit(plan, target, spec)

    def export(self, source: Source, program: Program) -> Export:
        """Give a project to build with the vendor's toolkit, or with g++ and our emulator.

        Raises: EmulatorFault, KernelDoesNotCompile, ProjectIsWrong.
        """
        from spcomp.backends.ascendc.project import export

        return export(source, program)

    def compile_ahead(self, source: Source) -> Mapping[str, int]:
        """Compile nothing: the compiler is part of a toolkit that is not here."""
        return {}

    def build(self, source: Source) -> Executable:
        """Make the source run in the emulator; its first call compiles it."""
        from spcomp.backends.ascendc.executor import EmulatedExecutable

        return EmulatedExecutable(source)


BACKEND = AscendCBackend()
