"""What the tests on a card share: tensors, and the oracle in float64 on the card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import spcomp as sp
from spcomp.api import Attention
from spcomp.patterns import block_topk, moba, quest, streaming_llm, xattention
from tests import oracle
from tests.conformance.cases import assert_same_selection

DEVICE = "cuda"


@sp.pattern
def documents(q, k, v, *, size=300, longest=4096):
    """Packed documents of `size` tokens, the same for every head."""
    names = torch.arange(longest, device=DEVICE) // size
    rule = sp.mask_mod(lambda b, h, q_idx, kv_idx: names[q_idx] == names[kv_idx])
    return sp.attend(q, sp.gather(k, rule), sp.gather(v, rule))


@sp.pattern
def overlapping(q, k, v):
    """Blocks by the probabilities of overlapping units, one list a KV head (NSA)."""
    units = sp.downsample(k, block=32, stride=16, tail="drop")
    chances = sp.softmax(sp.score(q, units), heads="group")
    best = sp.topk(sp.regroup(chances, block=64), k=4, always=sp.sink(1) | sp.own())
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


PATTERNS: dict[str, tuple[Callable[[], sp.Pattern], int]] = {
    "block_topk": (lambda: block_topk(block=64, budget=0.25), 64),
    "moba": (lambda: moba(block=128, k_blocks=4), 128),
    "quest": (lambda: quest(page=16, budget=256), 16),
    "quest by groups": (lambda: quest(page=16, budget=256, heads="group"), 16),
    "xattention": (lambda: xattention(block=64, stride=8, threshold=0.8), 64),
    "overlapping": (lambda: overlapping(), 64),
    "streaming_llm": (lambda: streaming_llm(sinks=4, recent=500), 0),
    "documents": (lambda: documents(), 0),
}
"""Patterns, and the tokens of a unit of their one list; 0 without a list."""

PROBE = 144
"""Columns of the values that tell which units were read: as many whatever the length, so that one
kernel serves them all."""

Shape = tuple[int, int, int, int, int]  # B, Hq, Hkv, Sq, Skv


def tensors(
    shape: Shape, d: int, dtype: torch.dtype, *, dv: int | None = None, layout: str = "plain"
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v on the card; `swapped` is [B,S,H,D] in memory, `sliced` a part of more."""
    b, hq, hkv, sq, skv = shape
    sizes = (b, hq, sq, d), (b, hkv, skv, d), (b, hkv, skv, dv or d)
    q, k, v = (_laid_out(torch.randn(s, device=DEVICE).to(dtype), layout) for s in sizes)
    return q, k, v


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "swapped":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        longer = torch.full((*x.shape[:2], x.shape[2] + 7, x.shape[3] + 16), torch.nan)
        held = longer.to(x)[:, :, 3 : 3 + x.shape[2], 16:]
        return held.copy_(x)
    return x


def assert_attends(out: Tensor, lse: Tensor, qkv: tuple[Tensor, ...], mask: Tensor) -> None:
    """Compare with the oracle: at most twice the error of plain PyTorch on the card.

    The lse is float32 whatever the inputs, and so is the error it is allowed.
    """
    q, k, v = qkv
    want, want_lse = oracle.attention(q, k, v, mask)
    plain, _ = oracle.plain_attention(q, k, v, mask)
    _, plain_lse = oracle.plain_attention(q.float(), k.float(), v.float(), mask)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert oracle.error(out, want) <= 2 * oracle.error(plain, want) + oracle.TINY[q.dtype]
    assert oracle.error(lse, want_lse) <= max(2 * oracle.error(plain_lse, want_lse), 1e-5)


def mask_on_card(attention: Attention, unit: int, q: Tensor, k: Tensor) -> Tensor:
    """Give the pairs the kernels read, [B,Hq,Sq,Skv], after checking them against the reference.

    The values are one-hot by unit, so the output shows which units a row read; rows may differ from
    the reference where two units score within the rounding of the dtype of each other.
    """
    want = attention.to_mask(q, k)
    if unit == 0:
        return want
    skv = k.shape[2]
    assert -(-skv // unit) <= PROBE
    eye = torch.eye(PROBE, device=k.device, dtype=k.dtype).repeat_interleave(unit, 0)[:skv]
    out = attention(q, k, eye.expand(*k.shape[:2], -1, -1))
    read = (out > 0).repeat_interleave(unit, -1)[..., :skv]
    positions = torch.arange(q.shape[2], device=k.device)[:, None] + (skv - q.shape[2])
    got = read & (torch.arange(skv, device=k.device) <= positions)
    if not torch.equal(got, want):
        cpu = (x.cpu() for x in (q, k, got, want))
        assert_same_selection(attention.pattern, *cpu)
    return got


def compiled(pattern: Any, **options: Any) -> Attention:
    """Compile a pattern, or one of PATTERNS by its name, for the card."""
    if isinstance(pattern, str):
        pattern = PATTERNS[pattern][0]()
    return sp.compile(pattern, backend="triton", **options)
