"""The Triton backend: NVIDIA and AMD GPUs, and the CPU through Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Mapping

from spcomp.backends.base import (
    DTYPES,
    MAX_HEAD_DIM,
    Executable,
    Export,
    Refusal,
    Source,
    Specialisation,
)
from spcomp.backends.triton.axes import axis_space, default_axes, lacking
from spcomp.backends.triton.targets import INTERPRETER, TARGETS
from spcomp.errors import NotOnThisDevice, TritonMissing
from spcomp.ir.plan import Plan
from spcomp.ir.plan_rules import base
from spcomp.ir.program import Program
from spcomp.ir.schedule import AxisSpace, KernelAxes
from spcomp.ir.target import Target

GATHERING = ("attend_gather", "merge")
GATHERED_DIMS = {"D": 576, "Dv": 512}
"""The kernels that hold wider rows than others, and the widths they hold: those of MLA."""


class TritonBackend:
    """Plans as Triton kernels."""

    name = "triton"

    def targets(self) -> Mapping[str, Target]:
        """The chips it compiles for, and the interpreter."""
        return {**TARGETS, INTERPRETER.name: INTERPRETER}

    def target_of(self, device: str) -> Target:
        """Give the target of a torch device.

        Raises: TritonMissing, NotOnThisDevice.
        """
        _check_triton(device)
        if device == "cpu":
            if os.environ.get("TRITON_INTERPRET") != "1":
                raise NotOnThisDevice(
                    backend=self.name,
                    device="cpu",
                    why=", since Triton's interpreter is off",
                    way_out=(
                        "use backend='reference', or set TRITON_INTERPRET=1 before the first "
                        "import of triton."
                    ),
                )
            return INTERPRETER
        return _gpu_target(device)

    def axes(self, target: Target, spec: Specialisation) -> KernelAxes:
        """The default schedule axes."""
        return default_axes(target, spec)

    def lacking(self, target: Target, spec: Specialisation) -> Mapping[str, str]:
        """What these tensors cannot have."""
        return lacking(target, spec)

    def space(self, target: Target, spec: Specialisation) -> AxisSpace:
        """The choices of the manifest beside the templates, and the default."""
        return axis_space(target, spec)

    def refuses(self, plan: Plan, target: Target, spec: Specialisation) -> Refusal | None:
        """Say why it will not build a plan."""
        if spec.dtype not in DTYPES:
            return Refusal(
                f"{spec.dtype} tensors",
                "its kernels compute in " + ", ".join(DTYPES),
                "cast the tensors, or use backend='reference'.",
            )
        from spcomp.ir.passes.fit_target import fit_target

        return _too_wide(plan, spec) or fit_target(
            plan, target, spec.head_dim, spec.value_dim, spec.element_bytes, dict(spec.widths)
        )

    def interpret(self, program: Program) -> Executable | None:
        """Give None: kernels are made from plans."""
        return None

    def emit(self, plan: Plan, target: Target, spec: Specialisation) -> Source:
        """Generate the source of every launch."""
        from spcomp.backends.triton.emit import emit

        return emit(plan, target, spec)

    def export(self, source: Source, program: Program) -> Export:
        """Give every kernel's source and its binary for a target, which need not be here.

        Raises: Refused, for Triton's interpreter or when the compiler fails.
        """
        from spcomp.backends.triton.export import export

        return export(source)

    def compile_ahead(self, source: Source) -> Mapping[str, int]:
        """Compile every kernel for its target; tell what they spill.

        Raises: Refused, when the compiler fails.
        """
        from spcomp.backends.triton.offline import build_offline

        return {"spill_bytes": sum(kernel.spill_bytes for kernel in build_offline(source))}

    def build(self, source: Source) -> Executable:
        """Import the source on this machine; Triton compiles at the first launch."""
        from spcomp.backends.triton.executor import TritonExecutable

        return TritonExecutable(source)


def _too_wide(plan: Plan, spec: Specialisation) -> Refusal | None:
    """Refuse rows wider than the tiles of a kernel that reads or writes them."""
    sizes = spec.constants()
    names = {"D": "head_dim", "Dv": "value_dim"}
    for launch in plan.launches():
        for buffer in launch.buffers():
            dim = str(plan.buffer(base(buffer)).dims[-1])
            wide = launch.kernel in GATHERING
            most = GATHERED_DIMS.get(dim, MAX_HEAD_DIM) if wide else MAX_HEAD_DIM
            if sizes.get(dim, 0) > most:
                return Refusal(
                    f"{names.get(dim, dim)} = {sizes[dim]}",
                    f"its tiles {'of gathered keys ' if wide else ''}hold at most {most}",
                    "use backend='reference', or split the head.",
                )
    return None


def _check_triton(device: str) -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise TritonMissing(name="q", device=device, reason=error) from error


def _gpu_target(device: str) -> Target:
    import torch

    if torch.version.hip:
        arch = str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
        found = {t.arch: t for t in TARGETS.values()}.get(f"hip:{arch}")
    else:
        major, minor = torch.cuda.get_device_capability(device)
        known = [t for t in TARGETS.values() if t.arch.startswith("cuda:")]
        fitting = [t for t in known if int(t.arch[5:]) <= major * 10 + minor]
        found = fitting[-1] if fitting else None
    if found is None:
        raise NotOnThisDevice(
            backend="triton",
            device=device,
            why=", which is older than any target it knows",
            way_out="use backend='reference'.",
        )
    return found


BACKEND = TritonBackend()
