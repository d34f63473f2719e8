"""What the tests of reports share: the Triton backend on the device at hand, and small tensors.

Without a card the kernels run in Triton's interpreter, which takes milliseconds a program: shapes
here are as small as the fault they watch for allows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import spcomp as sp
from spcomp.api import Attention
from tests.conformance.cases import assert_within, device_of

DEVICE = device_of("triton")


@sp.pattern
def dense(q, k, v, *, scale=None):
    return sp.attend(q, k, v, scale=scale)


def qkv(
    b: int,
    hq: int,
    hkv: int,
    sq: int,
    skv: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    dv: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q [B,Hq,Sq,D], k [B,Hkv,Skv,D] and v [B,Hkv,Skv,Dv] on the CPU."""
    shapes = (b, hq, sq, d), (b, hkv, skv, d), (b, hkv, skv, dv or d)
    q, k, v = (torch.randn(s).to(dtype) for s in shapes)
    return q, k, v


def compiled(pattern: Any, **options: Any) -> Attention:
    """Compile a pattern for Triton, its captured tensors on the device the kernels run on."""
    made = pattern() if callable(pattern) else pattern
    moved = {n: t.to(DEVICE) for n, t in made.tensors.items()}
    return sp.compile(sp.Pattern(made.program, moved), backend="triton", **options)


def run(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Call on the device, with the strides given; out and lse on the CPU."""
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    out, lse = attention(q, k, v, return_lse=True, **options)
    return out.cpu(), lse.cpu()


def assert_attends(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **rule: Any
) -> tuple[Tensor, Tensor]:
    """Run, and compare with the oracle under a mask; out and lse."""
    out, lse = run(attention, q, k, v)
    assert_within(out, lse, q, k, v, mask, **rule)
    return out, lse
