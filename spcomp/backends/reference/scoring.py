"""How well each unit of keys fits a row of queries, and which units a row may choose from.

A map of scores is a `Score`, or what `Softmax` and `Regroup` make of one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spcomp.backends.reference.call import Call, single
from spcomp.backends.reference.pooling import Grid, block_grid, token_grid
from spcomp.backends.reference.tokens import by_head
from spcomp.ir.nodes import Local, Node, Regroup, Score, Similar, Sink, Softmax, Sums
from spcomp.ir.nodes.score import Activation, HeadSharing, Reduction
from spcomp.ir.types import list_heads
from spcomp.ir.units import score_below, sums_below, units_ranked

SUMMED_AT_ONCE = 256
"""The most rows of a map that are held while it is summed along lines."""


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


def row_grid(call: Call, node: Node) -> Grid:
    """Tell which query rows each row of a map of scores stands for."""
    if sums_below(node) is not None:
        return block_grid(call.env["Sq"], call.env["Sq"], call.device)
    while isinstance(node, Softmax):
        node = node.scores
    if isinstance(node, Regroup):
        return block_grid(call.env["Sq"], node.rows, call.device)
    return call.grid(score_below(node).q)


def unit_grid(call: Call, node: Node) -> Grid:
    """Tell which key tokens, or which offsets, each unit of a map of scores stands for."""
    while isinstance(node, Softmax):
        node = node.scores
    if isinstance(node, Regroup):
        starts, tokens = _block_starts(call, node), call.env["Skv"]
        ends = (starts + node.block).clamp(max=tokens)
        return Grid(starts.clamp(min=0), ends - 1, node.block, tokens)
    if isinstance(node, Sums):
        if node.along == "diagonals":
            return token_grid(call.env["Skv"], call.device)
        return unit_grid(call, node.scores)
    return call.grid(score_below(node).k)


def list_rows(call: Call, node: Node, start: int, stop: int) -> Rows:
    """Give rows [start, stop) of a map of scores; rows that there are not are left out."""
    grid = row_grid(call, node)
    stop = min(stop, grid.count)
    start = min(start, stop)
    first = grid.first[start:stop, None]
    last = (first + grid.stride - 1).clamp(max=call.env["Sq"] - 1)
    return Rows(start, stop, grid.stride, first + call.shift, last + call.shift)


def scores(call: Call, node: Node, rows: Rows) -> Tensor:
    """Score all units for some rows: [B,Hs,n,Nk], float32 (float64 for float64 inputs).

    Hs is Hq, Hkv or 1 by `heads`; the query heads that share a list are joined by `reduce`.
    """
    if isinstance(node, Softmax):
        return _probabilities(call, node, rows)
    if isinstance(node, Regroup):
        return _regrouped(call, node, rows)
    if isinstance(node, Sums):
        return _sums(call, node)[:, :, rows.start : rows.stop]
    assert isinstance(node, Score), node
    q = single(node.q, call.value(node.q))[:, :, rows.start : rows.stop].to(call.dtype)
    weights = None
    if node.weights is not None:
        weights = call.tensor(node.weights)[:, :, rows.start : rows.stop].to(call.dtype)
    high, low = call.wide(node.k)
    by_head = head_scores(q, high, low, node.activation, weights)
    return shared(by_head, high.shape[1], node.heads, node.reduce) * node.scale


def head_scores(
    q: Tensor, high: Tensor, low: Tensor | None, activation: Activation, weights: Tensor | None
) -> Tensor:
    """Score units head by head before scaling: q [B,Hq,n,D] and units [B,Hkv,U,D] -> [B,Hq,n,U].

    With `low` the units are a pair (high, low), and the score is the upper bound of q·k inside a
    unit. weights [B,Hq,n] multiply what the activation gives.
    """
    scores = _products(q, high) if low is None else _bounds(q, high, low)
    if activation == "relu":
        scores = scores.relu()
    return scores if weights is None else scores * weights[..., None]


def shared(by_head: Tensor, kv_heads: int, heads: HeadSharing, reduce: Reduction) -> Tensor:
    """Join the scores [B,Hs,n,U] of the heads that share a list."""
    if heads == "query":
        return by_head
    lists = kv_heads if heads == "group" else 1
    batch, joined = by_head.shape[0], by_head.shape[1] // lists
    grouped = by_head.reshape(batch, lists, joined, *by_head.shape[2:])
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


def _probabilities(call: Call, node: Softmax, rows: Rows) -> Tensor:
    scale = call.env["D"] ** -0.5 if node.scale is None else node.scale
    logits = _of_candidates(call, node.scores, rows, -torch.inf, scale)
    over = logits
    if node.over is not None:
        over = _of_candidates(call, node.over, rows, -torch.inf, scale)
    total = over.logsumexp(dim=-1, keepdim=True) if over.shape[3] else over.new_zeros(1)
    chances = (logits - total.masked_fill(total == -torch.inf, 0.0)).exp()
    if node.heads is None:
        return chances
    return shared(chances, _heads_of_units(call, node), node.heads, node.reduce)


def _heads_of_units(call: Call, node: Softmax) -> int:
    high, _ = call.wide(score_below(node).k)
    return int(high.shape[1])


def _of_candidates(
    call: Call, node: Node, rows: Rows, otherwise: float, scale: float = 1.0
) -> Tensor:
    able = candidates(call, node, rows)
    return (scores(call, node, rows) * scale).masked_fill(~able, otherwise)


def _regrouped(call: Call, node: Regroup, rows: Rows) -> Tensor:
    ratio = rows.granule // row_grid(call, node.scores).stride
    inner = list_rows(call, node.scores, rows.start * ratio, rows.stop * ratio)
    fill = 0.0 if node.by == "sum" or isinstance(node.scores, Softmax) else -torch.inf
    fine = _of_candidates(call, node.scores, inner, fill)
    fine = torch.nn.functional.pad(fine, (0, 0, 0, -fine.shape[2] % ratio), value=fill)
    by_row = fine.reshape(*fine.shape[:2], fine.shape[2] // ratio, ratio, fine.shape[3])
    joined = by_row.sum(dim=3) if node.by == "sum" else by_row.amax(dim=3)
    units, blocks = unit_grid(call, node.scores).first, _block_starts(call, node)
    unit = units_ranked(node.scores)
    overlap = _overlap(units, unit.block, blocks, node.block)
    if node.by == "sum":
        return joined @ (overlap / unit.stride).to(joined.dtype)
    if not joined.shape[3]:
        return joined.new_full((*joined.shape[:3], overlap.shape[1]), fill)
    nothing = joined.new_full(joined.shape[:3], fill)
    highest = [joined[..., held].amax(dim=-1) if held.any() else nothing for held in overlap.T > 0]
    return torch.stack(highest, dim=-1)


def _block_starts(call: Call, node: Regroup) -> Tensor:
    """Give the first token of each block; below 0 where blocks are counted from the end."""
    tokens, block = call.env["Skv"], node.block
    count = -(-tokens // block)
    begin = tokens - count * block if node.from_end else 0
    return begin + block * torch.arange(count, device=call.device)


def _overlap(units: Tensor, unit: int, blocks: Tensor, block: int) -> Tensor:
    """Count the tokens that each unit has in each block, from the first tokens and the sizes of
    both: int64 [units, blocks]."""
    first = torch.maximum(units[:, None], blocks[None, :])
    end = torch.minimum(units[:, None] + unit, blocks[None, :] + block)
    return (end - first).clamp(min=0)


@torch.no_grad()
def _sums(call: Call, node: Sums) -> Tensor:
    """Add a map along lines, over all its rows: [B,Hs,1,N]; once a call, some rows at a time."""
    if node not in call.known:
        total: Tensor | None = None
        for start in range(0, row_grid(call, node.scores).count, SUMMED_AT_ONCE):
            rows = list_rows(call, node.scores, start, start + SUMMED_AT_ONCE)
            part = _of_candidates(call, node.scores, rows, 0.0)
            if node.along == "diagonals":
                part = _by_offset(part, rows.high)
            joined = part.sum(dim=2, keepdim=True)
            total = joined if total is None else total + joined
        assert total is not None
        call.known[node] = total
    return call.known[node]


def _by_offset(values: Tensor, positions: Tensor) -> Tensor:
    """Lay the entries [B,H,n,Skv] of rows at some positions by their offset t - u."""
    key = positions - torch.arange(values.shape[3], device=values.device)
    index = key.clamp(min=0).expand(*values.shape[:2], *key.shape)
    return values.gather(3, index).masked_fill(key < 0, 0.0)


def candidates(call: Call, node: Node, rows: Rows) -> Tensor:
    """Tell which units a row may choose, bool [n, Nk], or [B,Hs,n,Nk] where heads differ; causal:
    those whose last, or first, token it sees."""
    grid, score = unit_grid(call, node), score_below(node)
    if score.causal:
        able = (grid.first if score.begun else grid.last)[None, :] <= rows.high
    else:
        able = torch.ones(len(rows.low), grid.count, dtype=torch.bool, device=call.device)
    if score.among is None or not isinstance(node, (Score, Softmax)):
        return able
    assert isinstance(score.among, Similar)
    heads = call.number(list_heads(node))
    held = by_head(call.alike(score.among), heads, "blocks that are judged")
    return able & (held ^ score.among.negated)[:, :, None]


def forced(call: Call, node: Node, always: tuple[Node, ...], rows: Rows) -> Tensor:
    """Tell which units a row keeps whatever their score: bool [n, Nk].

    `Sink(n)` holds the first n units, `Local(n)` those from n - 1 before the own unit of the row's
    first query to the own unit of its last. A forced unit need not be complete, but under a causal
    score it must have begun.
    """
    grid = unit_grid(call, node)
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
    return held & (grid.first[None, :] <= rows.high) if score_below(node).causal else held
