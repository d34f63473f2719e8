"""The topk kernel against a sort in Python, in Triton's interpreter; and compiled for a card."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spcomp.backends.triton.contexts.select import TopKContext
from tests.backends.triton.choice import choose
from tests.backends.triton.rendering import (
    compile_kernel,
    field_names,
    import_rendered,
    variables_of,
    write_rendered,
)

TEMPLATE = "triton/kernels/topk.py.jinja"
# Rows here are short (with 512, tiles of short rows hold 64), or one large tile, or several.
SHORT_ROW, ONE_TILE, MANY_TILES = 512, 64, 16


def _run(folder: Path, scores: Tensor, k: int, width: int, block_u: int) -> tuple[Tensor, Tensor]:
    kernel = import_rendered(TEMPLATE, TopKContext(("test",), block_u), folder).topk_kernel
    batch, lists, rows, units = scores.shape
    guarded = torch.full((batch, lists, rows, width + 3), 77, dtype=torch.int32)
    idx, cnt = guarded[..., :width], torch.full((batch, lists, rows), 77, dtype=torch.int32)
    strides = (*scores.stride()[:3], *idx.stride()[:3], *cnt.stride()[:2])
    kernel[(batch * lists * rows,)](scores, idx, cnt, *strides, lists, rows, units, k, width)
    assert (guarded[..., width:] == 77).all(), "wrote past the width"
    return idx, cnt


def _check(folder: Path, scores: Tensor, k: int, width: int, block_u: int) -> None:
    idx, cnt = _run(folder, scores, k, width, block_u)
    want_idx, want_cnt = choose(scores, k, width)
    assert torch.equal(cnt, want_cnt)
    assert torch.equal(idx, want_idx)


@pytest.mark.parametrize("block_u", [SHORT_ROW, ONE_TILE, MANY_TILES])
@pytest.mark.parametrize("k", [0, 1, 5, 17, 59, 60])
def test_the_k_largest_scores_are_chosen(tmp_path: Path, k: int, block_u: int) -> None:
    scores = torch.randn(2, 1, 2, 59) * 10 ** torch.randint(-30, 30, (2, 1, 2, 1)).float()
    _check(tmp_path, scores, k, max(k, 1), block_u)


@pytest.mark.parametrize("block_u", [SHORT_ROW, ONE_TILE, MANY_TILES])
@pytest.mark.parametrize("k", [1, 7, 20, 40])
def test_ties_go_to_the_lower_index(tmp_path: Path, k: int, block_u: int) -> None:
    scores = torch.randint(-2, 3, (1, 1, 4, 50)).float()
    scores[0, 0, 0] = 1.0
    scores[0, 0, 1] = torch.tensor([0.0, -0.0]).repeat(25)
    scores[0, 0, 2] = torch.tensor([-0.0, 0.0]).repeat(25)
    _check(tmp_path, scores, k, k, block_u)


@pytest.mark.parametrize("block_u", [SHORT_ROW, ONE_TILE, MANY_TILES])
@pytest.mark.parametrize("k", [0, 3, 10, 30])
def test_excluded_forced_and_nan_scores_are_honoured(tmp_path: Path, k: int, block_u: int) -> None:
    scores = torch.randn(1, 1, 6, 41)
    kind = torch.randint(0, 5, scores.shape)
    for value, mark in ((1, -math.inf), (2, math.inf), (3, math.nan)):
        scores[kind == value] = mark
    scores[0, 0, 0] = -math.inf
    scores[0, 0, 1] = math.nan
    scores[0, 0, 2] = math.inf
    scores[0, 0, 3, :-1] = -math.inf
    scores[0, 0, 4, ::2] = -math.inf
    scores[0, 0, 4, 1::2] = math.nan
    _check(tmp_path, scores, k, 41, block_u)


@pytest.mark.parametrize("block_u", [SHORT_ROW, ONE_TILE, MANY_TILES])
def test_a_row_narrower_than_k_or_than_the_forced_set_is_not_overrun(
    tmp_path: Path, block_u: int
) -> None:
    scores = torch.randn(1, 1, 3, 37)
    scores[0, 0, 1, 5:25] = math.inf
    _check(tmp_path, scores, 12, 7, block_u)


def test_extreme_finite_scores_keep_their_order(tmp_path: Path) -> None:
    largest, tiny = torch.finfo(torch.float32).max, 1e-45
    values = [largest, -largest, tiny, -tiny, 0.0, 1.0, -1.0, math.nan, -math.inf, math.inf]
    scores = torch.tensor(values).view(1, 1, 1, -1).repeat(1, 1, 9, 1)
    for k in range(1, 10):
        _check(tmp_path, scores[:, :, :1], k, k, ONE_TILE)


def test_any_strides_are_read(tmp_path: Path) -> None:
    scores = torch.randn(2, 2, 2, 40).permute(1, 2, 0, 3)[..., 3:33]
    _check(tmp_path, scores, 6, 9, MANY_TILES)


def test_the_context_holds_exactly_the_variables_of_the_template() -> None:
    assert variables_of(TEMPLATE) == field_names(TopKContext)


def test_the_default_schedule_compiles_for_sm_90_without_spills(tmp_path: Path) -> None:
    path = write_rendered(TEMPLATE, TopKContext(("test",), 8192), tmp_path)
    types = {"scores_ptr": "*fp32", "idx_ptr": "*i32", "cnt_ptr": "*i32"}
    built = compile_kernel(path, "topk_kernel", types=types, num_warps=8)
    assert built.spill_bytes == 0
