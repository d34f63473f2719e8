"""The op on a card: graphs of torch.compile and of CUDA, streams, devices, threads, capture."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import spcomp as sp
from spcomp.api import Attention
from spcomp.backends.triton.launcher import STATS
from spcomp.errors import NeedsGradient, NotWarmedUp
from spcomp.patterns import block_topk, moba, streaming_llm
from tests.gpu.card import DEVICE, Shape, compiled, tensors

pytestmark = pytest.mark.gpu

OP = torch.ops.spcomp.attend
PREFILL: Shape = (1, 4, 2, 600, 700)
DECODE: Shape = (2, 4, 2, 1, 700)
NAMES = ["block_topk", "moba", "quest by groups", "streaming_llm", "documents"]
CALLS = [
    pytest.param(name, shape, id=f"{name}-{'decode' if shape == DECODE else 'prefill'}")
    for name in NAMES
    for shape in (PREFILL, DECODE)
]


@sp.pattern
def listed(q, k, v, *, indices):
    """Attend to blocks of 64 keys that the caller chose."""
    chosen = sp.block_indices(indices, block=64)
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))


@pytest.fixture(autouse=True)
def _no_graph_of_another_test() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def _drawn(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return list(tensors(shape, 64, dtype))


def _graph(attention: Attention, **options: Any) -> Any:
    """Compile a call with work around it, so that the op reads and feeds what the graph makes."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(q * 0.5, k, v, return_lse=True)
        return out + 1, lse

    return torch.compile(call, fullgraph=True, **options)


