"""A pattern as a value: its name, its hyper-parameters, and the stage that gives the result."""

from __future__ import annotations

from dataclasses import dataclass, field

from spcomp.errors import Where
from spcomp.ir import dims
from spcomp.ir.nodes import Argument, Captured, Node, topological

Parameter = tuple[str, "bool | int | float | str | None"]


@dataclass(frozen=True, slots=True)
class Program:
    """The pattern level of the IR.

    `parameters` are the hyper-parameters it was made with, for people and for keys; the meaning is
    `result` alone."""

    name: str
    parameters: tuple[Parameter, ...]
    result: Node
    where: Where | None = field(default=None, compare=False, repr=False)

    def stages(self) -> tuple[Node, ...]:
        """Give all stages, each after those it reads."""
        return topological(self.result)

    def captured(self) -> tuple[Captured, ...]:
        """Give the tensors the pattern brought along, in order of first use."""
        return tuple(n for n in self.stages() if isinstance(n, Captured))

    def arguments(self) -> tuple[Argument, ...]:
        """Give the tensors a call brings beside q, k and v, in order of first use."""
        return tuple(n for n in self.stages() if isinstance(n, Argument))

    def names(self) -> tuple[str, ...]:
        """Name the dims of its own that the pattern gave those tensors."""
        return dims.names_of(d for a in self.arguments() for d in a.dims)

    def widths(self) -> tuple[str, ...]:
        """Name those of its own dims that are a last one: constants of the kernels."""
        return dims.names_of(a.dims[-1] for a in self.arguments())

    def title(self) -> str:
        """Give `name(key=value, …)`."""
        inner = ", ".join(f"{k}={v}" for k, v in self.parameters)
        return f"{self.name}({inner})"
