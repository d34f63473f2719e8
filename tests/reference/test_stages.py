"""Each stage alone: pooling, scores, top-k, selections, streams, merges, hooks, tables."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from spcomp.backends.reference.pattern import lists, to_mask
from spcomp.backends.reference.pooling import pool, unit_count
from spcomp.backends.reference.selecting import best
from spcomp.dsl import (
    attend,
    block_indices,
    block_mask,
    causal,
    downsample,
    everything,
    flex_block_mask,
    gather,
    local,
    mask_mod,
    merge,
    own,
    pattern,
    score,
    sink,
    stream,
    topk,
    window,
)
from spcomp.errors import CannotLower, ShapeMismatch
from spcomp.ir.nodes import Attend, Captured, Downsample, Input, Merge
from spcomp.ir.passes import PATTERN_PIPELINE
from tests import oracle
from tests.reference.make import DTYPES, Shape, assert_attends, inputs, mask_of, qkv, run

SHAPE = Shape(2, 4, 2, 37, 53, 16, 8)
T = oracle.positions(SHAPE.sq, SHAPE.skv)
KEY = torch.arange(SHAPE.skv)[None, :]
CAUSAL = T >= KEY


# ---- pooling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block", "stride"), [(4, 4), (8, 4), (2, 5), (64, 64)])
@pytest.mark.parametrize("tail", ["keep", "drop"])
def test_units_pool_their_real_tokens(
    block: int, stride: int, tail: str, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 3, 37, 5).to(dtype)
    node = Downsample(Input("k", "key"), block, stride, "minmax", tail)  # type: ignore[arg-type]
    count = unit_count(37, node)
    high, low = pool(x, "minmax", block, stride, count)
    means, _ = pool(x, "mean", block, stride, count)
    for u in range(count):
        part = x[:, :, u * stride : u * stride + block]
        assert part.shape[2] == block or tail == "keep"
        assert torch.equal(high[:, :, u], part.amax(dim=2))
        assert low is not None
        assert torch.equal(low[:, :, u], part.amin(dim=2))
        exact = part.double().mean(dim=2)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(means[:, :, u].double(), exact, rtol=eps, atol=eps)
    end = (count - 1) * stride + block if count else 0
    left = 37 - end if block >= stride else 37 - count * stride
    assert left < block if tail == "drop" else left <= 0


# ---- top-k ---------------------------------------------------------------------------------------


def test_best_keeps_forced_first_then_high_scores_then_low_indices() -> None:
    nan = math.nan
    values = torch.tensor([[5.0, 1.0, 5.0, 5.0, nan, -math.inf, 9.0]])
    able = torch.tensor([[True, True, True, True, True, True, False]])
    always = torch.zeros_like(able)
    kept = {k: best(values, able, always, k)[0].nonzero()[:, 0].tolist() for k in range(9)}
    assert kept[0] == []
    assert kept[1] == [0]
    assert kept[2] == [0, 2]
    assert kept[3] == [0, 2, 3]
    assert kept[4] == [0, 1, 2, 3]
    assert kept[5] == [0, 1, 2, 3, 5]
    assert kept[6] == kept[7] == kept[8] == [0, 1, 2, 3, 4, 5]
    always[0, 4] = True
    forced = {k: best(values, able, always, k)[0].nonzero()[:, 0].tolist() for k in range(3)}
    assert forced == {0: [4], 1: [4], 2: [0, 4]}


@pytest.mark.parametrize("heads", ["query", "group", "all"])
@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_scores_join_the_heads_that_share_a_list(heads: str, reduce: str) -> None:
    @pattern
    def shared(q, k, v):
        units = downsample(k, block=8, by="mean")
        best = topk(score(q, units, scale=0.5, heads=heads, reduce=reduce), k=2)
        return attend(q, gather(k, best), gather(v, best))

    q, k, v = qkv(SHAPE)
    found = lists(shared().program, inputs(shared(), q, k, v))[0]
    units = oracle.pooled(k, 8, oracle.mean).repeat_interleave(2, dim=1)
    by_head = q @ units.transpose(-1, -2)
    lists_of = {"query": 4, "group": 2, "all": 1}[heads]
    grouped = by_head.unflatten(1, (lists_of, -1))
    joined = {"mean": grouped.mean(2), "sum": grouped.sum(2), "max": grouped.amax(2)}[reduce]
    if heads == "query":
        joined = by_head
    torch.testing.assert_close(found.scores, joined * 0.5, rtol=0, atol=1e-12)
    for b in range(2):
        for h in range(lists_of):
            for row in range(SHAPE.sq):
                t = row + SHAPE.skv - SHAPE.sq
                able = oracle.complete_units(t, 8, SHAPE.skv)
                want = oracle.choose(joined[b, h, row].tolist(), able, (), 2)
                kept = found.indices[b, h, row, : found.counts[b, h, row]].tolist()
                assert kept == sorted(want)


def test_without_a_causal_score_later_units_compete_and_sinks_are_always_there() -> None:
    @pattern
    def bidirectional(q, k, v):
        best = topk(score(q, downsample(k, block=8), mask=None), k=3, always=sink(1))
        return attend(q, gather(k, best), gather(v, best), mask=None)

    q, k, v = qkv(Shape(1, 1, 1, 20, 9, 4, 4))
    mask = mask_of(bidirectional(), q, k, v)
    assert bool(mask.all())
    q, k, v = qkv(Shape(1, 1, 1, 9, 80, 4, 4))
    mask = mask_of(bidirectional(), q, k, v)
    assert bool(mask[..., :8].all())
    assert bool((mask.sum(-1) == 24).all())
    assert bool((mask & ~oracle.causal_mask(9, 80)).any())


def test_forced_units_are_taken_beyond_k_when_a_row_straddles_units() -> None:
    @pattern
    def straddling(q, k, v):
        rows = downsample(q, block=16)
        best = topk(score(rows, downsample(k, block=4)), k=1, always=own())
        return attend(q, gather(k, best), gather(v, best))

    q, k, v = qkv(Shape(1, 1, 1, 16, 16, 4, 4))
    found = lists(straddling().program, inputs(straddling(), q, k, v))[0]
    assert found.indices.tolist() == [[[[0, 1, 2, 3]]]]
    assert bool((mask_of(straddling(), q, k, v) == oracle.causal_mask(16, 16)).all())


# ---- selections ----------------------------------------------------------------------------------


def _selected(make, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Give the mask of a selection without and with the causal mask."""
    masks = []
    for rule in (None, "causal"):

        @pattern
        def selected(q, k, v, *, rule=rule):
            chosen = make()
            return attend(q, gather(k, chosen), gather(v, chosen), mask=rule)

        masks.append(mask_of(selected(), *qkv(SHAPE))[0, 0])
    return masks[0], masks[1]


