"""The pool kernel against torch, unit by unit, in Triton's interpreter; and compiled for a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spcomp.backends.triton.contexts.pool import PoolContext, PoolKind, pool_context
from tests.backends.triton.rendering import (
    compile_kernel,
    field_names,
    import_rendered,
    variables_of,
    write_rendered,
)

TEMPLATE = "triton/kernels/pool.py.jinja"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _context(**options: Any) -> PoolContext:
    return pool_context(header=("test",), is_interpreted=True, **options)


def _pooled(x: Tensor, by: PoolKind, block: int, stride: int, n_units: int) -> list[Tensor]:
    """Pool in float64, one unit at a time: [B, H, U, D] per output."""
    units = [x[:, :, u * stride : u * stride + block].double() for u in range(n_units)]
    outputs = {
        "mean": [lambda t: t.mean(2)],
        "max": [lambda t: t.amax(2)],
        "min": [lambda t: t.amin(2)],
        "minmax": [lambda t: t.amax(2), lambda t: t.amin(2)],
    }[by]
    return [torch.stack([f(t) for t in units], 2) for f in outputs]


def _run(
    folder: Path, x: Tensor, context: PoolContext, outs: list[Tensor], first: int, n: int
) -> None:
    kernel = import_rendered(TEMPLATE, context, folder).pool_kernel
    batch, heads, tokens, _ = x.shape
    grid = (batch * heads * -(-n // context.unit_tile),)
    kernel[grid](x, *outs, *x.stride()[:3], *outs[0].stride()[:3], heads, tokens, first, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by", ["mean", "max", "min", "minmax"])
def test_each_unit_is_pooled_over_the_tokens_it_has(
    tmp_path: Path, by: PoolKind, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 37, 3, 17).to(dtype).transpose(1, 2)  # [B, H, S, D], strided
    context = _context(by=by, head_dim=17, block=16, stride=16, unit_tile=2, token_tile=8)
    want = _pooled(x, by, 16, 16, 3)
    outs = [torch.full((2, 3, 3, 17), 99.0, dtype=dtype) for _ in want]
    _run(tmp_path, x, context, outs, 0, 3)
    for got, exact in zip(outs, want, strict=True):
        assert torch.equal(got, exact.float().to(dtype)) or (
            by == "mean"
            and (got - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
        )


@pytest.mark.parametrize(("block", "stride"), [(32, 16), (5, 3), (4, 7), (1, 1)])
def test_units_may_overlap_and_have_any_length(tmp_path: Path, block: int, stride: int) -> None:
    x = torch.randint(-8, 9, (1, 2, 70, 16)).float()
    n_units = (70 - 1) // stride + 1
    context = _context(by="max", head_dim=16, block=block, stride=stride, unit_tile=4, token_tile=8)
    out = torch.full((1, 2, n_units, 16), 99.0)
    _run(tmp_path, x, context, [out], 0, n_units)
    assert torch.equal(out.double(), _pooled(x, "max", block, stride, n_units)[0])


def test_only_the_units_asked_for_are_written(tmp_path: Path) -> None:
    x = torch.randn(1, 2, 50, 16)
    context = _context(by="minmax", head_dim=16, block=8, stride=8, unit_tile=2, token_tile=8)
    outs = [torch.full((1, 2, 9, 16), 99.0) for _ in range(2)]
    _run(tmp_path, x, context, outs, 4, 3)
    for got, want in zip(outs, _pooled(x, "minmax", 8, 8, 7), strict=True):
        assert torch.equal(got[:, :, 4:7].double(), want[:, :, 4:])
        assert (got[:, :, :4] == 99).all() and (got[:, :, 7:] == 99).all()


def test_bfloat16_is_rounded_to_nearest_even(tmp_path: Path) -> None:
    x = torch.tensor([1.0, 1.0078125]).to(torch.bfloat16).view(1, 1, 2, 1).repeat(1, 1, 1, 16)
    context = _context(by="mean", head_dim=16, block=2, stride=2, unit_tile=1, token_tile=2)
    out = torch.empty(1, 1, 1, 16, dtype=torch.bfloat16)
    _run(tmp_path, x, context, [out], 0, 1)
    assert (out == 1.0).all()


def test_the_context_holds_exactly_the_variables_of_the_template() -> None:
    assert variables_of(TEMPLATE) == field_names(PoolContext)


def test_the_default_schedule_compiles_for_sm_90_without_spills(tmp_path: Path) -> None:
    context = pool_context(
        header=("test",), by="minmax", head_dim=128, block=64, stride=64, unit_tile=1, token_tile=32
    )
    path = write_rendered(TEMPLATE, context, tmp_path)
    built = compile_kernel(path, "pool_kernel", num_warps=4, num_stages=2)
    assert built.spill_bytes == 0
    assert built.registers <= 128
