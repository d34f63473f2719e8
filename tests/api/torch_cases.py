"""What the tests of the op share: patterns with tables and lists, a layer, tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import spcomp as sp
from spcomp.api import Attention
from spcomp.patterns import block_topk

OP = torch.ops.spcomp.attend
Qkv = tuple[Tensor, Tensor, Tensor]


@sp.pattern
def biased(q, k, v, *, table):
    """A score hook that reads a table of floats [heads, distances]."""
    near = sp.window(20)
    return sp.attend(
        q,
        sp.gather(k, near),
        sp.gather(v, near),
        score_mod=lambda s, b, h, q_idx, kv_idx: s + table[h, abs(q_idx - kv_idx)],
    )


@sp.pattern
def documents(q, k, v, *, names):
    rule = sp.mask_mod(lambda b, h, q_idx, kv_idx: names[q_idx] == names[kv_idx])
    return sp.attend(q, sp.gather(k, rule), sp.gather(v, rule))


@sp.pattern
def listed(q, k, v, *, indices):
    chosen = sp.block_indices(indices, block=16)
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))


class Layer(nn.Module):
    """A model's use of a compiled pattern."""

    def __init__(self, attention: Attention, d: int = 16) -> None:
        super().__init__()
        self.attention, self.project = attention, nn.Linear(d, d)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(self.project(q), k, v)


def tensors(
    sq: int = 40, skv: int = 50, *, hq: int = 4, hkv: int = 2, d: int = 16, **options: Any
) -> Qkv:
    shapes = (1, hq, sq, d), (1, hkv, skv, d), (1, hkv, skv, d)
    q, k, v = (torch.randn(s, **options) for s in shapes)
    return q, k, v


def blocks(**options: Any) -> Attention:
    options.setdefault("backend", "reference")
    return sp.compile(block_topk(block=16, budget=2, locals=1), **options)


def assert_same(got: Any, want: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
