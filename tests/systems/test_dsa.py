"""DSA against a second opinion written from its paper: the tokens each query reads first, exact
where scores tie at zero, then the attention over them, its gradients, plans and kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp import compiler
from spcomp.api import Attention
from spcomp.backends import registry
from spcomp.backends.base import Specialisation
from spcomp.backends.reference.pattern import lists
from spcomp.backends.reference.plan import run_plan
from spcomp.backends.triton import layouts
from spcomp.patterns.dsa import dsa
from tests import oracle
from tests.api.input_cases import text_of
from tests.conformance.cases import device_of

SHAPES = [  # B, Hq, Hkv, Hi, Sq, Skv, D, Di
    (1, 1, 1, 1, 60, 60, 8, 8),
    (3, 3, 1, 3, 129, 257, 20, 12),
    (2, 4, 2, 16, 70, 70, 16, 32),
    (1, 16, 1, 3, 1, 211, 8, 16),
    (1, 2, 1, 16, 90, 40, 8, 8),
    (2, 6, 6, 1, 7, 33, 80, 24),
]
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
"""How near two scores, as a share of the terms of their sums, may be decided either way."""

RUNS: dict[str, dict[str, Any]] = {
    "reference": {"backend": "reference"},
    "plan": {"backend": "reference", "order": "gather"},
    "triton": {"backend": "triton"},
}


def index_scores(iq: Tensor, ik: Tensor, iw: Tensor) -> tuple[Tensor, Tensor]:
    """Give I(t,u) [B,Sq,Skv] without its positive factor, and the sum of the sizes of its terms,
    float64: head after head, as the formula reads."""
    iq, ik, iw = (x.double() for x in (iq, ik, iw))
    batch, heads, sq, _ = iq.shape
    total = torch.zeros(batch, sq, ik.shape[2], dtype=torch.float64)
    size = torch.zeros_like(total)
    for j in range(heads):
        term = torch.einsum("btd,bud->btu", iq[:, j], ik[:, 0])
        term = torch.where(term > 0, term, 0.0) * iw[:, j, :, None]
        total, size = total + term, size + term.abs()
    return total, size


def kept_tokens(
    iq: Tensor, ik: Tensor, iw: Tensor, k_tokens: int, close: float
) -> tuple[Tensor, Tensor]:
    """Give the tokens of each query, bool [B,Sq,Skv], and the rows that rounding may decide: those
    where the last token kept and the best one left are near, but not where both are exactly 0."""
    total, size = index_scores(iq, ik, iw)
    batch, sq, skv = total.shape
    kept = torch.zeros(total.shape, dtype=torch.bool)
    unsure = torch.zeros(batch, sq, dtype=torch.bool)
    for b in range(batch):
        for row in range(sq):
            seen = range(max(0, row + skv - sq + 1))
            values, sizes = total[b, row].tolist(), size[b, row].tolist()
            ranked = sorted(seen, key=lambda u: (-values[u], u))
            taken, left = ranked[:k_tokens], ranked[k_tokens:]
            kept[b, row, taken] = True
            if taken and left:
                last, best = taken[-1], left[0]
                gap = values[last] - values[best]
                unsure[b, row] = gap < close * max(sizes[last], sizes[best])
    return kept, unsure


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, integers: bool = False
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """Draw q, k, v and the tensors of the indexer; of integers, all scores are exact."""
    b, hq, hkv, hi, sq, skv, d, di = shape
    torch.manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        made = torch.randint(-1, 2, size) if integers else torch.randn(size)
        return made.to(dtype)

    qkv = tuple(torch.randn(s).to(dtype) for s in [(b, hq, sq, d), *[(b, hkv, skv, d)] * 2])
    own = {"index_q": draw(b, hi, sq, di), "index_k": draw(b, 1, skv, di)}
    return qkv, {**own, "index_w": draw(b, hi, sq)}  # type: ignore[return-value]


def compiled(k_tokens: int, run: str = "reference") -> Attention:
    return sp.compile(dsa(k_tokens=k_tokens), **RUNS[run])


def pairs_read(attention: Attention, q: Tensor, k: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Give the pairs [B,Hq,Sq,Skv] that were read: attention to one-hot values is the row of
    probabilities. Queries are small, so that none underflows."""
    each = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1).contiguous()
    device = device_of(attention.backend_name or "reference")
    moved = {n: x.to(device) for n, x in own.items()}
    out = attention(*(x.to(device) for x in (0.1 * q, k, each)), **moved)
    assert isinstance(out, Tensor)
    return out.cpu() > 0


