"""Sizes a call may have: offsets past 2^31, more heads than a grid axis holds, bounded scratch."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.patterns import block_topk, moba, quest, streaming_llm
from tests.gpu.card import DEVICE, assert_attends, compiled, tensors

pytestmark = pytest.mark.gpu

GIB = 1 << 30
ROOM = 24 * GIB  # of free memory the tests here ask for at most


def _need(size: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of free memory, and {free / GIB:.0f} are")


def _far_apart(flat: Tensor, x: Tensor, stride: int, begin: int) -> Tensor:
    """Copy x [1,1,S,D] to rows `stride` elements apart, from element `begin` on.

    Elements from 0 on are NaN: an offset that lost its upper bits reads them, and does not fault.
    """
    shape = x.shape
    far = flat.as_strided(shape, (stride, stride, stride, 1), begin)
    return far.copy_(x)


@pytest.mark.parametrize(
    ("skv", "stride"), [(24000, 93_440), (300, 2**23 - 64)], ids=["many rows", "far rows"]
)
@pytest.mark.parametrize("name", ["block_topk", "moba", "quest", "streaming_llm"])
def test_rows_past_two_to_the_31_elements_are_read(name: str, skv: int, stride: int) -> None:
    """B23. Keys and values share rows, sequence-major: the last ones begin past 2^31."""
    _need(2 * (2**31 + (skv + 1) * stride) + 4 * GIB)
    pattern = {
        "block_topk": block_topk(block=64, budget=0.25),
        "moba": moba(block=64, k_blocks=2),
        "quest": quest(page=16, budget=64),
        "streaming_llm": streaming_llm(sinks=4, recent=90),
    }[name]
    rows = 1 if name == "quest" else 64
    q, k, v = tensors((1, 1, 1, rows, skv), 64, torch.bfloat16)
    begin = 2**31
    assert (skv - 1) * stride > 2**31
    flat = torch.full((begin + skv * stride + 256,), torch.nan, device=DEVICE, dtype=q.dtype)
    far_k, far_v = _far_apart(flat, k, stride, begin), _far_apart(flat, v, stride, begin + 128)
    attention = compiled(pattern)
    out, lse = attention(q, far_k, far_v, return_lse=True)
    same, same_lse = attention(q, k, v, return_lse=True)
    assert torch.equal(out, same)
    assert torch.equal(lse, same_lse)
    if name == "streaming_llm":
        assert_attends(out, lse, (q, k, v), attention.to_mask(q, k))


def test_a_batch_times_heads_above_65535() -> None:
    """B26. Equal to two runs of half the size."""
    for pattern in (
        block_topk(block=16, budget=1, sinks=0, locals=1),
        moba(block=64, k_blocks=1),
        streaming_llm(sinks=1, recent=9),
    ):
        attention = compiled(pattern)
        for rows in (20, 1):
            q, k, v = tensors((16385, 4, 2, rows, 20), 16, torch.float16)
            assert q.shape[0] * q.shape[1] == 65540
            out, lse = attention(q, k, v, return_lse=True)
            for part in (slice(0, 8192), slice(8192, 16385)):
                half, half_lse = attention(q[part], k[part], v[part], return_lse=True)
                assert torch.equal(out[part], half)
                assert torch.equal(lse[part], half_lse)


def test_more_than_65535_query_tiles() -> None:
    """B26. Eleven million rows over 64 keys, against their first, middle and last ones alone."""

    @sp.pattern
    def everything(q, k, v):
        return sp.attend(q, k, v, mask=None)

    rows = 70_000 * 160
    q, k, v = tensors((1, 1, 1, rows, 64), 16, torch.float16)
    attention = compiled(everything)
    out, lse = attention(q, k, v, return_lse=True)
    for begin in (0, rows // 2, rows - 300):
        part = slice(begin, begin + 300)
        alone, alone_lse = attention(q[:, :, part], k, v, return_lse=True)
        assert torch.equal(out[:, :, part], alone)
        assert torch.equal(lse[:, :, part], alone_lse)


@pytest.mark.parametrize("name", ["block_topk", "moba", "streaming_llm", "quest decode"])
def test_scratch_of_131072_tokens_is_below_a_gibibyte(name: str) -> None:
    """B71. What a call allocates at its peak beside its inputs and its results."""
    _need(ROOM)
    pattern = {
        "block_topk": block_topk(block=128, budget=0.05),
        "moba": moba(block=2048, k_blocks=3),
        "streaming_llm": streaming_llm(),
        "quest decode": quest(page=16, budget=2048),
    }[name]
    length = 131072
    shape = (1, 32, 8, 1 if name == "quest decode" else length, length)
    attention = compiled(pattern)
    qkv = tensors(shape, 128, torch.bfloat16)
    small = tuple(x[:, :, : min(x.shape[2], 4096)] for x in qkv)
    attention(*small)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = attention(*qkv, return_lse=True)
    torch.cuda.synchronize()
    results = sum(prod(x.shape) * x.element_size() for x in (out, lse))
    scratch = torch.cuda.max_memory_allocated() - before - results
    assert 0 <= scratch <= GIB
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())
