"""What an attend does by tiles of query rows and key tokens: products in whole numbers, and tiles
that are skipped. `ir/nodes/attend.py` says what both mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spcomp.backends.reference.tokens import in_blocks, whole_numbers
from spcomp.errors import CannotLower
from spcomp.ir.nodes import Attend


def whole_tiles(node: Attend, start: int, stop: int, rows: int) -> tuple[int, int]:
    """Widen a range of query rows to whole tiles, which are judged and scaled as one."""
    if node.tile is None:
        return start, stop
    tile = node.tile[0]
    return start // tile * tile, min(-(-stop // tile) * tile, rows)


def integer_products(node: Attend, q: Tensor, keys: Tensor) -> Tensor:
    """Give q·k from whole numbers: q [B,Hq,R,D], whose row 0 begins a tile, and keys [B,Hkv,N,D],
    whose key 0 does -> [B,Hq,R,N].

    Raises: CannotLower, where a gradient is wanted.
    """
    if torch.is_grad_enabled() and (q.requires_grad or keys.requires_grad):
        raise CannotLower(
            where=node.where,
            what=f"the gradient of products in {node.quantise}",
            why="rounding to whole numbers has none",
            way_out="train with quantise=None, or call under torch.no_grad().",
        )
    assert node.tile is not None
    numbers, delta = whole_numbers(q, node.tile[0])
    key_numbers, key_delta = whole_numbers(keys, node.tile[1])
    batch, heads, rows, width = q.shape
    grouped = numbers.reshape(batch, keys.shape[1], -1, width)
    # Sums of at most 1040 products of numbers up to 127 are exact in float32.
    product = (grouped @ key_numbers.mT).reshape(batch, heads, rows, -1)
    key_delta = key_delta.repeat_interleave(heads // keys.shape[1], dim=1)
    return product * delta * key_delta.mT


@torch.no_grad()
def skipped(
    logits: Tensor, visible: Tensor, tile: tuple[int, int], distance: float | Tensor
) -> Tensor:
    """Tell which pairs lie in tiles that are left out.

    logits [B,Hq,R,N], -inf where nothing is visible; visible bool that broadcasts to it; row 0 and
    key 0 begin tiles; distance in units of log 2, a number or [1,Hq,1,1] -> bool [B,Hq,R,N].
    """
    rows, keys = logits.shape[2:]
    down, across = -rows % tile[0], -keys % tile[1]
    seen = torch.nn.functional.pad(visible.expand_as(logits), (0, across, 0, down))
    padded = torch.nn.functional.pad(logits, (0, across, 0, down), value=-torch.inf)
    highest = in_blocks(padded, 3, tile[1]).amax(dim=-1)  # [B,Hq,R,tiles]
    first = highest.new_full((*highest.shape[:3], 1), -torch.inf)
    before = torch.cat([first, highest.cummax(dim=-1).values[..., :-1]], dim=-1)
    # A row that sees nothing of a tile loses nothing by it; one that saw nothing yet loses all.
    gain = (highest - before).masked_fill(highest == -torch.inf, -torch.inf)
    gain = in_blocks(gain, 2, tile[0]).amax(dim=3)  # [B,Hq,row tiles,tiles]
    visited = in_blocks(in_blocks(seen, 3, tile[1]).any(dim=-1), 2, tile[0]).any(dim=3)
    place = torch.arange(visited.shape[-1], device=logits.device)
    last = torch.where(visited, place, -1).amax(dim=-1, keepdim=True)
    left_out = visited & (place != last) & (gain / math.log(2) + distance <= 0)
    pairs = left_out.repeat_interleave(tile[0], dim=2).repeat_interleave(tile[1], dim=3)
    return pairs[:, :, :rows, :keys]