def agreed(
    attention: Attention, k_tokens: int, q: Tensor, k: Tensor, own: dict[str, Tensor]
) -> Tensor:
    """Check the tokens read, the same for all heads, and give the pairs [B,Hq,Sq,Skv]."""
    want, unsure = kept_tokens(*own.values(), k_tokens, CLOSE[q.dtype])
    got = pairs_read(attention, q, k, own)
    assert bool((got == got[:, :1]).all())
    seen = oracle.causal_mask(q.shape[2], k.shape[2]).sum(-1)
    assert torch.equal(got[:, 0].sum(-1), seen.clamp(max=k_tokens).expand(q.shape[0], -1))
    assert not ((got[:, 0] != want).any(dim=-1) & ~unsure).any()
    assert float(unsure.float().mean()) < 0.02
    return got


@pytest.mark.parametrize("k_tokens", [1, 9, 64, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_and_output_are_those_of_the_formula(shape: tuple[int, ...], k_tokens: int) -> None:
    (q, k, v), own = tensors(shape)
    attention = compiled(k_tokens)
    pairs = agreed(attention, k_tokens, q, k, own)
    out, lse = attention(q, k, v, **own, return_lse=True)
    want, want_lse = oracle.attention(q, k, v, pairs)
    assert oracle.error(out, want) < 1e-12
    assert oracle.error(lse, want_lse) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("shape", "k_tokens"),
    [
        ((2, 4, 2, 3, 24, 70, 16, 2), 11),
        ((4, 3, 1, 2, 1, 90, 16, 2), 40),
        ((1, 2, 1, 1, 33, 33, 20, 2), 8),
    ],
    ids=str,
)
def test_exact_ties_go_to_the_earlier_token(
    shape: tuple[int, ...], k_tokens: int, run: str, dtype: torch.dtype
) -> None:
    """Small integers: every score is exact, most are 0, and zeros of both signs tie."""
    (q, k, _), own = tensors(shape, dtype, integers=True)
    want, _ = kept_tokens(*own.values(), k_tokens, 0.0)
    scores = index_scores(*own.values())[0]
    last = scores.masked_fill(~want, math.inf).amin(-1, keepdim=True)
    causal = oracle.causal_mask(q.shape[2], k.shape[2])
    tied = ((scores == last) & ~want & causal).any(-1)
    assert bool((tied & (last[..., 0] == 0)).any()), "no row is decided by a tie at zero"
    got = pairs_read(compiled(k_tokens, run), q, k, own)
    assert torch.equal(got, want[:, None].expand_as(got))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("shape", "k_tokens"),
    [
        ((3, 3, 1, 3, 13, 60, 40, 24), 16),
        ((1, 16, 1, 16, 1, 130, 16, 32), 40),
        ((1, 4, 2, 5, 30, 21, 80, 17), 7),
    ],
    ids=str,
)
def test_narrow_dtypes_choose_by_float32_scores(
    shape: tuple[int, ...], k_tokens: int, run: str, dtype: torch.dtype
) -> None:
    (q, k, v), own = tensors(shape, dtype)
    attention = compiled(k_tokens, run)
    pairs = agreed(attention, k_tokens, q, k, own)
    device = device_of(attention.backend_name or "reference")
    moved = {n: x.to(device) for n, x in own.items()}
    out, lse = attention(*(x.to(device) for x in (q, k, v)), **moved, return_lse=True)
    want, want_lse = oracle.attention(q, k, v, pairs)
    budget, _ = oracle.budgets(q, k, v, pairs)
    _, lse_budget = oracle.budgets(q.float(), k.float(), v.float(), pairs)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert oracle.error(out.cpu(), want) < budget
    assert oracle.error(lse.cpu(), want_lse) < lse_budget


