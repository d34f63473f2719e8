"""Tensors a call brings beside q, k and v: gates that join results, and sides of a score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import spcomp as sp
from tests import oracle
from tests.api.input_cases import (
    BACKENDS,
    assert_gated,
    chosen_blocks,
    gated,
    gated_by_rules,
    indexed,
    indexed_each,
    joined,
    outer,
    part_masks,
    qkv,
    text_of,
)
from tests.conformance.cases import device_of

# ---- merges by gates -----------------------------------------------------------------------------

CASES = {
    "prefill": (2, 4, 2, 40, 53, 16, torch.float32),
    "awkward": (1, 3, 1, 129, 257, 80, torch.bfloat16),
    "empty rows": (3, 2, 2, 30, 11, 16, torch.float16),
    "one row": (2, 4, 2, 1, 77, 32, torch.bfloat16),
    "few rows": (1, 6, 2, 5, 40, 17, torch.float32),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_add_the_parts(backend: str, case: str) -> None:
    *shape, dtype = CASES[case]
    if backend == "triton" and device_of(backend) == "cpu":  # an interpreter is slow
        shape[0], shape[3], shape[4] = 1, min(shape[3], 20), min(shape[4], 37)
    q, k, v = qkv(*shape, dtype)
    gates = torch.randn(*q.shape[:3], 3).to(dtype) * 2
    attention = sp.compile(gated(), backend=backend)
    tensors = [x.to(device_of(backend)) for x in (q, k, v)]
    got = attention(*tensors, gates=gates.to(tensors[0].device), return_lse=True)
    assert_gated(got, q, k, v, gates)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_part_adds_nothing_whatever_its_gate(backend: str) -> None:
    q, k, v = (x.to(device_of(backend)) for x in qkv(1, 2, 1, 20, 12, 16))
    gates = torch.ones(1, 2, 20, 3, device=q.device)
    gates[:, :, :8] = torch.nan  # rows before the first key: every part is empty
    gates[:, :, 8:20, 2] = torch.inf  # the only block is complete for the last row alone
    gates[:, :, 19, 2] = 0.5
    out, lse = sp.compile(gated(), backend=backend)(q, k, v, gates=gates, return_lse=True)
    assert not out[:, :, :8].any() and bool((lse[:, :, :8] == -torch.inf).all())
    assert bool(out.isfinite().all()) and bool(lse[:, :, 8:].isfinite().all())
    assert bool(out[:, :, 8:].any(-1).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_of_any_strides_give_the_same_bits(backend: str) -> None:
    q, k, v = (x.to(device_of(backend)) for x in qkv(2, 2, 1, 3, 20, 16))
    attention = sp.compile(gated_by_rules(), backend=backend)
    wide = torch.randn(2, 3, 2, 7, device=q.device)
    for gates in (
        wide.transpose(1, 2)[..., 2:5],
        wide[:, :, :1, :3].transpose(1, 2).expand(-1, 2, -1, -1),
        wide[0, 0, 0, :3].expand(2, 2, 3, 3),
    ):
        got = attention(q, k, v, gates=gates)
        assert torch.equal(got, attention(q, k, v, gates=gates.contiguous()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_patterns_with_tensors_compose(backend: str) -> None:
    dtype = torch.bfloat16
    q, k, v = qkv(1, 4, 2, 3, 33, 16, dtype)
    g, mix = torch.randn(1, 4, 3, 3).to(dtype), torch.randn(1, 4, 3, 2)
    given = {"g": g, "mix": mix}
    attention = sp.compile(outer(), backend=backend)
    device = device_of(backend)
    moved = {n: t.to(device) for n, t in given.items()}
    out, lse = (
        x.cpu() for x in attention(*(x.to(device) for x in (q, k, v)), **moved, return_lse=True)
    )

    def whole(attend: Any, to: torch.dtype) -> tuple[Tensor, Tensor]:
        x = [t.to(to) for t in (q, k, v)]
        inner = joined([attend(*x, m) for m in part_masks(q, k)], g.to(to))
        first = attend(*x, oracle.window_mask(3, 33, 3))
        return joined([first, inner], mix.to(to))

    want, plain = whole(oracle.attention, torch.float64), whole(oracle.plain_attention, dtype)
    assert oracle.error(out, want[0]) <= 2 * oracle.error(plain[0], want[0]) + 1e-4
    assert oracle.error(lse, want[1]) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_may_be_a_tensor_the_pattern_keeps(backend: str) -> None:
    q, k, v = qkv(1, 2, 1, 20, 20, 16)
    device = device_of(backend)
    held = torch.rand(1, 2, 20, 2)
    kept = held.to(device)

    @sp.pattern
    def fixed(q, k, v):
        parts = (sp.window(4), sp.sink(3))
        return sp.merge(
            *[sp.attend(q, sp.gather(k, s), sp.gather(v, s)) for s in parts], gates=kept
        )

    attention = sp.compile(fixed(), backend=backend)
    out = attention(*(x.to(device) for x in (q, k, v))).cpu()
    masks = oracle.window_mask(20, 20, 4), oracle.causal_mask(20, 20) & (torch.arange(20) < 3)
    want, _ = joined([oracle.attention(q, k, v, m) for m in masks], held.double())
    assert oracle.error(out, want) <= 1e-5
    assert text_of(lambda: attention(*(x.to(device) for x in qkv(1, 2, 1, 19, 20, 16)))) == (
        "ShapeMismatch: the gates of shape [1, 2, 20, 2] and 2 parts and q do not agree: "
        "[B, Hq, Sq, parts] is [1, 2, 19, 2].\n"
        "  help: declare them as a tensor of the call where they change with it."
    )


@pytest.mark.parametrize("phase_rows", [40, 3])
@pytest.mark.parametrize("order", [None, "query_major", "gather"])
def test_the_plan_of_a_gated_merge_means_what_the_pattern_means(
    order: Any, phase_rows: int
) -> None:
    pattern = gated_by_rules() if order == "query_major" else gated()
    q, k, v = (x.double() for x in qkv(2, 4, 2, phase_rows, 50, 8))
    gates = {"gates": torch.randn(2, 4, phase_rows, 3).double()}
    axes = {"attend": {"block_q": 64}}
    plan = sp.compile(pattern, backend="reference", order=order, axes=axes)
    assert plan.built(q, k, v, **gates).plan is not None
    want = sp.compile(pattern, backend="reference")(q, k, v, **gates, return_lse=True)
    got = plan(q, k, v, **gates, return_lse=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ---- sides of a score ----------------------------------------------------------------------------


INDEXERS = {
    "tokens": indexed(block=1),
    "blocks": indexed(),
    "rows": indexed(rows=8),
    "heads": indexed_each(),
}


@pytest.mark.parametrize("sq", [19, 1])
@pytest.mark.parametrize("name", INDEXERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_indexer_chooses_by_its_own_heads_and_width(backend: str, name: str, sq: int) -> None:
    pattern, hj = INDEXERS[name], 6 if name == "heads" else 1
    values = dict(pattern.program.parameters)
    block, rows = int(values["block"]), int(values["rows"])
    q, k, v = qkv(2, 4, 2, sq, 50, 16)
    iq, ik = torch.randn(2, 6, sq, 24), torch.randn(2, hj, 50, 24)
    device = device_of(backend)
    attention = sp.compile(pattern, backend=backend)
    given = {"iq": iq.to(device), "ik": ik.to(device)}
    out, lse = (
        x.cpu() for x in attention(*(x.to(device) for x in (q, k, v)), **given, return_lse=True)
    )
    units = oracle.pooled(ik.double(), block, oracle.mean) if block > 1 else ik.double()
    queries = oracle.pooled(iq.double(), rows, oracle.mean) if rows > 1 else iq.double()
    scores = (queries @ units.transpose(-1, -2)).sum(1, keepdim=True)
    if rows == 1:
        mask = chosen_blocks(scores, sq, 50, block, 2)
    else:
        t = oracle.positions(sq, 50)[:, 0]
        latest = t[torch.minimum(torch.arange(0, sq, rows) + rows - 1, torch.tensor(sq - 1))]
        last = ((torch.arange(units.shape[2]) + 1) * block - 1).clamp(max=49)
        able = last[None, :] <= latest[:, None]
        ranked = scores.masked_fill(~able, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ranked[..., :2], True) & able
        by_row = kept.repeat_interleave(block, -1)[..., :50].repeat_interleave(rows, 2)[:, :, :sq]
        mask = by_row & oracle.causal_mask(sq, 50)
    want, want_lse = oracle.attention(q, k, v, mask.expand(2, 4, sq, 50))
    budget, budget_lse = oracle.budgets(q, k, v, mask.expand(2, 4, sq, 50))
    assert oracle.error(out, want) <= budget
    assert oracle.error(lse, want_lse) <= max(budget_lse, 1e-5)
    assert torch.equal(
        sp.compile(pattern, backend="reference").to_mask(q, k, iq=iq, ik=ik),
        mask.expand(2, 4, sq, 50),
    )


def test_a_width_is_a_constant_of_the_kernels_and_a_head_count_is_not() -> None:
    device = device_of("triton")
    attention = sp.compile(indexed(), backend="triton")

    def built(hi: int, di: int, sq: int = 1) -> Any:
        q, k, v = (x.to(device) for x in qkv(1, 2, 1, sq, 40, 16))
        own = {"iq": torch.randn(1, hi, sq, di), "ik": torch.randn(1, 1, 40, di)}
        moved = {n: t.to(device) for n, t in own.items()}
        attention(q, k, v, **moved)
        return attention.built(q, k, v, **moved)

    first = built(4, 24)
    assert built(8, 24) is first and built(4, 24, sq=2) is first
    other = built(4, 32)
    assert other is not first
    assert dict(first.spec.widths) == {"Di": 24} and dict(other.spec.widths) == {"Di": 32}
    texts = [f.text for f in first.source.files if f.kernel == "score"]
    assert "HEAD_DIM = tl.constexpr(24)" in texts[0]
