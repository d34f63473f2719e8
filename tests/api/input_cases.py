"""Patterns that take tensors beside q, k and v, and the formulas their results are held against."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.errors import SpcompError
from tests import oracle

BACKENDS = ("reference", "triton")
NEAR, SINKS, BLOCK = 9, 4, 16


@sp.pattern
def gated(q, k, v, gates: sp.tensor("B Hq Sq 3"), *, size=NEAR):
    """A window, sinks, and the best blocks, joined by gates."""
    best = sp.topk(sp.score(q, sp.downsample(k, block=BLOCK)), k=2)
    parts = (sp.window(size), sp.sink(SINKS), best)
    return sp.merge(*[sp.attend(q, sp.gather(k, s), sp.gather(v, s)) for s in parts], gates=gates)


@sp.pattern
def gated_by_rules(q, k, v, gates: sp.tensor("B Hq Sq 3")):
    parts = (sp.window(20), sp.sink(9), sp.causal())
    return sp.merge(*[sp.attend(q, sp.gather(k, s), sp.gather(v, s)) for s in parts], gates=gates)


@sp.pattern
def outer(
    q, k, v, mix: Annotated[Any, sp.tensor("B Hq Sq 2", dtype="float32")], g: sp.tensor("B Hq Sq 3")
):
    """A pattern made of another one, whose result is joined again."""
    return sp.merge(sp.attend(q, k, v, mask=sp.window(3)), gated(q, k, v, gates=g), gates=mix)


def indexer(q, k, v, iq, ik, rows, block):
    side = iq if rows == 1 else sp.downsample(iq, block=rows)
    units = sp.downsample(ik, block=block) if block > 1 else ik
    best = sp.topk(sp.score(side, units, heads="all", reduce="sum"), k=2)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


@sp.pattern
def indexed(
    q, k, v, iq: sp.tensor("B Hi Sq Di"), ik: sp.tensor("B 1 Skv Di"), *, rows=1, block=BLOCK
):
    """Blocks that the heads of an indexer choose by one head of keys, one list for all heads."""
    return indexer(q, k, v, iq, ik, rows, block)


@sp.pattern
def indexed_each(
    q, k, v, iq: sp.tensor("B Hi Sq Di"), ik: sp.tensor("B Hi Skv Di"), *, rows=1, block=BLOCK
):
    """The same where each head of the indexer has keys of its own."""
    return indexer(q, k, v, iq, ik, rows, block)


def qkv(
    b: int, hq: int, hkv: int, sq: int, skv: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    shapes = (b, hq, sq, d), (b, hkv, skv, d), (b, hkv, skv, d)
    return tuple(torch.randn(s).to(dtype) for s in shapes)


def chosen_blocks(scores: Tensor, sq: int, skv: int, block: int, keep: int) -> Tensor:
    """Mask the tokens of the `keep` best complete blocks a row, scores [B,H,Sq,U]."""
    t, last = oracle.positions(sq, skv), (torch.arange(scores.shape[3]) + 1) * block - 1
    able = last.clamp(max=skv - 1)[None, :] <= t
    ranked = scores.masked_fill(~able, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ranked[..., :keep], True) & able
    return kept.repeat_interleave(block, dim=-1)[..., :skv] & oracle.causal_mask(sq, skv)


def part_masks(q: Tensor, k: Tensor, size: int = NEAR) -> tuple[Tensor, ...]:
    sq, skv = q.shape[2], k.shape[2]
    causal, key = oracle.causal_mask(sq, skv), torch.arange(skv)
    means = oracle.pooled(k.double(), BLOCK, oracle.mean).to(k.dtype).double()
    scores = q.double() @ means.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    best = chosen_blocks(scores, sq, skv, BLOCK, 2)
    return oracle.window_mask(sq, skv, size), causal & (key < SINKS), best


def joined(results: list[tuple[Tensor, Tensor]], gates: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of a merge by gates, written out."""
    out = sum(gates[..., p, None] * o for p, (o, _) in enumerate(results))
    return out, torch.stack([lse.double() for _, lse in results]).logsumexp(0)


def assert_gated(
    got: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, gates: Tensor, size: int = NEAR
) -> None:
    """Check against float64, within twice the error of plain PyTorch."""
    masks = part_masks(q, k, size)
    want = joined([oracle.attention(q, k, v, m) for m in masks], gates.double())
    plain = joined([oracle.plain_attention(q, k, v, m) for m in masks], gates)
    wide = joined(
        [oracle.plain_attention(q.float(), k.float(), v.float(), m) for m in masks], gates
    )
    out, lse = (x.cpu() for x in got)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert oracle.error(out, want[0]) <= 2 * oracle.error(plain[0], want[0]) + oracle.TINY[q.dtype]
    assert oracle.error(lse, want[1]) <= max(2 * oracle.error(wide[1], want[1]), 1e-5)


def text_of(action: Any) -> str:
    with pytest.raises(SpcompError) as caught:
        action()
    return "\n".join(x for x in str(caught.value).splitlines() if "-->" not in x)


def a_call(**other: Any) -> dict[str, Any]:
    q, k, v = qkv(2, 4, 2, 20, 30, 16)
    return {"q": q, "k": k, "v": v, "gates": torch.rand(2, 4, 20, 3), **other}


def a_decode_call(device: str) -> dict[str, Tensor]:
    q, k, v = qkv(1, 2, 1, 1, 20, 16)
    call = {"q": q, "k": k, "v": v, "gates": torch.rand(1, 2, 1, 3)}
    return {n: t.to(device) for n, t in call.items()}
