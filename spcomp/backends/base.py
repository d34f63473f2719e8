"""What a backend offers. `ir/` and `autotune/` know no backend; they know this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from spcomp.ir.passes.fit_target import Refusal
from spcomp.ir.plan import Plan
from spcomp.ir.program import Program
from spcomp.ir.schedule import AxisSpace, KernelAxes, Schedule
from spcomp.ir.target import Target

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Backend",
    "Executable",
    "Export",
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
    """What a kernel is specialised on: dtype and head dimensions. Never a length.

    is_aligned: every row of q, k and v begins at a multiple of 16 bytes, at a place of its own.
    heads: Hq and Hkv, zeros when they are not known. widths: sizes of the last dims that the
    pattern named itself (`Program.widths`). is_packed: sequences lie one behind the other in
    tensors without a batch axis."""

    dtype: str
    head_dim: int
    value_dim: int
    is_aligned: bool = True
    heads: tuple[int, int] = (0, 0)
    widths: tuple[tuple[str, int], ...] = ()
    is_packed: bool = False

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of q, k and v."""
        return ELEMENT_BYTES[self.dtype]

    def constants(self) -> dict[str, int]:
        """Give the dims that kernels hold as constants, by their symbols."""
        return {"D": self.head_dim, "Dv": self.value_dim, **dict(self.widths)}


def default_schedule(backend: Backend, target: Target, spec: Specialisation) -> Schedule:
    """Give the schedule that nobody tuned."""
    lacking = tuple(backend.lacking(target, spec).items())
    return Schedule("query_major", backend.axes(target, spec), lacking=lacking)


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
class Export:
    """What a source is to somebody who builds with it: `spcomp compile` writes it.

    files: contents by path, relative and with forward slashes. manifest: what `manifest.json` says
    beside the plan and its target; values of JSON, among them "rung". columns, rows: the table that
    is printed; the first column names, the others count.
    """

    files: Mapping[str, bytes]
    manifest: Mapping[str, Any]
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


class Executable(Protocol):
    """A built plan."""

    def run(
        self, tensors: Mapping[str, Tensor], dims: Mapping[str, int], kept: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the plan.

        tensors: q, k, v, what the call brings beside them, and the captured tables by buffer name;
        dims: the symbols of `ir/dims.py`;
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

    def lacking(self, target: Target, spec: Specialisation) -> Mapping[str, str]:
        """The kernels of this chip that these tensors cannot have, each with the reason."""
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

    def export(self, source: Source, program: Program) -> Export:
        """Give what is written for a target, which need not be here.

        program: what the source was made from, in the terms of the pattern, for a backend that
        proves what it writes.
        Raises: Refused, where there is nothing to write or the compiler fails.
        """
        ...

    def compile_ahead(self, source: Source) -> Mapping[str, int]:
        """Compile into the cache what the first launch would compile, without the device.

        Gives what the compiler told of it as fields of a tuning row; nothing where there is nothing
        to compile.
        Raises: Refused, when the compiler fails.
        """
        ...

    def build(self, source: Source) -> Executable:
        """Make the source runnable on this machine."""
        ...
