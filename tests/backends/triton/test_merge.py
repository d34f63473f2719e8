"""Joining parts by LSE against one softmax over all their keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spcomp.backends.triton.contexts.attend import MergeContext, merge_context
from tests.backends.triton.attention import SINKS
from tests.backends.triton.rendering import (
    compile_kernel,
    field_names,
    import_rendered,
    variables_of,
    write_rendered,
)

TEMPLATE = "triton/kernels/merge.py.jinja"


def run(
    folder: Any,
    part: Tensor,
    plse: Tensor,
    *,
    cnt: Tensor | None = None,
    gates: Tensor | None = None,
    sq: int | None = None,
    row_begin: int = 0,
    store_begin: int = 0,
    dtype: torch.dtype = torch.float32,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge part [P,B,Hq,Nr,Dv] and plse [P,B,Hq,Nr] in any strides; gates [B,Hq,Sq,P]."""
    n_parts, batch, hq, rows, dv = part.shape
    sq = rows if sq is None else sq
    context = merge_context(
        header=("A test.",),
        value_dim=dv,
        block_r=4,
        block_p=2,
        has_counts=cnt is not None,
        has_sinks=sinks is not None,
        has_gates=gates is not None,
        is_interpreted=True,
    )
    kernel = import_rendered(TEMPLATE, context, folder).merge_kernel
    out = torch.full((batch, sq, hq, dv), math.nan, dtype=dtype).transpose(1, 2)
    lse = torch.full((batch, hq, sq), math.nan)
    counts = torch.zeros(1, 1, 1, dtype=torch.int32) if cnt is None else cnt
    kernel[(batch * hq * -(-rows // 4),)](
        *(part, plse, out, lse, counts, *([] if gates is None else [gates])),
        *(*part.stride()[:4], *plse.stride(), *out.stride()[:3]),
        *(*lse.stride()[:2], *counts.stride()[:2]),
        *(() if gates is None else gates.stride()[:3]),
        *(n_parts, sq, hq, hq // counts.shape[1], row_begin, store_begin, rows),
        *(() if sinks is None else (sinks, sinks.stride(0))),
    )
    return out, lse


def joined(part: Tensor, plse: Tensor) -> tuple[Tensor, Tensor]:
    whole = plse.double().logsumexp(0)
    weights = torch.exp(plse.double() - whole.masked_fill(whole == -math.inf, 0.0))
    return (part.double() * weights[..., None]).sum(0), whole


def random_parts(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    part, plse = torch.randn(shape), torch.randn(shape[:-1]) * 3
    plse[torch.rand(plse.shape) < 0.3] = -math.inf
    return part.masked_fill((plse == -math.inf)[..., None], 0.0), plse


def test_context_holds_exactly_the_variables_of_the_template():
    assert field_names(MergeContext) == variables_of(TEMPLATE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 3, 5, 17), (5, 1, 2, 1, 64)])
def test_parts_join_as_one_softmax(tmp_path, shape, dtype):
    part, plse = random_parts(shape)
    plse[:, 0, 0, 0], part[:, 0, 0, 0] = -math.inf, 0.0
    out, lse = run(tmp_path, part, plse, dtype=dtype)
    want, want_lse = joined(part, plse)
    rounded = (want.to(dtype).double() - want).abs().max().item()
    assert (out.double() - want).abs().max().item() <= 2 * rounded + 2e-6
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-6, atol=1e-6)
    assert (out[0, 0, 0] == 0).all() and lse[0, 0, 0] == -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_single_part_passes_through_unchanged(tmp_path, dtype):
    part, plse = random_parts((1, 1, 2, 6, 16))
    part = part.to(dtype)
    out, lse = run(tmp_path, part, plse, dtype=dtype)
    assert torch.equal(out, part[0]) and torch.equal(lse, plse[0])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # a sink that is everything
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [1, 5])
def test_sinks_join_the_one_softmax_of_all_parts(tmp_path, parts, dtype):
    part, plse = random_parts((parts, 2, 6, 5, 17))
    plse[:, 0, :, 0], part[:, 0, :, 0] = -math.inf, 0.0
    sinks = torch.tensor(SINKS)
    out, lse = run(tmp_path, part, plse, dtype=dtype, sinks=sinks.repeat_interleave(3)[::3])
    want, want_lse = joined(part, plse)
    seen = want_lse.masked_fill(want_lse == -math.inf, 0.0)
    want = want * torch.sigmoid(seen - sinks.double()[:, None])[..., None]
    rounded = (want.to(dtype).double() - want).abs().max().item()
    assert (out.double() - want).abs().max().item() <= 2 * rounded + 2e-6
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-6, atol=1e-6)
    assert (out[0, :, 0] == 0).all() and (lse[0, :, 0] == -math.inf).all()
    assert (out[:, 4:] == 0).all() and bool(out[1, :4].any(-1).any(-1).all())


