"""The select and score kernels where the scores of a head are changed before heads are joined."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from spcomp.backends.triton.contexts.select import score_context, select_context
from tests.backends.triton.rendering import compile_kernel, write_rendered
from tests.backends.triton.test_select import (
    CAUSAL,
    OWN,
    SCORE,
    SELECT,
    TYPES,
    Case,
    _check,
    _marked,
    _score,
)

INDEXER: dict[str, Any] = {
    "n_lists": 1,
    "reduction": "sum",
    "is_relu": True,
    "has_weights": True,
    "granule": 1,
    "n_rows": 40,
    "sq": 40,
    "spread": 1,
}
CASES = {
    "an indexer": Case(batch=2, hq=6, hkv=1, dim=24, n_units=11, **INDEXER),
    "an indexer over several tiles": Case(
        hq=20, hkv=1, n_units=37, dtype=torch.bfloat16, **{**INDEXER, "n_rows": 90, "sq": 90}
    ),
    "ReLU, mean of a group": Case(hq=6, hkv=2, n_lists=2, reduction="mean", is_relu=True),
    "ReLU of bounds, largest": Case(
        is_bound=True, hq=4, hkv=2, n_lists=2, reduction="max", is_relu=True
    ),
    "weights, largest of all heads": Case(
        hq=4, hkv=2, n_lists=1, reduction="max", has_weights=True
    ),
    "weights, one list per head": Case(hq=6, hkv=2, n_lists=6, has_weights=True, is_relu=True),
    "weights of a slab of rows": Case(
        hq=3, hkv=1, n_lists=1, reduction="sum", has_weights=True, row_begin=4, slab=5
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_best_units_by_weighed_heads_are_chosen(tmp_path: Path, case: Case) -> None:
    _check(tmp_path, case)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_score_writes_what_select_compares(tmp_path: Path, case: Case) -> None:
    tensors = case.tensors()
    out = _score(tmp_path, case, tensors)
    torch.testing.assert_close(out, _marked(case, tensors).float(), rtol=1e-6, atol=0)


def test_a_relu_leaves_what_is_no_number(tmp_path: Path) -> None:
    case = CASES["an indexer"]
    q, k, low = case.tensors()
    q[0, 1, 30, 3] = math.nan
    out = _score(tmp_path, case, (q, k, low))
    marked = _marked(case, (q, k, low))
    assert marked.isnan().any()
    torch.testing.assert_close(out, marked.float(), rtol=1e-6, atol=0, equal_nan=True)


SHARED: dict[str, Any] = {
    "header": ("test",), "head_dim": 128, "granule": 1, "reduction": "sum", "visible": CAUSAL,
    "forced": OWN, "is_relu": True, "has_weights": True,
}  # fmt: skip


def test_the_kernels_of_an_indexer_compile_for_sm_90_without_spills(tmp_path: Path) -> None:
    path = write_rendered(SELECT, select_context(block_r=64, block_u=64, **SHARED), tmp_path)
    assert compile_kernel(path, "select_kernel", types=TYPES, num_warps=8).spill_bytes == 0
    path = write_rendered(SCORE, score_context(block_u=64, **SHARED), tmp_path)
    assert compile_kernel(path, "score_kernel", types=TYPES, num_warps=4).spill_bytes == 0
