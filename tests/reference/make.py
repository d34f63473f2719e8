"""Tensors and runs the tests of the reference backend share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spcomp.backends.reference.pattern import run_program, to_mask
from spcomp.dsl import Pattern
from tests import oracle


@dataclass(frozen=True)
class Shape:
    b: int = 1
    hq: int = 2
    hkv: int = 1
    sq: int = 64
    skv: int = 64
    d: int = 16
    dv: int = 16

    def __str__(self) -> str:
        return f"b{self.b}-h{self.hq}:{self.hkv}-s{self.sq}x{self.skv}-d{self.d}:{self.dv}"


AWKWARD = (
    Shape(1, 2, 1, 1, 1, 16, 16),
    Shape(2, 4, 2, 1, 77, 8, 8),
    Shape(3, 6, 2, 130, 130, 17, 17),
    Shape(2, 3, 3, 37, 130, 80, 24),
    Shape(1, 4, 2, 70, 33, 8, 40),
    Shape(1, 6, 2, 65, 64, 16, 1),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def qkv(shape: Shape, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k, v from a normal distribution."""
    q = torch.randn(shape.b, shape.hq, shape.sq, shape.d, dtype=torch.float64)
    k = torch.randn(shape.b, shape.hkv, shape.skv, shape.d, dtype=torch.float64)
    v = torch.randn(shape.b, shape.hkv, shape.skv, shape.dv, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def inputs(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Name the tensors of a call, the captured ones among them."""
    return {"q": q, "k": k, "v": v, **pattern.tensors}


def run(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, *, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run a pattern by its interpreter."""
    return run_program(pattern.program, inputs(pattern, q, k, v), chunk_rows=chunk_rows)


def mask_of(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Give the pairs a pattern reads."""
    return to_mask(pattern.program, inputs(pattern, q, k, v))


def assert_attends(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    hook: oracle.Hook | None = None,
    chunk_rows: int | None = None,
) -> None:
    """Check out and lse against the oracle's, within twice the error of plain PyTorch."""
    out, lse = run(pattern, q, k, v, chunk_rows=chunk_rows)
    want_out, want_lse = oracle.attention(q, k, v, mask, scale=scale, hook=hook)
    budget_out, budget_lse = oracle.budgets(q, k, v, mask, scale=scale, hook=hook)
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert oracle.error(out, want_out) <= budget_out
    assert oracle.error(lse, want_lse) <= budget_lse
