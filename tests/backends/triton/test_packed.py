"""Packed sequences in the kernels: each is attended as alone, whatever lies around it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp import compiler
from spcomp import packed as packed_calls
from spcomp.api import Attention
from spcomp.backends import registry
from spcomp.backends.base import Source, Specialisation
from spcomp.backends.triton import layouts
from spcomp.backends.triton.offline import build_offline
from spcomp.errors import CannotLower
from spcomp.ir.plan import Phase
from spcomp.ir.text import print_plan
from spcomp.patterns import SHIPPED, block_topk, moba, quest, streaming_llm
from tests.conformance.cases import device_of
from tests.shipped import NOT_PACKED, ON_TRITON

LONG = ([5, 0, 20, 17], [20, 9, 33, 0])
ORDERS = {
    "block_topk query_major": (block_topk(block=16, budget=0.4), "query_major"),
    "block_topk gather": (block_topk(block=16, budget=0.4), "gather"),
    "moba key_major": (moba(block=16, k_blocks=2), "key_major"),
    "moba gather": (moba(block=16, k_blocks=2), "gather"),
    "quest gather": (quest(page=8, budget=16), "gather"),
    "quest by groups": (quest(page=8, budget=16, heads="group"), "gather"),
    "streaming_llm query_major": (streaming_llm(sinks=2, recent=15), "query_major"),
    "streaming_llm gather": (streaming_llm(sinks=2, recent=15), "gather"),
}


@pytest.fixture(autouse=True)
def _memory_is_never_clean() -> Iterator[None]:
    """Fill what is allocated: NaN and large numbers show where a kernel reads what none wrote."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.zeros(1).new_empty(64, dtype=torch.float32).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(
    lengths: tuple[list[int], list[int]], hq: int = 2, hkv: int = 1, d: int = 16, dv: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    rows, keys = map(sum, lengths)
    shapes = (rows, hq, d), (keys, hkv, d), (keys, hkv, dv)
    q, k, v = (torch.randn(s).to(device_of("triton")) for s in shapes)
    return q, k, v


def run(
    attention: Attention, tensors: tuple[Tensor, Tensor, Tensor], lengths: tuple[list[int], ...]
) -> tuple[Tensor, Tensor]:
    device = tensors[0].device
    cu_q, cu_k = (starts(n).to(device) for n in lengths)
    longest = {"max_seqlen_q": max(lengths[0]), "max_seqlen_k": max(lengths[1])}
    out, lse = attention.varlen(
        *tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **longest, return_lse=True
    )
    return out, lse


