"""Faults that users of neighbouring projects met, tried on the reference backend.

The letter and number of a test are those of the report it comes from.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spcomp.backends.reference.pattern import lists
from spcomp.dsl import (
    Pattern,
    attend,
    block_mask,
    downsample,
    gather,
    local,
    mask_mod,
    own,
    pattern,
    score,
    sink,
    topk,
    window,
)
from spcomp.errors import NegativeCount
from spcomp.patterns import block_topk, moba, quest
from tests import oracle
from tests.reference.make import Shape, assert_attends, inputs, mask_of, qkv, run


@pattern
def dense(q, k, v, *, scale=None):
    return attend(q, k, v, scale=scale)


def _gradients(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, _ = run(pattern, q, k, v)
    return torch.autograd.grad(out, (q, k, v), torch.randn_like(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_b01_rows_that_see_nothing_are_zero_and_have_no_gradient(dtype: torch.dtype) -> None:
    hidden = torch.zeros(192, dtype=torch.bool)
    hidden[[0, 63, 64, 127]] = True

    @pattern
    def holes(q, k, v):
        chosen = mask_mod(lambda b, h, q_idx, kv_idx: ~hidden[q_idx] & (b == 0))
        return attend(q, gather(k, chosen), gather(v, chosen), mask=None)

    q, k, v = qkv(Shape(2, 4, 2, 192, 192, 64, 64), dtype)
    mask = torch.zeros(2, 1, 192, 192, dtype=torch.bool)
    mask[0, 0, ~hidden] = True
    assert_attends(holes(), q, k, v, mask)
    out, lse = run(holes(), q, k, v)
    assert not out[1].any()
    assert not out[0, :, hidden].any()
    assert bool((lse[0, :, hidden] == -math.inf).all())
    dq, dk, dv = _gradients(holes(), q, k, v)
    assert all(bool(g.isfinite().all()) for g in (dq, dk, dv))
    assert not dq[1].any()
    assert not dq[0, :, hidden].any()


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 300.0), (torch.bfloat16, 40.0)], ids=str
)
def test_b03_very_negative_logits_are_not_taken_for_masked_ones(
    dtype: torch.dtype, size: float
) -> None:
    q = torch.full((1, 1, 80, 64), size, dtype=dtype)
    k, v = torch.full_like(q, -size), torch.randn(1, 1, 80, 64).to(dtype)
    out, lse = run(dense(scale=1.0), q, k, v)
    want = v.double().cumsum(2) / torch.arange(1, 81)[:, None]
    assert oracle.error(out, want) <= 2 * oracle.error(want.to(dtype), want) + 1e-6
    _, want_lse = oracle.attention(q, k, v, oracle.causal_mask(80, 80), scale=1.0)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=0)
    out, lse = run(dense(scale=1.0), q[:, :, :5], k[:, :, :2], v[:, :, :2])
    assert not out[:, :, :3].any()
    assert bool((lse[:, :, :3] == -math.inf).all())
    assert bool(lse[:, :, 3:].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_b04_query_blocks_without_a_key_block_are_zero(dtype: torch.dtype) -> None:
    for rows in ((1, 3), range(5)):
        marks = torch.ones(1, 1, 5, 5, dtype=torch.bool)
        marks[:, :, list(rows)] = False

        @pattern
        def blocks(q, k, v, *, marks=marks):
            chosen = block_mask(marks, block=64)
            return attend(q, gather(k, chosen), gather(v, chosen), mask=None)

        q, k, v = qkv(Shape(1, 2, 1, 320, 320, 32, 32), dtype)
        mask = marks.repeat_interleave(64, dim=2).repeat_interleave(64, dim=3)
        assert_attends(blocks(), q, k, v, mask)
        out, lse = run(blocks(), q, k, v)
        empty = ~mask[0, 0].any(-1)
        assert not out[:, :, empty].any()
        assert bool((lse[:, :, empty] == -math.inf).all())
        assert all(bool(g.isfinite().all()) for g in _gradients(blocks(), q, k, v))


def test_b08_a_rule_is_never_asked_about_what_is_not_there() -> None:
    for length in (1, 63, 65, 127):
        table = torch.rand(length) < 0.5

        @pattern
        def looked_up(q, k, v, *, table=table):
            chosen = mask_mod(lambda b, h, q_idx, kv_idx: table[kv_idx] | table[q_idx])
            return attend(q, gather(k, chosen), gather(v, chosen))

        q, k, v = qkv(Shape(1, 1, 1, length, length, 8, 8))
        mask = (table[None, :] | table[:, None]) & oracle.causal_mask(length, length)
        assert_attends(looked_up(), q, k, v, mask)


@pytest.mark.parametrize("d", [1, 17, 31, 40, 80, 96, 160, 256])
@pytest.mark.parametrize("sq", [1, 33])
def test_b12_any_head_dimension(d: int, sq: int) -> None:
    q, k, v = qkv(Shape(1, 2, 1, sq, 50, d, d), torch.float16)
    pattern = block_topk(block=16, budget=3)
    assert_attends(pattern, q, k, v, mask_of(pattern, q, k, v))


@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize("length", [1, 15, 17, 100, 257])
def test_b14_any_block_with_a_ragged_tail(block: int, length: int) -> None:
    units = -(-length // block)
    marks = torch.rand(1, 2, units, units) < 0.6

    @pattern
    def blocks(q, k, v):
        chosen = block_mask(marks, block=block)
        return attend(q, gather(k, chosen), gather(v, chosen))

    q, k, v = qkv(Shape(1, 2, 1, length, length, 8, 8), torch.float32)
    wide = marks.repeat_interleave(block, dim=2).repeat_interleave(block, dim=3)
    mask = wide[..., :length, :length] & oracle.causal_mask(length, length)
    assert_attends(blocks(), q, k, v, mask)


@pytest.mark.parametrize("sq", [1, 4])
def test_b15_a_decode_step_is_the_end_of_a_longer_prefill(sq: int) -> None:
    for chosen in (moba(block=16, k_blocks=3), quest(page=8, budget=32)):
        q, k, v = qkv(Shape(1, 4, 2, 130, 130, 16, 16))
        whole, whole_lse = run(chosen, q, k, v)
        out, lse = run(chosen, q[:, :, -sq:], k, v)
        torch.testing.assert_close(out, whole[:, :, -sq:], rtol=0, atol=1e-13)
        torch.testing.assert_close(lse, whole_lse[:, :, -sq:], rtol=0, atol=1e-13)


def test_b16_an_item_of_a_batch_does_not_feel_the_others() -> None:
    for chosen in (moba(block=16, k_blocks=2), block_topk(block=32, budget=2, locals=1)):
        tensors = [torch.cat([x, torch.randn_like(x), x]) for x in qkv(Shape(1, 4, 2, 100, 100))]
        out, lse = run(chosen, *tensors)
        assert torch.equal(out[0], out[2])
        assert torch.equal(lse[0], lse[2])
        for n in (0, 1):
            alone, _ = run(chosen, *(x[n : n + 1] for x in tensors))
            torch.testing.assert_close(alone[0], out[n], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skv", [1, 2, 15, 16, 17, 20, 127, 129])
def test_b18_one_query_row_over_few_keys(skv: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(Shape(4, 4, 2, 1, skv, 128, 128), dtype)
    assert_attends(dense(), q, k, v, oracle.causal_mask(1, skv))


def _layouts() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    b, hq, hkv, s, d = 2, 4, 2, 130, 64
    swapped = [torch.randn(b, s, h, d).transpose(1, 2) for h in (hq, hkv, hkv)]
    fused = torch.randn(b, s, (hq + 2 * hkv) * d)
    heads = fused.unflatten(-1, (hq + 2 * hkv, d)).transpose(1, 2)
    strided = [torch.randn(b, h, s, 2 * d)[..., ::2] for h in (hq, hkv, hkv)]
    expanded = [torch.randn(b, hq, s, d), *(torch.randn(b, 1, s, d).expand(-1, 2, -1, -1),) * 2]
    sliced = [torch.randn(b, h, s + 9, d)[:, :, 5 : 5 + s] for h in (hq, hkv, hkv)]
    return {
        "swapped": tuple(swapped),
        "fused": tuple(heads.split([hq, hkv, hkv], dim=1)),
        "strided": tuple(strided),
        "expanded": tuple(expanded),
        "sliced": tuple(sliced),
    }  # type: ignore[return-value]


@pytest.mark.parametrize("layout", ["swapped", "fused", "strided", "expanded", "sliced"])
def test_b19_strides_change_no_bit(layout: str) -> None:
    q, k, v = _layouts()[layout]
    for chosen in (dense(), block_topk(block=16, budget=3), quest(page=16, budget=48)):
        out, lse = run(chosen, q, k, v)
        want, want_lse = run(chosen, q.contiguous(), k.contiguous(), v.contiguous())
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("wrap", ["swapped", "sum"])
def test_b21_the_layout_of_the_upstream_gradient_does_not_matter(wrap: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(Shape(2, 4, 2, 37, 53, 16, 16)))
    out, _ = run(moba(block=8, k_blocks=2), q, k, v)
    upstream = torch.ones_like(out)
    odd = torch.ones(()).double().expand_as(out)
    if wrap == "swapped":
        upstream = torch.randn_like(out)
        odd = upstream.transpose(1, 2).contiguous().transpose(1, 2)
    want = torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)
    for g, w in zip(torch.autograd.grad(out, (q, k, v), odd), want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-13)


def test_b29_b31_lse_is_the_same_in_every_mode_and_carries_a_gradient() -> None:
    q, k, v = qkv(Shape(2, 4, 2, 60, 60, 16, 16), torch.bfloat16)
    pattern = block_topk(block=16, budget=2, locals=1)
    _, plain = run(pattern, q, k, v)
    with torch.no_grad():
        assert torch.equal(run(pattern, q, k, v)[1], plain)
    with torch.inference_mode():
        assert torch.equal(run(pattern, q, k, v)[1], plain)
    _, tracked = run(pattern, q.requires_grad_(), k, v)
    assert torch.equal(tracked, plain)
    assert plain.dtype == torch.float32
    (dq,) = torch.autograd.grad(tracked.sum(), q)
    assert bool(dq.any())


@pytest.mark.parametrize("length", [129, 257, 300])
@pytest.mark.parametrize("sign", [1, -1])
def test_b35_a_large_bias_at_a_ragged_tail_has_right_gradients(length: int, sign: int) -> None:
    @pattern
    def biased(q, k, v):
        return attend(
            q, k, v, score_mod=lambda score, b, h, q_idx, kv_idx: score + sign * (q_idx - kv_idx)
        )

    distance = sign * (torch.arange(length)[:, None] - torch.arange(length)[None, :])
    mask = oracle.causal_mask(length, length)
    q, k, v = (x.requires_grad_() for x in qkv(Shape(1, 2, 1, length, length, 64, 64)))
    want, _ = oracle.attention(q, k, v, mask, hook=lambda x: x + distance)
    exact = torch.autograd.grad(want.square().sum(), (q, k, v))
    for dtype in (torch.float32, torch.float64):
        single = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        plain, _ = oracle.plain_attention(*single, mask, hook=lambda x: x + distance.to(x.dtype))
        coarse = torch.autograd.grad(plain.square().sum(), single)
        got = torch.autograd.grad(run(biased(), *single)[0].square().sum(), single)
        for g, p, w in zip(got, coarse, exact, strict=True):
            size = float(w.abs().max())  # the bias makes gradients of several hundred
            assert oracle.error(g, w) <= 3 * oracle.error(p, w) + oracle.TINY[dtype] * size


@pytest.mark.parametrize(("sq", "skv"), [(2, 5), (5, 2), (1, 100), (100, 1), (130, 70)])
def test_b37_causal_is_aligned_bottom_right(sq: int, skv: int) -> None:
    q, k, v = qkv(Shape(1, 2, 2, sq, skv, 8, 8))
    assert_attends(dense(), q, k, v, oracle.causal_mask(sq, skv))
    out, lse = run(dense(), q, k, v)
    above = max(sq - skv, 0)
    assert not out[:, :, :above].any()
    assert bool((lse[:, :, :above] == -math.inf).all())
    assert bool(lse[:, :, above:].isfinite().all())


@pytest.mark.parametrize("size", [1, 2, 64, 65, 128, 300])
def test_b38_a_window_counts_the_querys_own_key(size: int) -> None:
    @pattern
    def windowed(q, k, v):
        return attend(q, gather(k, window(size)), gather(v, window(size)))

    q, k, _ = qkv(Shape(1, 1, 1, 200, 200, 8, 8), torch.float32)
    out, _ = run(windowed(), q, k, torch.eye(200)[None, None])
    seen = (out[0, 0] > 0).sum(-1)
    assert torch.equal(seen, torch.arange(1, 201).clamp(max=size))
    if size == 1:
        assert torch.equal(out[0, 0], torch.eye(200))


@pytest.mark.parametrize("size", [0, -3])
def test_b38_a_window_of_no_key_is_refused(size: int) -> None:
    with pytest.raises(NegativeCount, match=f"window was given size = {size}, which is below 1"):
        window(size)


@pytest.mark.parametrize("block", [16, 33, 64])
def test_b42_documents_packed_together_do_not_read_one_another(block: int) -> None:
    lengths = (33, 64, 31)
    names = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)])

    @pattern
    def packed(q, k, v):
        best = topk(score(q, downsample(k, block=block)), k=9)
        chosen = best | local(block)
        same = mask_mod(lambda b, h, q_idx, kv_idx: names[q_idx] == names[kv_idx])
        return attend(q, gather(k, chosen & same), gather(v, chosen & same))

    first = qkv(Shape(1, 2, 1, 128, 128, 16, 16))
    second = tuple(torch.cat([torch.randn_like(x[:, :, :33]), x[:, :, 33:]], dim=2) for x in first)
    assert_attends(packed(), *first, oracle.document_mask(lengths))
    results = []
    for tensors in (first, second):
        q, k, v = (x.detach().requires_grad_() for x in tensors)
        out, _ = run(packed(), q, k, v)
        upstream = torch.ones_like(out)
        upstream[:, :, :33] = 7.0
        gradients = torch.autograd.grad(out, (q, k, v), upstream)
        results.append([x[:, :, 33:] for x in (out, *gradients)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("length", [1, 63, 64, 100])
@pytest.mark.parametrize("k_units", [0, 16])
def test_b43_more_units_than_there_are_means_all_and_none_means_none(
    length: int, k_units: int
) -> None:
    @pattern
    def chosen(q, k, v):
        best = topk(score(q, downsample(k, block=64)), k=k_units)
        always = topk(score(q, downsample(k, block=64)), k=max(k_units, 1), always=own())
        best = best | always if k_units else best
        return attend(q, gather(k, best), gather(v, best))

    q, k, v = qkv(Shape(1, 2, 1, length, length, 16, 16))
    causal = oracle.causal_mask(length, length)
    assert_attends(chosen(), q, k, v, causal if k_units else torch.zeros_like(causal))


def test_b43_without_a_budget_only_the_forced_units_are_kept() -> None:
    pattern = block_topk(block=16, budget=3, sinks=1, locals=2)
    q, k, v = qkv(Shape(1, 2, 1, 128, 128, 16, 16))
    block = torch.arange(128) // 16
    forced = (block[None, :] == 0) | (block[:, None] - 2 < block[None, :])
    want = forced & oracle.causal_mask(128, 128)
    assert torch.equal(mask_of(pattern, q, k, v), want.expand(1, 2, -1, -1))


def test_b44_future_units_neither_win_nor_cost_a_place() -> None:
    @pattern
    def top3(q, k, v):
        best = topk(score(q, downsample(k, block=64)), k=3, always=own())
        return attend(q, gather(k, best), gather(v, best))

    q, k, v = qkv(Shape(1, 1, 1, 512, 512, 16, 16))
    rigged = q.abs(), k.abs() * torch.arange(1, 513)[:, None], v
    found = lists(top3().program, inputs(top3(), *rigged))[0]
    blocks = torch.arange(512) // 64
    assert torch.equal(found.counts[0, 0], (blocks + 1).clamp(max=3).int())
    assert bool((found.indices[0, 0] <= blocks[:, None]).all())
    later = tuple(torch.cat([x[:, :, :256], torch.randn_like(x[:, :, 256:])], 2) for x in rigged)
    assert torch.equal(run(top3(), *later)[0][:, :, :256], run(top3(), *rigged)[0][:, :, :256])


def test_sinks_beyond_the_sequence_are_all_there_is() -> None:
    @pattern
    def sunk(q, k, v):
        best = topk(score(q, downsample(k, block=8)), k=9, always=sink(9))
        return attend(q, gather(k, best), gather(v, best))

    q, k, v = qkv(Shape(1, 1, 1, 20, 20, 8, 8))
    assert_attends(sunk(), q, k, v, oracle.causal_mask(20, 20))
