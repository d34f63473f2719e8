"""Tokens in another order or less their mean, how alike the tokens of a block are, and tokens as
whole numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from spcomp.backends.reference.pooling import compute_dtype
from spcomp.errors import ShapeMismatch

TINY_DELTA = 1e-7
"""What is added to a block's delta, so that a block of zeros has one."""


def mean_token(x: Tensor) -> Tensor:
    """Give the mean over all tokens, [B,H,1,D] in float32 (float64 for float64)."""
    return x.to(compute_dtype(x.dtype)).mean(dim=2, keepdim=True)


def centred(x: Tensor) -> Tensor:
    """Subtract the mean over all tokens: [B,H,S,D] in the dtype of x."""
    return (x.to(compute_dtype(x.dtype)) - mean_token(x)).to(x.dtype)


@torch.no_grad()
def similarity(x: Tensor, block: int) -> Tensor:
    """Give the mean cosine over all pairs of tokens of each block: x [B,H,S,D] -> [B,H,U].

    It is NaN for a short last block and for one that holds a token of zeros or a NaN.
    """
    wide = x.to(compute_dtype(x.dtype))
    directions = wide / wide.norm(dim=-1, keepdim=True)
    # Tokens that are not there are zeros, whose direction is NaN, as that of a real one would be.
    padded = torch.nn.functional.pad(directions, (0, 0, 0, -x.shape[2] % block), value=torch.nan)
    mean = in_blocks(padded, 2, block).sum(dim=3) / block
    # Rounding must not take the tokens of a block for more alike than the same.
    return mean.square().sum(dim=-1).clamp(max=1.0)


def in_blocks(x: Tensor, dim: int, block: int) -> Tensor:
    """Cut one dimension, a multiple of `block`, into blocks: [..,S,..] -> [..,S/block,block,..]."""
    return x.reshape(*x.shape[:dim], x.shape[dim] // block, block, *x.shape[dim + 1 :])


def whole_numbers(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Round each block of tokens to whole numbers from -127 to 127 and one scale a block.

    x [B,H,S,D] -> numbers [B,H,S,D] and deltas [B,H,S,1], both in float32 (float64 for float64), so
    that x is about number * delta. A half is rounded away from zero.
    """
    wide = x.to(compute_dtype(x.dtype))
    tokens = x.shape[2]
    padded = in_blocks(torch.nn.functional.pad(wide, (0, 0, 0, -tokens % block)), 2, block)
    delta = padded.abs().amax(dim=(3, 4), keepdim=True) / 127 + TINY_DELTA
    scaled = padded / delta
    numbers = scaled.sign() * (scaled.abs() + 0.5).floor()
    deltas = delta.expand(-1, -1, -1, block, -1)
    return (y.flatten(2, 3)[:, :, :tokens] for y in (numbers, deltas))  # type: ignore[return-value]


def by_head(x: Tensor, heads: int, what: str) -> Tensor:
    """Carry what is known of fewer heads to `heads` of them: [B,H,…] -> [B,heads,…].

    Raises: ShapeMismatch, when the heads do not divide.
    """
    if x.shape[1] == heads:
        return x
    if x.shape[1] == 0 or heads % x.shape[1]:
        raise ShapeMismatch(
            left=f"{what} for {x.shape[1]} heads",
            right=f"a use for {heads}",
            problem=f"{heads} is not a multiple of {x.shape[1]}",
            way_out="give one for each query head, or one for each KV head.",
        )
    return x.repeat_interleave(heads // x.shape[1], dim=1)
