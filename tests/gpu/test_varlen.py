"""Packed sequences on a card: each as a call of its own, without waiting, in graphs, without a
compile for new lengths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.api import Attention
from spcomp.backends.triton.launcher import STATS
from spcomp.patterns import block_topk, moba, quest, streaming_llm
from tests.gpu.card import DEVICE

pytestmark = pytest.mark.gpu

PATTERNS = {
    "block_topk": block_topk(block=64, budget=0.25),
    "moba": moba(block=128, k_blocks=3),
    "quest": quest(page=16, budget=256),
    "quest by groups": quest(page=16, budget=256, heads="group"),
    "streaming_llm": streaming_llm(sinks=4, recent=300),
}
PREFILL = ([1, 700, 0, 65, 1000, 64], [900, 700, 30, 0, 1300, 65])
OTHER = ([200, 3, 1000, 1], [1300, 3, 1000, 70])
DECODE = ([1, 2, 1, 16, 1], [3000, 5, 700, 1000, 0])
Packed = tuple[Tensor, Tensor, Tensor, dict[str, Tensor | int]]


def packed(
    lengths: tuple[list[int], list[int]], d: int = 64, heads: tuple[int, int] = (4, 2)
) -> Packed:
    """Draw q, k and v in bf16, with starts and longest lengths on the card."""
    rows, keys = map(sum, lengths)
    shapes = (rows, heads[0], d), (keys, heads[1], d), (keys, heads[1], d)
    q, k, v = (torch.randn(s, device=DEVICE).bfloat16() for s in shapes)
    given: dict[str, Tensor | int] = {}
    for side, sizes in zip("qk", lengths, strict=True):
        starts = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        given |= {f"cu_seqlens_{side}": starts.to(DEVICE), f"max_seqlen_{side}": max(sizes)}
    return q, k, v, given


def run(attention: Attention, call: Packed) -> tuple[Tensor, Tensor]:
    q, k, v, given = call
    out, lse = attention.varlen(q, k, v, **given, return_lse=True)  # type: ignore[arg-type]
    return out, lse


def alone(
    attention: Attention, call: Packed, lengths: tuple[list[int], list[int]]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Call for each sequence with queries and keys: its rows, out and lse."""
    q, k, v, _ = call
    row = key = 0
    for sq, skv in zip(*lengths, strict=True):
        rows, keys = slice(row, row + sq), slice(key, key + skv)
        row, key = rows.stop, keys.stop
        if sq and skv:
            views = (x[part].transpose(0, 1)[None] for x, part in ((q, rows), (k, keys), (v, keys)))
            out, lse = attention(*views, return_lse=True)
            yield rows, out[0].transpose(0, 1), lse[0]


@pytest.mark.parametrize("lengths", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_packed_sequence_is_a_call_of_its_own(
    name: str, lengths: tuple[list[int], list[int]]
) -> None:
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        call = packed(lengths)
        attention = sp.compile(PATTERNS[name])
        out, lse = run(attention, call)
        plain = sp.compile(PATTERNS[name], order=_order_of(attention))
        for rows, want, want_lse in alone(plain, call, lengths):
            torch.testing.assert_close(out[rows].float(), want.float(), rtol=0, atol=2e-2)
            torch.testing.assert_close(lse[:, rows], want_lse, rtol=0, atol=1e-3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not out.isnan().any()


def _order_of(attention: Attention) -> str | None:
    """Name the order that packed calls took, so that no other kernel is compared."""
    orders = {b.plan.order for b in attention.compiled.plans.values() if b.plan.phase == "prefill"}
    return orders.pop() if orders else None


@pytest.mark.parametrize("lengths", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_warm_packed_call_never_waits_for_the_card(
    name: str, lengths: tuple[list[int], list[int]]
) -> None:
    call, attention = packed(lengths), sp.compile(PATTERNS[name])
    run(attention, call)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(attention, call)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", PATTERNS)
def test_other_lengths_compile_nothing(name: str) -> None:
    attention = sp.compile(PATTERNS[name])
    run(attention, packed(PREFILL))
    compiled = STATS.forms
    run(attention, packed(OTHER))
    assert STATS.forms == compiled


@pytest.mark.parametrize("name", PATTERNS)
def test_a_captured_call_follows_what_is_written_to_the_starts(name: str) -> None:
    """The graph holds the longest lengths and the rows in all; where sequences begin is read."""
    q, k, v, given = packed(([300, 500], [700, 500]))
    given |= {"max_seqlen_q": 600, "max_seqlen_k": 800}
    attention = sp.compile(PATTERNS[name])
    run(attention, (q, k, v, given))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(attention, (q, k, v, given))
    for side, middle in (("q", 450), ("k", 620)):
        given[f"cu_seqlens_{side}"][1] = middle  # type: ignore[index]
    graph.replay()
    want, want_lse = run(attention, (q, k, v, given))
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
