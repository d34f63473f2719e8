"""The cost model against counts made by hand and by brute force."""

from __future__ import annotations

import math

import pytest

from spcomp.backends.reference.pattern import to_mask
from spcomp.ir import dims
from spcomp.ir.cost import (
    FIGURES,
    Figures,
    P,
    W,
    costs_of,
    dense_cost,
    evaluate,
    pairs_within,
    replaced,
    roofline_ms,
    total,
    visited_pairs,
)
from spcomp.ir.plan import Phase
from spcomp.ir.target import Target
from tests.ir.programs import LOWERED, PATTERNS, PHASES, plan_of, tensors

SHAPE = {"B": 2, "Hq": 4, "Hkv": 2, "Sq": 70, "Skv": 70, "D": 8, "Dv": 12, "E": 2}


def figures(name: str, phase: Phase = "prefill", **shape: int) -> dict[str, Figures]:
    costs = costs_of(plan_of(name, phase))
    return {c.kernel: evaluate(c, {**SHAPE, **shape}) for c in costs}


# ---- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sq", "skv"), [(1, 1), (1, 40), (40, 40), (13, 40), (40, 13)])
@pytest.mark.parametrize("width", [0, 1, 7, 13])
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_are_counted_row_by_row(sq: int, skv: int, width: int, causal: bool) -> None:
    width = min(width, skv)
    positions = [r + skv - sq for r in range(sq)]
    counted = sum(min(width, max(t + 1, 0)) if causal else width for t in positions)
    assert dims.evaluate(pairs_within(width, causal), {"Sq": sq, "Skv": skv}) == counted


@pytest.mark.parametrize("name", [n for n in LOWERED if n != "pooled_stream"])
def test_visited_pairs_are_at_least_those_a_pattern_reads(name: str) -> None:
    pattern, inputs = PATTERNS[name], tensors()
    mask = to_mask(pattern.program, {**inputs, **pattern.tensors})
    read = mask.sum((2, 3)).max().item()
    assert dims.evaluate(visited_pairs(plan_of(name)), SHAPE) >= read


def test_pairs_of_a_stream_of_units_are_pairs_with_units() -> None:
    near, far = (c for c in costs_of(plan_of("pooled_stream")) if c.pairs != 0)
    # 70 rows see 8 tokens at most; 9 units of 8 tokens are counted as if all were seen.
    assert dims.evaluate(near.width, SHAPE) == 8
    assert dims.evaluate(far.width, SHAPE) == 9
    assert evaluate(far, SHAPE).pairs == 70 * 9


def test_visited_pairs_of_a_window_and_of_a_sink_are_exact() -> None:
    # Rows 0 to 22 see t + 1 keys; 23 is where the window of 20 leaves the 4 sinks behind.
    counted = sum(min(t + 1, 24) for t in range(70))
    assert dims.evaluate(visited_pairs(plan_of("streaming_llm")), SHAPE) == counted


# ---- launches ------------------------------------------------------------------------------------


def test_figures_of_block_topk_match_a_count_by_hand() -> None:
    found = figures("block_topk")
    # 70 tokens are 5 blocks of 16; a list keeps max(ceil(5 / 2), 3) + 1 = 4 of them: 64 keys.
    pairs = sum(min(t + 1, 64) for t in range(70))
    q, kv, out = 2 * 4 * 70 * 8 * 2, 2 * 2 * 70 * (8 + 12) * 2, 2 * 4 * 70 * (12 * 2 + 4)
    lists, counts = 2 * 2 * 5 * 4 * 4, 2 * 2 * 5 * 4
    tiles = 2 * 2 * 5 * 4 * 4 + 2 * counts
    k_mean, q_mean = 2 * 2 * 5 * 8 * 2, 2 * 4 * 5 * 8 * 2
    # 1 row tile of 16 rows; each of the 8 query heads reads the units of its KV head.
    reread = 2 * 4 * 1 * 5 * 8 * 2
    keys = 2 * 4 * pairs * (8 + 12) * 2 // 16
    assert found["select"] == Figures(
        "select",
        flops=2 * 2 * 4 * 5 * 5 * 8,
        floor_bytes=q_mean + k_mean + lists + counts,
        l2_bytes=q_mean + reread + lists + counts,
        scratch_bytes=lists + counts,
    )
    assert found["tiles"] == Figures(
        "tiles",
        flops=0,
        floor_bytes=lists + counts + tiles,
        l2_bytes=lists + counts + tiles,
        scratch_bytes=tiles,
    )
    assert found["attend"] == Figures(
        "attend",
        flops=2 * 2 * 4 * pairs * (8 + 12),
        floor_bytes=q + kv + out + tiles,
        l2_bytes=q + keys + out + tiles,
        scratch_bytes=0,
        pairs=pairs,
    )