@pytest.mark.parametrize("run", RUNS)
def test_tensors_of_any_stride_give_what_dense_ones_give(run: str) -> None:
    (q, k, v), own = tensors((2, 4, 1, 3, 20, 35, 16, 8), torch.float32)
    device = device_of(RUNS[run]["backend"])
    q, k, v = (x.to(device) for x in (q, k, v))
    own = {n: x.to(device) for n, x in own.items()}
    attention = compiled(6, run)
    want = attention(q, k, v, **own)

    def swapped(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    apart = torch.full((2, 3, 29), torch.nan, device=device)
    apart[..., 5:25] = own["index_w"]
    strided = {"index_q": swapped(own["index_q"]), "index_w": apart[..., 5:25]}
    got = attention(swapped(q), swapped(k), swapped(v), **{**own, **strided})
    assert torch.equal(got, want)


@pytest.mark.parametrize("run", RUNS)
def test_more_tokens_than_there_are_is_dense_attention(run: str) -> None:
    (q, k, v), own = tensors((1, 3, 1, 2, 18, 18, 16, 8), torch.float32)
    device = device_of(RUNS[run]["backend"])
    moved = {n: x.to(device) for n, x in own.items()}
    out = compiled(2048, run)(*(x.to(device) for x in (q, k, v)), **moved)
    mask = oracle.causal_mask(18, 18).expand(1, 3, -1, -1)
    want = oracle.attention(q, k, v, mask)[0]
    assert oracle.error(out.cpu(), want) < oracle.budgets(q, k, v, mask)[0]


def test_queries_before_the_first_key_give_zero() -> None:
    (q, k, v), own = tensors((1, 2, 1, 3, 20, 7, 8, 8))
    out, lse = compiled(4)(q, k, v, **own, return_lse=True)
    assert not out[:, :, :13].any() and bool((lse[:, :, :13] == -math.inf).all())
    assert bool(lse[:, :, 13:].isfinite().all())


@pytest.mark.parametrize("shape", [SHAPES[1], (2, 4, 2, 3, 40, 23, 8, 8)], ids=str)
def test_gradients_are_those_of_attention_to_the_tokens_kept(shape: tuple[int, ...]) -> None:
    (q, k, v), own = tensors(shape)
    attention = compiled(9)
    pairs = agreed(attention, 9, q, k, own)
    ours, theirs = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    index = {n: x.clone().requires_grad_() for n, x in own.items()}
    out = attention(*ours, **index)
    expected, _ = oracle.attention(*theirs, pairs)
    seed = torch.randn_like(out)
    leaves = [*ours, *index.values()]
    got = torch.autograd.grad(out, leaves, seed, allow_unused=True)
    want = torch.autograd.grad(expected, theirs, seed)
    for a, b in zip(got, want, strict=False):
        assert oracle.error(a, b) < 1e-12
    assert all(g is None or not g.any() for g in got[3:])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("sq", "heads"), [(5, 128), (1, 16)])
def test_the_multi_query_form_of_mla_takes_values_that_are_a_view_of_its_keys(
    sq: int, heads: int, run: str
) -> None:
    torch.manual_seed(3)
    q, kv = torch.randn(1, heads, sq, 576).bfloat16(), torch.randn(1, 1, 50, 576).bfloat16()
    _, own = tensors((1, 1, 1, 8, sq, 50, 8, 32), torch.bfloat16)
    scale = 192**-0.5 * 1.3689**2
    attention, device = compiled(12, run), device_of(RUNS[run]["backend"])
    moved = {n: x.to(device) for n, x in own.items()}
    held = kv.to(device)
    out = attention(q.to(device), held, held[..., :512], **moved, scale=scale).cpu()
    kept, unsure = kept_tokens(*own.values(), 12, CLOSE[q.dtype])
    assert not unsure.any()
    mask = kept[:, None].expand(1, heads, -1, -1)
    want = oracle.attention(q, kv, kv[..., :512], mask, scale=scale)[0]
    budget = oracle.budgets(q, kv, kv[..., :512], mask, scale=scale)[0]
    assert out.shape == (1, heads, sq, 512)
    assert oracle.error(out, want) < budget


