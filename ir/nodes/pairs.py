"""Selections made of other values: the diagonals of a list of offsets, and one of several by
head."""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.ir.nodes.base import Node
from spcomp.ir.nodes.select import Selection


@dataclass(frozen=True, slots=True)
class Diagonals(Selection):
    """The pairs whose offset a list names: t - u in the list, u <= t.

    offsets: a `TopK` or `TopP` of sums along diagonals, one list a head. Where these were regrouped
    into blocks of b offsets, entry d holds the block diagonal t // b - u // b = d. The stream is of
    tokens."""

    offsets: Node


@dataclass(frozen=True, slots=True)
class Switch(Selection):
    """For each head one of several selections.

    by: a captured table [Hq] i32, which case each query head takes; or an `Alike`, whose heads take
    case 1 where it is true and case 0 elsewhere. A table is data: another assignment is the same
    pattern."""

    by: Node
    cases: tuple[Node, ...]
