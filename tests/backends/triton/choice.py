"""What choosing units means, in Python, row by row: the reference of select, score and topk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Rule = Callable[[int, int, int, int, int], bool]  # (batch, list head, q_lo, q_hi, unit)


def unit_scores(
    rows: Tensor,
    units: Tensor,
    low: Tensor | None,
    n_lists: int,
    how: str,
    is_relu: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """Score in float64: rows [B,Hq,Nr,D] and units [B,Hkv,Nu,D] give [B,Hl,Nr,Nu]; weights
    [B,Hq,Nr] multiply what is left of the scores of a head."""
    heads, group = rows.shape[1], rows.shape[1] // units.shape[1]
    wide = units.repeat_interleave(group, 1).double()
    q = rows.double()
    if low is None:
        scores = q @ wide.mT
    else:
        lowest = low.repeat_interleave(group, 1).double()
        scores = q.clamp(min=0) @ wide.mT + q.clamp(max=0) @ lowest.mT
    if is_relu:
        scores = scores.relu()
    if weights is not None:
        scores = scores * weights.double()[..., None]
    scores = scores.unflatten(1, (n_lists, heads // n_lists))
    return {"none": scores.sum, "sum": scores.sum, "mean": scores.mean, "max": scores.amax}[how](2)


@dataclass(frozen=True)
class Rules:
    """Which units a row may and must choose."""

    visible: Rule = lambda b, h, q_lo, q_hi, u: True
    forced: Rule = lambda b, h, q_lo, q_hi, u: False

    def mark(self, scores: Tensor, granule: int, sq: int, row_begin: int = 0) -> Tensor:
        """Put -inf on what is excluded and inf on what is forced."""
        marked = scores.clone()
        for b, h, r, u in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape)).tolist():
            q_lo = (row_begin + r) * granule
            pair = (b, h, q_lo, min(q_lo + granule - 1, sq - 1), u)
            if not self.visible(*pair):
                marked[b, h, r, u] = -math.inf
            elif self.forced(*pair):
                marked[b, h, r, u] = math.inf
        return marked


def chosen(row: list[float], k: int, width: int) -> list[int]:
    """Choose from one row of marked scores; ascending."""
    visible = [u for u, score in enumerate(row) if score != -math.inf]
    n_forced = sum(score == math.inf for score in row)

    def rank(u: int) -> tuple[bool, float, int]:
        return (math.isnan(row[u]), 0.0 if math.isnan(row[u]) else -row[u], u)

    keep = min(max(k, n_forced), len(visible), width)
    return sorted(sorted(visible, key=rank)[:keep])


def choose(marked: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """Choose for every row of [B,Hl,Nr,Nu]: idx [B,Hl,Nr,width] int32 and cnt [B,Hl,Nr] int32."""
    lists = [chosen(row, k, width) for row in marked.flatten(0, 2).tolist()]
    idx = torch.tensor(
        [[*entry, *[-1] * (width - len(entry))] for entry in lists], dtype=torch.int32
    )
    cnt = torch.tensor([len(entry) for entry in lists], dtype=torch.int32)
    return idx.reshape(*marked.shape[:3], width), cnt.reshape(marked.shape[:3])
