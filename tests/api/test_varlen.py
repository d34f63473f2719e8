"""Packed sequences: each means what a call of its own means; what cannot be packed is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import spcomp as sp
from spcomp.api import Attention
from spcomp.errors import (
    CannotLower,
    CannotPack,
    DeviceClash,
    HeadsDoNotDivide,
    LastStrideNotOne,
    LengthMissing,
    NeedsGradient,
    Refused,
    ShapeMismatch,
    WrongLengths,
)
from spcomp.patterns import block_topk, moba, quest, streaming_llm

PATTERNS = {
    "block_topk": block_topk(block=16, budget=0.3),
    "moba": moba(block=64, k_blocks=2),
    "quest": quest(page=8, budget=24),
    "streaming_llm": streaming_llm(sinks=3, recent=20),
}
LENGTHS = {
    "one": ([65], [63]),
    "three": ([1, 0, 130], [64, 65, 1]),
    "five": ([63, 64, 0, 65, 2], [65, 0, 1000, 64, 1]),
    "long": ([1000], [1000]),
    "nothing": ([0, 0], [0, 3]),
}


def starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(
    lengths: tuple[list[int], list[int]], *, hq: int = 4, hkv: int = 2, d: int = 16, dv: int = 16
) -> tuple[Tensor, ...]:
    """Draw q, k, v and the starts of both sides."""
    rows, keys = map(sum, lengths)
    tensors = torch.randn(rows, hq, d), torch.randn(keys, hkv, d), torch.randn(keys, hkv, dv)
    return (*tensors, *map(starts, lengths))


def run(attention: Attention, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Any:
    return attention.varlen(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)


def alone(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Call for each sequence: its rows, out [n,Hq,Dv] and lse [Hq,n]."""
    for n in range(len(cu_q) - 1):
        rows, keys = (slice(int(c[n]), int(c[n + 1])) for c in (cu_q, cu_k))
        views = (x[part].transpose(0, 1)[None] for x, part in ((q, rows), (k, keys), (v, keys)))
        out, lse = attention(*views, return_lse=True)
        yield rows, out[0].transpose(0, 1), lse[0]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_packed_sequence_is_a_call_of_its_own_bit_for_bit(name: str, lengths: str) -> None:
    tensors = packed(LENGTHS[lengths], dv=10)
    attention = sp.compile(PATTERNS[name], backend="reference")
    out, lse = run(attention, *tensors)
    assert out.shape == (tensors[0].shape[0], 4, 10)
    assert lse.shape == (4, tensors[0].shape[0])
    assert lse.dtype == torch.float32
    for rows, want, want_lse in alone(attention, *tensors):
        assert torch.equal(out[rows], want)
        assert torch.equal(lse[:, rows], want_lse)


def test_a_sequence_without_keys_gives_zeros_and_one_without_queries_has_no_rows() -> None:
    tensors = packed(([3, 0, 4], [0, 5, 6]))
    out, lse = run(sp.compile(moba(block=4, k_blocks=2)), *tensors)
    assert not out[:3].any()
    assert bool((lse[:, :3] == -torch.inf).all())
    assert bool(out[3:].any(-1).all())
    assert bool(lse[:, 3:].isfinite().all())


def test_no_sequences_and_no_rows_give_nothing() -> None:
    attention = sp.compile(streaming_llm(), backend="reference")
    out, lse = run(attention, *packed(([], [])))
    assert out.shape == (0, 4, 16)
    assert lse.shape == (4, 0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_views_of_a_fused_projection_change_no_bit(backend: str) -> None:
    lengths = [9, 0, 30]
    fused = torch.randn(39, (4 + 2 + 2) * 16)
    parts = fused.split((64, 32, 32), dim=1)
    q, k, v = (p.unflatten(1, (-1, 16)) for p in parts)
    attention = sp.compile(streaming_llm(sinks=2, recent=9), backend=backend)
    cu = starts(lengths)
    got = run(attention, q, k, v, cu, cu)
    want = run(attention, *(x.contiguous() for x in (q, k, v)), cu, cu)
    assert not q.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_rule_reads_the_number_of_the_sequence() -> None:
    bias = torch.randn(3, 40)

    @sp.pattern
    def ruled(q, k, v):
        rule = sp.mask_mod(lambda b, h, q_idx, kv_idx: kv_idx % (b + 2) == 0)
        chosen = sp.gather(k, rule), sp.gather(v, rule)
        return sp.attend(q, *chosen, score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[b, kv_idx])

    q, k, v, cu_q, cu_k = packed(([5, 7, 2], [40, 30, 3]))
    out = sp.compile(
        ruled()
    )(  # a batch of one length tells the items apart by itself
        *(x[:, :, :2] for x in (torch.zeros(3, 4, 2, 16), *[torch.zeros(3, 2, 2, 16)] * 2))
    )
    assert out.shape == (3, 4, 2, 16)
    got, _ = run(sp.compile(ruled()), q, k, v, cu_q, cu_k)
    for n, (rows, keys) in enumerate(zip(cu_q.tolist(), cu_k.tolist(), strict=True)):
        if n == 3:
            break
        end, last = int(cu_q[n + 1]), int(cu_k[n + 1])
        count, size = end - rows, last - keys
        t, j = torch.arange(count)[:, None] + size - count, torch.arange(size)[None]
        logits = torch.einsum("qhd,khd->hqk", q[rows:end], k[keys:last].repeat_interleave(2, 1))
        logits = logits / 4 + bias[n, :size]
        hidden = (j > t) | (j % (n + 2) != 0)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0)
        want = torch.einsum("hqk,khd->qhd", weights, v[keys:last].repeat_interleave(2, 1))
        torch.testing.assert_close(got[rows:end], want, rtol=0, atol=2e-6)


