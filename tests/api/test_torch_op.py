"""A compiled pattern inside torch.compile, torch.export, autograd and autocast, and its copies."""

from __future__ import annotations

import copy
import io
import pickle
import re
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import spcomp as sp
from spcomp.errors import DtypeMix, HeadsDoNotDivide, LastStrideNotOne, NeedsGradient, UnknownHandle
from spcomp.patterns import quest, streaming_llm
from tests.api.torch_cases import (
    OP,
    Layer,
    Qkv,
    assert_same,
    biased,
    blocks,
    documents,
    tensors,
)
from tests.conformance.cases import device_of


@pytest.fixture(autouse=True)
def _no_graph_of_another_test() -> Iterator[None]:
    torch._dynamo.reset()
    yield


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_whole_graph_gives_what_an_eager_call_gives(backend: str, scale: float | None) -> None:
    attention = blocks()

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = attention(q * 2, k, v, scale=scale, return_lse=True)
        return out, lse, attention(q, k, v, scale=scale)

    graph = torch.compile(both, fullgraph=True, backend=backend)
    for lengths in ((40, 50), (1, 50), (0, 50)):
        qkv = tensors(*lengths)
        assert_same(graph(*qkv), both(*qkv))


def test_the_compiled_object_itself_is_one_graph() -> None:
    qkv, counter = tensors(), CompileCounter()
    attention = blocks()
    assert torch.equal(torch.compile(attention, fullgraph=True, backend=counter)(*qkv),
                       attention(*qkv))  # fmt: skip
    assert (counter.frame_count, counter.op_count) == (1, 3)  # the op, and its two results


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_a_training_step_through_inductor_gives_the_gradients_of_an_eager_one() -> None:
    layer, qkv = Layer(blocks()), tensors()

    def step(forward: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in qkv]
        loss = forward(*leaves).square().sum()
        return [loss, *torch.autograd.grad(loss, [*leaves, *layer.parameters()])]

    got = step(torch.compile(layer, fullgraph=True))
    for a, b in zip(got, step(layer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("how", "graphs"), [("dynamic", 1), ("marked", 1), ("automatic", 2)])
def test_lengths_share_graphs(how: str, graphs: int) -> None:
    attention, counter = blocks(), CompileCounter()
    dynamic = True if how == "dynamic" else None
    graph = torch.compile(
        lambda *qkv: attention(*qkv), fullgraph=True, backend=counter, dynamic=dynamic
    )
    for length in (20, 33, 47, 64, 100):
        qkv = tensors(length, length + 7)
        for x in qkv if how == "marked" else ():
            torch._dynamo.mark_dynamic(x, 2)
        assert torch.equal(graph(*qkv), attention(*qkv))
    assert counter.frame_count == graphs


def test_equal_compiles_share_a_graph_and_others_do_not() -> None:
    counter, qkv = CompileCounter(), tensors()
    graph = torch.compile(lambda attention, *qkv: attention(*qkv), fullgraph=True, backend=counter)
    quests = sp.compile(quest(page=8, budget=16), backend="reference")
    for attention, graphs in ((blocks(), 1), (blocks(), 1), (quests, 2), (blocks(), 2)):
        assert torch.equal(graph(attention, *qkv), attention(*qkv))
        assert counter.frame_count == graphs


def test_a_scale_is_a_constant_of_the_graph() -> None:
    attention, counter, qkv = blocks(), CompileCounter(), tensors()
    graph = torch.compile(
        lambda scale: attention(*qkv, scale=scale), fullgraph=True, backend=counter
    )
    for scale in (None, 0.5, 2, 0.25, 0.5):
        assert torch.equal(graph(scale), attention(*qkv, scale=scale))
    assert counter.frame_count == 4


def test_the_graph_of_the_triton_backend_gives_what_an_eager_call_gives() -> None:
    qkv = tuple(x.to(device_of("triton")) for x in tensors(30, 30))
    attention = sp.compile(streaming_llm(sinks=2, recent=9), backend="triton")
    graph = torch.compile(
        lambda *qkv: attention(*qkv, return_lse=True), fullgraph=True, backend="aot_eager"
    )
    assert_same(graph(*qkv), attention(*qkv, return_lse=True))
    with torch.no_grad():
        leaves = [x.clone().requires_grad_() for x in qkv]
        assert_same(graph(*leaves), attention(*qkv, return_lse=True))


# ---- opcheck -------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs_gradient", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("layout", ["plain", "swapped"])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_the_op_passes_the_checks_of_torch(rows: int, layout: str, needs_gradient: bool) -> None:
    attention = blocks()
    qkv = tensors(rows, 41, hq=6, d=80)
    if layout == "swapped":
        qkv = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)
    given = [x.requires_grad_(needs_gradient) for x in qkv]
    torch.library.opcheck(OP.default, (*given, [], attention.handle, None))


