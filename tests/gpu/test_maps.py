"""Maps of probabilities and lists of a share on the card: the same bits again, in graphs, at new
lengths, with offsets past 2^31."""

from __future__ import annotations

import pytest
import torch

import spcomp as sp
from spcomp.backends.triton import launcher
from spcomp.patterns import xattention
from tests.gpu.card import DEVICE, assert_attends, compiled, mask_on_card, tensors

pytestmark = pytest.mark.gpu


def test_a_call_gives_the_same_bits_again() -> None:
    attention = compiled(xattention(threshold=0.5))
    given = tensors((1, 8, 2, 8192, 8192), 128, torch.bfloat16)
    first = attention(*given)
    assert all(torch.equal(first, attention(*given)) for _ in range(3))


def test_a_new_length_compiles_nothing() -> None:
    attention = compiled(xattention(threshold=0.5))
    attention(*tensors((1, 4, 2, 4096, 4096), 128, torch.bfloat16))
    before = launcher.STATS.forms
    for length in (4097, 5001, 333):
        attention(*tensors((1, 4, 2, length, length), 128, torch.bfloat16))
    assert launcher.STATS.forms == before


def test_a_graph_replays_what_a_call_gives() -> None:
    attention = compiled(xattention(threshold=0.5))
    q, k, v = tensors((1, 4, 2, 2048, 2048), 128, torch.bfloat16)
    attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v)
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, attention(q, k, v))


@pytest.mark.parametrize(("stride", "d"), [(8, 64), (16, 64), (16, 128), (4, 256)])
def test_strides_and_head_dimensions(stride: int, d: int) -> None:
    attention = compiled(xattention(block=64, stride=stride, threshold=0.7))
    q, k, v = tensors((2, 6, 2, 700, 1900), d, torch.bfloat16, layout="swapped")
    mask = mask_on_card(attention, 64, q, k)
    out, lse = attention(q, k, v, return_lse=True)
    assert_attends(out, lse, (q, k, v), mask)


def test_a_long_call_in_slabs_reads_what_a_short_one_does() -> None:
    """At 262144 tokens the parts take several slabs; a call for the last rows alone takes one."""
    length, last = 262144, 1024
    q, k, v = tensors((1, 2, 1, length, length), 128, torch.bfloat16)
    attention = compiled(xattention(threshold=0.1))
    out = attention(q, k, v)[:, :, -last:]
    alone = attention(q[:, :, -last:].contiguous(), k, v)
    assert torch.equal(out, alone)


def test_shares_of_the_heads_are_read_from_their_table() -> None:
    shares = torch.tensor([0.0, 0.5, 0.9, 1.0], device=DEVICE)
    attention = compiled(xattention(block=64, stride=8, threshold=shares))
    q, k, _ = tensors((1, 4, 2, 1000, 1000), 128, torch.bfloat16)
    mask = mask_on_card(attention, 64, q, k)
    counts = mask.flatten(2).sum(-1)
    assert bool((counts[:, 1:] >= counts[:, :-1]).all())
    with pytest.raises(sp.SpcompError):
        attention(*tensors((1, 8, 2, 1000, 1000), 128, torch.bfloat16))