@pytest.mark.parametrize(
    ("make", "want"),
    [
        (everything, (T == T) & (KEY >= 0)),
        (causal, CAUSAL),
        (lambda: window(7), CAUSAL & (T - 7 < KEY)),
        (lambda: local(7), CAUSAL & (T - 7 < KEY)),
        (lambda: sink(5), (T == T) & (KEY < 5)),
        (lambda: sink(0), (T != T) & (KEY < 0)),
        (lambda: sink(3) | window(4), (KEY < 3) | (CAUSAL & (T - 4 < KEY))),
        (lambda: sink(9) & window(30), (KEY < 9) & CAUSAL & (T - 30 < KEY)),
    ],
    ids=["everything", "causal", "window", "local", "sink", "no-sink", "union", "intersect"],
)
def test_rules_hold_the_pairs_they_name(make, want: Tensor) -> None:
    free, under = _selected(make)
    assert torch.equal(free, want)
    assert torch.equal(under, want & CAUSAL)


def test_a_local_rule_in_units_never_reads_a_later_key() -> None:
    from spcomp.ir.nodes import Local

    free, under = _selected(lambda: Local(2, 8))
    want = CAUSAL & (KEY // 8 > T // 8 - 2)
    assert torch.equal(free, want)
    assert torch.equal(under, want)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_mask_marks_rows_and_units_of_the_call(heads: int, batch: int) -> None:
    marks = torch.rand(batch, heads, 5, 7) < 0.5

    @pattern
    def given(q, k, v):
        chosen = block_mask(marks, block=(8, 8))
        return attend(q, gather(k, chosen), gather(v, chosen), mask=None)

    q, k, v = qkv(SHAPE)
    spread = marks.expand(2, -1, -1, -1).repeat_interleave(4 // heads, dim=1)
    want = spread.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)[..., :37, :53]
    assert torch.equal(mask_of(given(), q, k, v), want)
    assert_attends(given(), q, k, v, want, chunk_rows=5)


def test_a_block_mask_too_small_or_too_large_marks_nothing_outside() -> None:
    for rows, units in ((2, 3), (9, 20)):
        marks = torch.ones(1, 1, rows, units, dtype=torch.bool)

        @pattern
        def given(q, k, v, *, marks=marks):
            chosen = block_mask(marks, block=8)
            return attend(q, gather(k, chosen), gather(v, chosen), mask=None)

        q, k, v = qkv(SHAPE)
        want = (torch.arange(37) < rows * 8)[:, None] & (torch.arange(53) < units * 8)
        got = mask_of(given(), q, k, v)
        assert torch.equal(got, want.expand(2, 4, -1, -1))
        assert_attends(given(), q, k, v, got, chunk_rows=10)


def test_listed_units_may_repeat_pad_overflow_and_come_in_any_order() -> None:
    indices = torch.tensor([[3, 0, 3, -1], [-1, -1, -1, -1], [900, 1, 6, 2]]).int()[None, None]
    counts = torch.tensor([[[4, 4, 3]]]).int()
    for held, last in ((None, {1, 6, 2}), (counts, {1, 6})):

        @pattern
        def given(q, k, v, *, held=held):
            chosen = block_indices(indices, held, block=(16, 8))
            return attend(q, gather(k, chosen), gather(v, chosen), mask=None)

        want = torch.zeros(37, 53, dtype=torch.bool)
        for row, units in enumerate(({0, 3}, set(), last)):
            for u in units:
                want[row * 16 : (row + 1) * 16, u * 8 : (u + 1) * 8] = True
        q, k, v = qkv(SHAPE)
        assert torch.equal(mask_of(given(), q, k, v), want.expand(2, 4, -1, -1))
        assert_attends(given(), q, k, v, want)


def test_a_list_for_other_heads_is_refused_with_both_figures() -> None:
    @pattern
    def given(q, k, v):
        chosen = block_mask(torch.ones(1, 3, 5, 7, dtype=torch.bool), block=8)
        return attend(q, gather(k, chosen), gather(v, chosen))

    with pytest.raises(ShapeMismatch, match="a list for 3 heads and q with 4 heads"):
        run(given(), *qkv(SHAPE))


def test_a_flex_block_mask_means_its_mask_mod() -> None:
    def rule(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & ((q_idx - kv_idx < 40) | (kv_idx % 7 == h)) & (kv_idx != b)

    mask = create_block_mask(rule, 2, 4, 130, 130, device="cpu", BLOCK_SIZE=16)

    @pattern
    def flexible(q, k, v):
        chosen = flex_block_mask(mask)
        return attend(q, gather(k, chosen), gather(v, chosen), mask=None)

    b, h, i, j = torch.meshgrid(*map(torch.arange, (2, 4, 130, 130)), indexing="ij")
    q, k, v = qkv(Shape(2, 4, 2, 130, 130, 16, 16))
    assert torch.equal(mask_of(flexible(), q, k, v), rule(b, h, i, j))


def test_a_mask_mod_reads_tables_of_exactly_the_lengths() -> None:
    names_q, names_k = torch.randint(0, 3, (37,)), torch.randint(0, 3, (53,))
    per_head = torch.tensor([True, False, True, True])

    def rule(b, h, q_idx, kv_idx):
        return (names_q[q_idx] == names_k[kv_idx]) & (per_head[h] | (b == 1))

    @pattern
    def ruled(q, k, v):
        chosen = mask_mod(rule)
        return attend(q, gather(k, chosen), gather(v, chosen), mask=None)

    q, k, v = qkv(SHAPE)
    b, h, i, j = torch.meshgrid(*map(torch.arange, (2, 4, 37, 53)), indexing="ij")
    want = rule(b, h, i, j)
    assert torch.equal(mask_of(ruled(), q, k, v), want)
    assert_attends(ruled(), q, k, v, want, chunk_rows=9)


def test_passes_keep_the_meaning() -> None:
    marks = torch.rand(1, 4, 5, 7) < 0.3

    @pattern
    def busy(q, k, v):
        best = topk(score(q, downsample(k, block=8, by="minmax"), heads="group"), k=2)
        chosen = (best | sink(2) | block_mask(marks, block=8)) & mask_mod(
            lambda b, h, q_idx, kv_idx: (kv_idx + q_idx) % 5 != h
        )
        part = attend(q, gather(k, chosen), gather(v, chosen))
        return merge(merge(part, attend(q, k, v, scale=0.1)), part)

    q, k, v = qkv(SHAPE)
    program = busy().program
    given = inputs(busy(), q, k, v)
    want = to_mask(program, given)
    for change in PATTERN_PIPELINE:
        program = change(program)
        assert torch.equal(to_mask(program, given), want), change.__name__


# ---- hooks, streams, merges ----------------------------------------------------------------------


def test_a_score_hook_changes_the_scaled_logit_and_passes_gradients_to_its_table() -> None:
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def hook(score, b, h, q_idx, kv_idx):
        return torch.tanh(score / 5.0) * 5.0 - slopes[h] * torch.abs(q_idx - kv_idx)

    @pattern
    def biased(q, k, v):
        return attend(q, k, v, scale=0.3, score_mod=hook)

    h, i, j = torch.meshgrid(*map(torch.arange, (4, 37, 53)), indexing="ij")

    def dense(logits: Tensor) -> Tensor:
        return torch.tanh(logits / 5.0) * 5.0 - (slopes[h] * (i - j).abs()).to(logits.dtype)

    for dtype in DTYPES:
        q, k, v = qkv(SHAPE, dtype)
        assert_attends(biased(), q, k, v, CAUSAL, scale=0.3, hook=dense, chunk_rows=11)
    q, k, v = (x.requires_grad_() for x in qkv(SHAPE))
    got = torch.autograd.grad(run(biased(), q, k, v)[0].square().sum(), (q, k, v, slopes))
    out, _ = oracle.attention(q, k, v, CAUSAL, scale=0.3, hook=dense)
    want = torch.autograd.grad(out.square().sum(), (q, k, v, slopes))
    for g, expected in zip(got, want, strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-11, atol=1e-11)


def test_streams_share_one_softmax_and_units_are_visible_by_their_last_token() -> None:
    @pattern
    def coarse_and_fine(q, k, v):
        units = stream(downsample(k, block=8), downsample(v, block=8))
        return attend(q, [gather(stream(k, v), window(5)), units])

    q, k, v = (x.requires_grad_() for x in qkv(SHAPE))
    ends = torch.tensor([min(8 * u + 8, 53) - 1 for u in range(7)])
    mask = torch.cat([CAUSAL & (T - 5 < KEY), ends[None, :] <= T], dim=1)
    means = [torch.stack([c.mean(2) for c in x.split(8, dim=2)], dim=2) for x in (k, v)]
    keys, values = (torch.cat([x, m], dim=2) for x, m in zip((k, v), means, strict=True))
    want, want_lse = oracle.attention(q, keys, values, mask)
    out, lse = run(coarse_and_fine(), q, k, v, chunk_rows=6)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    for g, expected in zip(got, torch.autograd.grad(want.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-11, atol=1e-11)


def test_a_list_selects_the_entries_of_a_stream_of_the_same_units() -> None:
    @pattern
    def coarse(q, k, v):
        units = downsample(k, block=8, stride=4, tail="drop")
        best = topk(score(q, units), k=2)
        return attend(q, gather(stream(units, downsample(v, block=8, stride=4, tail="drop")), best))

    q, k, v = qkv(SHAPE)
    starts = range(0, 53 - 8 + 1, 4)
    means = [torch.stack([x[:, :, s : s + 8].mean(2) for s in starts], dim=2) for x in (k, v)]
    scores = q @ means[0].repeat_interleave(2, dim=1).transpose(-1, -2)
    mask = torch.zeros(2, 4, 37, len(starts), dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, (2, 4, 37))).tolist():
        able = [u for u, s in enumerate(starts) if s + 7 <= row + 16]
        for u in oracle.choose(scores[b, h, row].tolist(), able, (), 2):
            mask[b, h, row, u] = True
    want, want_lse = oracle.attention(q, *means, mask)
    out, lse = run(coarse(), q, k, v, chunk_rows=10)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)
    with pytest.raises(CannotLower, match="a mask of tokens for a stream of units"):
        mask_of(coarse(), q, k, v)


def test_merging_by_lse_is_one_softmax_over_disjoint_keys() -> None:
    @pattern
    def split(q, k, v):
        far = mask_mod(lambda b, h, q_idx, kv_idx: kv_idx % 2 == 0)
        near = mask_mod(lambda b, h, q_idx, kv_idx: kv_idx % 2 == 1)
        return merge(
            attend(q, gather(k, far), gather(v, far)),
            merge(attend(q, gather(k, near), gather(v, near))),
        )

    for sq, skv in ((37, 53), (37, 20)):
        q, k, v = (x.requires_grad_() for x in qkv(Shape(2, 4, 2, sq, skv, 16, 8)))
        mask = oracle.causal_mask(sq, skv)
        out, lse = run(split(), q, k, v, chunk_rows=10)
        want, want_lse = oracle.attention(q, k, v, mask)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)
        got = torch.autograd.grad(out.square().sum(), (q, k, v))
        exact = torch.autograd.grad(want.square().sum(), (q, k, v))
        for g, expected in zip(got, exact, strict=True):
            torch.testing.assert_close(g, expected, rtol=1e-11, atol=1e-11)


