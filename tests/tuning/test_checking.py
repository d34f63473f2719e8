"""What counts as right, and on which part of a sample it is looked at."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spcomp as sp
from spcomp.autotune.fidelity import fidelity
from spcomp.patterns import block_topk, streaming_llm
from spcomp.tuning import checking
from tests.tuning.fates import tensors


@given(
    heads=st.sampled_from([1, 4, 64]),
    rows=st.integers(1, 40000),
    keys=st.integers(1, 40000),
    most_rows=st.none() | st.just(checking.CHECKED_ROWS),
)
def test_a_part_stays_in_its_phase_and_within_its_pairs(
    heads: int, rows: int, keys: int, most_rows: int | None
) -> None:
    q, k = torch.empty(1, heads, rows, 1), torch.empty(1, 1, keys, 1)
    part = checking.part_of(q, k, k, checking.CHECKED_PAIRS, most_rows)
    got, seen = part.q.shape[2], rows - max(0, rows - keys)
    assert (got <= 16) == (seen <= 16)
    assert part.k.shape[2] - got == keys - seen  # bottom-right stays where it was
    assert part.tokens == part.k.shape[2] == part.v.shape[2] >= 1
    if got > 17:
        assert heads * got * part.tokens <= checking.CHECKED_PAIRS["cpu"]
        assert got <= (most_rows or rows)
    if got < seen:
        assert got % 2 == 1


def test_a_part_is_a_view_of_the_sample() -> None:
    q, k, v = tensors(2000, 3000)
    part = checking.part_of(q, k, v, checking.CHECKED_PAIRS, 1025)
    assert (part.q.shape[2], part.tokens) == (1025, 2025)
    assert part.q.data_ptr() == q.data_ptr()


def test_the_error_leaves_out_half_a_percent_of_the_rows() -> None:
    want = torch.zeros(1, 2, 500, 4)
    got = want.clone()
    got[0, 0, :5] = 1.0
    assert checking.error_between(got, want) == 0.0
    got[0, 1, 7, 2] = 0.5
    assert checking.error_between(got, want) == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_value_that_is_not_finite_is_no_tie(value: float) -> None:
    want = torch.zeros(1, 2, 500, 4)
    got = want.clone()
    got[0, 1, 3, 1] = value
    assert checking.error_between(got, want) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerance_takes_the_reference_and_no_shifted_output(dtype: torch.dtype) -> None:
    attention = sp.compile(block_topk(block=64), backend="reference")
    q, k, v = tensors(dtype=dtype)
    standard = checking.standard(attention, checking.part_of(q, k, v, checking.CHECKED_PAIRS))
    assert checking.error_between(attention(q, k, v), standard.out) == 0.0
    assert 0 < standard.allowed < 0.05
    assert checking.error_between(standard.out.roll(1, 2), standard.out) > standard.allowed


def test_what_is_kept_is_that_of_the_whole_sample_where_it_fits() -> None:
    attention = sp.compile(block_topk(block=64), backend="reference")
    q, k, v = tensors()
    kept, why = checking.kept_of(attention, q, k, v)
    want = fidelity(q, k, v, mask=attention.to_mask(q, k), out=attention(q, k, v))
    assert why == ""
    assert kept == {
        "tokens": 200,
        "mass_mean": want.mass_mean,
        "mass_p5": want.mass_p5,
        "out_error": want.out_error,
        "density": want.density,
    }


def test_what_is_kept_does_not_count_the_share_of_sinks() -> None:
    @sp.pattern
    def near(q, k, v, *, sinks):  # type: ignore[no-untyped-def]
        return sp.attend(q, sp.gather(k, sp.window(9)), sp.gather(v, sp.window(9)), sinks=sinks)

    qkv = tensors()
    logits = torch.full((qkv[0].shape[1],), 2.0)
    plain, sunk = (sp.compile(near(sinks=s), backend="reference") for s in (None, logits))
    assert checking.kept_of(sunk, *qkv) == checking.kept_of(plain, *qkv)
    assert not torch.equal(sunk(*qkv), plain(*qkv))


@sp.pattern
def all_ways(q, k, v):  # type: ignore[no-untyped-def]
    """Every query sees every key, later ones too."""
    return sp.attend(q, k, v, mask=None)


def test_what_cannot_be_measured_says_why() -> None:
    attention = sp.compile(all_ways(), backend="reference")
    kept, why = checking.kept_of(attention, *tensors())
    assert kept is None
    assert why.startswith("what it keeps of attention was not measured (MaskSeesTheFuture: ")


def test_the_scale_of_a_pattern_is_that_of_its_attends() -> None:
    @sp.pattern
    def scaled(q, k, v):  # type: ignore[no-untyped-def]
        return sp.attend(q, k, v, scale=2.0)

    assert checking.scale_of(scaled()) == 2.0
    assert checking.scale_of(streaming_llm()) is None
