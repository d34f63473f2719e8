"""Every backend means what the oracle means; a backend joins by being listed in the registry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.api import Attention
from spcomp.backends import registry
from spcomp.errors import CannotLower, NeedsGradient
from spcomp.patterns import block_topk, moba, streaming_llm
from tests import oracle
from tests.conformance.cases import (
    COMPRESSED,
    PATTERNS,
    POOLED,
    Case,
    adapted,
    assert_same_selection,
    assert_within,
    cases_of,
    device_of,
    read_keys,
    refuses,
    rule_of,
    why_not,
)

BACKENDS = registry.names()
SMALL = {"streaming_llm": streaming_llm(sinks=2, recent=9), "moba": moba(block=16, k_blocks=2)}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Name each backend that can run on this machine."""
    name = str(request.param)
    reason = why_not(name)
    if reason is not None:
        pytest.skip(f"the {name} backend cannot run here: {reason}")
    return name


def _all() -> list[object]:
    return [
        pytest.param(backend, name, case, id=f"{backend}-{name}-{case}")
        for backend in BACKENDS
        for name in PATTERNS
        for case in cases_of(backend, name)
    ]


def _compiled(backend: str, pattern: sp.Pattern, **options: object) -> Attention:
    if device_of(backend) == "cuda":
        moved = {n: t.cuda() for n, t in pattern.tensors.items()}
        pattern = sp.Pattern(pattern.program, moved)
    return sp.compile(pattern, backend=backend, **options)  # type: ignore[arg-type]


def _run(attention: Attention, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = attention(*tensors, return_lse=True)
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize(("name_of_backend", "name", "case"), _all())
def test_a_backend_reads_the_keys_and_gives_the_values_of_the_pattern(
    name_of_backend: str, name: str, case: Case
) -> None:
    reason = why_not(name_of_backend)
    if reason is not None:
        pytest.skip(f"the {name_of_backend} backend cannot run here: {reason}")
    pattern = PATTERNS[name](case)
    q, k, v = case.tensors(device_of(name_of_backend))
    attention = _compiled(name_of_backend, pattern)
    if refuses(name_of_backend, name, lambda: attention(q, k, v)):
        return
    out, lse = _run(attention, q, k, v)
    q, k, v = (x.cpu() for x in (q, k, v))
    want = sp.compile(pattern, backend="reference").to_mask(q, k)
    got = read_keys(out, case.skv)
    assert_same_selection(pattern, q, k, got, want)
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    assert_within(out, lse, q, k, v, got, **rule_of(name, case))


@pytest.mark.parametrize("order", ["query_major", "key_major", "gather"])
def test_a_loop_order_changes_nothing_but_rounding(backend: str, order: str) -> None:
    case = adapted(backend, Case(1, 2, 1, 40, 66, 16))
    patterns = {
        "query_major": block_topk(block=16, budget=3),
        "key_major": moba(block=32, k_blocks=2),
        "gather": moba(block=16, k_blocks=2),
    }
    q, k, v = case.tensors(device_of(backend))
    attention = _compiled(backend, patterns[order], order=order)
    if refuses(backend, order, lambda: attention(q, k, v)):
        return
    assert attention.built(q, k, v).plan.order == order
    out, lse = _run(attention, q, k, v)
    q, k, v = (x.cpu() for x in (q, k, v))
    mask = attention.to_mask(q, k)
    assert torch.equal(read_keys(out, case.skv), mask)
    assert_within(out, lse, q, k, v, mask)


def test_rows_and_heads_that_read_nothing_give_zero(backend: str) -> None:
    case = adapted(backend, Case(2, 2, 1, 48, 40, 16, torch.bfloat16))
    marks = torch.ones(2, 2, 3, 3, dtype=torch.bool)
    marks[0, 0, 1], marks[1, 1] = False, False

    @sp.pattern
    def holes(q, k, v):
        chosen = sp.block_mask(marks, block=16)
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen), mask=None)

    q, k, v = case.tensors(device_of(backend))
    attention = _compiled(backend, holes())
    if refuses(backend, "given", lambda: attention(q, k, v)):
        return
    out, lse = _run(attention, q, k, v)
    for empty in ((0, 0, slice(16, 32)), (1, 1)):
        assert not out[empty].any()
        assert bool((lse[empty] == -torch.inf).all())
    assert bool(lse[0, 1].isfinite().all())
    assert bool(out.isfinite().all())


