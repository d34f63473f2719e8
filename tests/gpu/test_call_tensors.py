"""Merges by gates on a card: no waiting, and graphs that replay on other gates."""

from __future__ import annotations

import pytest
import torch

import spcomp as sp
from tests.api.input_cases import gated
from tests.gpu.card import tensors

pytestmark = pytest.mark.gpu

PREFILL = (1, 4, 2, 600, 700)
DECODE = (2, 4, 2, 1, 700)


@pytest.mark.parametrize("shape", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_a_graph_with_gates_never_waits_and_replays(shape: tuple[int, ...]) -> None:
    q, k, v = tensors(shape, 64, torch.bfloat16)  # type: ignore[arg-type]
    gates = torch.randn(*q.shape[:3], 3, device=q.device).bfloat16()
    attention = sp.compile(gated(), backend="triton")
    attention(q, k, v, gates=gates)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, k, v, gates=gates)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, gates=gates)
    gates.copy_(torch.randn_like(gates))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, attention(q, k, v, gates=gates))