def test_a_scale_of_the_call_counts() -> None:
    q, k, v, cu_q, cu_k = packed(([5, 7], [9, 8]))
    attention = sp.compile(streaming_llm(sinks=1, recent=4))
    cu = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    got = attention.varlen(q, k, v, **cu, scale=0.9)
    want = attention.varlen(q * (0.9 * 4), k, v, **cu)
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, attention.varlen(q, k, v, **cu))


def test_the_longest_length_may_be_given_and_changes_nothing() -> None:
    q, k, v, cu_q, cu_k = packed(([5, 7], [9, 8]))
    attention = sp.compile(block_topk(block=4, budget=0.5))
    want, _ = run(attention, q, k, v, cu_q, cu_k)
    cu = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    assert torch.equal(attention.varlen(q, k, v, **cu, max_seqlen_q=99, max_seqlen_k=50), want)


def test_gradients_are_those_of_calls_of_their_own() -> None:
    *tensors, cu_q, cu_k = packed(([5, 0, 9], [9, 3, 12]))
    attention = sp.compile(moba(block=4, k_blocks=2), backend="reference")
    leaves = [x.requires_grad_() for x in tensors]
    weights = torch.randn(14, 4, 16)
    out, lse = run(attention, *leaves, cu_q, cu_k)
    got = torch.autograd.grad((out * weights).sum() + lse.sum(), leaves)
    parts = list(alone(attention, *leaves, cu_q, cu_k))
    loss = sum((o * weights[rows]).sum() + s.sum() for rows, o, s in parts)
    want = torch.autograd.grad(loss, leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert not got[1][9:12].any()  # keys of a sequence without queries


def test_autocast_casts_what_a_call_casts() -> None:
    q, k, v, cu_q, cu_k = packed(([5, 7], [9, 8]))
    attention = sp.compile(streaming_llm(sinks=1, recent=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = run(attention, q, k, v, cu_q, cu_k)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    want, _ = run(attention, *(x.bfloat16() for x in (q, k, v)), cu_q, cu_k)
    assert torch.equal(out, want)


def test_torch_compile_cuts_its_graph_at_the_call() -> None:
    tensors = packed(([5, 7], [9, 8]))
    attention = sp.compile(streaming_llm(sinks=1, recent=4))

    def double(*given: Tensor) -> Tensor:
        out, _ = run(attention, *given)
        return out * 2

    torch.compiler.reset()
    got = torch.compile(double, backend="eager")(*tensors)
    assert torch.equal(got, double(*tensors))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(double, backend="eager", fullgraph=True)(*tensors)


def test_tensors_on_meta_give_shapes() -> None:
    tensors = (x.to("meta") for x in packed(([5, 7], [9, 8]), dv=10))
    out, lse = run(sp.compile(moba()), *tensors)
    assert (out.device.type, out.shape, lse.shape) == ("meta", (12, 4, 10), (4, 12))


def test_an_explanation_tells_how_packed_sequences_run() -> None:
    q, k, v, cu_q, cu_k = packed(([5, 70], [9, 80]))
    cu = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    attention = sp.compile(moba(block=64), backend="reference")
    text = attention.explain_varlen(q, k, v, **cu)
    assert text == "the reference backend runs the packed sequences one by one"
    attention = sp.compile(moba(block=64), backend="triton")
    lines = attention.explain_varlen(q, k, v, **cu).splitlines()
    assert lines[2] == "  phase     prefill: 70 query rows, 80 keys"
    assert lines[3].startswith("  order     key_major")


# ---- refusals ------------------------------------------------------------------------------------


def changed(**given: Any) -> dict[str, Any]:
    """Give a right call's arguments with some changed."""
    q, k, v, cu_q, cu_k = packed(([5, 7], [9, 8]))
    right = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    return {**right, **given}


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def refusal(attention: Attention, error: type[Exception], arguments: dict[str, Any]) -> str:
    with pytest.raises(error) as caught:
        attention.varlen(**arguments)
    return str(caught.value)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("error", "given", "text"),
    [
        (
            WrongLengths,
            {"cu_seqlens_q": ints(1, 5, 12)},
            "WrongLengths: cu_seqlens_q begins with 1, not with 0.\n"
            "  help: cumulate the lengths: [0, n0, n0 + n1, …] up to the rows there are.",
        ),
        (
            WrongLengths,
            {"cu_seqlens_k": ints(0, 18, 17)},
            "WrongLengths: cu_seqlens_k falls from 18 to 17 at sequence 1.\n"
            "  help: cumulate the lengths: [0, n0, n0 + n1, …] up to the rows there are.",
        ),
        (
            WrongLengths,
            {"cu_seqlens_q": ints(0, 5, 11)},
            "WrongLengths: cu_seqlens_q ends with 11, and q has 12 rows.\n"
            "  help: cumulate the lengths: [0, n0, n0 + n1, …] up to the rows there are.",
        ),
        (
            WrongLengths,
            {"cu_seqlens_q": ints(0, 12)},
            "WrongLengths: cu_seqlens_q has 1 sequences and cu_seqlens_k has 2.\n"
            "  help: give both for the same sequences; a sequence may have no queries or no keys.",
        ),
        (
            WrongLengths,
            {"cu_seqlens_q": torch.zeros(3, 2, dtype=torch.int32)},
            "WrongLengths: cu_seqlens_q with shape [3, 2] and strides [2, 1] is not one dense row "
            "of B + 1 starts.\n"
            "  help: pass the cumulated lengths, beginning with 0: int32 [B+1].",
        ),
        (
            WrongLengths,
            {"max_seqlen_q": 0},
            "WrongLengths: max_seqlen_q = 0 is below 1.\n"
            "  help: give the longest length, or leave it out on the CPU.",
        ),
        (
            WrongLengths,
            {"max_seqlen_k": 8},
            "WrongLengths: max_seqlen_k = 8 is below the 9 rows of a sequence of cu_seqlens_k.\n"
            "  help: give the longest length, or leave it out on the CPU.",
        ),
        (
            WrongLengths,
            {"cu_seqlens_q": torch.tensor([0, 5, 12])},
            "WrongLengths: cu_seqlens_q of dtype int64 is not int32.\n"
            "  help: pass the cumulated lengths, beginning with 0: int32 [B+1].",
        ),
        (
            DeviceClash,
            {"cu_seqlens_q": ints(0, 5, 12).to("meta")},
            "DeviceClash: cu_seqlens_q is on meta and q is on cpu.\n"
            "  help: move them to one device.",
        ),
        (
            ShapeMismatch,
            {"q": torch.zeros(1, 4, 12, 16)},
            "ShapeMismatch: q with shape [1, 4, 12, 16] and the form [Tq, Hq, D] do not agree: 3 "
            "dimensions are needed.\n"
            "  help: packed tensors have no batch axis; call the pattern itself on a batch.",
        ),
        (
            ShapeMismatch,
            {"v": torch.zeros(16, 2, 16)},
            "ShapeMismatch: k with shape [17, 2, 16] and v with shape [16, 2, 16] do not agree: Tk "
            "is 17 in the first and 16 in the second.\n"
            "  help: q is [Tq, Hq, D]; k is [Tk, Hkv, D]; v is [Tk, Hkv, Dv].",
        ),
        (
            HeadsDoNotDivide,
            {"q": torch.zeros(12, 3, 16)},
            "HeadsDoNotDivide: q has 3 heads and k has 2: 3 is not a multiple of 2.\n"
            "  help: grouped-query attention needs Hq = G * Hkv; query head h uses KV head h // G.",
        ),
        (
            LastStrideNotOne,
            {"q": torch.zeros(12, 16, 4).transpose(1, 2)},
            "LastStrideNotOne: q has stride 4 in its last dimension, where 1 is needed.\n"
            "  help: call q.contiguous() first; other strides are free.",
        ),
    ],
)
def test_wrong_lengths_and_shapes_are_refused_by_their_figures(
    backend: str, error: type[Exception], given: dict[str, Any], text: str
) -> None:
    attention = sp.compile(streaming_llm(sinks=1, recent=4), backend=backend)
    assert refusal(attention, error, changed(**given)) == text
    assert not attention.compiled.plans, "refused before anything is lowered"


def test_a_device_is_not_waited_for() -> None:
    attention = sp.compile(streaming_llm(sinks=1, recent=4), backend="triton")
    with FakeTensorMode():
        given = {
            n: torch.empty(x.shape, dtype=x.dtype, device="cuda") for n, x in changed().items()
        }
        with pytest.raises(LengthMissing) as caught:
            attention.explain_varlen(**given, max_seqlen_q=7)
    assert str(caught.value) == (
        "LengthMissing: max_seqlen_k is not given, and reading it off cu_seqlens_k would wait for "
        "cuda:0.\n  help: pass max_seqlen_k=, at least the longest length of a sequence."
    )


def given_blocks() -> sp.Pattern:
    marks = torch.ones(1, 1, 1, 1, dtype=torch.bool)

    @sp.pattern
    def blocks(q, k, v):
        chosen = sp.block_mask(marks, block=64)
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))

    return blocks()


