"""The top-k kernel in the emulator against a stable sort."""

from __future__ import annotations

import re
import struct
from dataclasses import fields
from functools import lru_cache

import jinja2.meta
import numpy as np
import pytest

from spcomp.backends.ascendc.contexts.topk import TopKContext, topk_context
from spcomp.backends.ascendc.emulate import (
    Argument,
    Buffer,
    EmulatedKernel,
    Launch,
    compile_kernel,
)
from spcomp.codegen.render import TEMPLATES, environment, render

TEMPLATE = "ascendc/kernels/topk.h.jinja"
TILING = """#include <cstdint>
struct TopKTiling {
    int32_t lists, units, k, width;
};
"""
Array = np.ndarray


def context(chunk: int = 2048, max_width: int = 2048) -> TopKContext:
    return topk_context(
        header=("test",),
        name="test_00_topk",
        tiling_header="tiling.h",
        struct="TopKTiling",
        chunk=chunk,
        max_width=max_width,
    )


@lru_cache(maxsize=4)
def kernel(chunk: int, max_width: int) -> EmulatedKernel:
    source = render(TEMPLATE, context(chunk, max_width)).replace("#pragma once\n", "")
    return compile_kernel(source.replace('#include "tiling.h"', TILING), "test_00_topk")


def chosen(
    scores: Array, k: int, width: int, launch: Launch, chunk: int, max_width: int
) -> tuple[Array, Array]:
    lists, units = scores.shape
    indices = np.full((lists, width), 77, np.int32)
    counts = np.full(lists, 77, np.int32)
    arguments: list[Argument] = [
        Buffer("scores", scores, read_only=True),
        Buffer("indices", indices),
        Buffer("counts", counts),
        struct.pack("=4i", lists, units, k, width),
    ]
    statistics = kernel(chunk, max_width).run(arguments, launch)
    assert not statistics.warnings
    return indices, counts


def model(scores: Array, k: int, width: int) -> tuple[Array, Array]:
    indices = np.full((len(scores), width), -1, np.int32)
    counts = np.zeros(len(scores), np.int32)
    for row, values in enumerate(scores):
        keep = min(width, max(k, int(np.sum(values == np.inf))))
        ranked = np.argsort(-values, kind="stable")
        kept = np.sort([unit for unit in ranked if values[unit] > -np.inf][:keep])
        indices[row, : len(kept)] = kept
        counts[row] = len(kept)
    return indices, counts