def test_queries_before_the_first_key_give_zero(backend: str) -> None:
    case = adapted(backend, Case(1, 2, 1, 20, 7, 16, torch.float16))
    q, k, v = case.tensors(device_of(backend))
    attention = _compiled(backend, moba(block=16, k_blocks=2))
    out, lse = _run(attention, q, k, v)
    q, k, v = (x.cpu() for x in (q, k, v))
    assert not out[:, :, :13].any()
    assert bool((lse[:, :, :13] == -torch.inf).all())
    mask = attention.to_mask(q, k)
    assert not mask[:, :, :13].any()
    assert bool(mask[:, :, 13:].any(-1).all())
    assert_within(out, lse, q, k, v, mask)


@pytest.mark.parametrize("name", ["streaming_llm", "moba"])
def test_very_negative_logits_are_not_taken_for_masked_ones(backend: str, name: str) -> None:
    device = device_of(backend)
    case = adapted(backend, Case(1, 1, 1, 40, 40, 16))
    _, _, v = case.tensors(device, probe=False)
    q = torch.full((1, 1, 40, case.d), 300.0, device=device, dtype=case.dtype)
    attention = _compiled(backend, SMALL[name])
    if refuses(backend, name, lambda: attention(q, -q, v)):
        return
    out, lse = _run(attention, q, -q, v)
    q, v = (x.cpu() for x in (q, v))
    want, want_lse = oracle.attention(q, -q, v, attention.to_mask(q, -q))
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=0)
    atol = 1e-5 if case.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(out.double(), want, rtol=0, atol=atol)


@pytest.mark.parametrize("layout", ["swapped", "sliced", "expanded", "fused"])
def test_strides_change_no_bit(backend: str, layout: str) -> None:
    case = adapted(backend, Case(1, 4, 2, 50, 50, 16, layout=layout))
    d, dv = case.d, case.columns or case.d
    if layout == "fused":
        sizes = (4 * d, 2 * d, 2 * dv)
        whole = torch.randn(1, 50, sum(sizes)).to(case.dtype)
        parts = zip(whole.split(sizes, dim=-1), (4, 2, 2), strict=True)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part, heads in parts)
    elif layout == "expanded":
        q = torch.randn(1, 4, 50, d).to(case.dtype)
        k, v = (torch.randn(1, 1, 50, n).to(case.dtype).expand(-1, 2, -1, -1) for n in (d, dv))
    else:
        q, k, v = case.tensors("cpu", probe=False)
    device = device_of(backend)
    attention = _compiled(backend, block_topk(block=16, budget=2, locals=1))
    q, k, v = (x.to(device) for x in (q, k, v))
    packed = [torch.empty(x.shape, dtype=x.dtype, device=device).copy_(x) for x in (q, k, v)]
    got, want = _run(attention, q, k, v), _run(attention, *packed)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_an_item_of_a_batch_does_not_feel_the_others(backend: str) -> None:
    device = device_of(backend)
    attention = _compiled(backend, moba(block=16, k_blocks=2))
    drawn = adapted(backend, Case(1, 2, 1, 20, 34, 16)).tensors(device, probe=False)
    tensors = [torch.cat([x, torch.randn_like(x), x]) for x in drawn]
    out, lse = _run(attention, *tensors)
    assert torch.equal(out[0], out[2])
    assert torch.equal(lse[0], lse[2])
    alone, _ = _run(attention, *(x[1:2].contiguous() for x in tensors))
    torch.testing.assert_close(alone[0], out[1], rtol=0, atol=1e-6)


def test_the_lse_is_the_same_whether_asked_for_or_not(backend: str) -> None:
    attention = _compiled(backend, block_topk(block=16, budget=2, locals=1))
    case = adapted(backend, Case(1, 2, 1, 40, 40, 16))
    tensors = case.tensors(device_of(backend), probe=False)
    out, _ = _run(attention, *tensors)
    assert torch.equal(attention(*tensors).cpu(), out)
    with torch.inference_mode():
        assert torch.equal(attention(*tensors).cpu(), out)


