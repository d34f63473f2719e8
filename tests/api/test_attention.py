"""The callable a user holds: results, scales, empty calls, orders, schedules, explanations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.errors import WrongArguments
from spcomp.patterns import block_topk, moba, quest, streaming_llm
from tests import oracle
from tests.conformance.cases import assert_within, device_of, read_keys

BACKENDS = ["reference", "triton"]


@sp.pattern
def dense(q, k, v, *, scale=None):
    return sp.attend(q, k, v, scale=scale)


def _tensors(
    backend: str, sq: int = 40, skv: int = 50, hq: int = 2, hkv: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (1, hq, sq, 16), (1, hkv, skv, 16), (1, hkv, skv, 16)
    q, k, v = (torch.randn(s).to(device_of(backend)) for s in shapes)
    return q, k, v


def _oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **rule: Any) -> Tensor:
    return oracle.attention(*(x.cpu() for x in (q, k, v)), mask.cpu(), **rule)[0].float()


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_alone_is_the_out_that_comes_with_the_lse(backend: str) -> None:
    q, k, v = _tensors(backend)
    attention = sp.compile(streaming_llm(sinks=2, recent=9), backend=backend)
    alone = attention(q, k, v)
    out, lse = attention(q, k, v, return_lse=True)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, out)
    assert out.shape == q.shape
    assert lse.shape == (1, 2, 40)
    mask = oracle.sink_window_mask(40, 50, 2, 9)
    assert_within(out.cpu(), lse.cpu(), q.cpu(), k.cpu(), v.cpu(), mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.9, 1e-3, 0.0, -0.5])
def test_a_call_may_set_the_scale_of_the_pattern_aside(backend: str, scale: float) -> None:
    q, k, v = _tensors(backend)
    mask = oracle.causal_mask(40, 50)
    by_pattern = sp.compile(dense(scale=scale), backend=backend)
    other = sp.compile(dense(scale=3.0), backend=backend)
    want = _oracle(q, k, v, mask, scale=scale)
    torch.testing.assert_close(by_pattern(q, k, v).cpu(), want, rtol=0, atol=2e-6)
    torch.testing.assert_close(other(q, k, v, scale=scale).cpu(), want, rtol=0, atol=2e-6)
    kept = _oracle(q, k, v, mask, scale=3.0)
    torch.testing.assert_close(other(q, k, v).cpu(), kept, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("b", "sq", "skv"), [(1, 0, 7), (1, 7, 0), (0, 7, 7), (1, 0, 0)])
def test_a_call_without_queries_or_keys_gives_zeros_in_its_shape(
    backend: str, b: int, sq: int, skv: int
) -> None:
    device = device_of(backend)
    q, k = torch.randn(b, 4, sq, 8, device=device), torch.randn(b, 2, skv, 8, device=device)
    v = torch.randn(b, 2, skv, 5, device=device)
    out, lse = sp.compile(quest(page=4, budget=8), backend=backend)(q, k, v, return_lse=True)
    assert out.shape == (b, 4, sq, 5)
    assert not out.any()
    assert lse.shape == (b, 4, sq)
    assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pattern_function_is_taken_with_its_defaults(backend: str) -> None:
    q, k, v = _tensors(backend, sq=20, skv=20)
    assert repr(sp.compile(block_topk).pattern) == repr(block_topk())
    got = sp.compile(block_topk, backend=backend)(q, k, v)
    assert torch.equal(got, sp.compile(block_topk(), backend=backend)(q, k, v))
    with pytest.raises(WrongArguments, match="is a str, not a pattern"):
        sp.compile("moba")  # type: ignore[arg-type]


def test_the_backend_follows_the_device_and_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _tensors("reference")
    monkeypatch.delenv("SPCOMP_BACKEND", raising=False)
    assert sp.compile(dense).built(q, k, v).target.backend == "reference"
    assert sp.compile(dense, backend="reference").built(q, k, v).target.backend == "reference"
    monkeypatch.setenv("SPCOMP_BACKEND", "triton")
    q, k, v = _tensors("triton")
    assert sp.compile(dense).built(q, k, v).target.backend == "triton"


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_order_of_a_pattern_gives_one_result(backend: str) -> None:
    """Key-major, gathered, and what the lowering chooses; the reference of the pattern beside."""
    pattern = moba(block=64, k_blocks=2)
    q, k, _ = _tensors(backend, sq=20, skv=200)
    columns = torch.cat([torch.eye(200), torch.randn(200, 8)], dim=-1)
    v = columns.expand(1, 1, -1, -1).to(q.device)
    mask = oracle.moba_mask(q.cpu(), k.cpu(), block=64, k_blocks=2)
    for order in ("key_major", "gather", None):
        attention = sp.compile(pattern, backend=backend, order=order)
        if order is not None:
            assert attention.built(q, k, v).plan.order == order
        out, lse = (x.cpu() for x in attention(q, k, v, return_lse=True))
        assert torch.equal(read_keys(out, 200), mask)
        assert_within(out, lse, q.cpu(), k.cpu(), v.cpu(), mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_changes_tiles_and_nothing_else(backend: str) -> None:
    q, k, v = _tensors(backend, sq=70, skv=90)
    pattern = block_topk(block=32, budget=2, locals=1)
    plain = sp.compile(pattern, backend=backend)
    built = plain.built(q, k, v)
    changed = sp.compile(pattern, backend=backend, axes={"attend": {"block_q": 16, "block_k": 16}})
    tiles = {n.kernel: dict(n.axes) for n in changed.built(q, k, v).plan.launches()}["attend"]
    assert (tiles["block_q"], tiles["block_k"]) == (16, 16)
    assert changed.built(q, k, v).source != built.source
    mask = plain.to_mask(q, k).cpu()
    for attention in (plain, changed):
        out, lse = (x.cpu() for x in attention(q, k, v, return_lse=True))
        assert_within(out, lse, q.cpu(), k.cpu(), v.cpu(), mask)


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        (
            {"atend": {"block_q": 16}},
            "UnknownChoice: axes was given the kernel = 'atend'.\n  help: choose one of attend, ",
        ),
        (
            {"attend": {"block_z": 16}},
            "UnknownChoice: axes was given the axis = 'attend.block_z'.\n"
            "  help: choose one of block_k, block_q, stages, warps.",
        ),
        ({"attend": {"warps": -4}}, "NegativeCount: axes was given attend.warps = -4, which is"),
    ],
)
def test_a_wrong_axis_is_refused_by_name(axes: Any, text: str) -> None:
    q, k, v = _tensors("triton", sq=70, skv=90)
    with pytest.raises(sp.SpcompError) as caught:
        sp.compile(moba(block=32, k_blocks=2), backend="triton", axes=axes)(q, k, v)
    assert str(caught.value).startswith(text)


def test_an_explanation_names_backend_order_launches_and_scratch() -> None:
    q, k, v = _tensors("triton", sq=100, skv=140)
    pattern = moba(block=64, k_blocks=2)
    attention = sp.compile(pattern, backend="triton")
    plan = attention.built(q, k, v).plan
    text = attention.explain(q, k, v)
    lines = text.splitlines()
    assert lines[0] == "moba(block=64, k_blocks=2)"
    assert lines[1].startswith("  backend   triton on ")
    assert lines[2] == "  phase     prefill: 100 query rows, 140 keys"
    assert lines[3].startswith("  order     key_major")
    assert "  slabs     1 of 100 query rows" in lines
    launches = lines[lines.index("  launches") + 1 : lines.index("  scratch")]
    assert [line.split()[0] for line in launches] == [n.kernel for n in plan.launches()]
    assert next(line.split()[0] for line in launches) == "pool"
    scratch = lines[lines.index("  scratch") + 1 :]
    assert [line.split()[0] for line in scratch] == [b.name for b in plan.scratch()]
    assert any(line.split()[1:] == ["data", "[1,", "1,", "3,", "16]"] for line in scratch)


def test_an_explanation_tells_decode_from_prefill_and_an_order_that_was_asked_for() -> None:
    pattern = moba(block=64, k_blocks=2)
    decode = sp.compile(pattern, backend="triton").explain(*_tensors("triton", sq=1, skv=140))
    assert "  phase     decode: 1 query rows, 140 keys" in decode
    assert "attend_gather" in decode
    asked = sp.compile(pattern, backend="triton", order="gather")
    text = asked.explain(*_tensors("triton", sq=100, skv=140))
    assert "attend_gather" in text
    assert "attend_keys" not in text
    reference = sp.compile(pattern, backend="reference").explain(*_tensors("reference"))
    assert reference == "the reference backend interprets the pattern; it has no launches"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_is_that_of_the_call_whatever_the_backend(backend: str) -> None:
    q, k, _ = _tensors(backend, sq=30, skv=41)
    mask = sp.compile(quest(page=8, budget=16), backend=backend).to_mask(q, k)
    assert mask.dtype == torch.bool
    assert torch.equal(mask.cpu(), oracle.quest_mask(q.cpu(), k.cpu(), page=8, budget=16))


def test_inputs_are_left_as_they_were_and_results_are_new() -> None:
    for backend in BACKENDS:
        tensors = _tensors(backend)
        copies = [x.clone() for x in tensors]
        attention = sp.compile(streaming_llm(sinks=2, recent=9), backend=backend)
        first = attention(*tensors)
        held = first.clone()
        second = attention(*(2 * x for x in tensors))
        assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))
        assert torch.equal(first, held)
        assert not torch.equal(first, second)
