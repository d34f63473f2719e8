"""Sink logits in the two interpreters of the reference backend, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spcomp.backends.reference.pattern import run_program, to_mask
from spcomp.backends.reference.plan import run_plan
from spcomp.dsl import (
    Pattern,
    attend,
    downsample,
    everything,
    gather,
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
from spcomp.ir.nodes import Captured, Merge
from spcomp.ir.program import Program
from spcomp.ir.spec import check
from spcomp.ir.text import parse_plan, print_plan
from tests import oracle
from tests.reference.lower import plans_of
from tests.reference.make import AWKWARD, DTYPES, Shape, inputs, mask_of, qkv, run

LOGITS = (0.5, -math.inf, 3.0, -200.0, math.inf, 1e30)
"""Of six heads: usual ones, none, one that is nothing, and two that are everything."""


@pattern
def near(q, k, v, *, sinks):
    return attend(q, gather(k, window(9)), gather(v, window(9)), sinks=sinks)


@pattern
def listed(q, k, v, *, sinks):
    best = topk(score(q, downsample(k, block=16)), k=2, always=own())
    return attend(q, gather(k, best), gather(v, best), sinks=sinks)


@pattern
def blocks(q, k, v, *, sinks):
    best = topk(score(downsample(q, block=16), downsample(k, block=16), heads="group"), k=2)
    return attend(q, gather(k, best), gather(v, best), sinks=sinks)


@pattern
def joined(q, k, v, *, sinks):
    """Two disjoint sets of keys, one of them in a nested merge."""
    parts = []
    for n in range(2):
        rule = mask_mod(lambda b, h, i, j, n=n: j % 2 == n)
        parts.append(attend(q, gather(k, rule), gather(v, rule)))
    return merge(parts[0], merge(parts[1]), sinks=sinks)


@pattern
def streams(q, k, v, *, sinks):
    """Two streams of one attend, which plans join by a merge."""
    pair = stream(k, v)
    even, odd = (mask_mod(lambda b, h, i, j, n=n: j % 2 == n) for n in range(2))
    return attend(q, [gather(pair, even & window(20)), gather(pair, odd)], sinks=sinks)


PATTERNS = {"near": near, "listed": listed, "blocks": blocks, "joined": joined, "streams": streams}


def logits(heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor((LOGITS * 2)[:heads]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_sinks_join_the_denominator_alone(shape: Shape, dtype: torch.dtype) -> None:
    q, k, v = qkv(shape, dtype)
    sinks = logits(shape.hq).to(dtype)
    made = near(sinks=sinks)
    out, lse = run(made, q, k, v, chunk_rows=30)
    mask = mask_of(made, q, k, v)
    rule = {"sinks": sinks}
    want, want_lse = oracle.attention(q, k, v, mask, **rule)
    budget, budget_lse = oracle.budgets(q, k, v, mask, **rule)
    assert out.dtype == dtype
    assert oracle.error(out, want) <= budget
    assert oracle.error(lse, want_lse) <= budget_lse


def test_the_share_is_the_sigmoid_and_the_lse_is_as_without() -> None:
    q, k, v = qkv(Shape(2, 4, 2, 37, 20, 16, 8))
    sinks = torch.randn(4, dtype=torch.float64)
    out, lse = run(near(sinks=sinks), q, k, v)
    plain, plain_lse = run(near(sinks=None), q, k, v)
    assert torch.equal(lse, plain_lse)
    want = plain * torch.sigmoid(plain_lse - sinks[:, None]).nan_to_num()[..., None]
    torch.testing.assert_close(out, want, rtol=0, atol=1e-14)
    assert not out[:, :, :17].any()
    assert bool((lse[:, :, :17] == -math.inf).all())


def test_no_sink_and_a_sink_of_minus_infinity_are_one() -> None:
    q, k, v = qkv(Shape(1, 2, 1, 20, 8, 16, 8), torch.float32)
    none = run(near(sinks=torch.full((2,), -math.inf)), q, k, v)
    for got, want in zip(none, run(near(sinks=None), q, k, v), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    "shape", [Shape(2, 6, 2, 40, 50, 8, 5), Shape(1, 6, 6, 37, 20, 8, 8), Shape(3, 6, 1, 1, 70)]
)
def test_every_plan_applies_sinks_once(name: str, shape: Shape) -> None:
    q, k, v = qkv(shape)
    made: Pattern = PATTERNS[name](sinks=logits(6, torch.float64))
    mask = mask_of(made, q, k, v)
    want, want_lse = oracle.attention(q, k, v, mask, sinks=logits(6, torch.float64))
    canonical, plans = plans_of(made)
    assert plans
    for plan in plans:
        check(plan, "cut")
        assert parse_plan(print_plan(plan)) == plan
        applied = [x for x in plan.launches() if getattr(x, "sinks_buf", "")]
        assert [x.writes() for x in applied] == [("out", "lse")]
        for rows in (None, 17):
            out, lse = run_plan(plan, inputs(canonical, q, k, v), slab_rows=rows)
            assert oracle.error(out, want) <= 1e-12
            assert oracle.error(lse, want_lse) <= 1e-12


@pytest.mark.parametrize("name", PATTERNS)
def test_gradients_reach_the_sinks(name: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(Shape(2, 4, 2, 37, 20, 8, 5)))
    sinks = torch.tensor([0.5, -1.0, 3.0, -math.inf], dtype=torch.float64, requires_grad=True)
    made: Pattern = PATTERNS[name](sinks=sinks)
    mask = to_mask(made.program, inputs(made, q, k, v))
    found = []
    for out, lse in (
        run(made, q, k, v, chunk_rows=10),
        oracle.attention(q, k, v, mask, sinks=sinks),
    ):
        seen = lse.masked_fill(lse == -math.inf, 0.0)
        loss = out.square().sum() + seen.cos().sum()
        found.append(torch.autograd.grad(loss, (q, k, v, sinks)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert bool(found[0][3][:3].all())
    assert found[0][3][3] == 0


def test_a_pooled_stream_shares_the_softmax_with_the_sinks() -> None:
    sinks = torch.randn(4, dtype=torch.float64)

    @pattern
    def coarse(q, k, v):
        units = stream(downsample(k, block=8), downsample(v, block=8))
        parts = [gather(stream(k, v), window(5)), gather(units, everything())]
        return attend(q, parts, sinks=sinks)

    q, k, v = qkv(Shape(1, 4, 2, 30, 44, 16))
    ends = torch.tensor([min(8 * u + 8, 44) - 1 for u in range(6)])
    mask = [oracle.window_mask(30, 44, 5), ends[None, :] <= oracle.positions(30, 44)]
    wide = [torch.cat([x, oracle.pooled(x, 8, oracle.mean)], dim=2) for x in (k, v)]
    want, _ = oracle.attention(q, *wide, torch.cat(mask, dim=1), sinks=sinks)
    assert oracle.error(run(coarse(), q, k, v)[0], want) <= 1e-12


def test_each_part_of_a_merge_by_gates_has_a_softmax_and_sinks_of_its_own() -> None:
    sinks = torch.randn(4, dtype=torch.float64)
    gate = torch.rand(2, 4, 37, 2, dtype=torch.float64)
    made = near(sinks=sinks)

    @pattern
    def early(q, k, v):
        return attend(q, gather(k, sink(6)), gather(v, sink(6)), mask=None)

    node = Captured("gate", (2, 4, 37, 2), "float64")
    parts = made.program.result, early().program.result
    gated = Program("gated", (), Merge(parts, "gates", node))
    check(gated, "infer_types")
    q, k, v = qkv(Shape(2, 4, 2, 37, 53, 8, 5))
    out, _ = run_program(gated, {**inputs(made, q, k, v), "gate": gate})
    beside, _ = oracle.attention(q, k, v, oracle.window_mask(37, 53, 9), sinks=sinks)
    plain, _ = oracle.attention(q, k, v, torch.arange(53) < 6)
    first, second = gate[..., None].unbind(3)
    assert oracle.error(out, first * beside + second * plain) <= 1e-12
