"""Scratch: formulas, slabs that stay within the limit, and places that do not overlap."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spcomp.ir import dims
from spcomp.ir.lifetimes import lifetimes
from spcomp.ir.passes.place_buffers import (
    ALIGN_BYTES,
    bytes_of,
    peak_scratch_bytes,
    place_buffers,
    scratch_bytes,
    slab_align,
    slab_rows,
)
from spcomp.ir.plan import SCRATCH_LIMIT_BYTES, Buffer, Phase
from tests.ir.programs import LOWERED, PHASES, plan_of

SMALL = {"B": 2, "Hq": 4, "Hkv": 2, "Sq": 70, "Skv": 70, "D": 8, "Dv": 12}
MODEL = {"B": 1, "Hq": 32, "Hkv": 8, "D": 128, "Dv": 128}


def test_bytes_of_data_hold_the_size_of_an_element() -> None:
    assert str(bytes_of(Buffer("x", (dims.B, 3), "data", "scratch"))) == "3*B*E"
    assert bytes_of(Buffer("x", (5, 3), "int32", "scratch")) == 60


def test_scratch_of_a_window_is_its_tile_lists() -> None:
    plan = plan_of("streaming_llm")
    # Two row tiles of 64, two key tiles of 64; a tile, a partial and a total count, int32 each.
    assert dims.evaluate(scratch_bytes(plan), {**SMALL, "R": 70}) == 2 * 2 * 4 + 2 * 2 * 4


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.parametrize("tokens", [4096, 131072, 1 << 20])
def test_scratch_stays_within_one_gibibyte_at_every_length(
    name: str, phase: Phase, tokens: int
) -> None:
    if name == "quest-group" and tokens == 1 << 20:
        # Its pages of 4 tokens alone are half the keys, 1 GiB: the smallest slab is taken then.
        assert slab_rows(plan_of(name), {**MODEL, "Sq": tokens, "Skv": tokens}, 2) == 1
        return
    plan = plan_of(name, phase)
    env = {**MODEL, "Sq": tokens if phase == "prefill" else 16, "Skv": tokens}
    rows = slab_rows(plan, env, 2)
    held = dims.evaluate(scratch_bytes(plan), {**env, "E": 2, "R": min(rows, env["Sq"])})
    assert held <= SCRATCH_LIMIT_BYTES


@given(st.sampled_from(["block_topk", "moba", "quest"]), st.integers(1, 5000), st.integers(12, 24))
def test_slabs_are_aligned_fit_and_are_as_few_as_can_be(name: str, sq: int, bits: int) -> None:
    plan = plan_of(name)
    env, align = {**SMALL, "Sq": sq, "Skv": 5000}, slab_align(plan)
    limit = 1 << bits
    rows = slab_rows(plan, env, 4, limit)
    most = -(-sq // align) * align

    def size(r: int) -> int:
        return dims.evaluate(scratch_bytes(plan), {**env, "E": 4, "R": r})

    assert rows % align == 0
    assert 0 < rows <= most
    if size(align) > limit:
        assert rows == align
        return
    assert size(rows) <= limit
    # One slab fewer, of equal size, would not fit.
    slabs = -(-most // rows)
    if slabs > 1:
        fewer = -(-most // align // (slabs - 1)) * align
        assert -(-most // fewer) == slabs or size(fewer) > limit


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", LOWERED)
def test_buffers_alive_at_one_time_do_not_overlap(name: str, phase: Phase) -> None:
    plan = plan_of(name, phase)
    placed = place_buffers(plan, SMALL, 2)
    spans = lifetimes(plan)
    env = {**SMALL, "E": 2, "R": placed.slab_rows}
    ends = {
        n: at + dims.evaluate(bytes_of(plan.buffer(n)), env)
        for n, at in dict(placed.offsets).items()
    }
    assert set(ends) == {b.name for b in plan.scratch()}
    assert max(ends.values(), default=0) <= placed.arena_bytes
    for (a, start_a), (b, start_b) in itertools.combinations(placed.offsets, 2):
        assert start_a % ALIGN_BYTES == 0
        apart = ends[a] <= start_b or ends[b] <= start_a
        assert apart or not spans[a].meets(spans[b])


@pytest.mark.parametrize("name", LOWERED)
def test_the_arena_lies_between_the_peak_and_the_sum(name: str) -> None:
    plan = plan_of(name)
    placed = place_buffers(plan, SMALL, 2)
    env = {**SMALL, "E": 2, "R": placed.slab_rows}
    padding = ALIGN_BYTES * len(placed.offsets)
    assert dims.evaluate(peak_scratch_bytes(plan), env) <= placed.arena_bytes
    assert placed.arena_bytes <= dims.evaluate(scratch_bytes(plan), env) + padding


def test_buffers_of_separate_lifetimes_share_their_place() -> None:
    plan = plan_of("moba")
    offsets = dict(place_buffers(plan, SMALL, 2).offsets)
    assert offsets["keys"] in {offsets[n] for n in offsets if n != "keys"}