def test_the_op_passes_the_checks_of_torch_with_tables() -> None:
    table = torch.randn(4, 50, requires_grad=True)
    for pattern in (biased(table=table), documents(names=torch.arange(50) // 9)):
        attention = sp.compile(pattern, backend="reference")
        given = [x.requires_grad_() for x in tensors(50, 50)]
        torch.library.opcheck(OP.default, (*given, attention.tables, attention.handle, 0.2))


def test_the_backward_op_passes_the_checks_of_torch() -> None:
    """The check runs it in a graph without a backward of its own, below autograd: zeros came of
    that once."""
    attention = sp.compile(biased(table=torch.randn(4, 50)), backend="reference")
    q, k, v = tensors(50, 50)
    given = (torch.randn_like(q), torch.randn(1, 4, 50), q, k, v, attention.tables)
    wanted = [True, False, True, True]
    backward = torch.ops.spcomp.attend_backward
    torch.library.opcheck(backward.default, (*given, attention.handle, None, wanted))
    want = backward(*given, attention.handle, None, wanted)
    assert all(bool(x.any()) for x in want)
    with torch.inference_mode():
        assert_same(backward(*given, attention.handle, None, wanted), want)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_gives_the_gradients_of_tensors_and_float_tables(backend: str) -> None:
    table = torch.randn(4, 50, requires_grad=True)
    attention = sp.compile(biased(table=table), backend="reference")
    given = [x.requires_grad_() for x in tensors(50, 50)]

    def loss(*qkv: Tensor) -> Tensor:
        out, lse = attention(*qkv, return_lse=True)
        return out.square().sum() + lse.cos().sum()

    graph = torch.compile(loss, fullgraph=True, backend=backend)
    want = torch.autograd.grad(loss(*given), [*given, table])
    assert all(bool(x.any()) for x in want)
    for got, x in zip(torch.autograd.grad(graph(*given), [*given, table]), want, strict=True):
        torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


def test_gradients_agree_with_differences_to_the_second_order() -> None:
    attention = blocks()
    given = [x.requires_grad_() for x in tensors(6, 6, d=4, dtype=torch.float64)]

    def call(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = OP(*qkv, [], attention.handle, None)
        return out, lse

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


def test_a_row_that_sees_nothing_has_no_gradient() -> None:
    attention = blocks()
    q, k, v = (x.requires_grad_() for x in tensors(8, 3))
    out, lse = OP(q, k, v, [], attention.handle, None)
    assert bool((lse[:, :, :5] == -torch.inf).all())
    (gradient,) = torch.autograd.grad(out.sum() + lse[:, :, 5:].sum(), q)
    assert not gradient[:, :, :5].any()
    assert bool(gradient.isfinite().all())


def test_integer_tables_have_no_gradient_and_are_no_hindrance() -> None:
    attention = sp.compile(documents(names=torch.arange(50) // 9), backend="reference")
    q, k, v = tensors(50, 50)
    q.requires_grad_()
    graph = torch.compile(lambda q: attention(q, k, v), fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(graph(q).sum(), q)
    (want,) = torch.autograd.grad(attention(q, k, v).sum(), q)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_table_of_floats_that_only_selects_has_a_gradient_of_zero() -> None:
    table = torch.randn(50, requires_grad=True)
    attention = sp.compile(documents(names=table), backend="reference")
    q, k, v = (x.requires_grad_() for x in tensors(50, 50))
    graph = torch.compile(attention, fullgraph=True, backend="aot_eager")
    of_q, of_table = torch.autograd.grad(graph(q, k, v).square().sum(), (q, table))
    torch.testing.assert_close(
        of_q, torch.autograd.grad(attention(q, k, v).square().sum(), q)[0], rtol=1e-5, atol=1e-5
    )
    assert not of_table.any()


def test_a_gradient_of_a_backend_without_a_backward_is_refused_in_a_graph_too() -> None:
    qkv = [x.to(device_of("triton")) for x in tensors()]
    qkv[1].requires_grad_()
    attention = sp.compile(streaming_llm(sinks=2, recent=9), backend="triton")
    text = "NeedsGradient: k requires a gradient, and the triton backend has no backward."
    with pytest.raises(NeedsGradient, match=text):
        OP(*qkv, [], attention.handle, None)
    graph = torch.compile(lambda: attention(*qkv), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=text):
        graph()


# ---- wrong calls ---------------------------------------------------------------------------------

WRONG: list[tuple[type[sp.SpcompError], Callable[[], Qkv]]] = [
    (HeadsDoNotDivide, lambda: tensors(hq=5)),
    (DtypeMix, lambda: (tensors()[0].half(), *tensors()[1:])),
    (LastStrideNotOne, lambda: (tensors()[0], tensors(16, 16, d=50)[1].mT, tensors()[2])),
]


@pytest.mark.parametrize(("error", "wrong"), WRONG, ids=lambda x: getattr(x, "__name__", ""))
def test_a_wrong_call_is_refused_when_it_is_traced(
    error: type[sp.SpcompError], wrong: Callable[[], Qkv]
) -> None:
    attention, qkv = blocks(), wrong()
    with pytest.raises(error) as eager:
        attention(*qkv)
    with pytest.raises(error) as faked:
        attention(*(x.to("meta") for x in qkv))
    assert str(faked.value) == str(eager.value)
    ran = []
    graph = torch.compile(
        lambda *qkv: attention(*qkv), fullgraph=True, backend=lambda g, _: ran.append(g) or g
    )
    with pytest.raises(RuntimeError, match=re.escape(str(eager.value).splitlines()[0])):
        graph(*qkv)
    assert not ran


def test_tensors_without_memory_give_shapes() -> None:
    q, k, v = tensors(hq=6, dtype=torch.bfloat16)
    out, lse = blocks()(*(x.to("meta") for x in (q, k, v[..., :5])), return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == ((1, 6, 40, 5), torch.bfloat16, "meta")
    assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((1, 6, 40), torch.float32, True)


def test_a_handle_of_no_pattern_is_refused() -> None:
    with pytest.raises(UnknownHandle) as caught:
        OP(*tensors(), [], "nobody-0", None)
    assert str(caught.value) == (
        "UnknownHandle: the graph names the compiled pattern 'nobody-0', which this process does "
        "not hold.\n"
        "  help: compile the same pattern with the same options, `spcomp.compile(...)`, and keep "
        "it until the graph has run once."
    )


# ---- autocast, inference mode, copies ------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [("float32",) * 3, ("bfloat16", "float32", "bfloat16")])
def test_autocast_casts_as_it_does_for_torchs_own_attention(dtypes: tuple[str, ...]) -> None:
    q, k, v = (x.to(getattr(torch, d)) for x, d in zip(tensors(), dtypes, strict=True))
    attention = blocks()
    want = attention(*(x.bfloat16() for x in (q, k, v)), return_lse=True)
    graphs = [
        torch.compile(
            lambda *qkv: attention(*qkv, return_lse=True), fullgraph=True, backend=backend
        )
        for backend in ("eager", "aot_eager")
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        peer = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        got = attention(q, k, v, return_lse=True)
        assert_same(got, want)
        for graph in graphs:
            assert_same(graph(q, k, v), want)
    assert got[0].dtype == peer.dtype == torch.bfloat16
    if dtypes[1] == dtypes[0]:
        assert graphs[1](q, k, v)[0].dtype == torch.float32  # outside, another graph


def test_autocast_leaves_float64_and_what_is_computed_in_float32() -> None:
    attention, exact = blocks(), tensors(dtype=torch.float64)
    half = [x.bfloat16().requires_grad_() for x in exact]
    want = attention(*half)
    (gradient,) = torch.autograd.grad(want.sum(), half[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(*exact), blocks()(*exact))
        assert attention(*exact).dtype == torch.float64
        single = OP(*(x.float() for x in exact), [], attention.handle, None)[0]
        assert single.dtype == torch.float32  # the op casts nothing: what calls it does
        got = OP(*half, [], attention.handle, None)[0]
        assert torch.equal(got, want)
        assert torch.equal(torch.autograd.grad(got.sum(), half[0])[0], gradient)


def test_inference_mode_changes_nothing() -> None:
    attention, qkv = blocks(), tensors()
    want = attention(*qkv)
    graph = torch.compile(lambda *qkv: attention(*qkv), fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        inside = [x.clone() for x in qkv]
        assert torch.equal(attention(*inside), want)
        assert torch.equal(graph(*inside), want)


def _saved(layer: Layer) -> Layer:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: Layer = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("twin_of", [
    copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), _saved,
], ids=["deepcopy", "pickle", "torch.save"])  # fmt: skip
def test_a_module_that_holds_one_can_be_copied(twin_of: Callable[[Layer], Layer]) -> None:
    table = torch.randn(4, 50)
    layer, qkv = Layer(sp.compile(biased(table=table), backend="reference")), tensors(50, 50)
    want = layer(*qkv)  # its plans are built, and are not copied
    twin = twin_of(layer)
    assert twin.attention.handle == layer.attention.handle
    table.zero_()
    assert torch.equal(twin(*qkv), want)
    assert not torch.equal(layer(*qkv), want)


# ---- a cache in a graph --------------------------------------------------------------------------


def test_a_cache_cuts_the_graph_and_gives_what_it_gives_without_one() -> None:
    attention = sp.compile(quest(page=8, budget=24), backend="reference")
    cache = sp.KVCache.empty(
        attention, batch=1, kv_heads=2, head_dim=16, capacity=80, dtype=torch.float32, device="cpu"
    )
    counter = CompileCounter()

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.append(k * 2, v)
        cache.rewind(1)
        out = cache.attend(q * 2, scale=0.5)
        assert isinstance(out, Tensor)
        return out + 1

    graph = torch.compile(step, backend=counter)
    q, k, v = tensors(1, 0)
    for n in (9, 2, 5, 3, 1):
        _, new_k, new_v = tensors(1, n)
        got = graph(q, new_k, new_v)
        k = torch.cat([k, new_k[:, :, :-1] * 2], dim=2)
        v = torch.cat([v, new_v[:, :, :-1]], dim=2)
        torch.testing.assert_close(got, attention(q * 2, k, v, scale=0.5) + 1)
    assert cache.length == 15
    assert 0 < counter.frame_count <= 6
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_outside_the_graph"):
        torch.compile(step, fullgraph=True, backend="eager")(q, *tensors(1, 2)[1:])
