"""What a compiled pattern keeps between calls: plans ready to run, and calls that were checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from spcomp.backends.base import Executable, Source, Specialisation
from spcomp.dsl.pattern import Pattern
from spcomp.ir.plan import Plan
from spcomp.ir.target import Target


@dataclass(frozen=True, slots=True)
class Built:
    """One plan of a pattern, ready to run; without plan and source where a backend interprets the
    pattern itself."""

    plan: Plan | None
    target: Target
    spec: Specialisation
    source: Source | None
    executable: Executable


Admitted: TypeAlias = tuple[dict[str, int], Executable, dict[str, Tensor]]
"""A call that passed its checks: its symbols, what runs it, the tables of its pattern."""


@dataclass(slots=True)
class Epoch:
    """The time between two writes to a pattern's lists: the lists sorted, calls that passed.

    A thread that still holds an old one leaves nothing in the new one."""

    versions: tuple[int, ...]
    admitted: dict[tuple[object, ...], Admitted] = field(default_factory=dict)
    canonical: Pattern | None = None
