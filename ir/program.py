"""A pattern as a value: its name, its hyper-parameters, and the stage that gives the result."""

from __future__ import annotations

from dataclasses import dataclass, field

from spcomp.errors import Where
from spcomp.ir.nodes import Captured, Node, topological

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

    def title(self) -> str:
        """Give `name(key=value, …)`."""
        inner = ", ".join(f"{k}={v}" for k, v in self.parameters)
        return f"{self.name}({inner})"
