"""Prices of plans: formulas evaluated for one shape, and a time that says it is predicted."""

from __future__ import annotations

import dataclasses

import pytest

from spcomp.autotune import price
from spcomp.autotune.report.record import PricedShape
from spcomp.errors import UnknownTarget
from spcomp.patterns import block_topk

SHAPE = PricedShape(1, 8, 2, 32768, 64, "bfloat16")


def test_dense_flops_are_those_of_the_causal_triangle() -> None:
    found = price.dense_price(SHAPE, perplexity=7.5)
    pairs = 32768 * 32769 // 2
    assert found.flops == 2 * 8 * pairs * (64 + 64)
    operands = (8 + 2 + 2 + 8) * 32768 * 64 * 2
    assert found.bytes == operands + 8 * 32768 * 4
    assert found.perplexity == 7.5


def test_a_smaller_budget_costs_less_and_its_time_is_predicted() -> None:
    small, large = (
        price.predicted(price.source_for(block_topk(block=128, budget=share), SHAPE, "sm90"), SHAPE)
        for share in (0.125, 0.5)
    )
    dense = price.dense_price(SHAPE, None)
    assert small.flops is not None and large.flops is not None and dense.flops is not None
    assert small.flops < large.flops < dense.flops
    assert small.timing is not None and large.timing is not None
    assert small.timing.median_ms < large.timing.median_ms
    assert (small.timing.kind, small.timing.spread_ms) == ("predicted", None)
    assert small.timing.where == "the roofline of NVIDIA H100 (sm90)"
    assert small.timing.dense_ms == large.timing.dense_ms


def test_kernels_are_the_same_whatever_their_header_says() -> None:
    source = price.source_for(block_topk(block=128, budget=0.25), SHAPE, "sm90")
    renamed = tuple(
        dataclasses.replace(file, text="# another header\n" + file.text) for file in source.files
    )
    assert price.same_kernels(dataclasses.replace(source, files=renamed)) == price.same_kernels(
        source
    )
    other = price.source_for(block_topk(block=64, budget=0.25), SHAPE, "sm90")
    assert price.same_kernels(other) != price.same_kernels(source)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UnknownTarget):
        price.source_for(block_topk(), SHAPE, "sm42")
