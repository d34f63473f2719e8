"""Every shipped pattern compiles for every target without a card; what counts does not spill."""

from __future__ import annotations

import pytest

from spcomp import compiler
from spcomp.backends import registry
from spcomp.backends.base import Specialisation
from spcomp.backends.triton.offline import BuiltKernel, build_offline
from spcomp.dsl.pattern import Pattern
from spcomp.ir.plan import Phase
from spcomp.patterns import SHIPPED, block_topk, moba, streaming_llm
from tests.shipped import NO_KERNELS, ON_TRITON, assert_refused

BACKEND = registry.backend("triton")
CARDS = ("sm80", "sm90", "sm100", "gfx942")


def compiled(
    pattern: Pattern, target: str, phase: Phase, dtype: str = "bfloat16", dim: int = 128
) -> tuple[BuiltKernel, ...]:
    """Lower, emit and compile one plan."""
    chip, spec = registry.target(target), Specialisation(dtype, dim, dim)
    plan = compiler.lower(pattern, backend=BACKEND, target=chip, spec=spec, phase=phase)
    return build_offline(compiler.emit(plan, BACKEND, chip, spec))


LONG = ("nsa", "infllm_v2")  # many launches, whose kernels other patterns have on every card


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name in ON_TRITON
        for target in CARDS
        if name not in LONG or target in ("sm90", "gfx942")
    ],
)
def test_a_pattern_compiles_for_a_target(name: str, target: str) -> None:
    phase: Phase = "decode" if name == "quest" else "prefill"
    kernels = compiled(SHIPPED[name](), target, phase)
    assert kernels and all(k.binary_bytes > 0 and k.registers > 0 for k in kernels)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("name", NO_KERNELS["triton"])
def test_a_pattern_without_kernels_is_refused(name: str, target: str, phase: Phase) -> None:
    assert_refused(name, target, phase)


@pytest.mark.parametrize(
    ("pattern", "phase", "dtype", "dim"),
    [
        (block_topk(), "prefill", "bfloat16", 64),
        (block_topk(block=64), "prefill", "float16", 128),
        (block_topk(), "prefill", "bfloat16", 256),
        (block_topk(), "prefill", "float32", 128),
        (moba(), "prefill", "bfloat16", 128),
        (streaming_llm(), "decode", "bfloat16", 128),
    ],
    ids=str,
)
def test_kernels_for_hopper_neither_spill_nor_serialise(
    pattern: Pattern, phase: Phase, dtype: str, dim: int
) -> None:
    """A spill or a serialised wgmma (ptxas C75xx) would be a slow kernel that looks right. What the
    warp-specialised kernel spills lies outside its loops, as test_attend_ws.py sees to."""
    bad = {
        k.kernel: (k.registers, k.spill_bytes, k.warnings)
        for k in compiled(pattern, "sm90", phase, dtype, dim)
        if (k.spill_bytes and k.kernel != "attend_ws") or k.warnings
    }
    assert not bad
