"""Calls with tensors beside q, k and v: their checks, copies, caches, gradients and graphs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp import compiler
from spcomp.backends.triton import launcher
from tests import oracle
from tests.api.input_cases import (
    BACKENDS,
    a_call,
    a_decode_call,
    gated,
    indexed,
    joined,
    outer,
    part_masks,
    qkv,
    text_of,
)
from tests.api.torch_cases import OP
from tests.conformance.cases import device_of

# ---- calls ---------------------------------------------------------------------------------------


WRONG_CALLS = {
    "missing": (
        {"gates": None},
        "MissingTensor: the pattern 'gated' takes the tensor gates [B, Hq, Sq, 3], and the call "
        "gives none.\n"
        "  help: pass gates=... by keyword.",
    ),
    "no tensor": (
        {"gates": [1.0]},
        "MissingTensor: the pattern 'gated' takes the tensor gates [B, Hq, Sq, 3], and the call "
        "gives a list.\n"
        "  help: pass gates=... by keyword.",
    ),
    "unknown": (
        {"gate": torch.rand(3)},
        "UnknownTensor: the call gives the tensor gate, which the pattern 'gated' does not take.\n"
        "  help: it takes gates [B, Hq, Sq, 3].",
    ),
    "rank": (
        {"gates": torch.rand(4, 20, 3)},
        "ShapeMismatch: gates with shape [4, 20, 3] and the form [B, Hq, Sq, 3] do not agree: "
        "4 dimensions are needed.\n"
        "  help: gates is [B, Hq, Sq, 3].",
    ),
    "number": (
        {"gates": torch.rand(2, 4, 20, 2)},
        "ShapeMismatch: gates with shape [2, 4, 20, 2] and the form [B, Hq, Sq, 3] do not agree: "
        "3 is declared and 2 given.\n"
        "  help: gates is [B, Hq, Sq, 3].",
    ),
    "length": (
        {"gates": torch.rand(2, 4, 30, 3)},
        "ShapeMismatch: gates with shape [2, 4, 30, 3] and q, k and v do not agree: "
        "Sq is 30 in the first and 20 in the second.\n"
        "  help: gates is [B, Hq, Sq, 3].",
    ),
    "dtype": (
        {"gates": torch.rand(2, 4, 20, 3).half()},
        "DtypeMix: q is float32 and gates is float16.\n"
        "  help: cast them to one of float32, float16, bfloat16 before the call.",
    ),
    "device": (
        {"gates": torch.rand(2, 4, 20, 3, device="meta")},
        "DeviceClash: q is on cpu and gates is on meta.\n  help: move them to one device.",
    ),
    "stride": (
        {"gates": torch.rand(2, 4, 3, 20).transpose(2, 3)},
        "LastStrideNotOne: gates has stride 20 in its last dimension, where 1 is needed.\n"
        "  help: call gates.contiguous() first; other strides are free.",
    ),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_wrong_tensor_is_refused_by_a_sentence(case: str) -> None:
    change, text = WRONG_CALLS[case]
    attention = sp.compile(gated(), backend="reference")
    attention(**a_call())  # what passed before changes nothing
    assert text_of(lambda: attention(**a_call(**change))) == text


def test_a_dim_of_two_sizes_and_a_wrong_fixed_dtype_are_refused() -> None:
    q, k, v = qkv(1, 4, 2, 20, 30, 16)
    iq, ik = torch.randn(1, 6, 20, 24), torch.randn(1, 1, 30, 25)
    attention = sp.compile(indexed())
    assert text_of(lambda: attention(q, k, v, iq=iq, ik=ik)) == (
        "ShapeMismatch: ik with shape [1, 1, 30, 25] and iq do not agree: "
        "Di is 25 in the first and 24 in the second.\n"
        "  help: ik is [B, 1, Skv, Di]."
    )
    empty = {"iq": iq[:, :0], "ik": ik[..., :24].contiguous()}
    assert "Hi is 0, where 1 or more is needed" in text_of(lambda: attention(q, k, v, **empty))
    g, mix = torch.rand(1, 4, 20, 3), torch.rand(1, 4, 20, 2).half()
    assert text_of(lambda: sp.compile(outer())(q, k, v, g=g, mix=mix)) == (
        "WrongDtype: mix is float16, where the pattern takes float32.\n"
        "  help: cast it before the call."
    )


def test_a_pattern_without_tensors_refuses_one() -> None:
    attention = sp.compile(sp.pattern(lambda q, k, v: sp.attend(q, k, v)))
    q, k, v = qkv(1, 2, 1, 8, 8, 16)
    assert text_of(lambda: attention(q, k, v, bias=q)) == (
        "UnknownTensor: the call gives the tensor bias, which the pattern '<lambda>' does not "
        "take.\n"
        "  help: it takes q, k and v alone."
    )


def test_a_call_is_checked_again_when_its_tensors_change_form() -> None:
    attention = sp.compile(gated(), backend="reference")
    call = a_call()
    attention(**call)
    attention(**call)
    shorter = {**call, "gates": call["gates"][:, :, :19]}
    assert "Sq is 19" in text_of(lambda: attention(**shorter))


def test_an_equal_call_prepares_nothing_again() -> None:
    device = device_of("triton")
    attention = sp.compile(gated(), backend="triton")
    call = a_decode_call(device)
    attention(**call)
    before = launcher.STATS.prepared
    call["gates"] = call["gates"].clone()
    attention(**call)
    assert launcher.STATS.prepared == before


def test_explain_and_copies_know_the_tensors() -> None:
    device = device_of("triton")
    call = a_decode_call(device)
    attention = sp.compile(gated(size=5), backend="triton")
    assert "merge" in attention.explain(**call)
    want = attention(**call)
    for made in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(made(**call), want)


def test_autocast_casts_what_is_declared_to_be_data() -> None:
    q, k, v = qkv(1, 4, 2, 20, 30, 16)
    g, mix = torch.rand(1, 4, 20, 3), torch.rand(1, 4, 20, 2)
    attention = sp.compile(outer(), backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v, g=g, mix=mix)
    want = attention(*(x.bfloat16() for x in (q, k, v)), g=g.bfloat16(), mix=mix)
    assert torch.equal(out, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_passes_gates_on_and_refuses_keys_it_does_not_keep(backend: str) -> None:
    device = device_of(backend)

    @sp.pattern
    def paged(q, k, v, gates: sp.tensor("B Hq Sq 2")):
        pages = sp.cached(sp.downsample(k, block=8, by="minmax"))
        best = sp.topk(sp.score(q, pages), k=2, always=sp.own())
        parts = (best, sp.window(5))
        return sp.merge(
            *[sp.attend(q, sp.gather(k, s), sp.gather(v, s)) for s in parts], gates=gates
        )

    attention = sp.compile(paged(), backend=backend)
    options = {"batch": 1, "kv_heads": 2, "head_dim": 16, "capacity": 40, "device": device}
    cache = sp.KVCache.empty(attention, dtype=torch.float32, **options)
    q, k, v = (x.to(device) for x in qkv(1, 4, 2, 3, 30, 16))
    gates = torch.rand(1, 4, 3, 2, device=device)
    cache.append(k[:, :, :27], v[:, :, :27])
    cache.append(k[:, :, 27:], v[:, :, 27:])
    got = cache.attend(q, gates=gates)
    torch.testing.assert_close(got, attention(q, k, v, gates=gates), rtol=0, atol=1e-6)
    assert text_of(lambda: sp.KVCache.empty(sp.compile(indexed()), **options)) == (
        "CannotLower: a cache for the tensor ik [B, 1, Skv, Di] cannot be lowered: it keeps keys "
        "and values alone.\n"
        "  help: keep its keys yourself and call the compiled pattern with k and v."
    )


def test_the_ascend_backend_refuses_tensors_of_a_call_by_name() -> None:
    pattern = indexed(rows=16)
    shape = {"Sq": 64, "D": 64, "Dv": 64, "Di": 64}
    text = text_of(lambda: compiler.plan_for(pattern, shape, "float16", None, {}, "ascend910b"))
    assert "refuses the tensor iq of a call: none of its kernels reads it" in text


# ---- gradients and graphs ------------------------------------------------------------------------


def test_gradients_reach_the_gates() -> None:
    q, k, v = (x.double().requires_grad_() for x in qkv(2, 4, 2, 13, 22, 8))
    gates = torch.randn(2, 4, 13, 3).double().requires_grad_()
    out, lse = sp.compile(gated(), backend="reference")(q, k, v, gates=gates, return_lse=True)
    w, u = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out * w).sum() + (lse * u).sum(), (q, k, v, gates))
    results = [oracle.attention(q, k, v, m) for m in part_masks(q, k)]
    want_out, want_lse = joined(results, gates)
    want = torch.autograd.grad((want_out * w).sum() + (want_lse * u).sum(), (q, k, v, gates))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_gradient_of_gates_is_refused_where_there_is_no_backward() -> None:
    call = a_decode_call(device_of("triton"))
    call["gates"].requires_grad_()
    attention = sp.compile(gated(), backend="triton")
    assert text_of(lambda: attention(**call)).startswith(
        "NeedsGradient: gates requires a gradient, and the triton backend has no backward."
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_takes_gates_and_gives_their_gradients(backend: str) -> None:
    torch._dynamo.reset()
    attention = sp.compile(gated(), backend="reference")
    call = a_call()
    gates = call.pop("gates").requires_grad_()

    def run(q: Tensor, k: Tensor, v: Tensor, raw: Tensor) -> Tensor:
        return attention(q, k, v, gates=raw.sigmoid())

    graph = torch.compile(run, fullgraph=True, backend=backend)
    got, want = graph(**call, raw=gates), run(**call, raw=gates)
    assert torch.equal(got, want)
    (a,), (b,) = (torch.autograd.grad(x.square().sum(), gates) for x in (got, want))
    assert bool(a.any())
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_op_is_sound_with_gates() -> None:
    attention = sp.compile(gated(), backend="reference")
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 1, 6, 20, 8))
    gates = torch.rand(1, 2, 6, 3, requires_grad=True)
    torch.library.opcheck(OP.default, (q, k, v, [gates], attention.handle, None))
    meta = attention(*(x.detach().to("meta") for x in (q, k, v)), gates=gates.detach().to("meta"))
    assert meta.shape == q.shape
    wrong = gates.detach().to("meta")[..., :2]
    moved = [x.detach().to("meta") for x in (q, k, v)]
    assert "3 is declared and 2 given" in text_of(lambda: attention(*moved, gates=wrong))