@pytest.mark.parametrize("run", RUNS)
def test_what_fp8_kernels_choose_is_had_by_rounding_what_the_indexer_is_given(run: str) -> None:
    """One scale a vector, a power of two as in scale_fmt ue8m0: the rounded numbers are exact in
    bfloat16, and a positive scale may stand before or behind the ReLU."""
    (q, k, _), own = tensors((1, 2, 1, 4, 12, 60, 16, 16), torch.bfloat16)

    def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-4)
        scale = torch.exp2(torch.ceil(torch.log2(largest / 448)))
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    (q8, s_q), (k8, s_k) = rounded(own["index_q"]), rounded(own["index_k"])
    weights = own["index_w"].double() * s_q[..., 0].double()
    scores, _ = index_scores(q8.double(), k8.double(), weights)
    scores = scores * s_k[:, 0, :, 0].double()[:, None]
    given = {"index_q": (q8.float() * s_q).bfloat16(), "index_k": (k8.float() * s_k).bfloat16()}
    assert torch.equal(given["index_k"].float(), k8.float() * s_k)
    got = pairs_read(compiled(9, run), q, k, {**own, **given})[:, 0]
    causal = oracle.causal_mask(12, 60)
    ranked = scores.masked_fill(~causal, -math.inf).sort(dim=-1, descending=True, stable=True)
    last, left = ranked.values[..., 8], ranked.values[..., 9]
    is_sure = (last - left > 1e-5 * scores.abs().amax(-1)) | ((last == 0) & (left == 0))
    assert bool(is_sure.all()), "a choice that rounding decides"
    want = torch.zeros_like(got).scatter(-1, ranked.indices[..., :9], True)
    assert torch.equal(got, want)
    assert not torch.equal(pairs_read(compiled(9, run), q, k, own)[:, 0], want)


def test_decoding_step_by_step_is_what_the_whole_sequence_gives() -> None:
    (q, k, v), own = tensors((2, 4, 2, 3, 60, 60, 8, 8))
    attention = compiled(10)
    whole = attention(q, k, v, **own)
    for step in range(60):
        rows = slice(step, step + 1)
        out = attention(
            q[:, :, rows],
            k[:, :, : step + 1],
            v[:, :, : step + 1],
            index_q=own["index_q"][:, :, rows],
            index_k=own["index_k"][:, :, : step + 1],
            index_w=own["index_w"][:, :, rows],
        )
        assert oracle.error(out, whole[:, :, rows]) < 1e-12


def test_the_list_is_one_for_all_heads_with_2048_tokens() -> None:
    (q, k, v), own = tensors((1, 4, 1, 2, 3, 2200, 8, 8))
    program = dsa().program
    (found,) = lists(program, {"q": q, "k": k, "v": v, **own})
    assert found.indices.shape == (1, 1, 3, 2048)
    kept, unsure = kept_tokens(*own.values(), 2048, CLOSE[torch.float64])
    assert not unsure.any()
    for row in range(3):
        assert found.indices[0, 0, row].tolist() == kept[0, row].nonzero()[:, 0].tolist()


