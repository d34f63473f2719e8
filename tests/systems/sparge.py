"""A second opinion on SpargeAttn, from the paper (arXiv:2502.18137) and its code: maps of blocks in
float64, and attention tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests import oracle

SHAPES = [  # B, Hq, Hkv, Sq, Skv, D
    (1, 1, 1, 64, 64, 16),
    (2, 4, 1, 130, 130, 16),
    (3, 3, 1, 129, 257, 20),
    (1, 16, 1, 1, 77, 16),
    (2, 8, 2, 100, 37, 8),
    (1, 4, 4, 255, 255, 16),
    (1, 32, 2, 65, 97, 8),
]
BLOCKS = [(32, 16), (16, 32), (16, 16)]
NEAR = 1e-9


@dataclass(frozen=True, slots=True)
class Setting:
    """The hyper-parameters of one call, per query head where they may differ."""

    block_q: int
    block_k: int
    tau: list[float] | None = None
    kappa: tuple[int, int] | None = None
    theta: list[float] | None = None
    causal: bool = False
    attention_sink: bool = False


def pairwise_cosine(x: Tensor, block: int) -> list[float]:
    """Give the mean cosine over all pairs of each block of x [S, D]; NaN where it is not judged."""
    found = []
    for first in range(0, x.shape[0], block):
        tokens = x[first : first + block]
        if len(tokens) < block or bool((tokens.abs().amax(dim=1) == 0).any()):
            found.append(math.nan)
            continue
        cosines = [torch.cosine_similarity(a, tokens, dim=-1, eps=0).mean() for a in tokens]
        found.append(float(torch.stack(cosines).mean()))
    return found


def means(x: Tensor, block: int, stored: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([stored(x[i : i + block].mean(dim=0)) for i in range(0, x.shape[0], block)])


def row_of_map(
    scores: Tensor, able: list[int], tau: float | None, kept_blocks: int
) -> tuple[set[int], float]:
    """Choose the blocks of one row, and give the least distance of what decided it."""
    if not able:
        return set(), math.inf
    chances = torch.softmax(scores[able], dim=0).tolist()
    order = sorted(range(len(able)), key=lambda n: (-chances[n], able[n]))
    ordered = [float(scores[able[n]]) for n in order]

    def gap(kept: int) -> float:
        return ordered[kept - 1] - ordered[kept] if kept < len(ordered) else math.inf

    if tau is None:
        return {able[n] for n in order[:kept_blocks]}, gap(kept_blocks)
    reached, kept, near = 0.0, 0, math.inf
    for n in order:
        reached += chances[n]
        if tau < 1:
            near = min(near, abs(reached - tau))
        if reached <= tau or tau >= 1:
            kept += 1
    kept = max(kept, 1)
    return {able[n] for n in order[:kept]}, min(near, gap(kept))


def block_map(
    q: Tensor, k: Tensor, how: Setting, head: int, stored: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Give the map of one head, [Nq, Nk], and how near each row is to being another, [Nq]."""
    (sq, d), skv = q.shape, k.shape[0]
    keys = stored(k - k.mean(dim=0))
    rows, cols = -(-sq // how.block_q), -(-skv // how.block_k)
    theta = how.theta[head] if how.theta else 0.6
    like_q, like_k = pairwise_cosine(q, how.block_q), pairwise_cosine(keys, how.block_k)
    near_k = min((abs(s - theta) for s in like_k if not math.isnan(s)), default=math.inf)
    scores = (means(q, how.block_q, stored) @ means(keys, how.block_k, stored).T) / math.sqrt(d)
    amount = max(1, how.kappa[0] * cols // how.kappa[1]) if how.kappa else 0
    tau = how.tau[head] if how.tau else None
    held = torch.zeros(rows, cols, dtype=torch.bool)
    near = torch.full((rows,), near_k, dtype=torch.float64)
    for m in range(rows):
        newest = min((m + 1) * how.block_q, sq) - 1 + skv - sq
        begun = [n for n in range(cols) if not how.causal or n * how.block_k <= newest]
        able = [n for n in begun if like_k[n] > theta]
        kept, distance = row_of_map(scores[m], able, tau, amount)
        near_q = math.inf if math.isnan(like_q[m]) else abs(like_q[m] - theta)
        near[m] = min(near_k, near_q, distance)
        for n in begun:
            dense = not like_q[m] > theta or not like_k[n] > theta
            held[m, n] = dense or n in kept or (how.attention_sink and n == 0)
    return held, near


def maps(
    q: Tensor, k: Tensor, how: Setting, stored: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor, Tensor]:
    """Give the token mask [B,Hq,Sq,Skv], and how near each query's row of blocks is to another."""
    batch, heads, sq, _ = q.shape
    skv, group = k.shape[2], heads // k.shape[1]
    mask = torch.zeros(batch, heads, sq, skv, dtype=torch.bool)
    near = torch.zeros(batch, heads, sq, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            held, distance = block_map(q[b, h].double(), k[b, h // group].double(), how, h, stored)
            rows = held.repeat_interleave(how.block_q, 0)[:sq]
            mask[b, h] = rows.repeat_interleave(how.block_k, 1)[:, :skv]
            near[b, h] = distance.repeat_interleave(how.block_q)[:sq]
    return (mask & oracle.causal_mask(sq, skv) if how.causal else mask), near


def whole(x: Tensor) -> tuple[Tensor, float]:
    """Quantise a block: whole numbers and their delta, number by number."""
    delta = float(x.abs().max()) / 127 + 1e-7
    numbers = [
        [math.copysign(math.floor(abs(n) / delta + 0.5), n) for n in row] for row in x.tolist()
    ]
    return torch.tensor(numbers, dtype=torch.float64), delta


def online(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, tile: tuple[int, int], lam: float, int8: bool
) -> tuple[Tensor, Tensor, int, float]:
    """Attend with one head as the kernel does: tiles by ascending keys, a running maximum in units
    of log 2. Also give how many tiles were dropped, and how near a tile was to the other fate."""
    (sq, d), skv = q.shape, k.shape[0]
    keys = k - k.mean(dim=0)
    out = torch.zeros(sq, v.shape[1], dtype=torch.float64)
    lse = torch.full((sq,), -math.inf, dtype=torch.float64)
    dropped, near = 0, math.inf
    for top in range(0, sq, tile[0]):
        rows = range(top, min(top + tile[0], sq))
        starts = range(0, skv, tile[1])
        visited = [j for j in starts if bool(mask[rows, j : j + tile[1]].any())]
        best, total, sums = [-math.inf] * len(rows), [0.0] * len(rows), torch.zeros_like(out[rows])
        for j in visited:
            x, y = q[rows], k[j : j + tile[1]]
            logits = x @ y.T
            if int8:
                (a, da), (b, db) = whole(x), whole(keys[j : j + tile[1]])
                logits = a @ b.T * da * db + (x @ k.mean(dim=0))[:, None]
            logits = logits / math.sqrt(d) * math.log2(math.e)
            logits = logits.masked_fill(~mask[rows, j : j + tile[1]], -math.inf)
            highest = logits.amax(dim=1).tolist()
            gains = [
                h - m if h > -math.inf else -math.inf for h, m in zip(highest, best, strict=True)
            ]
            near = min(near, abs(max(gains) + lam)) if math.isfinite(max(gains)) else near
            skip = max(gains) + lam <= 0 and j != visited[-1]
            dropped += skip
            for i, high in enumerate(highest):
                newest = max(best[i], high)
                if newest == -math.inf:
                    continue
                shrink = 2.0 ** (best[i] - newest) if best[i] > -math.inf else 0.0
                total[i] *= shrink
                sums[i] *= shrink
                best[i] = newest
                if not skip:
                    weights = 2.0 ** (logits[i] - newest)
                    total[i] += float(weights.sum())
                    sums[i] += weights @ v[j : j + tile[1]]
        for i, row in enumerate(rows):
            if total[i] > 0:
                out[row] = sums[i] / total[i]
                lse[row] = (best[i] + math.log2(total[i])) * math.log(2)
    return out, lse, dropped, near


def tensors(shape: tuple[int, ...], sharp: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens that come in runs of 16, some of them around a direction of their own."""
    b, hq, hkv, sq, skv, d = shape
    torch.manual_seed(sum(shape))

    def runs(heads: int, tokens: int) -> Tensor:
        count = -(-tokens // 16)
        strength = 3.0 * torch.rand(b, heads, count, 1, dtype=torch.float64)
        base = strength * torch.randn(b, heads, count, d, dtype=torch.float64)
        noise = torch.randn(b, heads, tokens, d, dtype=torch.float64)
        return base.repeat_interleave(16, dim=2)[:, :, :tokens] + noise

    q, k = sharp * runs(hq, sq), runs(hkv, skv) + 0.5
    return q, k, torch.randn(b, hkv, skv, d, dtype=torch.float64)


def assert_same_map(got: Tensor, want: Tensor, near: Tensor, eps: float = NEAR) -> None:
    differs = (got != want).any(dim=-1)
    assert not (differs & (near > eps)).any()
    assert float((near > eps).float().mean()) > 0.9  # little is left to rounding
