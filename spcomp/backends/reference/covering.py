"""Diagonals covered by blocks of keys, with the columns beside them, as `Covered` says."""

from __future__ import annotations

import torch
from torch import Tensor


def covered(columns: Tensor, offsets: Tensor, ends: list[int], block: int) -> Tensor:
    """Give the keys that each block of query rows reads: bool [B,H,len(ends),Skv].

    columns, offsets: bool [B,H,Skv], the keys and distances a head lists. ends: the position after
    the last of each block of rows, in int.
    """
    batch, heads, keys = columns.shape
    marks = torch.zeros(batch, heads, len(ends), keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            listed = offsets[b, h].nonzero()[:, 0].tolist()
            for m, end in enumerate(ends):
                stretches = _stretches([o for o in listed if o < end], end, block)
                for first, stop in stretches:
                    marks[b, h, m, first:stop] = True
                if stretches:
                    stop = stretches[-1][1]
                    marks[b, h, m, :stop] |= columns[b, h, :stop].cpu()
    return marks.to(columns.device)


def _stretches(offsets: list[int], end: int, block: int) -> list[tuple[int, int]]:
    """Merge the blocks of keys that offsets stand for into stretches [first, stop)."""
    found: list[tuple[int, int]] = []
    for offset in sorted(offsets, reverse=True):
        stop = max(end - offset, block)
        if not found or stop > found[-1][1] + block:
            found.append((stop - block, stop))
        elif stop > found[-1][1]:
            first, before = found.pop()
            found.append((first, before + block))
    return found
