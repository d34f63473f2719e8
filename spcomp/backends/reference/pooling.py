"""From tokens to units: pooled values, and which tokens a unit stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spcomp.ir.nodes import Downsample
from spcomp.ir.nodes.downsample import Pooling

Pooled = tuple[Tensor, Tensor | None]
"""Units [B,H,U,D], and for a minmax pair their minima beside the maxima."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype scores, softmax and sums are computed in: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """How units lie on tokens.

    first, last: int64 [U], the first and last token of each unit (of the real ones), both
    ascending. stride: tokens from unit to unit, which is also how many query rows a row of a list
    serves. tokens: how many there are.
    """

    first: Tensor
    last: Tensor
    stride: int
    tokens: int

    @property
    def count(self) -> int:
        """The number of units."""
        return int(self.first.shape[0])

    def same_as(self, other: Grid) -> bool:
        """Tell whether both have the same units."""
        return torch.equal(self.first, other.first) and torch.equal(self.last, other.last)

    def holders(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Give the range [low, high) of the units that hold each token, int64 [N]."""
        low = torch.searchsorted(self.last, tokens.contiguous())
        high = torch.searchsorted(self.first, tokens.contiguous(), right=True)
        return low, torch.maximum(low, high)


def token_grid(tokens: int, device: torch.device) -> Grid:
    """Give the grid on which each token is its own unit."""
    each = torch.arange(tokens, device=device)
    return Grid(each, each, 1, tokens)


def last_grid(inner: Grid, count: int) -> Grid:
    """Give the grid of the last `count` units of another."""
    begin = max(0, inner.count - count)
    return Grid(inner.first[begin:], inner.last[begin:], inner.stride, inner.tokens)


def pooled_grid(inner: Grid, node: Downsample) -> Grid:
    """Give the grid of the units pooled from those of another grid."""
    count = unit_count(inner.count, node)
    starts = torch.arange(count, device=inner.first.device) * node.stride
    ends = (starts + node.block).clamp(max=inner.count)
    first = inner.first[starts] if count else starts
    last = inner.last[ends - 1] if count else ends
    return Grid(first, last, inner.stride * node.stride, inner.tokens)


def block_grid(tokens: int, block: int, device: torch.device) -> Grid:
    """Give the grid of blocks that tile some tokens; the last one may be short."""
    first = torch.arange(0, tokens, block, device=device)
    return Grid(first, (first + block).clamp(max=tokens) - 1, block, tokens)


def fold(x: Tensor, size: int, reverse: bool) -> Tensor:
    """Lay `size` tokens side by side: [B,H,S,D] -> [B,H,ceil(S/size),size*D], zeros past the
    end."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size))
    batch, heads, tokens, width = padded.shape
    units = padded.reshape(batch, heads, tokens // size, size, width)
    return (units.flip(3) if reverse else units).flatten(3)


def unit_count(length: int, node: Downsample) -> int:
    """Count the units over some entries; with tail "keep" none begins where all is covered."""
    if node.tail == "drop":
        return max(0, (length - node.block) // node.stride + 1)
    if node.block <= node.stride:
        return -(-length // node.stride)
    return max(1, -(-(length - node.block) // node.stride) + 1)


def pool(
    x: Tensor, by: Pooling, block: int, stride: int, count: int, padded: bool = False
) -> Pooled:
    """Pool x [B,H,S,D] to [B,H,count,D] in its dtype, accumulated in float32 or wider.

    A unit that reaches past the end is pooled over its real tokens; a mean, when `padded`, over
    zeros too.
    """
    if count == 0:
        none = x[:, :, :0]
        return (none, none) if by == "minmax" else (none, None)
    if by == "mean":
        starts = torch.arange(count, device=x.device) * stride
        ends = starts + block
        real = (ends if padded else ends.clamp(max=x.shape[2])) - starts
        sums = _reduced(x.to(compute_dtype(x.dtype)), block, stride, count, 0.0, "sum")
        return (sums / real[:, None]).to(x.dtype), None
    high = _reduced(x, block, stride, count, -torch.inf, "amax") if by != "min" else None
    low = _reduced(x, block, stride, count, torch.inf, "amin") if by != "max" else None
    if high is None:
        assert low is not None
        return low, None
    return high, low


def _reduced(x: Tensor, block: int, stride: int, count: int, fill: float, how: str) -> Tensor:
    """Reduce each unit: pad by what changes nothing, view the units, reduce."""
    length = (count - 1) * stride + block
    padding = max(0, length - x.shape[2])
    padded = torch.nn.functional.pad(x, (0, 0, 0, padding), value=fill)[:, :, :length]
    units = padded.unfold(2, block, stride)
    if how == "sum":
        return units.sum(dim=-1)
    return units.amax(dim=-1) if how == "amax" else units.amin(dim=-1)
