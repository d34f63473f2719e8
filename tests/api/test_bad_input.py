"""Every mistake a user can make gives one sentence with both figures and the way out, before any
compile."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import spcomp as sp
from spcomp.arguments import check_strides
from spcomp.errors import SpcompError
from spcomp.patterns import block_topk, moba, quest, streaming_llm


def tensors(
    sq: int = 64, skv: int = 64, hq: int = 4, hkv: int = 2, d: int = 16, **kw: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make q, k and v."""
    return (
        torch.randn(1, hq, sq, d, **kw),
        torch.randn(1, hkv, skv, d, **kw),
        torch.randn(1, hkv, skv, d, **kw),
    )


def text_of(action: Callable[[], Any]) -> str:
    """Give the whole text of the error, the place's file and line replaced by PLACE."""
    with pytest.raises(SpcompError) as caught:
        action()
    return re.sub(r"--> \S+:\d+", "--> PLACE", str(caught.value))


def test_a_forced_set_larger_than_k_is_refused_at_the_users_line() -> None:
    assert text_of(lambda: sp.compile(block_topk(budget=4, sinks=1, locals=4))) == (
        "ForcedSetTooLarge: topk keeps 4 blocks, but its forced set alone has 1 sink + 4 "
        "local = 5.\n"
        "  --> PLACE:  best = topk(\n"
        "  help: raise k to 5 or more, or shrink the forced set."
    )


def test_a_negative_k_is_refused() -> None:
    assert text_of(lambda: moba(k_blocks=-1)) == (
        "NegativeCount: topk was given k = -1, which is below 0.\n"
        '  --> PLACE:  best = topk(score(q, means, mask="causal"), k=k_blocks, always=own())\n'
        "  help: k counts units to keep; give 0 or more."
    )


def test_a_window_of_zero_is_refused() -> None:
    assert text_of(lambda: streaming_llm(recent=0)) == (
        "NegativeCount: window was given size = 0, which is below 1.\n"
        "  --> PLACE:  kept = sink(sinks) | window(recent)\n"
        "  help: size counts tokens, the query's own included; give 1 or more."
    )


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k, v = tensors(hq=5)
    assert text_of(lambda: sp.compile(moba)(q, k, v)) == (
        "HeadsDoNotDivide: q has 5 heads and k has 2: 5 is not a multiple of 2.\n"
        "  help: grouped-query attention needs Hq = G * Hkv; query head h uses KV head h // G."
    )


def test_mixed_dtypes_are_refused() -> None:
    q, k, v = tensors()
    assert text_of(lambda: sp.compile(moba)(q, k.half(), v)) == (
        "DtypeMix: q is float32 and k is float16.\n"
        "  help: cast them to one of float32, float16, bfloat16 before the call."
    )


def test_integer_tensors_are_refused() -> None:
    q, k, v = (x.int() for x in tensors())
    assert text_of(lambda: sp.compile(moba)(q, k, v)) == (
        "DtypeUnsupported: q is int32, which the reference backend does not compute in.\n"
        "  help: use one of float32, float16, bfloat16, float64."
    )


def test_a_head_dimension_that_does_not_fit_on_chip_is_refused() -> None:
    q, k, v = tensors(d=300)
    assert text_of(lambda: sp.compile(moba(block=64), backend="triton")(q, k, v)) == (
        "Refused: the triton backend refuses head_dim = 300: its tiles hold at most 256.\n"
        "  --> PLACE:  @pattern\n"
        "  help: use backend='reference', or split the head."
    )


def test_shapes_that_clash_are_refused_with_both_figures() -> None:
    q, k, v = tensors()
    assert text_of(lambda: sp.compile(moba)(q, k[..., :8], v)) == (
        "ShapeMismatch: q with shape [1, 4, 64, 16] and k with shape [1, 2, 64, 8] do not agree: "
        "D is 16 in the first and 8 in the second.\n"
        "  help: q is [B, Hq, Sq, D]; k is [B, Hkv, Skv, D]; v is [B, Hkv, Skv, Dv]."
    )


def test_a_missing_dimension_is_refused() -> None:
    q, k, v = tensors()
    assert text_of(lambda: sp.compile(moba)(q[0], k, v)) == (
        "ShapeMismatch: q with shape [4, 64, 16] and the form [B, Hq, Sq, D] do not agree: "
        "4 dimensions are needed.\n"
        "  help: add a batch or head dimension with unsqueeze, or transpose [B, S, H, D] tensors "
        "with .transpose(1, 2)."
    )


def test_tensors_on_two_devices_are_refused() -> None:
    q, k, v = tensors()
    assert text_of(lambda: sp.compile(moba)(q, k.to("meta"), v)) == (
        "DeviceClash: q is on cpu and k is on meta.\n  help: move them to one device."
    )


def test_a_last_stride_other_than_one_is_refused() -> None:
    q, k, v = tensors(d=32)
    q, k, v = q[..., ::2], k[..., :16], v[..., :16]
    assert text_of(lambda: sp.compile(moba)(q, k, v)) == (
        "LastStrideNotOne: q has stride 2 in its last dimension, where 1 is needed.\n"
        "  help: call q.contiguous() first; other strides are free."
    )


