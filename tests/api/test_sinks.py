"""Sink logits through the public calls: in graphs, their gradients, read anew, and mistakes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.errors import NeedsGradient, SpcompError
from tests import oracle
from tests.api.torch_cases import OP, assert_same, tensors
from tests.conformance.cases import device_of


@pytest.fixture(autouse=True)
def _no_graph_of_another_test() -> Iterator[None]:
    torch._dynamo.reset()
    yield


@sp.pattern
def near(q, k, v, *, sinks):
    """The last twenty keys beside sink logits."""
    return sp.attend(q, sp.gather(k, sp.window(20)), sp.gather(v, sp.window(20)), sinks=sinks)


@sp.pattern
def joined(q, k, v, *, sinks):
    """Even and odd keys in one softmax beside sink logits."""
    parts = []
    for n in range(2):
        rule = sp.mask_mod(lambda b, h, i, j, n=n: j % 2 == n)
        parts.append(sp.attend(q, sp.gather(k, rule), sp.gather(v, rule)))
    return sp.merge(*parts, sinks=sinks)


PATTERNS = {"near": near, "joined": joined}


# ---- graphs and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_gives_the_gradient_of_the_sinks(backend: str, name: str) -> None:
    sinks = torch.randn(4, requires_grad=True)
    attention = sp.compile(PATTERNS[name](sinks=sinks), backend="reference")
    given = [x.requires_grad_() for x in tensors(50, 50)]
    mask = attention.to_mask(*given[:2])

    def loss(out: Tensor, lse: Tensor) -> Tensor:
        return out.square().sum() + lse.cos().sum()

    graph = torch.compile(
        lambda *qkv: attention(*qkv, return_lse=True), fullgraph=True, backend=backend
    )
    wide = [x.detach().double().requires_grad_() for x in (*given, sinks)]
    want_loss = loss(*oracle.attention(*wide[:3], mask, sinks=wide[3]))
    want = torch.autograd.grad(want_loss, wide)
    assert all(bool(x.any()) for x in want)
    for run in (graph, lambda *qkv: attention(*qkv, return_lse=True)):
        found = torch.autograd.grad(loss(*run(*given)), [*given, sinks])
        for got, x in zip(found, want, strict=True):
            torch.testing.assert_close(got.double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_has_the_dtype_of_the_sinks(dtype: torch.dtype) -> None:
    sinks = torch.randn(4).to(dtype).requires_grad_()
    attention = sp.compile(near(sinks=sinks), backend="reference")
    q, k, v = tensors(30, 50, dtype=torch.bfloat16)
    (got,) = torch.autograd.grad(attention(q, k, v).float().sum(), sinks)
    assert (got.dtype, got.shape) == (dtype, sinks.shape)
    exact = sinks.detach().double().requires_grad_()
    out, _ = oracle.attention(q, k, v, attention.to_mask(q, k), sinks=exact)
    (want,) = torch.autograd.grad(out.sum(), exact)
    torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02 * float(want.abs().max()))


def test_the_op_passes_the_checks_of_torch_with_sinks() -> None:
    sinks = torch.randn(4, requires_grad=True)
    attention = sp.compile(joined(sinks=sinks), backend="reference")
    given = [x.requires_grad_() for x in tensors(50, 50)]
    torch.library.opcheck(OP.default, (*given, attention.tables, attention.handle, 0.2))


def test_gradients_of_sinks_agree_with_differences_to_the_second_order() -> None:
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    attention = sp.compile(near(sinks=sinks), backend="reference")
    given = [x.requires_grad_() for x in tensors(5, 6, hq=2, hkv=1, d=3, dtype=torch.float64)]

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = OP(q, k, v, [sinks], attention.handle, None)
        return out, lse

    assert torch.autograd.gradcheck(call, (*given, sinks))
    assert torch.autograd.gradgradcheck(call, (*given, sinks))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_sinks_are_read_at_each_call(backend: str) -> None:
    device = device_of(backend)
    sinks = torch.zeros(4, device=device)
    attention = sp.compile(near(sinks=sinks), backend=backend)
    q, k, v = (x.to(device) for x in tensors(30, 30))
    for value in (0.0, 2.0, -torch.inf):
        sinks.fill_(value)
        want, _ = oracle.attention(q.cpu(), k.cpu(), v.cpu(), near_mask(30), sinks=sinks.cpu())
        torch.testing.assert_close(attention(q, k, v).cpu().double(), want, rtol=0, atol=1e-5)


def near_mask(n: int) -> Tensor:
    return oracle.window_mask(n, n, 20)


def test_the_triton_backend_refuses_the_gradient_of_sinks() -> None:
    device = device_of("triton")
    sinks = torch.zeros(4, device=device, requires_grad=True)
    attention = sp.compile(near(sinks=sinks), backend="triton")
    qkv = [x.to(device) for x in tensors(20, 20)]
    with pytest.raises(NeedsGradient, match="the table table0 requires a gradient"):
        attention(*qkv)
    with torch.no_grad():
        assert bool(attention(*qkv).isfinite().all())


@pytest.mark.parametrize("layout", ["strided", "expanded", "shifted"])
def test_any_layout_of_the_sinks_gives_the_same(layout: str) -> None:
    device = device_of("triton")
    values = torch.full((6,), 1.5) if layout == "expanded" else torch.randn(6)
    values = values.to(device)
    laid = {
        "strided": lambda: values.repeat_interleave(3)[::3],
        "expanded": lambda: values[:1].expand(6),
        "shifted": lambda: torch.cat([values[:1], values])[1:],
    }[layout]()
    qkv = [x.to(device) for x in tensors(33, 40, hq=6)]
    runs = [sp.compile(near(sinks=s), backend="triton")(*qkv) for s in (values, laid)]
    assert torch.equal(*runs)


def test_one_tensor_may_be_sinks_and_a_table_of_a_rule() -> None:
    device = device_of("triton")
    table = torch.tensor([3.0, 20.0, 5.0, 9.0], device=device)

    @sp.pattern
    def both(q, k, v):
        rule = sp.mask_mod(lambda b, h, i, j: i - j < table[h])
        return sp.attend(q, sp.gather(k, rule), sp.gather(v, rule), sinks=table)

    qkv = [x.to(device) for x in tensors(30, 30)]
    got = sp.compile(both(), backend="triton")(*qkv).cpu()
    qkv = [x.cpu() for x in qkv]
    i, j = torch.arange(30)[:, None], torch.arange(30)
    mask = (j <= i) & (i - j < table.cpu()[:, None, None])
    want, _ = oracle.attention(*qkv, mask, sinks=table.cpu())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_a_copy_has_sinks_of_its_own() -> None:
    sinks = torch.randn(4)
    attention = sp.compile(near(sinks=sinks), backend="reference")
    qkv = tensors(20, 20)
    want = attention(*qkv, return_lse=True)
    twin = copy.deepcopy(attention)
    sinks.fill_(torch.inf)
    assert_same(twin(*qkv, return_lse=True), want)
    assert not attention(*qkv).any()


# ---- decode --------------------------------------------------------------------------------------


@sp.pattern
def pages(q, k, v, *, sinks):
    """Decode over pages, whose keys are split over programs."""
    units = sp.cached(sp.downsample(k, block=16, by="minmax"))
    best = sp.topk(sp.score(q, units, heads="group"), k=3, always=sp.own())
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best), sinks=sinks)


@pytest.mark.parametrize("splits", [1, 3])
def test_sinks_count_once_however_decode_is_split(splits: int) -> None:
    device = device_of("triton")
    sinks = torch.tensor([1.0, -torch.inf, 4.0, 0.0, -2.0, 2.0], device=device)
    axes = {"attend_gather": {"max_splits": splits, "block_k": 16}}
    attention = sp.compile(pages(sinks=sinks), backend="triton", axes=axes)
    q, k, v = (x.to(device) for x in tensors(1, 90, hq=6))
    plan = attention.built(q, k, v).plan
    assert plan is not None
    assert [x.kernel for x in plan.launches() if getattr(x, "sinks_buf", "")] == ["merge"]
    out, lse = attention(q, k, v, return_lse=True)
    q, k, v, sinks = (x.cpu() for x in (q, k, v, sinks))
    mask = sp.compile(pages(sinks=sinks), backend="reference").to_mask(q, k)
    want, want_lse = oracle.attention(q, k, v, mask, sinks=sinks)
    assert oracle.error(out.cpu(), want) <= 1e-5
    assert oracle.error(lse.cpu(), want_lse) <= 1e-5


def test_a_cache_attends_beside_sinks() -> None:
    sinks = torch.randn(4)
    attention = sp.compile(pages(sinks=sinks), backend="reference")
    cache = sp.KVCache.empty(
        attention, batch=1, kv_heads=2, head_dim=16, capacity=80, dtype=torch.float32, device="cpu"
    )
    q, k, v = tensors(1, 70)
    cache.append(k, v)
    torch.testing.assert_close(cache.attend(q), attention(q, k, v))


# ---- mistakes ------------------------------------------------------------------------------------


def text_of(action: Callable[[], Any]) -> str:
    """Give the whole text of the error, the place's file and line replaced by PLACE."""
    with pytest.raises(SpcompError) as caught:
        action()
    return re.sub(r"--> \S+:\d+", "--> PLACE", str(caught.value))


