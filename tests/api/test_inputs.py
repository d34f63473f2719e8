"""Tensors a call brings beside q, k and v: gates that join results, and sides of a score."""

from __future__ import annotations

import copy
import pickle
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.backends.triton import launcher
from spcomp.errors import SpcompError
from tests import oracle
from tests.api.torch_cases import OP
from tests.conformance.cases import device_of

BACKENDS = ("reference", "triton")
NEAR, SINKS, BLOCK = 9, 4, 16


@sp.pattern
def gated(q, k, v, gates: sp.tensor("B Hq Sq 3"), *, size=NEAR):
    """A window, sinks, and the best blocks, joined by gates."""
    best = sp.topk(sp.score(q, sp.downsample(k, block=BLOCK)), k=2)
    parts = (sp.window(size), sp.sink(SINKS), best)
    return sp.merge(*[sp.attend(q, sp.gather(k, s), sp.gather(v, s)) for s in parts], gates=gates)


@sp.pattern
def gated_by_rules(q, k, v, gates: sp.tensor("B Hq Sq 3")):
    parts = (sp.window(20), sp.sink(9), sp.causal())
    return sp.merge(*[sp.attend(q, sp.gather(k, s), sp.gather(v, s)) for s in parts], gates=gates)


@sp.pattern
def outer(
    q, k, v, mix: Annotated[Any, sp.tensor("B Hq Sq 2", dtype="float32")], g: sp.tensor("B Hq Sq 3")
):
    """A pattern made of another one, whose result is joined again."""
    return sp.merge(sp.attend(q, k, v, mask=sp.window(3)), gated(q, k, v, gates=g), gates=mix)


def indexer(q, k, v, iq, ik, rows, block):
    side = iq if rows == 1 else sp.downsample(iq, block=rows)
    units = sp.downsample(ik, block=block) if block > 1 else ik
    best = sp.topk(sp.score(side, units, heads="all", reduce="sum"), k=2)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


@sp.pattern
def indexed(
    q, k, v, iq: sp.tensor("B Hi Sq Di"), ik: sp.tensor("B 1 Skv Di"), *, rows=1, block=BLOCK
):
    """Blocks that the heads of an indexer choose by one head of keys, one list for all heads."""
    return indexer(q, k, v, iq, ik, rows, block)


@sp.pattern
def indexed_each(
    q, k, v, iq: sp.tensor("B Hi Sq Di"), ik: sp.tensor("B Hi Skv Di"), *, rows=1, block=BLOCK
):
    """The same where each head of the indexer has keys of its own."""
    return indexer(q, k, v, iq, ik, rows, block)


