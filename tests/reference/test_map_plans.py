"""Plans of maps of probabilities: they mean what their patterns mean, and what is not lowered is
refused with its figures."""

from __future__ import annotations

import pytest
import torch

import spcomp as sp
from spcomp.backends.reference.plan import run_plan
from spcomp.dsl import Pattern
from spcomp.errors import CannotLower, ShapeMismatch
from spcomp.ir import dims
from spcomp.ir.passes.place_buffers import scratch_bytes, slab_rows
from spcomp.ir.plan import SCRATCH_LIMIT_BYTES, Phase
from spcomp.patterns import xattention
from tests.ir.programs import foreign_sum, highest, overlapping, shares
from tests.reference.lower import plan_of, plans_of
from tests.reference.make import Shape, inputs, qkv, run

PATTERNS: dict[str, Pattern] = {
    "xattention": xattention(block=16, stride=4, threshold=0.7),
    "by head": xattention(block=16, stride=8, threshold=torch.tensor([0.0, 0.5, 0.9, 1.0])),
    "overlapping": overlapping(),
    "mean": overlapping(block=4, reduce="mean", rows=4),
    "highest head": overlapping(block=4, reduce="max"),
    "highest unit": overlapping(heads=None, by="max", rows=16),
    "foreign": foreign_sum(),
    "highest": highest(),
    "shares": shares(),
}
SHAPES = (
    Shape(2, 4, 2, 130, 130, 8, 6),
    Shape(2, 4, 2, 1, 130, 8, 6),
    Shape(1, 4, 2, 70, 33, 8, 6),
    Shape(1, 4, 1, 37, 130, 17, 17),
    Shape(1, 4, 4, 20, 5, 8, 8),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_every_plan_means_what_its_pattern_means(name: str, shape: Shape) -> None:
    q, k, v = qkv(shape)
    want, want_lse = run(PATTERNS[name], q, k, v)
    canonical, plans = plans_of(PATTERNS[name])
    assert {p.phase for p in plans} == {"prefill", "decode"}
    for plan in plans:
        for rows in (None, 50):
            out, lse = run_plan(plan, inputs(canonical, q, k, v), slab_rows=rows)
            torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
            torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)


KERNELS = {
    "xattention": ["part_lse", "row_lse", "block_sums", "topp"],
    "overlapping": ["pool", "part_lse", "row_lse", "block_scores", "topk"],
    "foreign": ["pool", "pool", "part_lse", "row_lse", "block_scores", "topk"],
    "highest": ["pool", "block_scores", "topk"],
}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_map_is_multiplied_once_where_sums_allow(name: str, phase: Phase) -> None:
    found = [launch.kernel for launch in plan_of(PATTERNS[name], phase).launches()]
    assert found[: len(KERNELS[name])] == KERNELS[name]


@pytest.mark.parametrize("length", [131072, 1 << 20])
def test_slabs_hold_the_scratch_of_a_long_map(length: int) -> None:
    plan = plan_of(xattention())
    env = {"B": 1, "Hq": 32, "Hkv": 8, "Sq": length, "Skv": length, "D": 128, "Dv": 128}
    rows = slab_rows(plan, env, 2)
    assert 0 < rows < length
    taken = dims.evaluate(scratch_bytes(plan), {**env, "R": rows, "R0": 0, "E": 2})
    assert taken <= SCRATCH_LIMIT_BYTES


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_table_of_shares_needs_one_for_each_head_of_the_list(backend: str) -> None:
    q, k, v = (torch.randn(1, heads, 40, 16) for heads in (2, 2, 2))
    pattern = xattention(block=16, stride=4, threshold=torch.ones(3))
    attention = sp.compile(pattern, backend=backend)
    with pytest.raises(ShapeMismatch) as caught:
        attention(q, k, v)
    assert "with 3 numbers" in str(caught.value)


def test_what_no_kernel_makes_is_refused_by_name() -> None:
    @sp.pattern
    def averaged(q, k, v):
        pooled = sp.score(q, sp.downsample(k, block=16), heads="group")
        best = sp.topk(sp.softmax(pooled), k=2)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    q, k, v = (torch.randn(1, heads, 40, 16) for heads in (4, 2, 2))
    with pytest.raises(CannotLower, match="probabilities of scores with heads='group'"):
        sp.compile(averaged(), backend="triton")(q, k, v)
    with pytest.raises(CannotLower, match="this backend has no kernel topp"):
        emulated = sp.compile(xattention(block=16, stride=4), backend="ascendc")
        emulated(q.half(), k.half(), v.half())
