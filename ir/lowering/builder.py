"""A plan under construction: buffers by name, launches once a call or once a slab."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.nodes import Argument, Captured, Node
from spcomp.ir.plan import Axes, Buffer, Launch, Phase, Step
from spcomp.ir.plan import Slabs as SlabStep
from spcomp.ir.schedule import Schedule
from spcomp.ir.types import INPUTS


@dataclass(slots=True)
class PlanBuilder:
    """Collects what `cut` makes. `align` is the row count slabs must be a multiple of."""

    phase: Phase
    schedule: Schedule
    heads: tuple[int, int] = (0, 0)  # Hq and Hkv, zeros when they are not known
    buffers: dict[str, Buffer] = field(default_factory=dict)
    once: list[Launch] = field(default_factory=list)
    each_slab: list[Launch] = field(default_factory=list)
    align: int = 1
    notes: list[str] = field(default_factory=list)
    made: dict[Node, object] = field(default_factory=dict)
    is_packed: bool = False

    def __post_init__(self) -> None:
        for name, role in (("q", "query"), ("k", "key"), ("v", "value")):
            self.buffers[name] = Buffer(name, self.whole(INPUTS[role].dims), "data", "input")
        if self.is_packed:
            for name in ("cu_q", "cu_k"):
                self.buffers[name] = Buffer(name, (dims.B + 1,), "int32", "input")

    def whole(self, shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
        """Give the dims of a tensor of the caller, which has no batch axis when it is packed."""
        return tuple(_PACKED.get(d, d) for d in shape) if self.is_packed else shape

    def scratch(self, prefix: str, shape: tuple[Dim, ...], dtype: str, state: str = "") -> str:
        """Declare a scratch buffer under a fresh name."""
        name = prefix
        while name in self.buffers:
            tail = name.removeprefix(prefix)
            name = f"{prefix}{int(tail or 1) + 1}"
        self.buffers[name] = Buffer(name, shape, dtype, "scratch", state)
        return name

    def captured(self, node: Captured) -> str:
        """Declare a captured tensor."""
        self.buffers[node.name] = Buffer(node.name, node.dims, node.dtype, "captured")
        return node.name

    def argument(self, node: Argument) -> str:
        """Declare a tensor that the call brings beside q, k and v."""
        self.buffers[node.name] = Buffer(node.name, node.dims, node.dtype, "input")
        return node.name

    def rows_multiple_of(self, granule: int) -> None:
        """Make slabs a multiple of a row granule."""
        self.align = math.lcm(self.align, granule)

    def offers(self, *kernels: str) -> bool:
        """Tell whether the backend has these kernels: its schedule names every one it has."""
        return set(kernels) <= set(dict(self.schedule.kernels))

    def axes(self, kernel: str, **fixed: int) -> Axes:
        """Give the axes of a kernel with some of them fixed by the lowering."""
        return tuple(sorted({**self.schedule.of(kernel), **fixed}.items()))

    def axis(self, kernel: str, name: str) -> int:
        """Give the scheduled value of one axis."""
        return self.schedule.of(kernel)[name]

    def steps(self) -> tuple[Step, ...]:
        """Give the steps in order."""
        return (*self.once, SlabStep(tuple(self.each_slab), self.align))


_PACKED: dict[Dim, Dim] = {dims.B: 1, dims.Sq: dims.Tq, dims.Skv: dims.Tk}


def rows_of(granule: int) -> Dim:
    """Give the rows of a slab's lists."""
    return dims.ceildiv(dims.R, granule)
