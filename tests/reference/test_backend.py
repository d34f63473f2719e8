"""The reference as an ordinary backend: what it refuses, emits, builds and keeps between steps."""

from __future__ import annotations

import pytest
import torch

from spcomp.backends.base import Backend, Specialisation
from spcomp.backends.reference import BACKEND
from spcomp.backends.reference.axes import TORCH
from spcomp.dsl import attend, downsample, gather, pattern, stream, window
from spcomp.ir.text import parse_plan
from spcomp.patterns import moba, quest
from tests import oracle
from tests.reference.lower import plan_of
from tests.reference.make import Shape, qkv, run

SPEC = Specialisation("float32", 16, 16)


def test_it_is_a_backend() -> None:
    assert isinstance(BACKEND, Backend)
    assert BACKEND.target_of("cpu") == BACKEND.target_of("cuda:3") == TORCH


def test_it_refuses_nothing_but_what_is_no_float() -> None:
    plan = plan_of(moba())
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        assert BACKEND.refuses(plan, TORCH, Specialisation(dtype, 999, 1)) is None
    refusal = BACKEND.refuses(plan, TORCH, Specialisation("int32", 16, 16))
    assert refusal is not None
    assert refusal.what == "int32 tensors"
    assert refusal.reason == "attention is computed in floating point"


def test_it_emits_the_plan_as_text_that_reads_back() -> None:
    plan = plan_of(moba())
    (file,) = BACKEND.emit(plan, TORCH, SPEC).files
    assert parse_plan(file.text) == plan


def test_what_it_builds_runs_the_plan() -> None:
    q, k, v = qkv(Shape(1, 4, 2, 40, 60), torch.float32)
    plan = plan_of(moba(block=16, k_blocks=2))
    built = BACKEND.build(BACKEND.emit(plan, TORCH, SPEC))
    out, lse = built.run({"q": q, "k": k, "v": v}, {}, {})
    want, want_lse = run(moba(block=16, k_blocks=2), q, k, v)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-6)


def test_a_pattern_without_a_plan_is_interpreted_itself() -> None:
    @pattern
    def coarse(q, k, v):
        units = stream(downsample(k, block=8), downsample(v, block=8))
        return attend(q, [gather(stream(k, v), window(5)), units])

    q, k, v = qkv(Shape(1, 4, 2, 40, 60))
    out, _ = BACKEND.interpret(coarse().program).run({"q": q, "k": k, "v": v}, {}, {})
    assert torch.equal(out, run(coarse(), q, k, v)[0])


@pytest.mark.parametrize("way", ["plan", "pattern"])
def test_a_state_kept_over_appends_is_what_pooling_all_tokens_gives(way: str) -> None:
    page, capacity = 4, 60
    steps = quest(page=page, budget=12)
    plan = plan_of(steps, "decode")
    executable = (
        BACKEND.build(BACKEND.emit(plan, TORCH, SPEC))
        if way == "plan"
        else BACKEND.interpret(steps.program)
    )
    q, k, v = qkv(Shape(2, 4, 2, 1, capacity, 8, 8))
    pages = {side: torch.full((2, 2, capacity // page, 8), torch.nan) for side in ("max", "min")}
    pages = {side: x.double() for side, x in pages.items()}
    length = 0
    for more in (1, 6, 1, 1, 4, 13, 1):
        begin, length = length, length + more
        held = {"q": q, "k": k[:, :, :length], "v": v[:, :, :length]}
        units = -(-length // page)
        kept = {f"pages.{side}": x[:, :, :units] for side, x in pages.items()}
        executable.update(held, {}, kept, begin)
        high = oracle.pooled(held["k"], page, lambda x: x.amax(dim=2))
        low = oracle.pooled(held["k"], page, lambda x: x.amin(dim=2))
        assert torch.equal(kept["pages.max"], high)
        assert torch.equal(kept["pages.min"], low)
        assert bool(pages["max"][:, :, units:].isnan().all())
        out, lse = executable.run(held, {}, kept)
        want, want_lse = run(steps, q, held["k"], held["v"])
        torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)


def test_a_kept_state_is_read_and_not_made_again() -> None:
    steps = quest(page=4, budget=12)
    q, k, v = qkv(Shape(1, 2, 1, 1, 32, 8, 8))
    tensors = {"q": q, "k": k, "v": v}
    # Bounds of zero tie all pages, so the two lowest join the newest.
    zeros = {f"pages.{side}": torch.zeros(1, 1, 8, 8).double() for side in ("max", "min")}
    page = torch.arange(32) // 4
    mask = (page < 2) | (page == 7)
    want, _ = oracle.attention(q, k, v, mask[None, :])
    plan = plan_of(steps, "decode")
    built = BACKEND.build(BACKEND.emit(plan, TORCH, SPEC))
    for executable in (built, BACKEND.interpret(steps.program)):
        out, _ = executable.run(tensors, {}, zeros)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