BAD = {
    "weights of other heads": (
        {"index_w": (1, 2, 10)},
        "ShapeMismatch: index_w with shape [1, 2, 10] and index_q do not agree: "
        "Hi is 2 in the first and 3 in the second.\n"
        "  help: index_w is [B, Hi, Sq].",
    ),
    "keys of several heads": (
        {"index_k": (1, 3, 10, 8)},
        "ShapeMismatch: index_k with shape [1, 3, 10, 8] and the form [B, 1, Skv, Di] do not "
        "agree: 1 is declared and 3 given.\n"
        "  help: index_k is [B, 1, Skv, Di].",
    ),
    "keys of other tokens": (
        {"index_k": (1, 1, 11, 8)},
        "ShapeMismatch: index_k with shape [1, 1, 11, 8] and q, k and v do not agree: "
        "Skv is 11 in the first and 10 in the second.\n"
        "  help: index_k is [B, 1, Skv, Di].",
    ),
    "no weights": (
        {"index_w": None},
        "MissingTensor: the pattern 'dsa' takes the tensor index_w [B, Hi, Sq], and the call "
        "gives none.\n"
        "  help: pass index_w=... by keyword.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_tensors_of_the_indexer_are_refused_by_a_sentence(name: str) -> None:
    (q, k, v), own = tensors((1, 2, 1, 3, 10, 10, 8, 8))
    change, text = BAD[name]
    changed = {n: None if s is None else torch.randn(s).double() for n, s in change.items()}
    assert text_of(lambda: compiled(4)(q, k, v, **{**own, **changed})) == text


def test_weights_with_the_heads_last_are_refused_with_the_way_out() -> None:
    (q, k, v), own = tensors((1, 2, 1, 3, 10, 10, 8, 8))
    own["index_w"] = own["index_w"].transpose(1, 2).contiguous().transpose(1, 2)
    assert text_of(lambda: compiled(4)(q, k, v, **own)) == (
        "LastStrideNotOne: index_w has stride 3 in its last dimension, where 1 is needed.\n"
        "  help: call index_w.contiguous() first; other strides are free."
    )


def lowered(target: str, **sizes: Any) -> Any:
    backend, chip = registry.backend("triton"), registry.target(target)
    spec = Specialisation("bfloat16", **sizes, widths=(("Di", 128),))
    return compiler.lower(dsa(), backend=backend, target=chip, spec=spec, phase="prefill")


def test_heads_wider_than_those_of_mla_are_refused_with_the_figures() -> None:
    assert text_of(lambda: lowered("sm90", head_dim=640, value_dim=512)) == (
        "Refused: the triton backend refuses head_dim = 640: its tiles of gathered keys hold at "
        "most 576.\n  help: use backend='reference', or split the head."
    )
    assert text_of(lambda: lowered("sm90", head_dim=576, value_dim=576)) == (
        "Refused: the triton backend refuses value_dim = 576: its tiles of gathered keys hold at "
        "most 512.\n  help: use backend='reference', or split the head."
    )


def test_a_chip_that_lacks_room_for_the_heads_of_mla_refuses_with_the_figures() -> None:
    assert lowered("sm80", head_dim=576, value_dim=512).order == "gather"
    assert "bytes on chip, and gfx942 has 65536" in text_of(
        lambda: lowered("gfx942", head_dim=576, value_dim=512)
    )


def test_a_negative_number_of_tokens_is_refused() -> None:
    assert "NegativeCount: topk was given k = -1" in text_of(lambda: dsa(k_tokens=-1).program)


@pytest.mark.parametrize("run", ["reference", "triton"])
def test_slabs_of_few_rows_take_the_weights_of_their_own_rows(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where scratch is short, launches repeat for each slab of query rows."""
    (q, k, v), own = tensors((2, 2, 1, 3, 70, 90, 16, 8), torch.float32)
    device = device_of(run)
    q, k, v = (x.to(device) for x in (q, k, v))
    own = {n: x.to(device) for n, x in own.items()}
    want = compiled(6)(q.cpu(), k.cpu(), v.cpu(), **{n: x.cpu() for n, x in own.items()})
    if run == "reference":
        plan = compiled(6, "plan").built(q, k, v, **own).plan
        out, _ = run_plan(plan, {"q": q, "k": k, "v": v, **own}, slab_rows=16)
    else:
        place, slabs = layouts.Shelf.place, []

        def placed(*given: Any) -> Any:
            found = place(*given)
            slabs.append(found[0])
            return found

        monkeypatch.setattr(layouts, "SCRATCH_LIMIT_BYTES", 40000)
        monkeypatch.setattr(layouts.Shelf, "place", placed)
        out = sp.compile(dsa(k_tokens=6), backend="triton")(q, k, v, **own)
        assert slabs and max(slabs) < 70
    assert oracle.error(out.cpu(), want) < 1e-5
