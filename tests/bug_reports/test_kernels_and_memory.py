"""Every kernel in the interpreter's bfloat16, no kernel per length, no memory of Sq x Skv."""

from __future__ import annotations

import time

import pytest
import torch

import spcomp as sp
from spcomp import arguments, compiler
from spcomp.backends import registry
from spcomp.codegen.render import TEMPLATES
from spcomp.ir import dims
from spcomp.ir.passes.place_buffers import place_buffers, scratch_bytes, slab_rows
from spcomp.patterns import block_topk, moba, quest, streaming_llm, xattention
from spcomp.patterns.infllm_v2 import infllm_v2
from tests.bug_reports.make import DEVICE, assert_attends, compiled, qkv, run
from tests.conformance.cases import assert_within

GIB = 1 << 30

KERNELS: dict[str, tuple[sp.Pattern, int, tuple[str, ...]]] = {
    "query-major": (
        block_topk(block=32, budget=2, locals=1),
        40,
        ("pool", "select", "tiles", "attend"),
    ),
    "key-major": (
        moba(block=64, k_blocks=2),
        20,
        ("pool", "select", "invert_count", "invert_scan", "invert_fill", "attend_keys", "merge"),
    ),
    "decode": (
        quest(page=16, budget=64, heads="group"),
        1,
        ("pool", "score", "topk", "attend_gather", "merge"),
    ),
    "shares of a map": (
        xattention(block=32, stride=8),
        40,
        ("part_lse", "row_lse", "block_sums", "topp", "tiles", "attend"),
    ),
    "overlapping units": (
        infllm_v2(block=16, kernel=8, stride=4, coarse=2, k_blocks=4, window=16),
        20,
        ("pool", "part_lse", "row_lse", "block_scores", "topk", "attend_gather"),
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_is_computed_as_numbers_and_not_as_bits(name: str) -> None:
    """B61. Small whole numbers are exact in bfloat16: only the rounding of results differs."""
    pattern, rows, kernels = KERNELS[name]
    attention = compiled(pattern)
    shapes = (1, 2, rows, 16), (1, 1, 130, 16), (1, 1, 130, 16)
    q, k, v = (torch.randint(-2, 3, shape).float() for shape in shapes)
    built = attention.built(*(x.to(DEVICE) for x in (q, k, v)))
    assert tuple(dict.fromkeys(n.kernel for n in built.plan.launches())) == kernels
    exact, exact_lse = run(attention, q, k, v)
    out, lse = run(attention, *(x.bfloat16() for x in (q, k, v)))
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=1e-2)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-2)
    assert_within(out, lse, *(x.bfloat16() for x in (q, k, v)), attention.to_mask(q, k))


def test_the_kernels_tried_in_bfloat16_are_all_there_are() -> None:
    """B61. Gluon has no interpreter: tests/gpu/test_attend_ws.py tries its kernel on a card."""
    tried = {"attend_ws"} | {kernel for _, _, kernels in KERNELS.values() for kernel in kernels}
    assert tried == {p.name.partition(".")[0] for p in (TEMPLATES / "triton/kernels").iterdir()}


@pytest.mark.parametrize("name", ["streaming_llm", "block_topk", "moba", "quest"])
def test_a_new_length_or_batch_makes_no_new_kernel(name: str) -> None:
    """B69. Forty-three lengths, four batches: the texts of one prefill and of one decode."""
    pattern = {
        "streaming_llm": streaming_llm(sinks=4, recent=60),
        "block_topk": block_topk(block=32),
        "moba": moba(block=64, k_blocks=2),
        "quest": quest(page=16, budget=64),
    }[name]
    attention = compiled(pattern)
    texts, executables = set(), set()
    for length in (*range(300, 341), 500, 1000):
        for rows in (length, 1):
            b = length % 4 + 1
            q = torch.empty(b, 2, rows, 16, device=DEVICE)
            k = v = torch.empty(b, 1, length, 16, device=DEVICE)
            built = attention.built(q, k, v)
            texts.add(tuple(f.text for f in built.source.files))
            executables.add(id(built.executable))
            held = " ".join(f.text for f in built.source.files)
            assert f" {length}" not in held.replace(f"{pattern}", "")
    assert len(texts) == len(executables) == 2


def test_lengths_run_through_one_object_and_stay_right() -> None:
    """B69."""
    attention = compiled(streaming_llm(sinks=2, recent=30))
    for b, length in ((1, 30), (2, 31), (1, 129), (3, 5)):
        q, k, v = qkv(b, 2, 1, length, length, 16)
        assert_attends(attention, q, k, v, attention.to_mask(q, k))
    assert len({id(attention.built(*(x.to(DEVICE) for x in (q, k, v))).executable)}) == 1


@sp.pattern
def causal(q, k, v):
    return sp.attend(q, k, v)


@sp.pattern
def documents(q, k, v):
    names = torch.zeros(131072, dtype=torch.int32)
    same = sp.mask_mod(lambda b, h, q_idx, kv_idx: names[q_idx] == names[kv_idx])
    return sp.attend(q, sp.gather(k, same), sp.gather(v, same))


@sp.pattern
def strided(q, k, v):
    every = sp.mask_mod(lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 128 == 0)
    chosen = every | sp.window(128)
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))


@sp.pattern
def free(q, k, v):
    rule = sp.mask_mod(lambda b, h, q_idx, kv_idx: (q_idx * 7 + kv_idx * h + b) % 11 < 3)
    return sp.attend(q, sp.gather(k, rule), sp.gather(v, rule))


MEMORY = {
    "window": streaming_llm(),
    "causal": causal(),
    "documents": documents(),
    "strided": strided(),
    "free": free(),
    "block_topk": block_topk(),
    "moba": moba(),
    "quest": quest(),
}
ANALYTIC = ("window", "causal", "documents", "strided")
"""Families whose rule is the same for every head and item: one list serves them all."""


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("length", [131072, 1 << 20])
def test_scratch_is_bounded_and_never_all_pairs(name: str, length: int) -> None:
    """B71. Sizes by their formulas, with 32 heads of 128 in 16 bit, as a call would ask for."""
    spec = arguments.Specialisation("bfloat16", 128, 128)
    triton, target = registry.backend("triton"), registry.target("sm90")
    env = {"B": 1, "Hq": 32, "Hkv": 8, "Sq": length, "Skv": length, "D": 128, "Dv": 128}
    begin = time.perf_counter()
    plan = compiler.lower(MEMORY[name], backend=triton, target=target, spec=spec)
    rows = slab_rows(plan, env, 2)
    placed = place_buffers(plan, env, 2)
    seconds = time.perf_counter() - begin
    asked = dims.evaluate(scratch_bytes(plan), {**env, "E": 2, "R": rows, "R0": 0})
    assert 0 < rows <= length
    assert placed.arena_bytes <= asked + 256 * len(plan.buffers)
    assert asked <= GIB
    if name in ANALYTIC and length == 131072:
        assert asked <= 200e6
        assert seconds < 20  # 2 on an idle machine
    for buffer in plan.scratch():
        here = {**env, "R": rows, "R0": 0}
        sizes = [dims.evaluate(d, here) for d in buffer.dims]
        assert sizes.count(length) < 2, (buffer.name, sizes)