def flex_mask() -> sp.Pattern:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 12, 17, device="cpu")

    @sp.pattern
    def flexed(q, k, v):
        chosen = sp.flex_block_mask(mask)
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen), mask=None)

    return flexed()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            given_blocks,
            "CannotPack: a list of blocks that the user gives cannot be used with packed "
            "sequences: its rows are those of a batch of one pair of lengths.",
        ),
        (
            flex_mask,
            "CannotPack: a mask built for Sq = 12 and Skv = 17 cannot be used with packed "
            "sequences: every sequence has lengths of its own.",
        ),
    ],
)
def test_what_was_made_for_one_pair_of_lengths_is_refused(
    backend: str, make: Callable[[], sp.Pattern], words: str
) -> None:
    text = refusal(sp.compile(make(), backend=backend), CannotPack, changed())
    assert text.splitlines()[0] == words
    assert f"{__file__}:" in text


def test_a_cache_is_refused() -> None:
    attention = sp.compile(quest(page=4, budget=8))
    cache = sp.KVCache.empty(
        attention, batch=1, kv_heads=2, head_dim=16, capacity=8, dtype=torch.float32, device="cpu"
    )
    assert refusal(attention, CannotPack, changed(k=cache)) == (
        "CannotPack: a KVCache in the place of k cannot be used with packed sequences: a cache "
        "holds a batch of one length, with the state of its pattern.\n"
        "  help: pass the tensor k [Tk, Hkv, D], or attend with the cache, `cache.attend`."
    )