def test_rows_too_far_apart_for_a_tile_are_refused() -> None:
    q, k, v = tensors(skv=2)
    assert text_of(lambda: check_strides(q, _far(k), v)) == (
        "StrideTooLarge: the rows of k are 67108864 elements apart, and a tile holds at most "
        "8388607.\n"
        "  help: call k.contiguous() first, or use the reference backend."
    )


def _far(x: torch.Tensor) -> torch.Tensor:
    """Give a tensor of no memory with rows 2^26 elements apart."""
    return torch.empty_strided(x.shape, (16, 16, 2**26, 1), device="meta")


def test_a_gradient_without_a_backward_is_refused() -> None:
    q, k, v = tensors()
    q.requires_grad_()
    assert text_of(lambda: sp.compile(moba(block=64), backend="triton")(q, k, v)) == (
        "NeedsGradient: q requires a gradient, and the triton backend has no backward.\n"
        "  help: use backend='reference', or call under torch.no_grad()."
    )


def test_an_unknown_backend_is_refused() -> None:
    assert text_of(lambda: sp.compile(moba, backend="cuda")) == (
        "UnknownBackend: there is no backend 'cuda'.\n"
        "  help: choose one of reference, triton, ascendc."
    )


def test_an_unknown_loop_order_is_refused() -> None:
    assert text_of(lambda: sp.compile(moba, order="diagonal")) == (  # type: ignore[arg-type]
        "UnknownChoice: compile was given order = 'diagonal'.\n"
        "  help: choose one of 'query_major', 'query_major_ws', 'key_major', 'gather'."
    )


def test_a_loop_order_that_cannot_express_the_pattern_is_refused() -> None:
    q, k, v = tensors()
    attention = sp.compile(moba(block=16, k_blocks=2), backend="triton", order="query_major")
    assert text_of(lambda: attention(q, k, v)) == (
        "CannotLower: this selection in the loop order query_major cannot be lowered: its "
        "lists change "
        "every 1 query rows, and a query tile needs multiples of 16.\n"
        '  --> PLACE:  best = topk(score(q, means, mask="causal"), k=k_blocks, always=own())\n'
        "  help: leave the schedule open, or take one of: gather, key_major."
    )


def test_gpu_tensors_without_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from spcomp.backends.registry import backend

    monkeypatch.setitem(sys.modules, "triton", None)
    assert text_of(lambda: backend("triton").target_of("cuda:0")) == (
        "TritonMissing: q is on cuda:0, but Triton cannot be imported (import of triton halted; "
        "None in sys.modules).\n"
        "  help: pip install 'spcomp[triton]', or use backend='reference'."
    )


def test_a_pattern_that_returns_nothing_is_refused() -> None:
    @sp.pattern
    def forgets(q, k, v):  # type: ignore[no-untyped-def]
        sp.attend(q, k, v)

    assert text_of(forgets) == (
        "PatternReturnsNothing: the pattern 'forgets' returned nothing, not the result of "
        "attend() or "
        "merge().\n"
        "  --> PLACE:  @sp.pattern\n"
        "  help: end the function with `return attend(q, ...)`."
    )


def test_a_mask_built_for_other_lengths_is_refused() -> None:
    mask = torch.ones(1, 1, 2, 4, dtype=torch.bool)

    @sp.pattern
    def masked(q, k, v):  # type: ignore[no-untyped-def]
        return sp.attend(q, k, v, mask=sp.block_mask(mask, block=64))

    q, k, v = tensors(sq=100, skv=100)
    assert text_of(lambda: sp.compile(masked)(q, k, v)) == (
        "MaskOfOtherLength: the block_mask tensor of shape [1, 1, 2, 4] was built for 2 x 4 "
        "blocks of "
        "64 x 64, but q and k are Sq = 100 and Skv = 100, which make 2 x 2.\n"
        "  --> PLACE:  return sp.attend(q, k, v, mask=sp.block_mask(mask, block=64))\n"
        "  help: build it again for these lengths."
    )


def test_a_flex_block_mask_of_other_lengths_is_refused() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    flex = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 256, device="cpu")

    @sp.pattern
    def masked(q, k, v):  # type: ignore[no-untyped-def]
        return sp.attend(q, k, v, mask=flex)

    q, k, v = tensors(sq=128, skv=128)
    assert text_of(lambda: sp.compile(masked)(q, k, v)) == (
        "MaskOfOtherLength: the mask was built for Sq = 128 and Skv = 256, but q and k are "
        "Sq = 128 and "
        "Skv = 128.\n"
        "  --> PLACE:  return sp.attend(q, k, v, mask=flex)\n"
        "  help: build it again for these lengths."
    )


