"""The plan level of the IR: launches over buffers, and slabs that keep scratch bounded.

A plan is what one call runs: launches in order, each reading and writing named buffers whose dims
are formulas over the symbols of `ir/dims.py`. Launches inside `Slabs` run once for each slab of R
query rows, with the same scratch buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

from spcomp.ir.dims import Dim

BufferKind = Literal["input", "captured", "scratch", "output"]
DType = str  # "data" (that of q, k, v), or a torch name such as "float32", "int32", "bool"


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor of the plan. `state` names the cache field it may be read from instead of being
    made."""

    name: str
    dims: tuple[Dim, ...]
    dtype: DType
    kind: BufferKind
    state: str = ""


Axes: TypeAlias = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel launch. Fields ending in `_buf` or `_bufs` name buffers; `axes` is its
    schedule."""

    stages: tuple[str, ...] = ()
    axes: Axes = ()

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        raise AssertionError("a Launch is one of the classes of ir/launches.py")

    def axis(self, name: str) -> int:
        """Give the value of a schedule axis."""
        return dict(self.axes)[name]

    def buffers(self) -> Iterator[str]:
        """Yield the buffers it touches, as declared."""
        for f in fields(self):
            value: Any = getattr(self, f.name)
            if f.name.endswith("_buf") and value:
                yield value
            elif f.name.endswith("_bufs"):
                yield from value

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        raise AssertionError("a Launch is one of the classes of ir/launches.py")

    def reads(self) -> tuple[str, ...]:
        """Give the buffers it reads."""
        written = set(self.writes())
        return tuple(dict.fromkeys(b for b in self.buffers() if b not in written))


@dataclass(frozen=True, slots=True)
class Slabs:
    """Launches that run for each slab of R query rows; R is a multiple of `align`."""

    launches: tuple[Launch, ...]
    align: int


Step: TypeAlias = "Launch | Slabs"
LoopOrder = Literal["query_major", "query_major_ws", "key_major", "gather"]
"""query_major_ws: query-major, with copies and products in warps of their own."""
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one call of a pattern runs.

    `order` is the loop order of its attend launches. `notes` say why it was chosen; they take no
    part in equality."""

    pattern: str
    phase: Phase
    order: LoopOrder
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    out: str
    lse: str
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def is_packed(self) -> bool:
        """Whether sequences lie one behind the other: sequence b is rows cu_q[b] … cu_q[b+1]-1 of
        q, out and lse, and cu_k likewise of k and v, which have no batch axis. Sq and Skv are the
        longest lengths in dims, and the sequence's own in predicates and in what kernels count."""
        return any(b.name == "cu_q" for b in self.buffers)

    def launches(self) -> tuple[Launch, ...]:
        """Give all launches in order, slabs flattened."""
        flat: list[Launch] = []
        for step in self.steps:
            flat.extend(step.launches if isinstance(step, Slabs) else (step,))
        return tuple(flat)

    def buffer(self, name: str) -> Buffer:
        """Give a buffer by name."""
        for b in self.buffers:
            if b.name == name:
                return b
        raise KeyError(name)

    def scratch(self) -> tuple[Buffer, ...]:
        """Give the buffers a call allocates beside its results."""
        return tuple(b for b in self.buffers if b.kind == "scratch")


SCRATCH_LIMIT_BYTES = 1 << 30
