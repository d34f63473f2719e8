"""Lists the user brings, in the one form plans read: ascending, each unit once, -1 at the end,
counts apart."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from spcomp.dsl.pattern import Pattern
from spcomp.ir.nodes import Captured, Given, Node
from spcomp.ir.nodes.base import rebuild

if TYPE_CHECKING:
    from torch import Tensor

MOST_TOKENS = 2**31 - 1  # kernels count tokens in 32 bits
MOST_UNITS = 1 << 24  # an entry of a list has 24 bits for the number of its unit


def canonical_lists(pattern: Pattern) -> Pattern:
    """Turn every block mask and index list of a pattern into sorted indices and counts.

    Rewrite: given(mask=m) -> given(indices=i, counts=c)
    """
    if not any(isinstance(n, Given) for n in pattern.program.stages()):
        return pattern
    tensors = dict(pattern.tensors)
    seen: dict[Node, Node] = {}

    def visit(node: Node) -> Node:
        if node not in seen:
            seen[node] = (
                _canonical(node, tensors) if isinstance(node, Given) else rebuild(node, visit)
            )
        return seen[node]

    result = visit(pattern.program.result)
    return Pattern(replace(pattern.program, result=result), tensors)


def _canonical(node: Given, tensors: dict[str, Tensor]) -> Given:
    assert isinstance(node.tensor, Captured)
    given = tensors[node.tensor.name]
    if node.form == "mask":
        indices, counts = from_mask(given.bool())
        name = f"{node.tensor.name}_list"
    else:
        limits = tensors[node.counts.name] if isinstance(node.counts, Captured) else None
        indices, counts = sorted_lists(given, limits, min(MOST_UNITS, MOST_TOKENS // node.block_k))
        name = f"{node.tensor.name}_sorted"
    tensors[name], tensors[f"{name}_counts"] = indices, counts
    listed = Captured(name, tuple(indices.shape), "int32", where=node.where)
    counted = Captured(f"{name}_counts", tuple(counts.shape), "int32", where=node.where)
    return replace(node, form="indices", tensor=listed, counts=counted)


def from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Give the lists of a boolean mask [B,H,Nq,Nk]: indices [B,H,Nq,K] i32 and counts [B,H,Nq]
    i32."""
    import torch

    units = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.int32)
    listed = torch.where(mask, units, mask.shape[-1])
    return _packed(listed, mask.shape[-1])


def sorted_lists(indices: Tensor, counts: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """Sort index lists; drop repeats, negatives, units from `most` on, and what a count leaves."""
    import torch

    beyond = torch.iinfo(torch.int32).max
    outside = (indices < 0) | (indices >= most)
    listed = torch.where(outside, beyond, indices).to(torch.int32)
    if counts is not None:
        place = torch.arange(indices.shape[-1], device=indices.device)
        listed = torch.where(place < counts[..., None], listed, beyond)
    return _packed(listed, beyond)


def _packed(listed: Tensor, beyond: int) -> tuple[Tensor, Tensor]:
    """Sort each row, remove repeats, and cut the columns no row uses; `beyond` marks no unit."""
    import torch

    ordered = listed.sort(dim=-1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    ordered = torch.where(repeated, beyond, ordered).sort(dim=-1).values
    exists = ordered != beyond
    counts = exists.sum(-1).to(torch.int32)
    width = max(1, int(counts.max())) if counts.numel() else 1
    packed = torch.where(exists, ordered, -1)[..., :width].to(torch.int32).contiguous()
    return packed, counts.contiguous()