LINE = (
    "  --> PLACE:  return sp.attend(q, sp.gather(k, sp.window(20)), sp.gather(v, sp.window(20)), "
    "sinks=sinks)\n"
)


@pytest.mark.parametrize(
    ("sinks", "given"),
    [
        (torch.zeros(1, 4), "float32[1, 4]"),
        (torch.zeros(()), "float32[]"),
        (torch.zeros(4, dtype=torch.int32), "int32[4]"),
        (torch.zeros(4, dtype=torch.bool), "bool[4]"),
    ],
    ids=str,
)
def test_sinks_that_are_no_list_of_logits_are_refused(sinks: Tensor, given: str) -> None:
    assert text_of(lambda: sp.compile(near(sinks=sinks))) == (
        "WrongStage: attend takes one logit a query head, [Hq] of float32, float16, bfloat16, "
        f"float64, as its sinks, but was given a tensor {given}.\n"
        f"{LINE}"
        "  help: a sink logit is a float and is the same for every query row of its head."
    )


def test_sinks_that_are_no_tensor_are_refused() -> None:
    assert text_of(lambda: near(sinks=[0.0, 1.0])) == (
        "WrongStage: attend takes a tensor of one logit a query head, [Hq], as its sinks, but was "
        "given a list.\n"
        f"{LINE}"
        "  help: pass torch.tensor([...]), or the parameter that holds them."
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_sinks_of_other_heads_are_refused_at_the_call(backend: str) -> None:
    attention = sp.compile(near(sinks=torch.zeros(2)), backend=backend)
    assert text_of(lambda: attention(*tensors())) == (
        "ShapeMismatch: the sinks of shape [2] and q with Hq = 4 do not agree: a sink is one logit "
        "of one query head.\n"
        f"{LINE}"
        "  help: pass 4 sinks; sink.expand(4) shares one between heads."
    )


def test_sinks_on_another_device_are_refused_at_the_call() -> None:
    attention = sp.compile(near(sinks=torch.zeros(4, device="meta")))
    assert text_of(lambda: attention(*tensors())).startswith(
        "DeviceClash: the pattern's tensor table0 is on meta and q is on cpu."
    )


@pytest.mark.parametrize("kind", ["attend", "merge"])
def test_a_part_of_a_merge_with_sinks_of_its_own_is_refused(kind: str) -> None:
    logits = torch.zeros(4)

    @sp.pattern
    def twice(q, k, v):
        part = (near if kind == "attend" else joined)(q, k, v, sinks=logits)
        rest = sp.attend(q, sp.gather(k, sp.sink(2)), sp.gather(v, sp.sink(2)))
        return sp.merge(rest, part)

    assert text_of(twice) == (
        f"WrongStage: merge takes parts of one softmax as its parts, but was given the result of "
        f"{kind} with sinks of its own.\n"
        "  --> PLACE:  return sp.merge(rest, part)\n"
        "  help: give the sinks to the merge, which counts them once: merge(..., sinks=s)."
    )


def test_the_ascendc_backend_refuses_sinks_by_name() -> None:
    logits = torch.zeros(4)

    @sp.pattern
    def listed(q, k, v):
        best = sp.topk(sp.score(q, sp.downsample(k, block=16)), k=2)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best), sinks=logits)

    qkv = tensors(20, 40, d=64, dtype=torch.float16)
    attention = sp.compile(listed(), backend="ascendc")
    assert re.sub(r"\n  --> .*", "", text_of(lambda: attention(*qkv))) == (
        "Refused: the ascendc backend refuses sink logits: its template ends the softmax without "
        "them.\n"
        "  help: use backend='reference'."
    )


