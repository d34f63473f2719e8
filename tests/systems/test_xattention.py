"""XAttention against a second opinion written from the paper: blocks first, then the output."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.patterns import xattention
from tests import oracle

SHAPES = [  # B, Hq, Hkv, Sq, Skv, D
    (1, 1, 1, 64, 64, 16),
    (2, 4, 2, 130, 130, 16),
    (3, 3, 1, 129, 257, 20),
    (1, 16, 1, 1, 77, 16),
    (2, 8, 2, 100, 37, 8),
    (1, 4, 4, 255, 255, 16),
]


def block_scores(q: Tensor, k: Tensor, stride: int, block: int) -> tuple[Tensor, Tensor]:
    """Give the block scores of one head [Nq, Nk] and which blocks a row may choose, in float64.

    Every entry of the small map is summed pair by pair.
    """
    (sq, d), skv = q.shape, k.shape[0]
    shift = skv - sq
    rows, cols = -(-sq // stride), -(-skv // stride)
    n_rows, n_cols = -(-sq // block), -(-skv // block)
    scores = torch.zeros(n_rows, n_cols, dtype=torch.float64)
    for a in range(rows):
        newest = min((a + 1) * stride, sq) - 1 + shift
        logits = torch.full((cols,), -math.inf, dtype=torch.float64)
        for b in range(cols):
            if min((b + 1) * stride, skv) - 1 > newest:
                continue
            pairs = [(a * stride + stride - 1 - t, b * stride + t) for t in range(stride)]
            real = [float(q[i] @ k[j]) for i, j in pairs if i < sq and j < skv]
            logits[b] = sum(real) / stride / math.sqrt(d)
        if bool((logits > -math.inf).any()):
            chances = torch.softmax(logits, dim=0)
            for b in range(cols):
                scores[a * stride // block, b * stride // block] += chances[b]
    last_key = torch.tensor([min((n + 1) * block, skv) - 1 for n in range(n_cols)])
    last_row = torch.tensor([min((m + 1) * block, sq) - 1 + shift for m in range(n_rows)])
    return scores, last_key[None, :] <= last_row[:, None]


def forced_blocks(sq: int, skv: int, block: int, sinks: int, locals_: int) -> Tensor:
    """Give the blocks a row keeps whatever their score: the first, and up to its own."""
    rows, cols = -(-sq // block), -(-skv // block)
    held = torch.zeros(rows, cols, dtype=torch.bool)
    for m in range(rows):
        first = m * block + skv - sq
        last = min((m + 1) * block, sq) - 1 + skv - sq
        for n in range(cols):
            near = first // block - locals_ < n <= last // block
            held[m, n] = (n < sinks or near) and n * block <= last
    return held


def chosen(scores: Tensor, able: Tensor, forced: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Keep blocks until a share of each row is held; also tell which rows are decided by less than
    rounding."""
    kept, close = forced.clone(), torch.zeros(scores.shape[0], dtype=torch.bool)
    for m in range(scores.shape[0]):
        may = able[m] | forced[m]
        goal = share * float(scores[m][may].sum())
        held = float(scores[m][forced[m]].sum())
        others = [n for n in range(scores.shape[1]) if may[n] and not forced[m, n]]
        for n in sorted(others, key=lambda n: (-float(scores[m, n]), n)):
            close[m] |= abs(held - goal) < 1e-9
            if held >= goal:
                break
            kept[m, n] = True
            held += float(scores[m, n])
        ordered = sorted(float(scores[m, n]) for n in others)
        close[m] |= any(b - a < 1e-9 for a, b in pairwise(ordered) if a > 0)
    return kept, close


def mask_of(
    q: Tensor, k: Tensor, *, block: int, stride: int, shares: list[float], sinks: int, locals_: int
) -> tuple[Tensor, Tensor]:
    """Give the mask [B,Hq,Sq,Skv], and the rows [B,Hq,Sq] that rounding may decide."""
    batch, heads, sq, _ = q.shape
    skv, group = k.shape[2], heads // k.shape[1]
    causal = oracle.causal_mask(sq, skv)
    mask = torch.zeros(batch, heads, sq, skv, dtype=torch.bool)
    unsure = torch.zeros(batch, heads, sq, dtype=torch.bool)
    forced = forced_blocks(sq, skv, block, sinks, locals_)
    for b in range(batch):
        for h in range(heads):
            scores, able = block_scores(q[b, h], k[b, h // group], stride, block)
            kept, close = chosen(scores, able, forced, shares[h])
            tokens = kept.repeat_interleave(block, 0)[:sq].repeat_interleave(block, 1)[:, :skv]
            mask[b, h] = tokens & causal
            unsure[b, h] = close.repeat_interleave(block)[:sq]
    return mask, unsure


def tensors(shape: tuple[int, ...], sharp: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    b, hq, hkv, sq, skv, d = shape
    torch.manual_seed(sum(shape))
    q = sharp * torch.randn(b, hq, sq, d, dtype=torch.float64)
    k = torch.randn(b, hkv, skv, d, dtype=torch.float64)
    return q, k, torch.randn(b, hkv, skv, d, dtype=torch.float64)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("block", "stride"), [(32, 8), (16, 4), (64, 16), (8, 8)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_and_output_are_those_of_the_paper(
    shape: tuple[int, ...], block: int, stride: int, threshold: float
) -> None:
    q, k, v = tensors(shape)
    attention = sp.compile(
        xattention(block=block, stride=stride, threshold=threshold), backend="reference"
    )
    shares = [threshold] * shape[1]
    want, unsure = mask_of(q, k, block=block, stride=stride, shares=shares, sinks=1, locals_=1)
    got = attention.to_mask(q, k)
    differs = (got != want).any(dim=-1)
    assert not (differs & ~unsure).any()
    assert float(unsure.float().mean()) < 0.5 or threshold == 1.0
    out, lse = attention(q, k, v, return_lse=True)
    expected, expected_lse = oracle.attention(q, k, v, got)
    assert oracle.error(out, expected) < 1e-12
    assert oracle.error(lse, expected_lse) < 1e-12


def test_each_head_has_its_own_threshold() -> None:
    q, k, _ = tensors((2, 4, 2, 130, 130, 16))
    shares = [0.0, 0.5, 0.9, 1.0]
    pattern = xattention(block=16, stride=4, threshold=torch.tensor(shares))
    want, unsure = mask_of(q, k, block=16, stride=4, shares=shares, sinks=1, locals_=1)
    got = sp.compile(pattern, backend="reference").to_mask(q, k)
    assert not ((got != want).any(dim=-1) & ~unsure).any()
    counts = got.flatten(2).sum(-1)
    assert bool((counts[:, 1:] >= counts[:, :-1]).all())


def test_without_forced_blocks_the_share_alone_decides() -> None:
    q, k, _ = tensors((1, 2, 2, 96, 96, 16))
    pattern = xattention(block=16, stride=4, threshold=0.6, sinks=0, locals=1)
    want, unsure = mask_of(q, k, block=16, stride=4, shares=[0.6] * 2, sinks=0, locals_=1)
    got = sp.compile(pattern, backend="reference").to_mask(q, k)
    assert not ((got != want).any(dim=-1) & ~unsure).any()