def drawn(lists: int, units: int, seed: int = 0) -> Array:
    """Scores with many ties; a fifth is excluded, some are forced, and so are two whole rows."""
    rng = np.random.default_rng([lists, units, seed])
    scores = rng.integers(-40, 40, (lists, units)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    scores[rng.random(scores.shape) < 0.02] = np.inf
    if lists > 2:
        scores[0] = -np.inf
        scores[1] = np.inf
    return scores


def check(
    scores: Array,
    k: int,
    width: int,
    launch: Launch | None = None,
    *,
    chunk: int = 2048,
    max_width: int = 2048,
) -> None:
    got = chosen(scores, k, width, launch or Launch(), chunk, max_width)
    want = model(scores, k, width)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize(
    ("lists", "units", "k", "width"),
    [
        (5, 40, 0, 0),
        (1, 1, 1, 1),
        (5, 48, 4, 6),
        (70, 64, 8, 8),
        (3, 65, 0, 5),
        (33, 100, 16, 64),
        (9, 129, 3, 65),
        (4, 300, 65, 80),
        (40, 512, 16, 32),
        (3, 2047, 10, 16),
        (3, 2048, 2048, 2048),
        (3, 50, 2000, 2048),
        (4, 7, 3, 2),
    ],
)
def test_rows_of_one_chunk(lists: int, units: int, k: int, width: int) -> None:
    check(drawn(lists, units), k, width)


@pytest.mark.parametrize(
    ("lists", "units", "k", "width"),
    [
        (3, 2049, 10, 16),
        (3, 2050, 2000, 2048),
        (4, 5000, 100, 300),
        (3, 4096, 64, 64),
        (3, 20003, 2048, 2048),
        (1, 131072, 64, 100),
    ],
)
def test_rows_of_several_chunks(lists: int, units: int, k: int, width: int) -> None:
    check(drawn(lists, units), k, width)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("blocks", [2, 7, 48])
@pytest.mark.parametrize(("lists", "units"), [(33, 100), (5, 3000), (200, 20)])
def test_cores_share_the_rows(lists: int, units: int, blocks: int, descending: bool) -> None:
    check(drawn(lists, units), 7, 9, Launch(blocks=blocks, descending=descending))


@pytest.mark.parametrize("units", [1, 50, 200, 1500])
def test_a_small_kernel_gives_the_same(units: int) -> None:
    for k, width in ((1, 1), (20, 33), (60, 64)):
        check(drawn(12, units), k, width, Launch(blocks=3), chunk=256, max_width=64)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = int(2 ** rng.uniform(0, 13))
    width = int(2 ** rng.uniform(0, 9))
    k = int(rng.integers(0, width + 3))
    blocks = int(rng.integers(1, 6))
    check(drawn(int(rng.integers(1, 60)), units, seed), k, width, Launch(blocks=blocks))


@pytest.mark.parametrize("units", [40, 3000])
def test_equal_scores_keep_the_lower_units(units: int) -> None:
    scores = np.zeros((3, units), np.float32)
    scores[1, ::2] = -0.0
    scores[2, -3:] = 1.0
    check(scores, 5, 8)


@pytest.mark.parametrize("units", [200, 5000])
def test_forced_units_may_exceed_k_but_not_the_width(units: int) -> None:
    scores = drawn(6, units)
    for row, forced in enumerate((0, 3, 5, 8, 9, 150)):
        scores[row, np.isposinf(scores[row])] = 1.0
        scores[row, 1 : forced + 1] = np.inf
    check(scores, 5, 8)


@pytest.mark.parametrize("units", [40, 3000])
def test_extreme_and_tiny_scores_are_ordered(units: int) -> None:
    scores = drawn(4, units)
    limits = np.finfo(np.float32)
    scores[:, :5] = [limits.max, limits.min, limits.tiny, -limits.tiny, limits.smallest_subnormal]
    check(scores, units // 2, 64)


def test_there_may_be_no_list_and_no_unit() -> None:
    check(drawn(0, 9), 3, 4, Launch(blocks=2))
    check(drawn(5, 0), 3, 4, Launch(blocks=2))


def test_the_context_holds_what_the_template_names() -> None:
    text = (TEMPLATES / TEMPLATE).read_text()
    names = jinja2.meta.find_undeclared_variables(environment().parse(text))
    assert names == {field.name for field in fields(TopKContext)}


@pytest.mark.parametrize(("chunk", "max_width"), [(256, 64), (1024, 256), (2048, 2048)])
def test_the_plan_of_the_unified_buffer_is_what_the_kernel_takes(
    chunk: int, max_width: int
) -> None:
    made = context(chunk, max_width)
    text = render(TEMPLATE, made)
    constants = {
        "kChunk": chunk,
        "kMaxSlots": max_width,
        "kMaxRows": made.max_rows,
        "kMaxParts": made.max_parts,
    }
    sizes = {"float": 4, "int32_t": 4, "uint8_t": 1}
    taken = 0
    for line in text.splitlines():
        for element, count in re.findall(r"Alloc<(\w+), ([^>]+)>", line):
            copies = 2 if "[side]" in line else 1
            taken += copies * sizes[element] * int(eval(count.replace("/", "//"), {}, constants))
    assert taken == made.ub_bytes


@pytest.mark.parametrize("units", [2049, 2057, 4097, 2111])
def test_the_last_unit_counts_wherever_its_chunk_ends(units: int) -> None:
    scores = drawn(3, units)
    scores[:, -1] = 1e6
    check(scores, 10, 16)


def test_what_an_earlier_chunk_left_behind_is_not_chosen() -> None:
    for units in (4136, 4137, 4143):  # the third chunk is loaded where the first one was
        scores = drawn(4, units)
        scores[:, units % 2048 : 64] = 1e6
        check(scores, 40, 64)
