"""Causal alignment, windows, empty calls, documents, and what a selection may keep."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.patterns import block_topk, moba, quest, streaming_llm
from tests import oracle
from tests.bug_reports.make import assert_attends, compiled, dense, qkv, run
from tests.conformance.cases import assert_within, read_keys


@pytest.mark.parametrize(("sq", "skv"), [(2, 5), (5, 2), (1, 100), (100, 1), (130, 70)])
def test_causal_is_aligned_bottom_right_and_top_left_can_be_asked_for(sq: int, skv: int) -> None:
    """B37."""

    @sp.pattern
    def top_left(q, k, v):
        return sp.attend(q, k, v, mask=sp.mask_mod(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx))

    tensors = qkv(1, 1, 1, sq, skv, 16)
    out, lse = assert_attends(compiled(dense), *tensors, oracle.causal_mask(sq, skv))
    above = max(sq - skv, 0)
    assert not out[:, :, :above].any()
    assert bool((lse[:, :, :above] == -math.inf).all())
    assert bool(lse[:, :, above:].isfinite().all())
    top = torch.arange(skv)[None, :] <= torch.arange(sq)[:, None]
    assert_attends(compiled(top_left), *tensors, top)


@pytest.mark.parametrize("size", [1, 2, 64, 65, 128, 300])
def test_a_window_counts_the_querys_own_key(size: int) -> None:
    """B38."""

    @sp.pattern
    def windowed(q, k, v):
        return sp.attend(q, sp.gather(k, sp.window(size)), sp.gather(v, sp.window(size)))

    q, k, _ = qkv(1, 1, 1, 200, 200, 16)
    out, _ = run(compiled(windowed), q, k, torch.eye(200)[None, None])
    assert torch.equal((out[0, 0] > 0).sum(-1), torch.arange(1, 201).clamp(max=size))
    if size == 1:
        torch.testing.assert_close(out[0, 0], torch.eye(200), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_empty_calls_keep_their_shapes(backend: str, shape: tuple[int, int, int]) -> None:
    """B40, as far as calls without packed sequences go."""
    b, sq, skv = shape
    for pattern in (dense(), moba(block=64, k_blocks=2), streaming_llm()):
        q, k, v = qkv(b, 2, 1, sq, skv, 16, dv=8)
        attention = sp.compile(pattern, backend="reference") if backend == "reference" else None
        out, lse = run(attention or compiled(pattern), q, k, v)
        assert out.shape == (b, 2, sq, 8)
        assert lse.shape == (b, 2, sq)
        assert lse.dtype == torch.float32
        assert not out.any()
        assert bool((lse == -math.inf).all())


def _packed(lengths: tuple[int, ...]) -> sp.Pattern:
    names = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)])

    @sp.pattern
    def packed(q, k, v):
        same = sp.mask_mod(lambda b, h, q_idx, kv_idx: names[q_idx] == names[kv_idx])
        return sp.attend(q, sp.gather(k, same), sp.gather(v, same))

    return packed()


@pytest.mark.parametrize("lengths", [(33, 64, 31), (64, 64, 64), (128, 64)], ids=str)
def test_documents_packed_together_do_not_read_one_another(lengths: tuple[int, ...]) -> None:
    """B42. Tiles are 128 x 64: ends that divide no tile, one side of it, and both."""
    attention = compiled(_packed(lengths))
    first = qkv(1, 2, 1, sum(lengths), sum(lengths), 16)
    second = []
    for x in first:
        changed = x.clone()
        changed[:, :, : lengths[0]] = 100 * torch.randn_like(changed[:, :, : lengths[0]])
        second.append(changed)
    out, lse = assert_attends(attention, *first, oracle.document_mask(lengths))
    other, other_lse = run(attention, *second)
    assert torch.equal(out[:, :, lengths[0] :], other[:, :, lengths[0] :])
    assert torch.equal(lse[:, :, lengths[0] :], other_lse[:, :, lengths[0] :])
    assert not torch.equal(out[:, :, : lengths[0]], other[:, :, : lengths[0]])


@pytest.mark.parametrize("length", [1, 63, 64, 100])
def test_more_units_than_there_are_means_all(length: int) -> None:
    """B43."""
    causal = oracle.causal_mask(length, length)
    tensors = qkv(1, 1, 1, length, length, 16)
    for pattern in (moba(block=64, k_blocks=16), quest(page=64, budget=4096)):
        assert_attends(compiled(pattern), *tensors, causal)
    assert_attends(compiled(block_topk(block=64, budget=16)), *tensors, causal)


def test_a_budget_of_nothing_keeps_the_forced_units_or_none() -> None:
    """B43."""

    @sp.pattern
    def none(q, k, v):
        rows, units = sp.downsample(q, block=32), sp.downsample(k, block=32)
        best = sp.topk(sp.score(rows, units), k=0)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    tensors = qkv(1, 1, 1, 100, 100, 16)
    out, lse = run(compiled(none), *tensors)
    assert not out.any()
    assert bool((lse == -math.inf).all())
    block = torch.arange(100) // 32
    forced = (block[None, :] == 0) | (block[:, None] == block[None, :])
    kept = compiled(block_topk(block=32, budget=2, sinks=1, locals=1))
    assert_attends(kept, *tensors, forced & oracle.causal_mask(100, 100))


def test_future_units_neither_win_nor_cost_a_place() -> None:
    """B44. Blocks score the higher the later they are."""
    units, block = 6, 32
    attention = compiled(block_topk(block=block, budget=3, sinks=0, locals=1))
    size = units * block
    later = torch.arange(1, size + 1)[:, None].float()
    q, k = torch.rand(1, 1, size, 16), torch.rand(1, 1, size, 16) * later / size
    v = torch.eye(units).repeat_interleave(block, 0)[None, None]
    out, _ = run(attention, q, k, v)
    read = out[0, 0].unflatten(0, (units, block)) > 0
    for row in range(units):
        kept = read[row].all(0)
        assert torch.equal(kept, read[row].any(0))
        assert int(kept.sum()) == min(row + 1, 3)
        assert not kept[row + 1 :].any()
    half = size // 2
    changed = torch.cat([k[:, :, :half], torch.randn(1, 1, half, 16) * 9], dim=2)
    other, _ = run(attention, q, changed, v)
    assert torch.equal(other[:, :, :half], out[:, :, :half])


FAMILIES = {
    "block_topk": (
        block_topk(block=32, budget=2, sinks=0, locals=1),
        lambda q, k: oracle.block_topk_mask(q, k, block=32, keep=2, sinks=0, locals=1),
    ),
    "moba": (moba(block=64, k_blocks=2), lambda q, k: oracle.moba_mask(q, k, block=64, k_blocks=2)),
    "moba of short blocks": (
        moba(block=16, k_blocks=3),
        lambda q, k: oracle.moba_mask(q, k, block=16, k_blocks=3),
    ),
    "quest": (
        quest(page=16, budget=32),
        lambda q, k: oracle.quest_mask(q, k, page=16, budget=32),
    ),
    "quest by groups": (
        quest(page=16, budget=48, heads="group"),
        lambda q, k: oracle.quest_mask(q, k, page=16, budget=48, shared=True),
    ),
    "streaming_llm": (
        streaming_llm(sinks=4, recent=20),
        lambda q, k: oracle.sink_window_mask(q.shape[2], k.shape[2], 4, 20).expand(1, 2, -1, -1),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sq", [1, 36])
def test_kernel_reference_and_oracle_agree(name: str, sq: int) -> None:
    """B46. The mask is dumped, and it is what the oracle attends under."""
    pattern, mask_of = FAMILIES[name]
    q, k, _ = qkv(1, 2, 1, sq, 150, 16)
    v = torch.cat([torch.eye(150).expand(1, 1, -1, -1), torch.randn(1, 1, 150, 4)], dim=-1)
    mask = mask_of(q, k)
    reference = sp.compile(pattern, backend="reference")
    assert torch.equal(reference.to_mask(q, k), mask)
    answers: list[tuple[Tensor, Tensor]] = [
        run(compiled(pattern), q, k, v),
        reference(q, k, v, return_lse=True),
    ]
    for out, lse in answers:
        assert torch.equal(read_keys(out, 150), mask)
        assert_within(out, lse, q, k, v, mask)
