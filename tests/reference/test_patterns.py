"""The shipped patterns as the reference interprets them, against masks written from the papers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spcomp.backends.reference.pattern import lists
from spcomp.dsl import Pattern
from spcomp.patterns import block_topk, moba, quest, streaming_llm
from tests import oracle
from tests.reference.make import (
    AWKWARD,
    DTYPES,
    Shape,
    assert_attends,
    inputs,
    mask_of,
    qkv,
    run,
)

Mask = Callable[[Tensor, Tensor], Tensor]


def _share(k: Tensor, block: int, share: float) -> int:
    return math.ceil(math.ceil(k.shape[2] / block) * share)


def _streaming(q: Tensor, k: Tensor) -> Tensor:
    mask = oracle.sink_window_mask(q.shape[2], k.shape[2], 3, 9)
    return mask.expand(q.shape[0], q.shape[1], -1, -1)


SHIPPED: dict[str, tuple[Pattern, Mask]] = {
    "block_topk-share": (
        block_topk(block=16, budget=0.25, sinks=1, locals=1),
        lambda q, k: oracle.block_topk_mask(
            q, k, block=16, keep=_share(k, 16, 0.25), sinks=1, locals=1
        ),
    ),
    "block_topk-number": (
        block_topk(block=8, budget=4, sinks=1, locals=2),
        lambda q, k: oracle.block_topk_mask(q, k, block=8, keep=4, sinks=1, locals=2),
    ),
    "block_topk-odd": (
        block_topk(block=11, budget=3, sinks=0, locals=1),
        lambda q, k: oracle.block_topk_mask(q, k, block=11, keep=3, sinks=0, locals=1),
    ),
    "moba": (
        moba(block=16, k_blocks=3),
        lambda q, k: oracle.moba_mask(q, k, block=16, k_blocks=3),
    ),
    "quest": (
        quest(page=4, budget=20),
        lambda q, k: oracle.quest_mask(q, k, page=4, budget=20),
    ),
    "quest-shared": (
        quest(page=4, budget=20, heads="group"),
        lambda q, k: oracle.quest_mask(q, k, page=4, budget=20, shared=True),
    ),
    "streaming_llm": (streaming_llm(sinks=3, recent=9), _streaming),
}
NAMES = tuple(SHIPPED)


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_pattern_reads_the_pairs_of_its_paper(name: str, shape: Shape) -> None:
    pattern, want = SHIPPED[name]
    q, k, v = qkv(shape)
    assert torch.equal(mask_of(pattern, q, k, v), want(q, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "block_topk-odd"])
def test_ties_go_to_the_lower_unit_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    # Whole numbers, and units and groups of a power of two, make scores exact and ties real.
    pattern, want = SHIPPED[name]
    q, k = (torch.randint(-1, 2, (2, h, 64, 4)).to(dtype) for h in (4, 2))
    v = torch.randn(2, 2, 64, 4).to(dtype)
    assert torch.equal(mask_of(pattern, q, k, v), want(q, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_attention_errs_at_most_twice_as_much_as_plain_torch(
    name: str, shape: Shape, dtype: torch.dtype
) -> None:
    pattern, _ = SHIPPED[name]
    q, k, v = qkv(shape, dtype)
    assert_attends(pattern, q, k, v, mask_of(pattern, q, k, v))


def test_a_long_ragged_call_agrees_with_the_paper() -> None:
    pattern, want = block_topk(block=64, budget=0.25), oracle.block_topk_mask
    q, k, v = qkv(Shape(1, 2, 1, 1023, 2049, 32, 32))
    mask = want(q, k, block=64, keep=_share(k, 64, 0.25), sinks=1, locals=2)
    assert torch.equal(mask_of(pattern, q, k, v), mask)
    assert_attends(pattern, q, k, v, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "streaming_llm"])
def test_low_precision_changes_a_selection_only_where_scores_are_close(
    name: str, dtype: torch.dtype
) -> None:
    pattern, want = SHIPPED[name]
    q, k, v = qkv(Shape(2, 4, 2, 60, 90, 32, 8), dtype)
    differs = (mask_of(pattern, q, k, v) != want(q, k)).any(dim=(0, 1, 3))
    found = lists(pattern.program, inputs(pattern, q, k, v))[0]
    rows = torch.arange(60) // -(-60 // found.scores.shape[2])
    smallest = found.scores.double().sort(dim=-1).values.diff(dim=-1).amin(dim=(0, 1, 3))
    size = found.scores.double().abs().max()
    close = smallest[rows] <= torch.finfo(dtype).eps * size
    assert not (differs & ~close).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_a_chunk_changes_no_pair(name: str) -> None:
    pattern, _ = SHIPPED[name]
    q, k, v = qkv(AWKWARD[2])
    whole = run(pattern, q, k, v, chunk_rows=1000)
    for rows in (1, 7, 33):
        out, lse = run(pattern, q, k, v, chunk_rows=rows)
        torch.testing.assert_close(out, whole[0], rtol=0, atol=1e-13)
        torch.testing.assert_close(lse, whole[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [AWKWARD[2], AWKWARD[4]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_oracle(name: str, shape: Shape) -> None:
    pattern, _ = SHIPPED[name]
    q, k, v = (x.requires_grad_() for x in qkv(shape))
    mask = mask_of(pattern, q, k, v)
    out, lse = run(pattern, q, k, v, chunk_rows=29)
    want_out, want_lse = oracle.attention(q, k, v, mask)
    seen = want_lse.isfinite()
    w, u = torch.randn_like(out), torch.randn_like(lse)[seen]
    got = torch.autograd.grad((out * w).sum() + (lse[seen] * u).sum(), (q, k, v))
    want = torch.autograd.grad((want_out * w).sum() + (want_lse[seen] * u).sum(), (q, k, v))
    for g, expected in zip(got, want, strict=True):
        torch.testing.assert_close(g, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_lists_are_ascending_and_hold_what_the_mask_holds(name: str) -> None:
    pattern, _ = SHIPPED[name]
    q, k, v = qkv(AWKWARD[3])
    for found in lists(pattern.program, inputs(pattern, q, k, v)):
        width = found.indices.shape[-1]
        real = torch.arange(width) < found.counts[..., None]
        assert found.indices.dtype == found.counts.dtype == torch.int32
        assert torch.equal(found.indices >= 0, real)
        steps = found.indices.diff(dim=-1)
        assert bool((steps[real[..., 1:]] > 0).all())