def qkv(
    b: int, hq: int, hkv: int, sq: int, skv: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    shapes = (b, hq, sq, d), (b, hkv, skv, d), (b, hkv, skv, d)
    return tuple(torch.randn(s).to(dtype) for s in shapes)


def chosen_blocks(scores: Tensor, sq: int, skv: int, block: int, keep: int) -> Tensor:
    """Mask the tokens of the `keep` best complete blocks a row, scores [B,H,Sq,U]."""
    t, last = oracle.positions(sq, skv), (torch.arange(scores.shape[3]) + 1) * block - 1
    able = last.clamp(max=skv - 1)[None, :] <= t
    ranked = scores.masked_fill(~able, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ranked[..., :keep], True) & able
    return kept.repeat_interleave(block, dim=-1)[..., :skv] & oracle.causal_mask(sq, skv)


def part_masks(q: Tensor, k: Tensor, size: int = NEAR) -> tuple[Tensor, ...]:
    sq, skv = q.shape[2], k.shape[2]
    causal, key = oracle.causal_mask(sq, skv), torch.arange(skv)
    means = oracle.pooled(k.double(), BLOCK, oracle.mean).to(k.dtype).double()
    scores = q.double() @ means.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    best = chosen_blocks(scores, sq, skv, BLOCK, 2)
    return oracle.window_mask(sq, skv, size), causal & (key < SINKS), best


def joined(results: list[tuple[Tensor, Tensor]], gates: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of a merge by gates, written out."""
    out = sum(gates[..., p, None] * o for p, (o, _) in enumerate(results))
    return out, torch.stack([lse.double() for _, lse in results]).logsumexp(0)


def assert_gated(
    got: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, gates: Tensor, size: int = NEAR
) -> None:
    """Check against float64, within twice the error of plain PyTorch."""
    masks = part_masks(q, k, size)
    want = joined([oracle.attention(q, k, v, m) for m in masks], gates.double())
    plain = joined([oracle.plain_attention(q, k, v, m) for m in masks], gates)
    wide = joined(
        [oracle.plain_attention(q.float(), k.float(), v.float(), m) for m in masks], gates
    )
    out, lse = (x.cpu() for x in got)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert oracle.error(out, want[0]) <= 2 * oracle.error(plain[0], want[0]) + oracle.TINY[q.dtype]
    assert oracle.error(lse, want[1]) <= max(2 * oracle.error(wide[1], want[1]), 1e-5)


def text_of(action: Any) -> str:
    with pytest.raises(SpcompError) as caught:
        action()
    return "\n".join(x for x in str(caught.value).splitlines() if "-->" not in x)


# ---- merges by gates -----------------------------------------------------------------------------

CASES = {
    "prefill": (2, 4, 2, 40, 53, 16, torch.float32),
    "awkward": (1, 3, 1, 129, 257, 80, torch.bfloat16),
    "empty rows": (3, 2, 2, 30, 11, 16, torch.float16),
    "one row": (2, 4, 2, 1, 77, 32, torch.bfloat16),
    "few rows": (1, 6, 2, 5, 40, 17, torch.float32),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_add_the_parts(backend: str, case: str) -> None:
    *shape, dtype = CASES[case]
    if backend == "triton" and device_of(backend) == "cpu":  # an interpreter is slow
        shape[0], shape[3], shape[4] = 1, min(shape[3], 20), min(shape[4], 37)
    q, k, v = qkv(*shape, dtype)
    gates = torch.randn(*q.shape[:3], 3).to(dtype) * 2
    attention = sp.compile(gated(), backend=backend)
    tensors = [x.to(device_of(backend)) for x in (q, k, v)]
    got = attention(*tensors, gates=gates.to(tensors[0].device), return_lse=True)
    assert_gated(got, q, k, v, gates)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_part_adds_nothing_whatever_its_gate(backend: str) -> None:
    q, k, v = (x.to(device_of(backend)) for x in qkv(1, 2, 1, 20, 12, 16))
    gates = torch.ones(1, 2, 20, 3, device=q.device)
    gates[:, :, :8] = torch.nan  # rows before the first key: every part is empty
    gates[:, :, 8:20, 2] = torch.inf  # the only block is complete for the last row alone
    gates[:, :, 19, 2] = 0.5
    out, lse = sp.compile(gated(), backend=backend)(q, k, v, gates=gates, return_lse=True)
    assert not out[:, :, :8].any() and bool((lse[:, :, :8] == -torch.inf).all())
    assert bool(out.isfinite().all()) and bool(lse[:, :, 8:].isfinite().all())
    assert bool(out[:, :, 8:].any(-1).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_of_any_strides_give_the_same_bits(backend: str) -> None:
    q, k, v = (x.to(device_of(backend)) for x in qkv(2, 2, 1, 3, 20, 16))
    attention = sp.compile(gated_by_rules(), backend=backend)
    wide = torch.randn(2, 3, 2, 7, device=q.device)
    for gates in (
        wide.transpose(1, 2)[..., 2:5],
        wide[:, :, :1, :3].transpose(1, 2).expand(-1, 2, -1, -1),
        wide[0, 0, 0, :3].expand(2, 2, 3, 3),
    ):
        got = attention(q, k, v, gates=gates)
        assert torch.equal(got, attention(q, k, v, gates=gates.contiguous()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_patterns_with_tensors_compose(backend: str) -> None:
    dtype = torch.bfloat16
    q, k, v = qkv(1, 4, 2, 3, 33, 16, dtype)
    g, mix = torch.randn(1, 4, 3, 3).to(dtype), torch.randn(1, 4, 3, 2)
    given = {"g": g, "mix": mix}
    attention = sp.compile(outer(), backend=backend)
    device = device_of(backend)
    moved = {n: t.to(device) for n, t in given.items()}
    out, lse = (
        x.cpu() for x in attention(*(x.to(device) for x in (q, k, v)), **moved, return_lse=True)
    )

    def whole(attend: Any, to: torch.dtype) -> tuple[Tensor, Tensor]:
        x = [t.to(to) for t in (q, k, v)]
        inner = joined([attend(*x, m) for m in part_masks(q, k)], g.to(to))
        first = attend(*x, oracle.window_mask(3, 33, 3))
        return joined([first, inner], mix.to(to))

    want, plain = whole(oracle.attention, torch.float64), whole(oracle.plain_attention, dtype)
    assert oracle.error(out, want[0]) <= 2 * oracle.error(plain[0], want[0]) + 1e-4
    assert oracle.error(lse, want[1]) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_may_be_a_tensor_the_pattern_keeps(backend: str) -> None:
    q, k, v = qkv(1, 2, 1, 20, 20, 16)
    device = device_of(backend)
    held = torch.rand(1, 2, 20, 2)
    kept = held.to(device)

    @sp.pattern
    def fixed(q, k, v):
        parts = (sp.window(4), sp.sink(3))
        return sp.merge(
            *[sp.attend(q, sp.gather(k, s), sp.gather(v, s)) for s in parts], gates=kept
        )

    attention = sp.compile(fixed(), backend=backend)
    out = attention(*(x.to(device) for x in (q, k, v))).cpu()
    masks = oracle.window_mask(20, 20, 4), oracle.causal_mask(20, 20) & (torch.arange(20) < 3)
    want, _ = joined([oracle.attention(q, k, v, m) for m in masks], held.double())
    assert oracle.error(out, want) <= 1e-5
    assert text_of(lambda: attention(*(x.to(device) for x in qkv(1, 2, 1, 19, 20, 16)))) == (
        "ShapeMismatch: the gates of shape [1, 2, 20, 2] and 2 parts and q do not agree: "
        "[B, Hq, Sq, parts] is [1, 2, 19, 2].\n"
        "  help: declare them as a tensor of the call where they change with it."
    )


@pytest.mark.parametrize("phase_rows", [40, 3])
@pytest.mark.parametrize("order", [None, "query_major", "gather"])
def test_the_plan_of_a_gated_merge_means_what_the_pattern_means(
    order: Any, phase_rows: int
) -> None:
    pattern = gated_by_rules() if order == "query_major" else gated()
    q, k, v = (x.double() for x in qkv(2, 4, 2, phase_rows, 50, 8))
    gates = {"gates": torch.randn(2, 4, phase_rows, 3).double()}
    axes = {"attend": {"block_q": 64}}
    plan = sp.compile(pattern, backend="reference", order=order, axes=axes)
    assert plan.built(q, k, v, **gates).plan is not None
    want = sp.compile(pattern, backend="reference")(q, k, v, **gates, return_lse=True)
    got = plan(q, k, v, **gates, return_lse=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ---- sides of a score ----------------------------------------------------------------------------


INDEXERS = {
    "tokens": indexed(block=1),
    "blocks": indexed(),
    "rows": indexed(rows=8),
    "heads": indexed_each(),
}


@pytest.mark.parametrize("sq", [19, 1])
@pytest.mark.parametrize("name", INDEXERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_indexer_chooses_by_its_own_heads_and_width(backend: str, name: str, sq: int) -> None:
    pattern, hj = INDEXERS[name], 6 if name == "heads" else 1
    values = dict(pattern.program.parameters)
    block, rows = int(values["block"]), int(values["rows"])
    q, k, v = qkv(2, 4, 2, sq, 50, 16)
    iq, ik = torch.randn(2, 6, sq, 24), torch.randn(2, hj, 50, 24)
    device = device_of(backend)
    attention = sp.compile(pattern, backend=backend)
    given = {"iq": iq.to(device), "ik": ik.to(device)}
    out, lse = (
        x.cpu() for x in attention(*(x.to(device) for x in (q, k, v)), **given, return_lse=True)
    )
    units = oracle.pooled(ik.double(), block, oracle.mean) if block > 1 else ik.double()
    queries = oracle.pooled(iq.double(), rows, oracle.mean) if rows > 1 else iq.double()
    scores = (queries @ units.transpose(-1, -2)).sum(1, keepdim=True)
    if rows == 1:
        mask = chosen_blocks(scores, sq, 50, block, 2)
    else:
        t = oracle.positions(sq, 50)[:, 0]
        latest = t[torch.minimum(torch.arange(0, sq, rows) + rows - 1, torch.tensor(sq - 1))]
        last = ((torch.arange(units.shape[2]) + 1) * block - 1).clamp(max=49)
        able = last[None, :] <= latest[:, None]
        ranked = scores.masked_fill(~able, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ranked[..., :2], True) & able
        by_row = kept.repeat_interleave(block, -1)[..., :50].repeat_interleave(rows, 2)[:, :, :sq]
        mask = by_row & oracle.causal_mask(sq, 50)
    want, want_lse = oracle.attention(q, k, v, mask.expand(2, 4, sq, 50))
    budget, budget_lse = oracle.budgets(q, k, v, mask.expand(2, 4, sq, 50))
    assert oracle.error(out, want) <= budget
    assert oracle.error(lse, want_lse) <= max(budget_lse, 1e-5)
    assert torch.equal(
        sp.compile(pattern, backend="reference").to_mask(q, k, iq=iq, ik=ik),
        mask.expand(2, 4, sq, 50),
    )


def test_a_width_is_a_constant_of_the_kernels_and_a_head_count_is_not() -> None:
    device = device_of("triton")
    attention = sp.compile(indexed(), backend="triton")

    def built(hi: int, di: int, sq: int = 1) -> Any:
        q, k, v = (x.to(device) for x in qkv(1, 2, 1, sq, 40, 16))
        own = {"iq": torch.randn(1, hi, sq, di), "ik": torch.randn(1, 1, 40, di)}
        moved = {n: t.to(device) for n, t in own.items()}
        attention(q, k, v, **moved)
        return attention.built(q, k, v, **moved)

    first = built(4, 24)
    assert built(8, 24) is first and built(4, 24, sq=2) is first
    other = built(4, 32)
    assert other is not first
    assert dict(first.spec.widths) == {"Di": 24} and dict(other.spec.widths) == {"Di": 32}
    texts = [f.text for f in first.source.files if f.kernel == "score"]
    assert "HEAD_DIM = tl.constexpr(24)" in texts[0]


# ---- calls ---------------------------------------------------------------------------------------


def a_call(**other: Any) -> dict[str, Any]:
    q, k, v = qkv(2, 4, 2, 20, 30, 16)
    return {"q": q, "k": k, "v": v, "gates": torch.rand(2, 4, 20, 3), **other}


def a_decode_call(device: str) -> dict[str, Tensor]:
    q, k, v = qkv(1, 2, 1, 1, 20, 16)
    call = {"q": q, "k": k, "v": v, "gates": torch.rand(1, 2, 1, 3)}
    return {n: t.to(device) for n, t in call.items()}


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
    from spcomp import compiler

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


# ---- declarations --------------------------------------------------------------------------------


def undeclared(q, k, v, gates):
    return sp.attend(q, k, v)


def unread(q, k, v, gates: sp.tensor("B Hq Sq 2")):
    return sp.attend(q, k, v)


def taken(q, k, v, scale: sp.tensor("B Hq Sq 2")):
    return sp.attend(q, k, v)


def misfit(q, k, v, gates: sp.tensor("B Hq Sq 2")):
    return sp.merge(sp.attend(q, k, v), gates=gates)


def numbers(q, k, v, gates: sp.tensor("B Hq Sq 1", dtype="int32")):
    return sp.merge(sp.attend(q, k, v), gates=gates)


def pooled(q, k, v, gates: sp.tensor("B Hq 4")):
    best = sp.topk(sp.score(q, sp.downsample(gates, block=2)), k=1)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


def too_many_lists(q, k, v, iq: sp.tensor("B Hi Sq D")):
    best = sp.topk(sp.score(iq, sp.downsample(k, block=4)), k=1)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


def of_other_width(q, k, v, iq: sp.tensor("B Hq Sq Di")):
    best = sp.topk(sp.score(iq, k), k=1)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


def as_keys(q, k, v, other: sp.tensor("B Hkv Skv D")):
    return sp.attend(q, sp.downsample(other, block=2), sp.downsample(v, block=2))


def swapped(q, k, v, iq: sp.tensor("B Hq Sq D")):
    best = sp.topk(sp.score(k, iq), k=1)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


WRONG_PATTERNS = {
    undeclared: (
        "BadDeclaration: the parameter gates of 'undeclared' stands beside q, k and v and declares "
        "no tensor.\n"
        "  help: give gates: tensor('B Hq Sq 3'), or make it a hyper-parameter behind *."
    ),
    unread: "WrongArguments: the pattern 'unread' takes gates and does not read it.",
    taken: (
        "BadDeclaration: the parameter scale of 'taken' has a name that is taken by spcomp.\n"
        "  help: give another name."
    ),
    misfit: (
        "WrongStage: merge takes a float tensor [B, Hq, Sq, 1], one value for each part, as its "
        "gates, but was given a tensor of data[B, Hq, Sq, 2].\n"
        "  help: declare it with tensor('B Hq Sq 1')."
    ),
    numbers: "but was given a tensor of int32[B, Hq, Sq, 1].",
    pooled: (
        "WrongStage: downsample takes tokens, [B, heads, Sq or Skv, width], as its x, but was "
        "given a tensor of data[B, Hq, 4]."
    ),
    too_many_lists: (
        "CannotLower: a score of Hi heads of rows by Hkv heads of units cannot be lowered: each "
        "head of the units must serve as many heads of the rows.\n"
        "  help: give the units 1 head, or as many as the rows have."
    ),
    of_other_width: (
        "CannotLower: a score of data rows of width Di by data units of width D cannot be lowered: "
        "their product needs one width and one dtype.\n"
        "  help: declare both sides with the same last dim and dtype."
    ),
    as_keys: (
        "WrongStage: attend takes keys and values as its streams, but was given a further tensor "
        "as keys and a value tensor as values."
    ),
    swapped: "but was given something made from the key input.",
}


@pytest.mark.parametrize("function", WRONG_PATTERNS, ids=lambda f: f.__name__)
def test_a_wrong_declaration_or_use_is_refused_when_compiled(function: Any) -> None:
    made = sp.pattern(function)
    assert WRONG_PATTERNS[function] in text_of(lambda: sp.compile(made))


def test_a_list_for_each_head_of_an_indexer_is_refused() -> None:
    @sp.pattern
    def lists(q, k, v, iq: sp.tensor("B Hi Sq Di"), ik: sp.tensor("B Hi Skv Di")):
        best = sp.topk(sp.score(iq, ik), k=1)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    assert text_of(lambda: sp.compile(lists())) == (
        "CannotLower: a score with a list for each of Hi heads cannot be lowered: attention reads "
        "one list for all heads, for each KV head or for each query head.\n"
        '  help: join the heads: score(..., heads="all", reduce="sum").'
    )


WRONG_FORMS = {
    "": "BadDeclaration: tensor('') names no dims.",
    "B Hq 0": "has the dim '0', which is neither a number of 1 or more nor a name",
    "B heads": "has the dim 'heads', which is neither a number of 1 or more nor a name",
    "B R": "has the dim 'R', which is taken by spcomp",
    "B E": "has the dim 'E', which is taken by spcomp",
    "B 2*D": "has the dim '2*D', which is neither a number of 1 or more nor a name",
}


@pytest.mark.parametrize("form", WRONG_FORMS)
def test_a_wrong_form_is_refused_by_a_sentence(form: str) -> None:
    assert WRONG_FORMS[form] in text_of(lambda: sp.tensor(form))


def test_an_unknown_dtype_is_refused() -> None:
    assert text_of(lambda: sp.tensor("B", dtype="float8")) == (
        "BadDeclaration: tensor('B', dtype='float8') names an unknown dtype.\n"
        "  help: give one of data, float32, float16, bfloat16, int32."
    )