def test_decode_reads_only_the_pages_it_lists() -> None:
    found = figures("quest", "decode", Sq=1, Skv=4096)
    # 2 pages of 16 tokens for each of 4 query heads, no two of them alike.
    listed = 2 * 4 * 32 * (8 + 12) * 2
    q, lists, counts = 2 * 4 * 8 * 2, 2 * 4 * 2 * 4, 2 * 4 * 4
    # ceil(32 / 32) = 1 tile, so no split: one part of each head.
    parts = 2 * 4 * (12 * 4 + 4)
    assert found["attend_gather"].floor_bytes == q + listed + lists + counts + parts
    assert found["score"].flops == 2 * 2 * 2 * 4 * 256 * 8


def test_key_major_counts_one_part_for_every_list_entry() -> None:
    found = figures("moba")
    # 1 block of 64 a query: its entries, its part and its lse.
    assert found["attend_keys"].scratch_bytes == 2 * 4 * 70 * 1 * (12 * 2 + 4)
    assert found["merge"].floor_bytes == (
        2 * 4 * 70 * (12 * 2 + 4) + 2 * 4 * 70 * 4 + 2 * 4 * 70 * (12 * 2 + 4)
    )


def test_a_part_of_a_stack_counts_as_one_part() -> None:
    found = costs_of(plan_of("joined"))
    writers = [evaluate(c, SHAPE) for c in found if c.kernel in ("attend", "attend_gather")]
    assert [w.scratch_bytes for w in writers] == [2 * 4 * 70 * (12 + 1) * 4] * 2


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", LOWERED)
def test_no_launch_asks_less_of_the_cache_than_its_floor_reads(name: str, phase: Phase) -> None:
    shape = {**SHAPE, "Sq": 70 if phase == "prefill" else 1, "Skv": 70}
    for cost in costs_of(plan_of(name, phase)):
        found = evaluate(cost, shape)
        assert all(getattr(found, f) >= 0 for f in FIGURES)
        if cost.pairs == 0:
            assert found.l2_bytes >= found.floor_bytes


def test_dense_attention_is_the_textbook_count() -> None:
    found = evaluate(dense_cost(), {**SHAPE, "Sq": 64, "Skv": 64})
    assert found.flops == 2 * 2 * 4 * (64 * 65 // 2) * 20
    full = evaluate(dense_cost(causal=False), {**SHAPE, "Sq": 64, "Skv": 64})
    assert full.flops == 2 * 2 * 4 * 64 * 64 * 20
    assert found.floor_bytes == 2 * 64 * 2 * (4 * 8 + 2 * 20 + 4 * 12) + 2 * 4 * 64 * 4


def test_total_adds_figures_up() -> None:
    one = Figures("a", 1, 2, 3, 4, 5)
    assert total([one, one, one], "sum") == Figures("sum", 3, 6, 9, 12, 15)


def test_replacing_a_symbol_keeps_every_argument_of_a_minimum() -> None:
    # sympy's own substitution holds the 64 to be the smaller one and drops the quotient.
    dim = dims.least(64, dims.ceildiv(264, dims.B * dims.R))
    found = replaced(dim, {dims.R: dims.Sq})
    assert dims.evaluate(found, {"B": 1, "Sq": 100}) == 3
    assert replaced(W * P, {W: 3, P: dims.Sq}) == 3 * dims.Sq


TARGET = Target(
    name="card",
    title="a card",
    backend="none",
    arch="none",
    warp_size=32,
    multiprocessors=1,
    shared_bytes=1,
    registers=1,
    tflops=(("float16", 100.0), ("float32", 10.0)),
    bandwidth_tbs=2.0,
    l2_tbs=4.0,
    launch_us=5.0,
)


@pytest.mark.parametrize(
    ("flops", "floor", "l2", "ms"),
    [(10**12, 0, 0, 10.0), (0, 10**10, 0, 5.0), (0, 0, 10**10, 2.5)],
)
def test_roofline_is_the_slowest_of_its_three(flops: int, floor: int, l2: int, ms: float) -> None:
    found = roofline_ms(Figures("x", flops, floor, l2, 0), TARGET, "float16", launches=2)
    assert math.isclose(found, ms + 0.010)


def test_an_unknown_dtype_takes_the_slowest_rate() -> None:
    one = Figures("x", 10**12, 0, 0, 0)
    assert math.isclose(roofline_ms(one, TARGET, "float64", 0), 100.0)