def _want(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = attention(q * 0.5, k, v, return_lse=True)
    return out + 1, lse


def _assert_same(got: Any, want: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("name", "shape"), CALLS)
def test_a_whole_graph_gives_what_an_eager_call_gives(
    name: str, shape: Shape, backend: str
) -> None:
    attention, qkv = compiled(name), _drawn(shape)
    _assert_same(_graph(attention, backend=backend)(*qkv), _want(attention, *qkv))


@pytest.mark.parametrize(("name", "shape"), CALLS)
def test_reduce_overhead_replays_on_other_inputs(name: str, shape: Shape) -> None:
    attention = compiled(name)
    graph = _graph(attention, mode="reduce-overhead")
    for _ in range(5):  # the first runs warm up and record, the others replay
        qkv = _drawn(shape)
        torch.compiler.cudagraph_mark_step_begin()
        got = [x.clone() for x in graph(*qkv)]
        _assert_same(got, _want(attention, *qkv))


def test_a_new_length_makes_no_new_graph_and_compiles_no_kernel() -> None:
    attention = compiled(block_topk(block=32, budget=0.37))
    counter = CompileCounterWithBackend("aot_eager")
    graph = _graph(attention, backend=counter, dynamic=True)
    graph(*_drawn((1, 4, 2, 300, 310)))
    made = STATS.forms
    for length in (301, 402, 777, 1024):
        qkv = _drawn((1, 4, 2, length, length + 9))
        _assert_same(graph(*qkv), _want(attention, *qkv))
    assert counter.frame_count == 1
    assert made == STATS.forms


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_graph_never_waits_for_the_card(name: str) -> None:
    attention, qkv = compiled(name), _drawn(PREFILL)
    graph = _graph(attention, backend="aot_eager")
    graph(*qkv)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph(*qkv)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("name", NAMES)
def test_the_op_passes_the_checks_of_torch(name: str, rows: int) -> None:
    attention = compiled(name)
    qkv = tensors((1, 6, 2, rows, 300), 80, torch.float16, layout="swapped")
    torch.library.opcheck(OP.default, (*qkv, attention.tables, attention.handle, None))


def test_export_holds_the_op_and_serves_other_lengths() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = compiled("block_topk")

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(q, k, v)

    rows, keys = (torch.export.Dim(n, min=2) for n in ("rows", "keys"))
    lengths = ({2: rows}, {2: keys}, {2: keys})
    program = torch.export.export(Layer(), tuple(_drawn(PREFILL)), dynamic_shapes=lengths)
    qkv = _drawn((1, 4, 2, 333, 444))
    assert torch.equal(program.module()(*qkv), Layer()(*qkv))


def test_a_gradient_is_refused_in_a_graph_too() -> None:
    attention, qkv = compiled("moba"), _drawn(PREFILL)
    qkv[1].requires_grad_()
    with pytest.raises(NeedsGradient, match="k requires a gradient"):
        OP(*qkv, [], attention.handle, None)
    with pytest.raises(RuntimeError, match="NeedsGradient: k requires a gradient"):
        _graph(attention, backend="aot_eager")(*qkv)
    with torch.no_grad():
        _assert_same(_graph(attention, backend="aot_eager")(*qkv), _want(attention, *qkv))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_training_step_of_the_reference_backend_on_the_card(backend: str) -> None:
    pattern = block_topk(block=64, budget=0.25)
    attention = sp.compile(pattern, backend="reference")
    leaves = [x.requires_grad_() for x in _drawn((1, 4, 2, 200, 200), torch.float32)]

    def loss(*qkv: Tensor) -> Tensor:
        out, lse = attention(*qkv, return_lse=True)
        return out.square().sum() + lse.cos().sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    graph = torch.compile(loss, fullgraph=True, backend=backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = torch.autograd.grad(graph(*leaves), leaves)
    torch.cuda.current_stream().wait_stream(side)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_backward_below_autograd_runs_on_the_current_stream() -> None:
    """In inference mode the gradient is taken in a thread of its own; its inputs come late."""
    attention = sp.compile(block_topk(block=64, budget=0.25), backend="reference")
    q, k, v = _drawn((1, 4, 2, 200, 200), torch.float32)
    grads = torch.randn_like(q), torch.zeros(1, 4, 200, device=DEVICE)
    given = [], attention.handle, None, [True] * 3
    backward = torch.ops.spcomp.attend_backward
    want = backward(*grads, q, k, v, *given)
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.inference_mode():
        torch.cuda._sleep(50_000_000)  # about 30 ms
        late.copy_(q)
        got = backward(*grads, late, k, v, *given)
    side.synchronize()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_as_it_does_for_torchs_own_attention(dtype: torch.dtype) -> None:
    attention, qkv = compiled("block_topk"), _drawn(PREFILL, torch.float32)
    want = attention(*(x.to(dtype) for x in qkv), return_lse=True)
    graph = torch.compile(
        lambda *qkv: attention(*qkv, return_lse=True), fullgraph=True, backend="aot_eager"
    )
    with torch.autocast("cuda", dtype=dtype):
        _assert_same(attention(*qkv, return_lse=True), want)
        _assert_same(graph(*qkv), want)
    assert attention(*qkv).dtype == torch.float32


# ---- graphs, streams, devices --------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), CALLS)
def test_the_op_captures_after_a_warm_call_and_follows_the_stream(name: str, shape: Shape) -> None:
    attention, qkv = compiled(name), _drawn(shape)

    def call() -> Any:
        return OP(*qkv, attention.tables, attention.handle, None)

    attention(*qkv)  # an eager call warms the op up too
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    new = _drawn(shape)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # about 30 ms
        for x, y in zip(qkv, new, strict=True):
            x.copy_(y)
        got = call()
    side.synchronize()
    _assert_same(got, attention(*new, return_lse=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    for x in qkv:
        x.copy_(torch.randn_like(x))
    for result in held:
        result.fill_(torch.nan)
    graph.replay()
    _assert_same(held, call())


@pytest.mark.parametrize("through_op", [False, True], ids=["eager", "op"])
def test_a_capture_refuses_a_pattern_that_never_ran(through_op: bool) -> None:
    pattern = streaming_llm(sinks=5, recent=91 + through_op)  # of this test alone
    attention, qkv = compiled(pattern), _drawn(PREFILL)

    def call() -> Any:
        if through_op:
            return OP(*qkv, [], attention.handle, None)
        return attention(*qkv, return_lse=True)

    graph = torch.cuda.CUDAGraph()
    text = "no kernel of the pattern 'streaming_llm' is compiled for prefill in bfloat16"
    with pytest.raises(NotWarmedUp, match=text), torch.cuda.graph(graph):
        call()
    torch.cuda.synchronize()
    want = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    graph.replay()
    _assert_same(held, want)


def test_a_capture_refuses_lists_that_are_not_sorted() -> None:
    indices = torch.tensor([[[[0], [1], [0], [2]]]], device=DEVICE).int()
    attention, qkv = compiled(listed(indices=indices)), _drawn((1, 4, 2, 256, 256))
    attention(*qkv)
    indices.fill_(0)  # the lists that were sorted are no longer those of the pattern
    text = "the lists of the pattern 'listed' are not sorted yet"
    with pytest.raises(NotWarmedUp, match=text), torch.cuda.graph(torch.cuda.CUDAGraph()):
        attention(*qkv)
    torch.cuda.synchronize()
    want = attention(*qkv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = attention(*qkv)
    graph.replay()
    assert torch.equal(held, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_a_graph_follows_the_device_of_its_tensors() -> None:
    for name in ("block_topk", "moba"):
        attention, qkv = compiled(name), _drawn(PREFILL)
        want = _want(attention, *qkv)
        away = [x.to("cuda:1") for x in qkv]
        graph = _graph(attention, backend="aot_eager")
        with torch.cuda.device(0):
            for got in (graph(*away), OP(*away, [], attention.handle, None)):
                assert got[0].device == torch.device("cuda:1")
            assert torch.cuda.current_device() == 0
            torch.testing.assert_close([x.to("cuda:0") for x in graph(*away)], list(want),
                                       rtol=0, atol=0)  # fmt: skip


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_op", [False, True], ids=["eager", "op"])
def test_threads_with_new_shapes_and_streams_of_their_own(through_op: bool) -> None:
    """The hyper-parameters are of this test alone, so that its kernels are compiled in a race."""
    pattern = moba(block=96 + 64 * through_op, k_blocks=3)
    attention, again = compiled(pattern), compiled(pattern)
    shapes = [(1, 4, 2, rows, 500) for rows in (1, 9, 40, 130, 257, 500)]
    calls = [_drawn(shape) for shape in shapes]  # type: ignore[arg-type]
    torch.cuda.synchronize()
    before = STATS.forms
    failures: list[BaseException] = []
    results: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    barrier = threading.Barrier(4)

    def work(thread: int) -> None:
        try:
            barrier.wait(60)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for n in range(24):
                    which = (thread + n) % len(calls)
                    if through_op:
                        result = OP(*calls[which], [], attention.handle, None)
                    else:
                        result = attention(*calls[which], return_lse=True)
                    results[thread, which] = result
            stream.synchronize()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert len(attention.compiled.plans) == 2  # decode and prefill
    made = STATS.forms - before
    assert made > 0
    for (_, which), got in results.items():
        _assert_same(got, again(*calls[which], return_lse=True))
    assert STATS.forms - before == made
