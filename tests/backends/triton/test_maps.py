"""The kernels of maps of scores against the plan's interpreter, launch by launch; and compiled for
a card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp import compiler
from spcomp.backends import registry
from spcomp.backends.base import Specialisation
from spcomp.backends.triton.contexts.maps import (
    BlockScoresContext,
    BlockSumsContext,
    PartsContext,
    RowLseContext,
)
from spcomp.backends.triton.offline import build_offline
from spcomp.dsl import Pattern
from spcomp.patterns import xattention
from tests.backends.triton.firing import Fired, fired
from tests.backends.triton.rendering import field_names, variables_of
from tests.ir.programs import foreign_sum, highest, overlapping, shares

KERNELS = frozenset({"part_lse", "row_lse", "block_sums", "block_scores"})
SMALL = {
    "part_lse": {"block_r": 16, "block_u": 32, "part": 16, "tiles": 2},
    "row_lse": {"block_r": 4, "block_n": 16},
    "block_sums": {"block_r": 4, "block_n": 16},
    "block_scores": {"block_r": 16, "block_n": 16},
}
CONTEXTS = {
    "part_lse": PartsContext,
    "row_lse": RowLseContext,
    "block_sums": BlockSumsContext,
    "block_scores": BlockScoresContext,
}


@sp.pattern
def folded(q, k, v, *, size=4, reverse=False, mask="causal"):
    """Plain logits of folded tokens, not by probabilities."""
    tiles = sp.score(sp.fold(q, size=size, reverse=reverse), sp.fold(k, size=size), mask=mask)
    best = sp.topk(sp.regroup(tiles, block=16, rows=16), k=2)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best), mask=mask)


X4, X8, X16 = (xattention(block=16, stride=n) for n in (4, 8, 16))
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# pattern, (B, Hq, Hkv, Sq, Skv, D), dtype, rows of a slab
CASES: dict[str, tuple[Pattern, tuple[int, ...], torch.dtype, int | None]] = {
    "xattention": (X4, (2, 4, 2, 70, 70, 16), BF16, None),
    "xattention-slabs": (
        X8,
        (1, 3, 1, 129, 257, 20),
        F16,
        48,
    ),
    "xattention-odd": (xattention(block=24, stride=4), (3, 2, 2, 61, 40, 80), F32, None),
    "xattention-decode": (
        X4,
        (2, 4, 1, 1, 200, 16),
        BF16,
        None,
    ),
    "xattention-few": (X16, (1, 2, 1, 7, 130, 16), F16, None),
    "sum": (overlapping(), (2, 4, 2, 40, 60, 16), BF16, 16),
    "mean": (overlapping(reduce="mean", rows=4), (1, 8, 2, 33, 33, 16), F32, None),
    "max-heads": (overlapping(reduce="max"), (1, 4, 1, 20, 50, 16), F16, None),
    "max-units": (overlapping(by="max", rows=8), (1, 4, 2, 37, 50, 24), F32, None),
    "per-head": (overlapping(heads=None, block=4), (1, 3, 3, 18, 40, 16), BF16, None),
    "no-units": (overlapping(), (1, 2, 1, 20, 5, 16), F32, None),
    "foreign": (foreign_sum(), (1, 4, 2, 30, 90, 16), BF16, None),
    "foreign-decode": (foreign_sum(), (2, 4, 2, 2, 150, 16), F32, None),
    "highest": (highest(), (1, 4, 2, 50, 70, 16), F32, 32),
    "pooled": (shares(), (2, 3, 1, 60, 100, 16), BF16, None),
    "folded": (folded(), (1, 2, 1, 40, 60, 16), F32, None),
    "folded-all": (folded(reverse=True, mask=None), (1, 2, 2, 40, 30, 16), F16, None),
}


def tensors_of(
    shape: tuple[int, ...], dtype: torch.dtype, sharp: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v; heads and tokens are swapped in memory, as a model has them."""
    b, hq, hkv, sq, skv, d = shape
    q, k, v = (torch.randn(b, s, h, d).to(dtype) for s, h in ((sq, hq), (skv, hkv), (skv, hkv)))
    return (sharp * q).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def agree(run: Fired) -> None:
    """Allow twice the error that plain torch in the same dtype has against float64."""
    for name in run.launch.writes():
        got, plain, exact = (x[name].double() for x in (run.got, run.plain, run.exact))
        assert torch.equal(got.isnan(), exact.isnan()), (run.launch.kernel, name)
        for mark in (torch.inf, -torch.inf):
            assert torch.equal(got == mark, exact == mark), (run.launch.kernel, name, mark)
        seen = exact.isfinite()
        if seen.any():
            budget = 2 * (plain - exact)[seen].abs().max() + 2e-6 * exact[seen].abs().max()
            assert (got - exact)[seen].abs().max() <= budget, (run.launch.kernel, name)


def phase_of(shape: tuple[int, ...]) -> str:
    return "decode" if shape[3] <= 16 else "prefill"


@pytest.mark.parametrize("name", CASES)
def test_a_launch_writes_what_the_plan_says(name: str) -> None:
    pattern, shape, dtype, rows = CASES[name]
    runs = fired(
        pattern, tensors_of(shape, dtype), phase_of(shape), KERNELS, axes=SMALL, slab_rows=rows
    )
    seen = [run.launch.kernel for run in runs if agree(run) is None]
    assert len(seen) >= 1 + (name not in ("highest", "folded", "folded-all"))


def test_nan_and_infinite_sums_are_told() -> None:
    """A NaN makes NaN of the rows that see it alone; a row of equal logits is no special case."""
    q, k, v = tensors_of((1, 2, 1, 48, 48, 16), torch.float32)
    q[0, 1, 20] = torch.nan
    k = k * 0
    for pattern in (xattention(block=16, stride=4), overlapping()):
        for run in fired(pattern, (q, k, v), "prefill", KERNELS, axes=SMALL):
            agree(run)


def test_a_launch_gives_the_same_bits_again() -> None:
    tensors = tensors_of((1, 4, 2, 70, 70, 16), torch.bfloat16)
    for pattern in (xattention(block=16, stride=4), overlapping()):
        first, second = (
            list(fired(pattern, tensors, "prefill", KERNELS, axes=SMALL)) for _ in range(2)
        )
        for a, b in zip(first, second, strict=True):
            for name in a.launch.writes():
                assert torch.equal(a.got[name], b.got[name])


@pytest.mark.parametrize("kernel", CONTEXTS)
def test_a_context_holds_exactly_the_variables_of_its_template(kernel: str) -> None:
    assert variables_of(f"triton/kernels/{kernel}.py.jinja") == field_names(CONTEXTS[kernel])


@pytest.mark.parametrize(
    ("pattern", "dim"),
    [
        (xattention(stride=16), 128),
        (xattention(stride=8), 64),
        (overlapping(block=8), 128),
    ],
    ids=["stride16-d128", "stride8-d64", "overlapping-d128"],
)
def test_the_default_schedule_compiles_for_sm_90_without_spills(
    pattern: Pattern, dim: int, tmp_path: Path
) -> None:
    backend, chip = registry.backend("triton"), registry.target("sm90")
    spec = Specialisation("bfloat16", dim, dim)
    plan = compiler.lower(pattern, backend=backend, target=chip, spec=spec)
    built = build_offline(compiler.emit(plan, backend, chip, spec))
    found = [b for b in built if b.kernel in (*KERNELS, "topp")]
    assert len(found) >= 3
    assert all(b.spill_bytes == 0 for b in found), [(b.kernel, b.spill_bytes) for b in found]
