"""What a backend offers. `ir/` and `autotune/` know no backend; they know this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from spcomp.ir.passes.fit_target import Refusal
from spcomp.ir.plan import Plan
from spcomp.ir.program import Program
from spcomp.ir.schedule import AxisSpace, KernelAxes
from spcomp.ir.target import Target

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Backend",
    "BuiltKernel",
    "Executable",
    "Refusal",
    "Source",
    "SourceFile",
    "Specialisation",
]

DTYPES = ("float32", "float16", "bfloat16")
ELEMENT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Specialisation:
    """What a kernel is specialised on: dtype and head dimensions. Never a length."""

    dtype: str
    head_dim: int
    value_dim: int

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of q, k and v."""
        return ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One generated kernel: launch number in the plan, kernel name, file text."""

    launch: int
    kernel: str
    text: str
    suffix: str = ".py"

    @property
    def file_name(self) -> str:
        """The name the file has in an export."""
        return f"{self.launch:02d}_{self.kernel}{self.suffix}"


@dataclass(frozen=True, slots=True)
class Source:
    """The generated source of a plan."""

    plan: Plan
    spec: Specialisation
    target: Target
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True)
class BuiltKernel:
    """What the compiler said about one kernel built without a card."""

    kernel: str
    launch: int
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    binary_bytes: int
    binary: bytes
    warps: int
    stages: int
    warnings: tuple[str, ...] = ()


class Executable(Protocol):
    """A built plan."""

    def run(
        self, tensors: Mapping[str, Tensor], dims: Mapping[str, int], kept: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the plan.

        tensors: q, k, v and the captured tables by buffer name; dims: the symbols of `ir/dims.py`;
        kept: state buffers a cache already holds (by `Buffer.state`), whose pool launches are
        skipped. Returns out [B,Hq,Sq,Dv] and lse [B,Hq,Sq] f32."""
        ...

    def update(
        self,
        tensors: Mapping[str, Tensor],
        dims: Mapping[str, int],
        kept: Mapping[str, Tensor],
        begin: int,
    ) -> None:
        """Bring the state buffers in `kept` up to date for the tokens begin … Skv-1 of
        tensors["k"], tensors["v"]."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A way to run plans."""

    @property
    def name(self) -> str:
        """Its name in `compile(backend=...)`."""
        ...

    def targets(self) -> Mapping[str, Target]:
        """The chips it makes code for, by name."""
        ...

    def target_of(self, device: str) -> Target:
        """The target of a torch device.

        Raises: NotOnThisDevice, TritonMissing and their like.
        """
        ...

    def axes(self, target: Target, spec: Specialisation) -> KernelAxes:
        """The default schedule axes of every kernel it may launch."""
        ...

    def space(self, target: Target, spec: Specialisation) -> AxisSpace:
        """The values each schedule axis may take, by kernel and axis; the default is among them."""
        ...

    def refuses(self, plan: Plan, target: Target, spec: Specialisation) -> Refusal | None:
        """Say why it will not build a plan, before any compile."""
        ...

    def interpret(self, program: Program) -> Executable | None:
        """Run a pattern as it stands; None where a backend needs a plan."""
        ...

    def emit(self, plan: Plan, target: Target, spec: Specialisation) -> Source:
        """Generate the source of every launch."""
        ...

    def compile(self, source: Source) -> tuple[BuiltKernel, ...]:
        """Compile every kernel for its target, which need not be here.

        Raises: Refused, where it has no compiler that works without the device or the compiler
        fails.
        """
        ...

    def build(self, source: Source) -> Executable:
        """Make the source runnable on this machine."""
        ...
