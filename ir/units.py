"""The geometry of units, in one place: which tokens a unit covers and when it is visible.

Visibility is one rule everywhere: a unit is visible to a query at position t = row + Skv - Sq iff
its last token is not later than t (design decision; NSA, MoBA, Quest, CSA and QSA all follow it).
"""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.expr import Expr, Lit, Sym, op
from spcomp.ir.nodes import Downsample, Fold, Node, Probe, Regroup, Score, Softmax, State, Sums

OFFSET = op("sub", Sym("Skv"), Sym("Sq"))


@dataclass(frozen=True, slots=True)
class Units:
    """Unit u covers the tokens u*stride … u*stride+block-1 of its sequence."""

    block: int
    stride: int
    tail: str = "keep"

    def count(self, tokens: Dim) -> Dim:
        """Give the number of units over some tokens."""
        if self.tail == "drop":
            complete = dims.ceildiv(tokens - self.block + 1, self.stride)
            return dims.largest(0, complete)
        if self.block <= self.stride:
            return dims.ceildiv(tokens, self.stride)
        return dims.largest(1, dims.ceildiv(tokens - self.block, self.stride) + 1)

    def first(self, unit: Expr) -> Expr:
        """Give the first token of a unit."""
        return op("mul", unit, Lit(self.stride))

    def last(self, unit: Expr) -> Expr:
        """Give the last real token of a unit; the last unit may be short, unless short ones are
        dropped."""
        if self.block == 1:
            return self.first(unit)
        if self.tail == "drop":
            return op("add", self.first(unit), Lit(self.block - 1))
        end = op("add", self.first(unit), Lit(self.block))
        return op("sub", op("min", end, Sym("Skv")), Lit(1))


TOKENS = Units(1, 1)


def units_of(node: Node) -> Units:
    """Give the units a tensor is in; tokens unless it was downsampled."""
    inner = node.value if isinstance(node, State) else node
    if isinstance(inner, Downsample):
        return Units(inner.block, inner.stride, inner.tail)
    if isinstance(inner, Fold):
        return Units(inner.size, inner.size)
    return TOKENS


def score_below(node: Node) -> Score:
    """Give the score that a map of scores is made from."""
    while isinstance(node, (Softmax, Regroup, Sums)):
        node = node.scores
    assert isinstance(node, Score), node
    return node


def sums_below(node: Node) -> Sums | None:
    """Give the sums along lines that a map is or is made from; its one row stands for all rows."""
    while isinstance(node, (Softmax, Regroup)):
        node = node.scores
    return node if isinstance(node, Sums) else None


def probe_below(node: Node) -> Probe | None:
    """Give the probe that a query side is or is pooled from."""
    while isinstance(node, Downsample):
        node = node.x
    return node if isinstance(node, Probe) else None


def rows_ranking(node: Node) -> Units:
    """Give the query rows that one row of a map of scores stands for; TOKENS of sums along lines,
    whose row stands for all."""
    if sums_below(node) is not None:
        return TOKENS
    while isinstance(node, Softmax):
        node = node.scores
    if isinstance(node, Regroup):
        return Units(node.rows, node.rows)
    return units_of(score_below(node).q)


def units_ranked(node: Node) -> Units:
    """Give the units of keys, or of offsets, that a map of scores ranks."""
    while isinstance(node, Softmax):
        node = node.scores
    if isinstance(node, Regroup):
        return Units(node.block, node.block)
    if isinstance(node, Sums):
        return TOKENS if node.along == "diagonals" else units_ranked(node.scores)
    return units_of(score_below(node).k)


def position(row: str) -> Expr:
    """Give the position of a query row (symbol q, q_lo or q_hi) among the keys."""
    return op("add", Sym(row), OFFSET)