# ---- beside gates --------------------------------------------------------------------------------


@sp.pattern
def gated(q, k, v, gates: sp.tensor("B Hq Sq 2"), *, sinks):
    """A window beside sink logits and the first keys, added by gates."""
    near_ = sp.attend(q, sp.gather(k, sp.window(20)), sp.gather(v, sp.window(20)), sinks=sinks)
    return sp.merge(
        near_, sp.attend(q, sp.gather(k, sp.sink(6)), sp.gather(v, sp.sink(6))), gates=gates
    )


@pytest.mark.parametrize("rows", [50, 3])
def test_a_part_that_gates_join_has_its_own_sinks(rows: int) -> None:
    sinks = torch.randn(4)
    q, k, v = tensors(rows, 50)
    gates = torch.rand(q.shape[0], 4, rows, 2)
    first, second = gates.double()[..., None].unbind(3)
    close, _ = oracle.attention(q, k, v, oracle.window_mask(rows, 50, 20), sinks=sinks)
    early, _ = oracle.attention(q, k, v, oracle.causal_mask(rows, 50) & (torch.arange(50) < 6))
    device = device_of("triton")
    for backend in ("reference", "triton"):
        attention = sp.compile(gated(sinks=sinks.to(device)), backend=backend)
        out = attention(*(x.to(device) for x in (q, k, v)), gates=gates.to(device))
        assert oracle.error(out.cpu(), first * close + second * early) < 1e-5


def test_sinks_of_a_merge_by_gates_are_refused() -> None:
    @sp.pattern
    def wrong(q, k, v, gates: sp.tensor("B Hq Sq 2"), *, sinks):
        part = sp.attend(q, k, v)
        return sp.merge(part, part, gates=gates, sinks=sinks)

    with pytest.raises(SpcompError, match="none beside gates"):
        wrong(sinks=torch.randn(4))
