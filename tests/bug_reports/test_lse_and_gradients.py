"""The LSE in every mode, accuracy against float64, and options that must reach the backward."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import spcomp as sp
from spcomp.cli import main
from spcomp.errors import NeedsGradient
from spcomp.patterns import block_topk, moba
from tests import oracle
from tests.bug_reports.make import DEVICE, assert_attends, compiled, dense, qkv, run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sq", [1, 40])
def test_the_lse_is_the_same_in_every_mode(dtype: torch.dtype, sq: int) -> None:
    """B29."""
    attention = compiled(block_topk(block=32, budget=2, locals=1))
    tensors = qkv(1, 2, 1, sq, 64, 16, dtype)
    out, lse = assert_attends(attention, *tensors, attention.to_mask(*tensors[:2]))
    assert lse.dtype == torch.float32
    assert bool(lse.isfinite().all())
    modes: list[Callable[[], Any]] = [torch.no_grad, torch.inference_mode, torch.enable_grad]
    for mode in modes:
        with mode():
            again, lse_again = run(attention, *tensors)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_inputs_stay_within_twice_the_error_of_plain_pytorch(dtype: torch.dtype) -> None:
    """B32. Logits of several hundred: softmax picks single keys."""
    q, k, v = (10 * x for x in qkv(1, 2, 2, 64, 64, 64, dtype))
    assert_attends(compiled(dense), q, k, v, oracle.causal_mask(64, 64))


def test_one_command_prints_both_errors_against_float64() -> None:
    """B32."""
    shape = "B=1,Hq=2,Hkv=1,Sq=40,Skv=64,D=16"
    done = CliRunner().invoke(
        main, ["check", "streaming_llm", "--shape", shape, "--backend", "reference", "--json"]
    )
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert row["plain_error"] > 0
    assert row["error"] <= row["allowed"]
    assert row["ok"] is True


# ---- gradients, of the backend that has them -----------------------------------------------------

S = 40


def _hook(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return torch.tanh(score / 2.0) * 2.0 + 0.1 * (h + 1)


def _hook_of_oracle(logits: Tensor) -> Tensor:
    heads = torch.arange(1, 5, dtype=logits.dtype)[:, None, None]
    return torch.tanh(logits / 2.0) * 2.0 + 0.1 * heads


@sp.pattern
def scored(q, k, v, *, scale=None, hook=None, size=None):
    """Take every option of attend."""
    mask = "causal" if size is None else sp.window(size)
    return sp.attend(q, k, v, mask=mask, scale=scale, score_mod=hook)


OPTIONS: dict[str, tuple[sp.Pattern, dict[str, Any], dict[str, Any]]] = {
    "scale of the pattern": (scored(scale=0.7), {}, {"scale": 0.7}),
    "scale of the call": (scored(scale=0.7), {"scale": 0.2}, {"scale": 0.2}),
    "softcap and bias": (scored(hook=_hook), {}, {"hook": _hook_of_oracle}),
    "window": (scored(size=7), {}, {}),
    "list a query": (moba(block=8, k_blocks=2), {}, {}),
    "list a group": (block_topk(block=8, budget=2, locals=1), {"scale": 0.3}, {"scale": 0.3}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_the_forward_reaches_the_backward(name: str) -> None:
    """B31, B33. Through the public call, with a loss on out and on the LSE."""
    pattern, call, rule = OPTIONS[name]
    attention = sp.compile(pattern, backend="reference")
    drawn = qkv(1, 4, 2, S, S + 8, 16)
    mask = attention.to_mask(*drawn[:2])
    if name == "window":
        assert torch.equal(mask[0, 0], oracle.window_mask(S, S + 8, 7))
    w, u = torch.randn(1, 4, S, 16), torch.randn(1, 4, S)

    def gradients(run_it: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        tensors = [x.to(dtype).requires_grad_() for x in drawn]
        out, lse = run_it(*tensors)
        loss = (out * w.to(out.dtype)).sum() + (lse * u.to(lse.dtype)).sum()
        return torch.autograd.grad(loss, tensors)

    got = gradients(lambda *x: attention(*x, return_lse=True, **call), torch.float32)
    want = gradients(lambda *x: oracle.attention(*x, mask, **rule), torch.float64)
    plain = gradients(lambda *x: oracle.plain_attention(*x, mask, **rule), torch.float32)
    for g, exact, p in zip(got, want, plain, strict=True):
        assert oracle.error(g, exact) <= 3 * oracle.error(p, exact) + 1e-6


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("length", [129, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_that_grows_with_distance_keeps_gradients_finite(
    sign: int, length: int, dtype: torch.dtype
) -> None:
    """B35."""

    @sp.pattern
    def far(q, k, v):
        def grow(score, b, h, q_idx, kv_idx):
            return score + sign * (q_idx - kv_idx)

        return sp.attend(q, k, v, score_mod=grow)

    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    mask = oracle.causal_mask(length, length)
    drawn = qkv(1, 1, 1, length, length, 64, dtype)
    upstream = torch.randn(1, 1, length, 64)

    def gradients(run_it: Any, kind: torch.dtype) -> tuple[Tensor, ...]:
        tensors = [x.to(kind).requires_grad_() for x in drawn]
        out = run_it(*tensors)
        return torch.autograd.grad(out, tensors, upstream.to(out.dtype))

    def hooked(attend: Any) -> Any:
        return lambda *x: attend(*x, mask, hook=lambda s: s + sign * distance.to(s.dtype))[0]

    got = gradients(sp.compile(far, backend="reference"), dtype)
    want = gradients(hooked(oracle.attention), torch.float64)
    plain = gradients(hooked(oracle.plain_attention), dtype)
    for g, exact, p in zip(got, want, plain, strict=True):
        assert bool(g.isfinite().all())
        assert oracle.error(g, exact) <= 3 * oracle.error(p, exact) + oracle.TINY[dtype]


def test_a_learned_table_gets_its_gradient_or_the_call_is_refused() -> None:
    """B33. A bias the score hook captured, trained: the reference gives its gradient, Triton
    refuses."""
    slope = torch.tensor([0.5, 2.0]).to(DEVICE).requires_grad_()

    @sp.pattern
    def biased(q, k, v):
        def weigh(score, b, h, q_idx, kv_idx):
            return score * slope[h]

        return sp.attend(q, k, v, score_mod=weigh)

    q, k, v = (x.to(DEVICE) for x in qkv(1, 2, 2, 20, 20, 16))
    out = sp.compile(biased, backend="reference")(q, k, v)
    (got,) = torch.autograd.grad(out.square().sum(), slope)
    wide = slope.detach().double().cpu().requires_grad_()
    exact, _ = oracle.attention(
        *(x.cpu() for x in (q, k, v)),
        oracle.causal_mask(20, 20),
        hook=lambda logits: logits * wide[:, None, None],
    )
    (want,) = torch.autograd.grad(exact.square().sum(), wide)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(NeedsGradient, match="table0 requires a gradient"):
        sp.compile(biased, backend="triton")(q, k, v)
    attention = sp.compile(biased, backend="triton")
    with torch.no_grad():
        assert bool(attention(q, k, v).isfinite().all())
    with pytest.raises(NeedsGradient, match="table0 requires a gradient"):
        attention(q, k, v)  # that the call before was let through says nothing of this one


def test_a_gradient_is_never_dropped_in_silence() -> None:
    """B33. Whichever of q, k and v needs it."""
    for index, name in enumerate("qkv"):
        tensors = [x.to(DEVICE) for x in qkv(1, 1, 1, 16, 16, 16)]
        tensors[index].requires_grad_()
        with pytest.raises(NeedsGradient, match=f"{name} requires a gradient"):
            compiled(dense)(*tensors)
        with torch.inference_mode():
            assert bool(compiled(dense)(*tensors).isfinite().all())
