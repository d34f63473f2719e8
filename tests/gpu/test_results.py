"""Results on the card against float64, over patterns, dtypes, head dimensions and shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.patterns import block_topk, moba, quest
from tests.gpu.card import (
    DEVICE,
    PATTERNS,
    Shape,
    assert_attends,
    compiled,
    mask_on_card,
    tensors,
)

pytestmark = pytest.mark.gpu

SHAPES: dict[str, tuple[Shape, str]] = {
    "long and ragged": ((1, 6, 2, 1023, 2049), "plain"),
    "batch of three": ((3, 3, 1, 200, 333), "swapped"),
    "more queries than keys": ((1, 4, 4, 300, 170), "sliced"),
    "decode": ((3, 6, 2, 1, 2049), "sliced"),
    "speculative": ((1, 4, 2, 5, 777), "plain"),
    "one key": ((1, 2, 1, 1, 1), "plain"),
}


def _check(name: str, d: int, dtype: torch.dtype, dv: int | None = None) -> None:
    """Try every shape; kernels are compiled for the first prefill and the first decode alone."""
    attention, unit = compiled(name), PATTERNS[name][1]
    for shape, layout in SHAPES.values():
        q, k, v = tensors(shape, d, dtype, dv=dv, layout=layout)
        q.mul_(0.5)  # small logits: no weight of a key that was read rounds to zero
        mask = mask_on_card(attention, unit, q, k)
        out, lse = attention(q, k, v, return_lse=True)
        assert_attends(out, lse, (q, k, v), mask)


# Each line costs some ten compiles of a second: the dtypes take turns behind bfloat16.
BY_DTYPE = [
    *((name, torch.bfloat16) for name in PATTERNS),
    ("block_topk", torch.float16),
    ("quest", torch.float16),
    ("block_topk", torch.float32),
    ("moba", torch.float32),
]


@pytest.mark.parametrize(("name", "dtype"), BY_DTYPE, ids=str)
def test_a_pattern_means_on_the_card_what_it_means(name: str, dtype: torch.dtype) -> None:
    _check(name, 64, dtype)


@pytest.mark.parametrize(
    ("name", "d", "dv"),
    [
        ("block_topk", 80, 80),
        ("moba", 17, 17),
        ("quest by groups", 256, 256),
        ("moba", 128, 40),
    ],
)
def test_any_head_dimension(name: str, d: int, dv: int) -> None:
    _check(name, d, torch.bfloat16, dv)


def test_float32_is_ieee_and_not_tf32() -> None:
    """Three more decimal digits than TF32 has."""
    q, k, v = tensors((1, 2, 1, 256, 256), 64, torch.float32)
    for pattern in (block_topk(block=64, budget=1.0), moba(block=256, k_blocks=1)):
        attention = compiled(pattern)
        out, lse = attention(q, k, v, return_lse=True)
        assert_attends(out, lse, (q, k, v), attention.to_mask(q, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_heads_and_items_that_read_nothing_give_zero(dtype: torch.dtype) -> None:
    marks = torch.rand(2, 2, 8, 8, device=DEVICE) < 0.5
    marks[0, 0, 3], marks[1, 1] = False, False
    hidden = torch.zeros(500, dtype=torch.bool, device=DEVICE)
    hidden[[0, 63, 64, 127, 499]] = True

    @sp.pattern
    def holes(q, k, v):
        rule = sp.mask_mod(lambda b, h, q_idx, kv_idx: ~hidden[q_idx])
        chosen = sp.block_mask(marks, block=64) & rule
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))

    q, k, v = tensors((2, 4, 2, 500, 510), 64, dtype)
    attention = compiled(holes)
    mask = attention.to_mask(q, k)
    out, lse = attention(q, k, v, return_lse=True)
    assert_attends(out, lse, (q, k, v), mask)
    empty = ~mask.any(-1)
    assert bool(empty[1, 2:].all())
    assert not out[empty].any()
    assert bool((lse[empty] == -torch.inf).all())


def test_very_negative_logits_are_not_taken_for_hidden_ones() -> None:
    """B03."""
    q = torch.full((1, 2, 80, 64), 300.0, device=DEVICE)
    k, v = -q[:, :1], torch.randn(1, 1, 80, 64, device=DEVICE)

    @sp.pattern
    def dense(q, k, v):
        return sp.attend(q, k, v, scale=1.0)

    out, lse = compiled(dense)(q, k, v, return_lse=True)
    counts = torch.arange(1, 81, device=DEVICE)[:, None]
    want = (v.double().cumsum(2) / counts).expand(1, 2, -1, -1)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, torch.full_like(lse, -5.76e6), rtol=1e-4, atol=0)


@pytest.mark.parametrize("order", ["key_major", "gather"])
def test_loop_orders_agree(order: str) -> None:
    q, k, v = tensors((2, 4, 2, 700, 900), 64, torch.bfloat16)
    attention = compiled(moba(block=64, k_blocks=3), order=order)
    assert attention.built(q, k, v).plan.order == order
    mask = mask_on_card(attention, 64, q, k)
    out, lse = attention(q, k, v, return_lse=True)
    assert_attends(out, lse, (q, k, v), mask)


def test_a_short_decode_continues_a_prefill() -> None:
    """B15. One object for both; the last rows of the longer call."""
    attention = compiled(quest(page=16, budget=128))
    q, k, v = tensors((2, 4, 2, 1003, 1003), 64, torch.float32)
    whole, whole_lse = attention(q, k, v, return_lse=True)
    for rows, keys in ((1, 1001), (1, 1003), (4, 1003)):
        part = slice(keys - rows, keys)
        out, lse = attention(q[:, :, part], k[:, :, :keys], v[:, :, :keys], return_lse=True)
        torch.testing.assert_close(out, whole[:, :, part], rtol=0, atol=2e-6)
        torch.testing.assert_close(lse, whole_lse[:, :, part], rtol=0, atol=1e-5)


def test_a_cache_changes_nothing() -> None:
    attention = compiled(quest(page=16, budget=128, heads="group"))
    cache = sp.KVCache.empty(
        attention, batch=2, kv_heads=2, head_dim=64, capacity=1000, device=DEVICE
    )
    q, k, v = tensors((2, 6, 2, 1, 900), 64, torch.bfloat16)
    begin = 0
    for n in (700, 1, 150, 1, 48):
        cache.append(k[:, :, begin : begin + n], v[:, :, begin : begin + n])
        begin += n
        out, lse = cache.attend(q, return_lse=True)
        want, want_lse = attention(q, k[:, :, :begin], v[:, :, :begin], return_lse=True)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
    cache.rewind(33)
    cache.append(-k[:, :, :20], v[:, :, :20])
    begin -= 33
    joined: list[Tensor] = [
        torch.cat([x[:, :, :begin], y], dim=2) for x, y in ((k, -k[:, :, :20]), (v, v[:, :, :20]))
    ]
    assert torch.equal(cache.attend(q), attention(q, *joined))
