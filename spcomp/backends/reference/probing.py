"""What all rows of a head share beside their sums: tables of one number a head, and whether two
estimates agree."""

from __future__ import annotations

import torch
from torch import Tensor

from spcomp.backends.reference.call import Call
from spcomp.backends.reference.scoring import list_rows, row_grid, scores
from spcomp.errors import ShapeMismatch
from spcomp.ir.nodes import Alike, Captured, Node


@torch.no_grad()
def alike(call: Call, node: Alike) -> Tensor:
    """Tell for each query head whether two estimates agree, as `Alike` says: bool [B,Hq]."""
    if node not in call.known:
        p, q = (_distribution(call, side) for side in (node.p, node.q))
        middle = (p + q) / 2
        divergence = (_relative(p, middle) + _relative(q, middle)) / 2
        is_alike = divergence.clamp(min=0).sqrt() < node.below
        call.known[node] = is_alike.repeat_interleave(call.env["Hq"] // is_alike.shape[1], dim=1)
    return call.known[node]


def _distribution(call: Call, node: Node) -> Tensor:
    """Give the one row of a map, divided by its sum: [B,Hs,N]; NaN where that is 0."""
    rows = list_rows(call, node, 0, row_grid(call, node).count)
    values = scores(call, node, rows)[:, :, 0]
    return values / values.sum(dim=-1, keepdim=True)


def _relative(p: Tensor, to: Tensor) -> Tensor:
    """Give the relative entropy of p to another distribution; 0 log 0 is 0."""
    return (p * (p / to).log()).masked_fill(p == 0, 0.0).sum(dim=-1)


def head_table(call: Call, node: Node, heads: int) -> Tensor:
    """Give a captured table of one number a head, [heads].

    Raises: ShapeMismatch when it is for other heads.
    """
    assert isinstance(node, Captured), node
    table = call.tensor(node)
    if table.shape != (heads,):
        raise ShapeMismatch(
            where=node.where,
            left=f"a table for {table.shape[0]} heads",
            right=f"lists or queries of {heads} heads",
            problem="each head needs one number",
            way_out="build the pattern for the heads of this model.",
        )
    return table