def test_a_table_that_is_too_short_is_refused() -> None:
    slopes = torch.ones(1)

    @sp.pattern
    def short(q, k, v):
        chosen = sp.gather(k, sp.causal()), sp.gather(v, sp.causal())
        return sp.attend(q, *chosen, score_mod=lambda s, b, h, q_idx, kv_idx: s * slopes[b])

    text = refusal(sp.compile(short()), sp.SpcompError, changed())
    assert "the tensor table0 of shape [1], read at [b]," in text


def test_a_gradient_is_refused_where_there_is_no_backward() -> None:
    attention = sp.compile(streaming_llm(sinks=1, recent=4), backend="triton")
    q = torch.zeros(12, 4, 16, requires_grad=True)
    assert refusal(attention, NeedsGradient, changed(q=q)).startswith("NeedsGradient: q requires")


def test_ascendc_refuses_packed_sequences_by_name() -> None:
    attention = sp.compile(moba(block=64, k_blocks=2), backend="ascendc")
    text = refusal(attention, Refused, changed())
    assert text.splitlines()[0] == (
        "Refused: the ascendc backend refuses packed sequences: its kernels read one length for "
        "all."
    )


def test_the_order_of_the_hopper_kernel_is_refused() -> None:
    attention = sp.compile(streaming_llm(), backend="triton", order="query_major_ws")
    tensors = packed(([50], [50]))
    arguments = dict(zip(("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"), tensors, strict=True))
    assert "has no kernel attend_ws" in refusal(attention, CannotLower, arguments)
