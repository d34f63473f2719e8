"""Plain dense attention to compare the attend family with, and tile lists of a dense mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
SINKS = (0.0, -math.inf, 2.5, -300.0, math.inf, 1e30)
"""Sink logits of six heads: usual ones, none, one that is nothing, and two that are everything."""
TILE_FIELDS = 24  # bits of an entry that hold the tile number


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend in q's dtype over visible [B,Hq,Sq,Skv]; an empty row gives 0 and -inf.

    sinks [Hq]: logits that join the denominator alone.
    Returns: out [B,Hq,Sq,Dv], lse [B,Hq,Sq] natural log in the softmax's dtype.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ k.transpose(-1, -2)).to(wide) * scale
    if bias is not None:
        scores = scores + bias.to(wide)
    scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.to(wide)[:, None])
    weights = torch.exp(scores - total.masked_fill(total == -math.inf, 0.0)[..., None])
    return (weights.to(q.dtype) @ v), lse


def assert_close(
    got: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Allow twice the error that plain PyTorch in the same dtype has against float64."""
    wide = (q.double(), k.double(), v.double())
    want, want_lse = dense(*wide, visible, scale, None if bias is None else bias.double(), sinks)
    plain, plain_lse = dense(q, k, v, visible, scale, bias, sinks)
    floor = 1e-6 if q.dtype == torch.float32 else 1e-4
    out, lse = got
    budget = 2 * (plain.double() - want).abs().max().item() + floor
    assert torch.isfinite(out).all()
    assert (out.double() - want).abs().max().item() <= budget
    empty = want_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert (out[empty] == 0).all()
    seen = ~empty
    if seen.any():
        # The inputs are as given, only the products and sums are rounded: float32 on both sides.
        lse_budget = 2 * (plain_lse.double() - want_lse)[seen].abs().max().item() + 1e-5
        assert (lse.double() - want_lse)[seen].abs().max().item() <= lse_budget


def causal(sq: int, skv: int) -> Tensor:
    """Give the bottom-right causal mask [Sq,Skv]."""
    return torch.arange(skv)[None, :] <= torch.arange(sq)[:, None] + (skv - sq)


def tile_lists(
    allowed: Tensor, chosen: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """List the tiles of allowed [B,Hl,Sq,Skv] within those of chosen [B,Hl,R,Nk] (truth values).

    Returns: tiles [B,Hl,R,C] i32 with flag 0 where chosen, partial and total [B,Hl,R] i32. A tile
    that is not chosen is listed too where it holds an allowed pair, as a union of lists needs.
    """
    batch, heads, sq, skv = allowed.shape
    rows, cols = chosen.shape[2:]
    seen = allowed.new_zeros(batch, heads, rows * block_q, cols * block_k)
    seen[:, :, :sq, :skv] = allowed
    # Rows past the end do not keep a tile from being full, columns past the end do.
    whole = seen.clone()
    whole[:, :, sq:] = True
    whole[..., skv:] = False
    grid = (batch, heads, rows, block_q, cols, block_k)
    full, some = whole.view(grid).all(5).all(3), seen.view(grid).any(5).any(3)
    tiles = torch.full((batch, heads, rows, cols + 1), -1, dtype=torch.int32)
    partial = torch.zeros(batch, heads, rows, dtype=torch.int32)
    total = torch.zeros_like(partial)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows))).tolist():
        entries = [
            c | (int(chosen[b, h, r, c]) << TILE_FIELDS)
            for wanted_full in (False, True)
            for c in range(cols)
            if some[b, h, r, c] and bool(full[b, h, r, c]) == wanted_full
        ]
        tiles[b, h, r, : len(entries)] = torch.tensor(entries, dtype=torch.int32)
        partial[b, h, r] = int((some & ~full)[b, h, r].sum())
        total[b, h, r] = len(entries)
    return tiles, partial, total
