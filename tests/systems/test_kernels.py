"""NSA, InfLLM-V2 and the A-shape of MInference through their kernels: what they read and what comes
out, beside the reference and second opinions, those of test_nsa.py and test_infllm_v2.py."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.patterns import infllm_v2, minference, nsa
from tests import oracle
from tests.conformance.cases import device_of
from tests.systems import test_infllm_v2 as infllm_opinion
from tests.systems import test_nsa as nsa_opinion

NSA = nsa_opinion.Sizes(16, 4, 1, 2, 20, 8, 4)
INFLLM = infllm_opinion.Sizes(16, 5, 1, 32, 8, 4, 4)
F32, BF16 = torch.float32, torch.bfloat16
BACKENDS = ("triton", "reference")
RANDOM = 8
"""Columns of v that are drawn; one a block follows, 1 for its tokens: they show what was read."""

CASES = {  # B, Hq, Hkv, Sq, Skv, D, dtype
    "prefill, one head": (1, 1, 1, 29, 130, 16, F32),
    "prefill, group of 3": (2, 3, 1, 17, 101, 20, BF16),
    "prefill, group of 4": (1, 4, 1, 19, 145, 16, F32),
    "prefill, more queries than keys": (1, 2, 1, 40, 21, 16, BF16),
    "prefill, before the first window": (2, 3, 1, 20, 6, 8, F32),
    "decode, one head": (2, 2, 2, 1, 203, 16, BF16),
    "decode, group of 3": (2, 3, 1, 3, 130, 20, F32),
    "decode, group of 4": (1, 8, 2, 5, 161, 16, BF16),
    "decode, before the first window": (2, 4, 1, 3, 6, 8, F32),
}


def tensors(case: str) -> tuple[Tensor, Tensor, Tensor]:
    b, hq, hkv, sq, skv, d, dtype = CASES[case]
    q, k, drawn = (
        2 * torch.randn(b, hq, sq, d),
        torch.randn(b, hkv, skv, d),
        torch.randn(skv, RANDOM),
    )
    block = NSA.block
    marks = torch.eye(-(-skv // block)).repeat_interleave(block, 0)[:skv]
    v = torch.cat([drawn, marks], dim=1).expand(b, hkv, -1, -1).contiguous()
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(
    pattern: sp.Pattern, backend: str, qkv: tuple[Tensor, ...], **more: Tensor
) -> tuple[Tensor, Tensor]:
    device = device_of(backend)
    given = {name: x.to(device) for name, x in more.items()}
    attention = sp.compile(pattern, backend=backend)
    out, lse = attention(*(x.to(device) for x in qkv), return_lse=True, **given)
    return out.cpu(), lse.cpu()


def assert_same_blocks(got: Tensor, mine: Tensor, pairs: Tensor, unsure: Tensor) -> Tensor:
    """Check the blocks that a row read by the columns of v that tell, and give the rows [B,Hq,Sq]
    that rounding did not decide."""
    block, skv = NSA.block, pairs.shape[3]
    whole = torch.nn.functional.pad(pairs, (0, -skv % block))
    want = whole.unflatten(3, (-1, block)).any(-1)
    sure = ~unsure
    for out in (got, mine):
        assert torch.equal((out[..., RANDOM:] > 0)[sure], want[sure])
    assert float(unsure.float().mean()) < 0.05
    return sure


@pytest.mark.parametrize("case", CASES)
def test_infllm_v2_reads_and_gives_what_the_reference_does(case: str) -> None:
    pattern, (q, k, v) = infllm_v2(**asdict(INFLLM)), tensors(case)
    (got, got_lse), (mine, mine_lse) = (run(pattern, b, (q, k, v)) for b in BACKENDS)
    pairs, unsure = infllm_opinion.mask_of(q, k, INFLLM)
    sure = assert_same_blocks(got, mine, pairs, unsure)
    want, want_lse = oracle.attention(q, k, v, pairs)
    allowed, allowed_lse = oracle.budgets(q, k, v, pairs)
    assert got.dtype == q.dtype and got_lse.dtype == torch.float32
    assert oracle.error(got[sure], want[sure]) < allowed
    assert oracle.error(got_lse[sure], want_lse[sure]) < allowed_lse
    assert oracle.error(got[sure], mine[sure]) < 2 * allowed
    assert oracle.error(got_lse[sure], mine_lse[sure]) < 2 * allowed_lse


@pytest.mark.parametrize("case", CASES)
def test_nsa_reads_and_gives_what_the_reference_does(case: str) -> None:
    pattern, (q, k, v) = nsa(**asdict(NSA)), tensors(case)
    gates = 0.5 + torch.rand(*q.shape[:3], 3).to(q.dtype) / 2
    pairs, unsure = nsa_opinion.mask_of(q, k, NSA)
    sure = ~unsure
    assert float(unsure.float().mean()) < 0.05
    got, got_lse = run(pattern, "triton", (q, k, v), gates=gates)
    mine, mine_lse = run(pattern, "reference", (q, k, v), gates=gates)
    want, want_lse = nsa_opinion.gated(nsa_opinion.branches(q, k, v, pairs, NSA), gates)
    (sq, skv) = pairs.shape[2:]
    means = (nsa_opinion.windows(x, NSA).to(q.dtype) for x in (k, v))
    budgets = [
        oracle.budgets(q, *means, nsa_opinion.seen(sq, skv, NSA)),
        oracle.budgets(q, k, v, pairs),
        oracle.budgets(q, k, v, oracle.window_mask(sq, skv, NSA.window)),
    ]
    allowed, allowed_lse = (sum(each) for each in zip(*budgets, strict=True))
    assert got.dtype == q.dtype and got_lse.dtype == torch.float32
    assert oracle.error(got[sure], want[sure]) < allowed
    assert oracle.error(got_lse[sure], want_lse[sure]) < allowed_lse
    assert oracle.error(got[sure], mine[sure]) < 2 * allowed
    assert oracle.error(got_lse[sure], mine_lse[sure]) < 2 * allowed_lse


def test_the_blocks_that_nsa_reads_are_those_of_the_reference() -> None:
    q, k, v = tensors("decode, group of 3")
    gates = nsa_opinion.only(1, q)
    got, mine = (run(nsa(**asdict(NSA)), b, (q, k, v), gates=gates)[0] for b in BACKENDS)
    assert_same_blocks(got, mine, *nsa_opinion.mask_of(q, k, NSA))


def test_before_the_first_window_the_compressed_branch_gives_0() -> None:
    q, k, v = tensors("prefill, before the first window")
    gates = nsa_opinion.only(0, q)
    out, lse = run(nsa(**asdict(NSA)), "triton", (q, k, v), gates=gates)
    assert not out.any()
    assert bool((lse[:, :, :14] == -torch.inf).all()) and bool(lse[:, :, 14:].isfinite().all())


@pytest.mark.parametrize("case", ["prefill, more queries than keys", "decode, group of 3"])
def test_the_a_shape_of_minference_gives_what_the_reference_does(case: str) -> None:
    pattern, (q, k, v) = minference(kind="a_shape", initial=5, recent=20), tensors(case)
    (got, got_lse), (mine, mine_lse) = (run(pattern, b, (q, k, v)) for b in BACKENDS)
    sq, skv = q.shape[2], k.shape[2]
    pairs = oracle.sink_window_mask(sq, skv, 5, 20).expand(*q.shape[:2], -1, -1)
    want, want_lse = oracle.attention(q, k, v, pairs)
    allowed, allowed_lse = oracle.budgets(q, k, v, pairs)
    for out, lse in ((got, got_lse), (mine, mine_lse)):
        assert oracle.error(out, want) < allowed
        assert oracle.error(lse, want_lse) < allowed_lse