def check(
    pattern: sp.Pattern,
    lengths: tuple[list[int], list[int]],
    order: str | None = None,
    tensors: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Compare with the reference, which calls for each sequence; float32 on both sides."""
    tensors = tensors or packed(lengths)
    out, lse = run(sp.compile(pattern, backend="triton", order=order), tensors, lengths)
    want, want_lse = run(sp.compile(pattern, backend="reference"), tensors, lengths)
    torch.testing.assert_close(out, want, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", ORDERS)
def test_every_loop_order_attends_each_sequence_alone(name: str) -> None:
    check(ORDERS[name][0], LONG, ORDERS[name][1])


@pytest.mark.parametrize("name", ["block_topk query_major", "moba gather", "streaming_llm gather"])
def test_decode_attends_each_sequence_alone(name: str) -> None:
    check(ORDERS[name][0], ([1, 0, 3, 16, 2], [30, 5, 3, 40, 0]))


def test_heads_of_other_widths_and_a_group_of_three() -> None:
    lengths = ([19, 3], [33, 40])
    tensors = packed(lengths, hq=3, hkv=1, d=20, dv=9)
    check(block_topk(block=16, budget=2, locals=1), lengths, tensors=tensors)
    check(moba(block=16, k_blocks=2), lengths, "key_major", tensors)


def test_strides_of_a_fused_projection_are_followed() -> None:
    lengths = ([30, 0, 9], [30, 0, 9])
    fused = torch.randn(39, 8 * 16 + 5).to(device_of("triton"))
    q, k, v = (p.unflatten(1, (-1, 16)) for p in fused[:, :128].split((64, 32, 32), dim=1))
    check(moba(block=16, k_blocks=2), lengths, "key_major", (q, k, v))


def test_one_dtype_is_as_near_as_a_call_of_its_own() -> None:
    lengths = ([40, 7], [50, 20])
    tensors = tuple(x.bfloat16() for x in packed(lengths))
    attention = sp.compile(block_topk(block=16, budget=2, locals=1), backend="triton")
    out, lse = run(attention, tensors, lengths)  # type: ignore[arg-type]
    q, k, v = (x[:n].transpose(0, 1)[None] for x, n in zip(tensors, (40, 50, 50), strict=True))
    want, want_lse = attention(q, k, v, return_lse=True)
    assert torch.equal(out[:40], want[0].transpose(0, 1))
    assert torch.equal(lse[:, :40], want_lse[0])


def test_a_share_of_the_units_is_that_of_the_sequence() -> None:
    @sp.pattern
    def tokens(q, k, v):
        best = sp.topk(sp.score(q, k, heads="group"), fraction=0.3, always=sp.own())
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    check(tokens(), ([17, 2], [40, 9]))
    check(tokens(), ([3, 2], [40, 9]))


def test_units_without_a_tail_are_those_of_the_sequence() -> None:
    @sp.pattern
    def whole_units(q, k, v):
        units = sp.downsample(k, block=16, tail="drop")
        best = sp.topk(sp.score(q, units, mask=None), k=1)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best), mask=None)

    check(whole_units(), ([17, 5, 3], [40, 9, 16]))
    check(whole_units(), ([2, 5, 3], [40, 9, 16]))


def test_parts_of_a_merge_keep_to_their_sequence() -> None:
    @sp.pattern
    def merged(q, k, v):
        best = sp.topk(sp.score(q, sp.downsample(k, block=16)), k=1)
        near = sp.attend(q, sp.gather(k, sp.window(5)), sp.gather(v, sp.window(5)))
        return sp.merge(near, sp.attend(q, sp.gather(k, best), sp.gather(v, best)))

    check(merged(), ([20, 3], [33, 17]))


def test_a_rule_with_tables_reads_the_number_of_the_sequence() -> None:
    bias = torch.randn(3, 40).to(device_of("triton"))

    @sp.pattern
    def ruled(q, k, v):
        rule = sp.mask_mod(lambda b, h, q_idx, kv_idx: kv_idx % (b + 2) == 0)
        chosen = sp.gather(k, rule), sp.gather(v, rule)
        return sp.attend(q, *chosen, score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[b, kv_idx])

    check(ruled(), ([20, 3, 17], [33, 17, 40]))


def test_slabs_of_rows_end_where_sequences_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = ([50, 3, 20], [60, 40, 9])
    for name, limit in (("block_topk query_major", 1_000), ("moba key_major", 30_000)):
        monkeypatch.setattr(layouts, "SCRATCH_LIMIT_BYTES", limit)
        pattern, order = ORDERS[name]
        attention = sp.compile(pattern, backend="triton", order=order)
        out, _ = run(attention, packed(lengths), lengths)
        assert out.shape[0] == 73
        check(pattern, lengths, order)
        built = next(iter(attention.compiled.plans.values()))
        prepared = next(iter(built.executable._prepared.values()))  # type: ignore[attr-defined]
        assert len(prepared.shots) > len(built.plan.launches())  # type: ignore[union-attr]


def test_longer_lengths_compile_nothing_and_are_worked_out_anew() -> None:
    attention = sp.compile(streaming_llm(sinks=2, recent=15), backend="triton")
    for lengths in (([20, 30], [40, 20]), ([30, 20], [20, 40]), ([50, 0], [50, 10])):
        tensors = packed(lengths)
        out, _ = run(attention, tensors, lengths)
        want, _ = run(sp.compile(attention.pattern, backend="reference"), tensors, lengths)
        torch.testing.assert_close(out, want, rtol=0, atol=2e-6)
    assert len(attention.compiled.plans) == 1


def test_a_length_past_the_longest_is_cut_where_nobody_could_check_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a device, whose starts are not read: nothing outside the scratch is touched."""
    monkeypatch.setattr(packed_calls, "_read", lambda side, starts, longest, total: longest)
    q, k, v = packed(([9, 12], [40, 30]))
    for pattern in (block_topk(block=16, budget=2, locals=1), moba(block=16, k_blocks=2)):
        attention = sp.compile(pattern, backend="triton")
        cu = {"cu_seqlens_q": starts([9, 12]), "cu_seqlens_k": starts([40, 30])}
        cu = {n: c.to(q.device) for n, c in cu.items()}
        out = attention.varlen(q, k, v, **cu, max_seqlen_q=12, max_seqlen_k=30)
        want, _ = run(attention, (q[9:], k[40:], v[40:]), ([12], [30]))
        torch.testing.assert_close(out[9:], want, rtol=0, atol=2e-6)


# ---- what is generated ---------------------------------------------------------------------------


def lowered(name: str, phase: Phase, dim: int = 128) -> Source:
    spec = Specialisation("bfloat16", dim, dim, is_packed=True)
    backend, target = registry.backend("triton"), registry.target("sm90")
    plan = compiler.lower(SHIPPED[name](), backend=backend, target=target, spec=spec, phase=phase)
    return compiler.emit(plan, backend, target, spec)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", [name for name in ON_TRITON if name not in NOT_PACKED])
def test_a_packed_plan_says_where_its_sequences_begin(name: str, phase: Phase) -> None:
    text = print_plan(lowered(name, phase).plan)
    assert "buffer cu_q int32[B + 1] input" in text
    assert "buffer q data[1, Hq, Tq, D] input" in text
    assert "attend_ws" not in text


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", NOT_PACKED)
def test_a_pattern_whose_units_none_counts_is_refused(name: str, phase: Phase) -> None:
    with pytest.raises(CannotLower) as caught:
        lowered(name, phase)
    assert str(caught.value).splitlines()[0] == (
        f"CannotLower: {NOT_PACKED[name]} of packed sequences cannot be lowered: no kernel counts "
        "the units of each sequence there."
    )


def test_why_the_hopper_kernel_is_not_taken_is_said() -> None:
    plan = lowered("streaming_llm", "prefill").plan
    assert plan.order == "query_major"
    assert plan.notes[0].endswith(
        "; not query_major_ws, since its copies would run past the end of a packed sequence"
    )
    spec = Specialisation("bfloat16", 128, 128, is_packed=True)
    backend, target = registry.backend("triton"), registry.target("sm90")
    with pytest.raises(CannotLower, match="past the end of a packed sequence"):
        compiler.lower(
            streaming_llm(), backend=backend, target=target, spec=spec, order="query_major_ws"
        )


@pytest.mark.parametrize(
    ("name", "phase"), [("block_topk", "prefill"), ("moba", "prefill"), ("quest", "decode")]
)
def test_packed_kernels_compile_with_few_spills(name: str, phase: Phase) -> None:
    for kernel in build_offline(lowered(name, phase)):
        # A thread of attend_gather spills 16 bytes when it is not packed: it has all registers.
        assert kernel.spill_bytes <= (48 if kernel.kernel == "attend_gather" else 0), kernel.kernel
        assert not kernel.warnings, kernel.warnings
