"""Plans as the reference interprets them: the meaning of their patterns, buffer by buffer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spcomp.backends.reference.pattern import lists
from spcomp.backends.reference.plan import Trace, run_plan
from spcomp.dsl import (
    Pattern,
    attend,
    block_mask,
    downsample,
    gather,
    mask_mod,
    merge,
    pattern,
    score,
    sink,
    topk,
    window,
)
from spcomp.ir.plan import Plan
from spcomp.patterns import block_topk, moba, quest, streaming_llm
from tests import oracle
from tests.reference.lower import plan_of, plans_of
from tests.reference.make import Shape, inputs, mask_of, qkv, run

MARKS = torch.rand(1, 2, 5, 9, generator=torch.Generator().manual_seed(3)) < 0.4
NAMES = torch.arange(200) // 40


@pattern
def union_of_all(q, k, v):
    best = topk(score(downsample(q, block=32), downsample(k, block=32), heads="group"), k=2)
    same = mask_mod(lambda b, h, q_idx, kv_idx: (NAMES[q_idx] == NAMES[kv_idx]) | (h == b))
    chosen = (best | window(20) | block_mask(MARKS, block=(32, 16))) & same
    return attend(q, gather(k, chosen), gather(v, chosen))


@pattern
def merged(q, k, v):
    far = sink(5)
    part = attend(q, gather(k, far), gather(v, far))
    hook = attend(q, k, v, score_mod=lambda s, b, h, q_idx, kv_idx: s - kv_idx * 0.01, scale=0.2)
    return merge(part, hook)


PATTERNS: dict[str, Pattern] = {
    "block_topk": block_topk(block=32, budget=0.5),
    "moba-16": moba(block=16, k_blocks=3),
    "moba-64": moba(block=64, k_blocks=2),
    "quest": quest(page=4, budget=16),
    "quest-shared": quest(page=16, budget=48, heads="group"),
    "streaming_llm": streaming_llm(sinks=4, recent=9),
    "union": union_of_all(),
    "merged": merged(),
}
SHAPES = (
    Shape(2, 4, 2, 130, 130, 8, 6),
    Shape(2, 4, 2, 1, 130, 8, 6),
    Shape(1, 4, 2, 70, 33, 8, 6),
    Shape(2, 2, 2, 37, 130, 17, 17),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_every_plan_means_what_its_pattern_means(name: str, shape: Shape) -> None:
    if name == "union" and (shape.sq, shape.skv) != (130, 130):
        shape = Shape(2, 4, 2, 160, 140, 8, 6)
    q, k, v = qkv(shape)
    want, want_lse = run(PATTERNS[name], q, k, v)
    canonical, plans = plans_of(PATTERNS[name])
    assert plans
    for plan in plans:
        for rows in (None, 50):
            out, lse = run_plan(plan, inputs(canonical, q, k, v), slab_rows=rows)
            torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
            torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)


def test_a_rule_on_remainders_of_the_indices_lists_the_right_tiles() -> None:
    @pattern
    def stripes(q, k, v):
        rule = mask_mod(lambda b, h, q_idx, kv_idx: (kv_idx + q_idx) // 32 % 2 == 0)
        return attend(q, gather(k, rule), gather(v, rule))

    q, k, v = qkv(SHAPES[0])
    row, key = torch.arange(130)[:, None], torch.arange(130)[None, :]
    mask = ((row + key) // 32 % 2 == 0) & (key <= row)
    want, _ = oracle.attention(q, k, v, mask)
    torch.testing.assert_close(run(stripes(), q, k, v)[0], want, rtol=0, atol=1e-12)
    for plan in plans_of(stripes())[1]:
        out, _ = run_plan(plan, {"q": q, "k": k, "v": v})
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)


def test_all_loop_orders_are_tried() -> None:
    orders = {p.order for pattern in PATTERNS.values() for p in plans_of(pattern)[1]}
    assert orders == {"query_major", "key_major", "gather"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plan_keeps_the_dtype_of_its_inputs(dtype: torch.dtype) -> None:
    q, k, v = qkv(SHAPES[0], dtype)
    mask = mask_of(PATTERNS["moba-64"], q, k, v)
    want, want_lse = oracle.attention(q, k, v, mask)
    budget, budget_lse = oracle.budgets(q, k, v, mask)
    for plan in plans_of(PATTERNS["moba-64"])[1]:
        out, lse = run_plan(plan, {"q": q, "k": k, "v": v})
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        assert oracle.error(out, want) <= budget
        assert oracle.error(lse, want_lse) <= budget_lse


def test_a_plan_is_differentiable() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(SHAPES[0]))
    for name in ("moba-64", "block_topk", "merged"):
        out, _ = run(PATTERNS[name], q, k, v)
        want = torch.autograd.grad(out.square().sum(), (q, k, v))
        for plan in plans_of(PATTERNS[name])[1]:
            out, _ = run_plan(plan, {"q": q, "k": k, "v": v}, slab_rows=64)
            got = torch.autograd.grad(out.square().sum(), (q, k, v))
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w, rtol=0, atol=1e-11)


# ---- buffers -------------------------------------------------------------------------------------


def _traced(plan: Plan, tensors: dict[str, Tensor], rows: int) -> list[Trace]:
    found: list[Trace] = []
    run_plan(plan, tensors, slab_rows=rows, trace=found)
    return found


def test_lists_of_a_slab_are_the_rows_of_the_whole_list() -> None:
    q, k, v = qkv(SHAPES[0])
    tensors = {"q": q, "k": k, "v": v}
    want = lists(PATTERNS["block_topk"].program, tensors)[0]
    for phase in ("prefill", "decode"):
        plan = plan_of(PATTERNS["block_topk"], phase)
        width = want.indices.shape[3]
        for slab in _traced(plan, tensors, 64):
            rows = slice(slab.begin // 32, -(-(slab.begin + slab.rows) // 32))
            assert torch.equal(slab.buffers["indices"][..., :width], want.indices[:, :, rows])
            assert torch.equal(slab.buffers["counts"], want.counts[:, :, rows])
            assert bool((slab.buffers["indices"][..., width:] == -1).all())


def test_scores_are_minus_infinite_where_no_candidate_is_and_infinite_where_forced() -> None:
    q, k, v = qkv(Shape(1, 1, 1, 40, 40, 8, 8))
    plan = plan_of(moba(block=8, k_blocks=2), "decode")
    (slab,) = _traced(plan, {"q": q, "k": k, "v": v}, 64)
    scores = slab.buffers["scores"][0, 0]
    row, unit = torch.arange(40)[:, None], torch.arange(5)[None, :]
    own = unit == row // 8
    complete = unit * 8 + 7 <= row
    means = k[0, 0].unflatten(0, (5, 8)).mean(1)
    want = (q[0, 0] @ means.T).masked_fill(~complete, -torch.inf).masked_fill(own, torch.inf)
    torch.testing.assert_close(scores, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["block_topk", "streaming_llm", "union"])
def test_tiles_hold_every_visible_pair_and_full_ones_nothing_else(name: str) -> None:
    q, k, v = qkv(SHAPES[0])
    canonical, _ = plans_of(PATTERNS[name])
    plan = plan_of(canonical, order="query_major")
    launch = next(n for n in plan.launches() if n.kernel == "tiles")
    block_q, block_k = launch.axis("block_q"), launch.axis("block_k")
    pairs = mask_of(PATTERNS[name], q, k, v)
    for slab in _traced(plan, inputs(canonical, q, k, v), 64):
        tiles, partial, total = (slab.buffers[n] for n in ("tiles", "partial", "total"))
        per_list = 4 // tiles.shape[1]
        for b, h, row in torch.cartesian_prod(
            torch.arange(2), torch.arange(4), torch.arange(tiles.shape[2])
        ).tolist():
            at = min(b, tiles.shape[0] - 1), h // per_list, row
            entries = tiles[at][: total[at]].tolist()
            numbers = [e & 0xFFFFFF for e in entries]
            cut = int(partial[at])
            assert numbers[:cut] == sorted(set(numbers[:cut]))
            assert numbers[cut:] == sorted(set(numbers[cut:]))
            assert bool((tiles[at][total[at] :] == -1).all())
            first = slab.begin + row * block_q
            here = pairs[b, h, first : min(first + block_q, slab.begin + slab.rows)]
            for tile, columns in enumerate(here.split(block_k, dim=1)):
                if tile in numbers[cut:]:
                    assert bool(columns.all())
                    assert columns.shape[1] == block_k
                elif tile not in numbers[:cut]:
                    assert not columns.any()


def test_the_inversion_lists_the_rows_of_each_unit() -> None:
    q, k, v = qkv(SHAPES[0])
    plan = plan_of(PATTERNS["moba-16"], order="key_major")
    rows_per_chunk = next(n for n in plan.launches() if n.kernel == "invert_count").axis("rows")
    for slab in _traced(plan, {"q": q, "k": k, "v": v}, 50):
        b = slab.buffers
        indices, counts, entries = (b[n].long() for n in ("indices", "counts", "entries"))
        width = indices.shape[3]
        for at in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
            starts = b["unit_start"][tuple(at)].tolist()
            tiles = b["tile_start"][tuple(at)].tolist()
            for unit in range(len(starts) - 1):
                held = entries[tuple(at)][starts[unit] : starts[unit + 1]]
                row, slot = held // width, held % width
                assert row.tolist() == sorted(set(row.tolist()))
                assert bool((indices[tuple(at)][row, slot] == unit).all())
                assert tiles[unit + 1] - tiles[unit] == -(-len(held) // 16)
                before = [int((row < c * rows_per_chunk).sum()) for c in range(4)]
                prefix = b["unit_prefix"][tuple(at)][unit].tolist()
                assert prefix == [starts[unit] + n for n in before[: len(prefix)]]
            assert starts[-1] == int(counts[tuple(at)].sum())


def test_parts_of_a_split_row_are_disjoint_and_those_not_there_are_not_read() -> None:
    q, k, v = qkv(Shape(1, 2, 1, 1, 130, 8, 8))
    plan = plan_of(PATTERNS["quest-shared"], "decode")
    (slab,) = _traced(plan, {"q": q, "k": k, "v": v}, 1)
    lse = slab.buffers["part_lse"]
    assert lse.shape[0] > 1
    whole = torch.logsumexp(lse.double(), dim=0)
    torch.testing.assert_close(whole, slab.buffers["lse"].double(), rtol=0, atol=1e-12)
    plan = plan_of(PATTERNS["moba-16"], order="key_major")
    q, k, v = qkv(SHAPES[0])
    first = _traced(plan, {"q": q, "k": k, "v": v}, 50)[0].buffers
    unwritten = torch.arange(3) >= first["counts"][..., None]
    assert bool(unwritten.any())
    assert torch.equal(first["part_lse"].isnan(), unwritten)