def test_merging_by_gates_adds_the_parts() -> None:
    gates = torch.randn(2, 4, 37, 2, dtype=torch.float64)

    @pattern
    def two(q, k, v):
        near, far = window(4), sink(6)
        return merge(
            attend(q, gather(k, near), gather(v, near)), attend(q, gather(k, far), gather(v, far))
        )

    program = two().program
    merged = program.result
    assert isinstance(merged, Merge)
    held = Captured("gates", (2, 4, 37, 2), "float64")
    gated = type(program)("gated", (), Merge(merged.parts, "gates", held))
    q, k, v = qkv(SHAPE)
    from spcomp.backends.reference.pattern import run_program

    out, _ = run_program(gated, {"q": q, "k": k, "v": v, "gates": gates}, chunk_rows=8)
    near, _ = oracle.attention(q, k, v, CAUSAL & (T - 4 < KEY))
    far, _ = oracle.attention(q, k, v, CAUSAL & (KEY < 6))
    want = gates[..., :1] * near + gates[..., 1:] * far
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)


def test_a_minmax_pair_is_refused_in_the_place_of_keys() -> None:
    @pattern
    def wrong(q, k, v):
        pair = downsample(k, block=8, by="minmax")
        return attend(q, stream(pair, downsample(v, block=8)))

    assert isinstance(wrong().program.result, Attend)
    with pytest.raises(CannotLower, match="a minmax pair in the place of one tensor"):
        run(wrong(), *qkv(SHAPE))
