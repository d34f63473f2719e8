"""How well each unit of keys fits a row of queries, and which units a row may choose from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spcomp.backends.reference.call import Call, single
from spcomp.ir.nodes import Local, Node, Score, Sink, TopK
from spcomp.ir.nodes.score import HeadSharing, Reduction


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows [start, stop) of a list, and the positions of the first and last query of each.

    low, high: int64 [n, 1]. A row serves `granule` query rows, the last one those that are left.
    """

    start: int
    stop: int
    granule: int
    low: Tensor
    high: Tensor


def score_of(node: TopK) -> Score:
    """Give the score a top-k ranks."""
    assert isinstance(node.scores, Score), node.scores
    return node.scores


def list_rows(call: Call, node: Score, start: int, stop: int) -> Rows:
    """Give rows [start, stop) of a score; rows that the q side does not have are left out."""
    grid = call.grid(node.q)
    stop = min(stop, grid.count)
    start = min(start, stop)
    first = grid.first[start:stop, None]
    last = (first + grid.stride - 1).clamp(max=call.env["Sq"] - 1)
    return Rows(start, stop, grid.stride, first + call.shift, last + call.shift)


def scores(call: Call, node: Score, rows: Rows) -> Tensor:
    """Score all units for some rows: [B,Hs,n,Nk], float32 (float64 for float64 inputs).

    Hs is Hq, Hkv or 1 by `heads`; the query heads that share a list are joined by `reduce`.
    """
    q = single(node.q, call.value(node.q))[:, :, rows.start : rows.stop].to(call.dtype)
    high, low = call.wide(node.k)
    return unit_scores(q, high, low, node.heads, node.reduce) * node.scale


def unit_scores(
    q: Tensor, high: Tensor, low: Tensor | None, heads: HeadSharing, reduce: Reduction
) -> Tensor:
    """Score units before scaling: q [B,Hq,n,D] and units [B,Hkv,U,D] -> [B,Hs,n,U].

    With `low` the units are a pair (high, low), and the score is the upper bound of q·k inside a
    unit.
    """
    by_head = _products(q, high) if low is None else _bounds(q, high, low)
    if heads == "query":
        return by_head
    lists = high.shape[1] if heads == "group" else 1
    grouped = by_head.reshape(by_head.shape[0], lists, -1, *by_head.shape[2:])
    if reduce == "max":
        return grouped.amax(dim=2)
    return grouped.mean(dim=2) if reduce == "mean" else grouped.sum(dim=2)


def _products(q: Tensor, units: Tensor) -> Tensor:
    """Multiply query heads with their KV head: [B,Hq,n,D] x [B,Hkv,U,D] -> [B,Hq,n,U]."""
    heads, rows = q.shape[1:3]
    per_kv_head = q.reshape(q.shape[0], units.shape[1], -1, q.shape[3])
    product = per_kv_head @ units.transpose(-1, -2)
    return product.reshape(q.shape[0], heads, rows, units.shape[2])


def _bounds(q: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Bound q·k from above: each sign of q takes the end of the interval that suits it."""
    return _products(q.clamp(min=0), high) + _products(q.clamp(max=0), low)


def candidates(call: Call, node: Score, rows: Rows) -> Tensor:
    """Tell which units a row may choose, bool [n, Nk]; causal: those whose last token it sees."""
    last = call.grid(node.k).last[None, :]
    if not node.causal:
        return torch.ones(len(rows.low), last.shape[1], dtype=torch.bool, device=call.device)
    return last <= rows.high


def forced(call: Call, node: Score, always: tuple[Node, ...], rows: Rows) -> Tensor:
    """Tell which units a row keeps whatever their score: bool [n, Nk].

    `Sink(n)` holds the first n units, `Local(n)` those from n - 1 before the own unit of the row's
    first query to the own unit of its last. A forced unit need not be complete, but under a causal
    score it must have begun.
    """
    grid = call.grid(node.k)
    unit = torch.arange(grid.count, device=call.device)[None, :]
    held = torch.zeros(len(rows.low), grid.count, dtype=torch.bool, device=call.device)
    for part in always:
        if isinstance(part, Sink):
            held |= unit < part.count
        else:
            assert isinstance(part, Local), part
            held |= (unit > rows.low // grid.stride - part.count) & (
                unit <= rows.high // grid.stride
            )
    return held & (grid.first[None, :] <= rows.high) if node.causal else held