@pytest.mark.parametrize("name", ["streaming_llm", "moba"])
def test_a_scale_of_the_call_replaces_that_of_the_pattern(backend: str, name: str) -> None:
    attention = _compiled(backend, SMALL[name])
    case = adapted(backend, Case(1, 2, 1, 30, 30, 16))
    q, k, v = case.tensors(device_of(backend), probe=False)
    if refuses(backend, name, lambda: attention(q, k, v, scale=0.9)):
        return
    out, lse = attention(q, k, v, scale=0.9, return_lse=True)
    q, k, v = (x.cpu() for x in (q, k, v))
    mask = attention.to_mask(q, k)
    assert_within(out.cpu(), lse.cpu(), q, k, v, mask, scale=0.9)


def test_a_gradient_is_right_or_refused(backend: str) -> None:
    attention = _compiled(backend, moba(block=16, k_blocks=2))
    case = adapted(backend, Case(1, 4, 2, 30, 40, 16))
    q, k, v = (x.requires_grad_() for x in case.tensors(device_of(backend), probe=False))
    try:
        out, lse = attention(q, k, v, return_lse=True)
    except NeedsGradient:
        with torch.no_grad():
            assert bool(attention(q, k, v).isfinite().all())
        return
    w, u = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out * w).sum() + (lse * u).sum(), (q, k, v))
    mask = attention.to_mask(q, k)

    def gradients(run: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = [x.detach().cpu().to(dtype).requires_grad_() for x in (q, k, v)]
        o, s = run(*wide, mask.cpu())  # type: ignore[operator]
        loss = (o * w.cpu().to(o.dtype)).sum() + (s * u.cpu().to(s.dtype)).sum()
        return torch.autograd.grad(loss, wide)

    want = gradients(oracle.attention, torch.float64)
    plain = gradients(oracle.plain_attention, torch.float32)
    for g, w64, p in zip(got, want, plain, strict=True):
        assert oracle.error(g.cpu(), w64) <= 3 * oracle.error(p, w64) + 1e-6


@pytest.mark.parametrize("case", COMPRESSED, ids=str)
@pytest.mark.parametrize("name", POOLED)
def test_a_pooled_stream_is_right_or_refused(backend: str, name: str, case: Case) -> None:
    pattern, (block, stride, has_short_tail) = POOLED[name]
    q, k, v = case.tensors(device_of(backend), probe=False)
    try:
        out, lse = _run(_compiled(backend, pattern), q, k, v)
    except CannotLower as refusal:
        assert backend == "ascendc", "only AscendC has no kernel for it"
        assert "this backend has no kernel" in str(refusal)
        return
    q, k, v = (x.cpu() for x in (q, k, v))
    last = case.skv if has_short_tail else case.skv - block + 1
    spans = [(a, min(a + block, case.skv)) for a in range(0, last, stride)]
    ends = torch.tensor([end - 1 for _, end in spans], dtype=torch.int64)
    near = oracle.window_mask(case.sq, case.skv, 5)
    mask = torch.cat([near, ends[None, :] <= oracle.positions(case.sq, case.skv)], dim=1)
    k, v = (torch.cat([x, *(_pooled(x, a, b) for a, b in spans)], dim=2) for x in (k, v))
    assert_within(out, lse, q, k, v, mask)


def _pooled(x: Tensor, start: int, stop: int) -> Tensor:
    return x[:, :, start:stop].double().mean(dim=2, keepdim=True).to(x.dtype)


@pytest.mark.slow
def test_a_long_ragged_call(backend: str) -> None:
    if backend == "triton" and device_of(backend) == "cpu":
        pytest.skip("hours in an interpreter")
    case = Case(1, 2, 1, 1023, 2049, 128, torch.bfloat16, columns=128)
    for pattern in (block_topk(block=64, budget=0.25), moba(block=128, k_blocks=4)):
        q, k, v = case.tensors(device_of(backend), probe=False)
        attention = _compiled(backend, pattern)
        out, lse = _run(attention, q, k, v)
        q, k, v = (x.cpu() for x in (q, k, v))
        assert_within(out, lse, q, k, v, attention.to_mask(q, k))
