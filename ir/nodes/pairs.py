"""Selections made of others: the diagonals of a list of offsets, their cover by blocks, and one of
several by head."""

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


@dataclass(frozen=True, slots=True)
class Covered(Selection):
    """Lines as the kernel of MInference reads them: diagonals covered by blocks of keys.

    columns, offsets: a `TopK` or `TopP` of sums along columns and along diagonals, in tokens. Each
    `block` query rows share what they read. With e the position after their last, an offset o < e
    stands for the `block` keys that end before max(e - o, block). In ascending order a stretch of
    keys that begins no later than `block` after the end of the one before extends that by `block`,
    else it begins another; so near diagonals merge and a few keys more are read. A column is read
    where some stretch ends after it. (microsoft/MInference, csrc/vertical_slash_index.cu.)"""

    columns: Node
    offsets: Node
    block: int