@pytest.mark.parametrize("store_begin", [0, 3])
def test_parts_beyond_a_rows_count_are_never_read(tmp_path, store_begin):
    """They hold NaN. Rows are those of a slab that begins at token 3."""
    part, plse = random_parts((4, 2, 4, 6, 16))
    cnt = torch.randint(0, 5, (2, 2, 6), dtype=torch.int32)
    exists = torch.arange(4)[:, None, None, None] < cnt.repeat_interleave(2, 1)[None]
    want, want_lse = joined(
        part.masked_fill(~exists[..., None], 0.0), plse.masked_fill(~exists, -math.inf)
    )
    # Parts innermost of the rows, as the key-major kernel writes them.
    part = part.masked_fill(~exists[..., None], math.nan).permute(1, 2, 3, 0, 4).contiguous()
    plse = plse.masked_fill(~exists, math.nan).permute(1, 2, 3, 0).contiguous()
    out, lse = run(
        tmp_path,
        part.permute(3, 0, 1, 2, 4),
        plse.permute(3, 0, 1, 2),
        cnt=cnt,
        sq=8,
        row_begin=3,
        store_begin=store_begin,
    )
    # The slab's sixth row would be token 8 of 8.
    at = 3 - store_begin
    stored = slice(at, at + 5)
    torch.testing.assert_close(out[:, :, stored], want.float()[:, :, :5], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse[:, :, stored], want_lse.float()[:, :, :5], rtol=1e-6, atol=1e-6)
    assert int(torch.isnan(lse[0, 0]).sum()) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("store_begin", [0, 3])
def test_gates_of_the_whole_call_join_the_parts_of_a_slab(tmp_path, store_begin, dtype):
    """Rows are those of a slab that begins at token 3; gates of empty parts are NaN."""
    part, plse = random_parts((3, 2, 4, 6, 17))
    plse[:, 1, 2, 4], part[:, 1, 2, 4] = -math.inf, 0.0
    gates = torch.randn(2, 9, 4, 5, dtype=dtype).transpose(1, 2)[..., 1:4]
    is_empty = (plse == -math.inf).movedim(0, -1)
    gates[:, :, 3:][is_empty] = math.nan
    out, lse = run(
        tmp_path, part, plse, gates=gates, sq=8, row_begin=3, store_begin=store_begin, dtype=dtype
    )
    factors = gates[:, :, 3:].double().masked_fill(is_empty, 0.0).movedim(-1, 0)
    want = (factors[..., None] * part.double()).sum(0)[:, :, :5]
    rounded = (want.to(dtype).double() - want).abs().max().item()
    at = 3 - store_begin
    stored = slice(at, at + 5)  # the slab's sixth row would be token 8 of 8
    assert (out[:, :, stored].double() - want).abs().max().item() <= 2 * rounded + 2e-6
    whole = plse.double().logsumexp(0).float()[:, :, :5]
    torch.testing.assert_close(lse[:, :, stored], whole, rtol=1e-6, atol=1e-6)
    assert int(torch.isnan(lse[0, 0]).sum()) == 3
    assert lse[1, 2, at + 4] == -math.inf and (out[1, 2, at + 4] == 0).all()


@pytest.mark.parametrize(("has_sinks", "has_gates"), [(False, False), (True, False), (False, True)])
def test_sm90_code_does_not_spill(tmp_path, has_sinks, has_gates):
    context = merge_context(
        header=("A test.",),
        value_dim=128,
        block_r=8,
        block_p=4,
        has_counts=not has_gates,
        has_sinks=has_sinks,
        has_gates=has_gates,
    )
    path = write_rendered(TEMPLATE, context, tmp_path)
    types = {
        "part_ptr": "*fp32",
        "plse_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "cnt_ptr": "*i32",
    }
    built = compile_kernel(path, "merge_kernel", types=types, num_warps=4)
    assert built.spill_bytes == 0