def test_a_table_too_short_for_the_lengths_is_refused() -> None:
    ids = torch.zeros(50, dtype=torch.int32)

    @sp.pattern
    def documents(q, k, v):  # type: ignore[no-untyped-def]
        same = sp.mask_mod(lambda b, h, i, j: ids[i] == ids[j])
        return sp.attend(q, k, v, mask=same)

    q, k, v = tensors(sq=64, skv=64)
    assert text_of(lambda: sp.compile(documents)(q, k, v)) == (
        "MaskOfOtherLength: the tensor table0 of shape [50], read at [q_idx], was built for "
        "indices 0 to "
        "49 on axis 0, but q and k are Sq = 64 and Skv = 64, which read 0 to 63.\n"
        "  --> PLACE:  same = sp.mask_mod(lambda b, h, i, j: ids[i] == ids[j])\n"
        "  help: build it again for these lengths."
    )


def test_control_flow_on_data_is_refused_at_its_line() -> None:
    @sp.pattern
    def branching(q, k, v):  # type: ignore[no-untyped-def]
        def rule(b, h, i, j):  # type: ignore[no-untyped-def]
            if i > j:
                return j > 3
            return False

        return sp.attend(q, k, v, mask=sp.mask_mod(rule))

    assert text_of(branching) == (
        "ControlFlowOnData: 'rule' branches on a value that is known only when the kernel runs "
        "((q_idx > kv_idx)).\n"
        "  --> PLACE:  if i > j:\n"
        "  help: use torch.where(condition, a, b), or combine conditions with & and | "
        "instead of `if`, "
        "`and`, `or`, `not`."
    )


def test_a_torch_function_without_an_expression_is_refused() -> None:
    @sp.pattern
    def sines(q, k, v):  # type: ignore[no-untyped-def]
        return sp.attend(q, k, v, mask=sp.mask_mod(lambda b, h, i, j: torch.sin(i) > 0))

    assert text_of(sines) == (
        "NotTraceable: '<lambda>' calls torch.sin, which has no element expression.\n"
        "  --> PLACE:  return sp.attend(q, k, v, mask=sp.mask_mod(lambda b, h, i, j: "
        "torch.sin(i) > 0))\n"
        "  help: use + - * // % comparisons & | ~, torch.where, minimum, maximum, abs, exp, "
        "log, tanh, and "
        "tensor[index]."
    )


def test_a_rule_on_the_bits_of_numbers_is_refused() -> None:
    @sp.pattern
    def bits(q, k, v):  # type: ignore[no-untyped-def]
        return sp.attend(q, k, v, mask=sp.mask_mod(lambda b, h, i, j: (i & 32) == 0))

    assert text_of(bits).startswith(
        "NotTraceable: '<lambda>' calls 'and' on the bits of numbers, which has no element "
        "expression."
    )


def test_stages_in_the_wrong_place_are_refused() -> None:
    @sp.pattern
    def swapped(q, k, v):  # type: ignore[no-untyped-def]
        best = sp.topk(sp.score(k, sp.downsample(q, block=16)), k=2)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    assert text_of(lambda: sp.compile(swapped)) == (
        "WrongStage: score takes queries as its q, but was given something made from the key "
        "input.\n"
        "  --> PLACE:  best = sp.topk(sp.score(k, sp.downsample(q, block=16)), k=2)\n"
        "  help: score(q side, k side): the first ranks, the second is ranked."
    )


def test_two_selections_for_keys_and_values_are_refused() -> None:
    @sp.pattern
    def torn(q, k, v):  # type: ignore[no-untyped-def]
        return sp.attend(q, sp.gather(k, sp.window(4)), sp.gather(v, sp.window(5)))

    assert text_of(torn) == (
        "WrongStage: attend takes values gathered by the selection of its keys as its v, but "
        "was given "
        "values gathered by another selection.\n"
        "  --> PLACE:  return sp.attend(q, sp.gather(k, sp.window(4)), sp.gather(v, "
        "sp.window(5)))\n"
        "  help: name the selection once: s = topk(...); attend(q, gather(k, s), gather(v, s))."
    )


def test_units_that_no_tile_divides_are_refused_by_name() -> None:
    @sp.pattern
    def odd(q, k, v):  # type: ignore[no-untyped-def]
        best = sp.topk(sp.score(q, sp.downsample(k, block=10)), k=2)
        both = best | sp.window(8)
        return sp.attend(q, sp.gather(k, both), sp.gather(v, both))

    q, k, v = tensors()
    assert text_of(lambda: sp.compile(odd, backend="triton")(q, k, v)) == (
        "CannotLower: a union of lists with units of 10 tokens cannot be lowered: tiles must "
        "divide every "
        "unit, and the largest that does is below 16 tokens.\n"
        "  --> PLACE:  return sp.attend(q, sp.gather(k, both), sp.gather(v, both))\n"
        "  help: use units that are multiples of 16, or backend='reference'."
    )


def test_a_wrong_hyper_parameter_is_refused_with_the_signature() -> None:
    assert text_of(lambda: quest(pages=4)) == (
        "WrongArguments: the pattern 'quest' was called wrongly: got an unexpected keyword "
        "argument "
        "'pages'.\n"
        "  --> PLACE:  @pattern\n"
        "  help: its signature is quest(q, k, v, *, page=16, budget=2048, heads='query')."
    )
