"""Launches: no waiting, graphs, streams, devices, repeats, uninitialised memory, compiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.api import Attention
from spcomp.backends.triton.launcher import STATS
from spcomp.patterns import block_topk, moba, quest, streaming_llm
from tests.gpu.card import DEVICE, compiled, tensors

pytestmark = pytest.mark.gpu

PREFILL = (1, 4, 2, 600, 700)
DECODE = (2, 4, 2, 1, 700)
CALLS = [
    pytest.param(name, shape, id=f"{name}-{'decode' if shape == DECODE else 'prefill'}")
    for name in ("block_topk", "moba", "quest by groups", "streaming_llm", "documents")
    for shape in (PREFILL, DECODE)
]
Call = Callable[[], tuple[Tensor, Tensor]]


def _call(attention: Attention, qkv: tuple[Tensor, Tensor, Tensor]) -> Call:
    return lambda: attention(*qkv, return_lse=True)


@pytest.mark.parametrize(("name", "shape"), CALLS)
def test_a_warm_call_never_waits_for_the_card(name: str, shape: tuple[int, ...]) -> None:
    qkv = tensors(shape, 64, torch.bfloat16)  # type: ignore[arg-type]
    call = _call(compiled(name), qkv)
    call()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_warm_decode_through_a_cache_never_waits_for_the_card() -> None:
    cache = sp.KVCache.empty(
        compiled(quest(page=16, budget=128)),
        batch=1, kv_heads=2, head_dim=64, capacity=400, device=DEVICE,
    )  # fmt: skip
    q, k, v = tensors((1, 4, 2, 1, 300), 64, torch.bfloat16)
    cache.append(k, v)
    cache.append(k[:, :, :1], v[:, :, :1])
    cache.attend(q)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            cache.append(k[:, :, :1], v[:, :, :1])
            cache.attend(q)
        cache.rewind(2)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(("name", "shape"), CALLS)
def test_a_captured_graph_replays_on_other_inputs(name: str, shape: tuple[int, ...]) -> None:
    qkv = tensors(shape, 64, torch.bfloat16)  # type: ignore[arg-type]
    call = _call(compiled(name), qkv)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    for _ in range(3):
        for x in qkv:
            x.copy_(torch.randn_like(x))
        for result in held:
            result.fill_(torch.nan)
        graph.replay()
        want = call()
        assert all(torch.equal(a, b) for a, b in zip(held, want, strict=True))


@pytest.mark.parametrize(("name", "shape"), CALLS)
def test_launches_go_to_the_current_stream(name: str, shape: tuple[int, ...]) -> None:
    """The inputs are filled late, on the same stream: another one would read the old values."""
    old, new = (tensors(shape, 64, torch.bfloat16) for _ in range(2))  # type: ignore[arg-type]
    attention = compiled(name)
    want = attention(*new, return_lse=True)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # about 30 ms
        for x, y in zip(old, new, strict=True):
            x.copy_(y)
        got = attention(*old, return_lse=True)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_tensors_on_another_card_than_the_current_one() -> None:
    """B22."""
    qkv = tensors(PREFILL, 64, torch.bfloat16)
    for name in ("block_topk", "moba"):
        attention = compiled(name)
        want = attention(*qkv)
        with torch.cuda.device(0):
            got = attention(*(x.to("cuda:1") for x in qkv))
        assert got.device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
        torch.testing.assert_close(got.to(want.device), want, rtol=0, atol=0)
    with pytest.raises(sp.SpcompError, match="q is on cuda:0 and k is on cuda:1"):
        compiled("moba")(qkv[0], qkv[1].to("cuda:1"), qkv[2])


@pytest.mark.parametrize(("name", "shape"), CALLS)
def test_twenty_runs_give_the_same_bits(name: str, shape: tuple[int, ...]) -> None:
    """B36, of the forward. Many query rows share one key block."""
    qkv = tensors(shape, 64, torch.bfloat16)  # type: ignore[arg-type]
    call = _call(compiled(name), qkv)
    first = call()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))


def _poison() -> None:
    """Leave NaN, and as int32 a number no index can be, in memory the next calls will be given."""
    torch.cuda.empty_cache()
    held = [torch.full((n,), torch.nan, device=DEVICE) for n in (1 << 28, *[1 << 16] * 64)]
    torch.cuda.synchronize()
    del held


@pytest.mark.parametrize(("name", "shape"), CALLS)
def test_no_memory_is_read_before_it_is_written(name: str, shape: tuple[int, ...]) -> None:
    b, hq, hkv, sq, skv = shape
    longer = (b, hq, hkv, sq if sq == 1 else skv + 90, skv)  # rows above the diagonal read nothing
    qkv = tensors(longer, 64, torch.bfloat16)
    attention = compiled(name)
    want = attention(*qkv, return_lse=True)
    _poison()
    out, lse = attention(*qkv, return_lse=True)
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])
    assert bool(out.isfinite().all())
    assert not lse.isnan().any()


@pytest.mark.parametrize("name", ["streaming_llm", "block_topk", "moba", "quest"])
def test_a_new_length_or_batch_compiles_nothing(name: str) -> None:
    """B69. The hyper-parameters are of this test alone, so that its first calls compile."""
    pattern = {
        "streaming_llm": streaming_llm(sinks=3, recent=77),
        "block_topk": block_topk(block=32, budget=0.31),
        "moba": moba(block=192, k_blocks=2),
        "quest": quest(page=24, budget=96),
    }[name]
    attention = compiled(pattern)
    before = STATS.forms
    for rows in (300, 1):
        attention(*tensors((2, 4, 2, rows, 300), 64, torch.float16))
    made = STATS.forms
    assert made - before >= 2
    for length in (*range(301, 341), 500, 1000, 1, 17, 4096):
        for rows in (length, 1):
            attention(*tensors((length % 4 + 1, 4, 2, rows, length), 64, torch.float16))
    for heads in ((8, 1), (3, 3), (12, 4)):
        attention(*tensors((1, *heads, 128, 128), 64, torch.float16))
    assert STATS.forms == made
