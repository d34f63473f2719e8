"""What this backend cannot do is said in one sentence with the figure, before any compile."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp import compiler
from spcomp.backends import registry
from spcomp.backends.ascendc import BACKEND, executor
from spcomp.backends.ascendc.calls import call_refusal, call_rules
from spcomp.backends.ascendc.contexts.host import LENGTHS, STRIDES
from spcomp.backends.ascendc.emit import forms
from spcomp.backends.ascendc.executor import Host
from spcomp.backends.ascendc.targets import TARGETS
from spcomp.backends.base import Specialisation
from spcomp.dsl.pattern import Pattern
from spcomp.errors import SpcompError
from spcomp.patterns import block_topk, moba, quest, streaming_llm

TARGET = TARGETS["ascend910b"]
BLOCKS = block_topk(block=64)


@pytest.fixture
def _compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: object) -> None:
        raise AssertionError("compiled before the refusal")

    monkeypatch.setattr(executor, "compile_kernel", compiled)
    monkeypatch.setattr(executor, "host_library", compiled)


def tensors(
    sq: int = 64, skv: int = 64, hq: int = 4, hkv: int = 2, d: int = 64, dtype: str = "float16"
) -> tuple[Tensor, Tensor, Tensor]:
    kind = getattr(torch, dtype)
    sizes = ((1, hq, sq, d), (1, hkv, skv, d), (1, hkv, skv, d))
    q, k, v = (torch.zeros(s, dtype=kind) for s in sizes)
    return q, k, v


def text_of(action: Callable[[], Any]) -> str:
    """Give the whole text of the error, without the place in the pattern."""
    with pytest.raises(SpcompError) as caught:
        action()
    return re.sub(r"\n  --> .*", "", str(caught.value))


def said(pattern: Pattern, *qkv: Tensor, **options: Any) -> str:
    return text_of(lambda: sp.compile(pattern, backend="ascendc")(*qkv, **options))


def refused(what: str, reason: str, way_out: str = "use backend='reference'.") -> str:
    return f"Refused: the ascendc backend refuses {what}: {reason}.\n  help: {way_out}"


# ---- rules of the chip ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.usefixtures("_compiles_nothing")
def test_other_dtypes_are_refused(dtype: str) -> None:
    assert said(BLOCKS, *tensors(dtype=dtype)) == refused(
        f"{dtype} tensors",
        "its templates multiply 16-bit elements alone",
        "cast q, k and v to float16 or bfloat16, or use backend='reference'.",
    )


@pytest.mark.usefixtures("_compiles_nothing")
def test_attention_over_a_stream_of_units_is_refused() -> None:
    @sp.pattern
    def pooled(q, k, v):
        units = [sp.downsample(x, block=16) for x in (k, v)]
        best = sp.topk(sp.score(q, units[0], heads="group"), k=2)
        return sp.attend(q, *(sp.gather(x, best) for x in units))

    assert said(pooled(), *tensors()) == refused(
        "attention over a stream of units", "there is no AscendC template for it"
    )


@pytest.mark.parametrize("dim", [8, 40, 272])
@pytest.mark.usefixtures("_compiles_nothing")
def test_head_dimensions_that_are_no_fractals_or_too_large_are_refused(dim: int) -> None:
    reason = (
        "a cube core multiplies fractals of 16 x 16 elements, so {} must be a multiple of 16 and "
        "at most 256"
    )
    way_out = "pad the heads, or use backend='reference'."
    assert said(BLOCKS, *tensors(d=dim)) == refused(
        f"the head dimension D = {dim}", reason.format("D"), way_out
    )
    q, k, _ = tensors()
    *_, v = tensors(d=dim)
    assert said(BLOCKS, q, k, v) == refused(
        f"the head dimension Dv = {dim}", reason.format("Dv"), way_out
    )


@pytest.mark.usefixtures("_compiles_nothing")
def test_units_that_are_no_fractals_are_refused() -> None:
    assert said(moba(block=24, k_blocks=2), *tensors()) == refused(
        "units of 24 tokens",
        "a block of keys is loaded as fractals of 16 rows",
        "use units that are multiples of 16, or use backend='reference'.",
    )


@pytest.mark.usefixtures("_compiles_nothing")
def test_an_infinite_scale_is_refused() -> None:
    assert said(BLOCKS, *tensors(), scale=math.inf) == refused(
        "the scale inf", "it is a finite constant of a kernel"
    )


@pytest.mark.usefixtures("_compiles_nothing")
def test_a_tile_of_another_size_is_refused() -> None:
    axes = {"score": {"block_u": 32}}
    attention = sp.compile(BLOCKS, backend="ascendc", axes=axes)
    assert text_of(lambda: attention(*tensors())) == refused(
        "score.block_u = 32", "its tiles are fixed, and this one is 128", "leave the axis out."
    )


# ---- rules of a call -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("apart", [0, 70000])
@pytest.mark.usefixtures("_compiles_nothing")
def test_rows_that_no_load_can_step_are_refused(name: str, apart: int) -> None:
    q, k, v = tensors()
    held = {"q": q, "k": k, "v": v}
    shape = held[name].shape
    held[name] = torch.empty_strided(shape, (64 * 70000, 64, apart, 1), dtype=torch.float16)
    assert said(BLOCKS, *held.values()) == refused(
        f"rows of {name} that lie {apart} elements apart",
        "a load of the cube core steps 1 to 65535 elements",
        f"call {name}.contiguous() first, or use backend='reference'.",
    )


@pytest.mark.usefixtures("_compiles_nothing")
def test_a_group_larger_than_a_tile_is_refused() -> None:
    assert said(BLOCKS, *tensors(hq=258, hkv=2)) == refused(
        "129 query heads for each KV head",
        "they share a tile of the cube core, which has 128 rows",
        "repeat k and v for groups of at most 128 query heads, or use backend='reference'.",
    )


@pytest.mark.usefixtures("_compiles_nothing")
def test_a_list_longer_than_topk_keeps_is_refused() -> None:
    q, k, v = tensors(skv=16 * 2049, hq=1, hkv=1, d=16)
    assert said(moba(block=16, k_blocks=3000), q, k, v) == refused(
        "lists of 2049 units",
        "top-k keeps at most 2048 of them on chip",
        "choose fewer or larger units, or use backend='reference'.",
    )


# ---- stages without a template -------------------------------------------------------------------

marks = torch.ones(1, 2, 4, 4, dtype=torch.bool)
numbers = torch.zeros(1, 2, 4, 1, dtype=torch.int32)


def best_of(q: Any, k: Any, *, block: int = 16, heads: Any = "query") -> Any:
    return sp.topk(sp.score(q, sp.downsample(k, block=block), heads=heads), k=2)


@sp.pattern
def hooked(q, k, v):
    best = best_of(q, k)
    hook = lambda score, b, h, q_idx, kv_idx: torch.tanh(score)  # noqa: E731
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best), score_mod=hook)


@sp.pattern
def marked(q, k, v):
    chosen = sp.block_mask(marks, block=16)
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen), mask=None)


@sp.pattern
def listed(q, k, v):
    chosen = sp.block_indices(numbers, block=16)
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen), mask=None)


@sp.pattern
def shared_by_all(q, k, v):
    best = best_of(q, k, heads="all")
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


@sp.pattern
def of_two_lists(q, k, v):
    best = best_of(q, k) | best_of(q, k, block=32)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


@pytest.mark.parametrize(
    ("pattern", "what", "reason"),
    [
        (quest(), "pooling by minmax", "its template has mean, max, min"),
        (hooked(), "a score_mod", "no vector code is generated for it"),
        (marked(), "the pattern's own tensor table0_list", "none of its kernels reads it"),
        (listed(), "the pattern's own tensor table0_sorted", "none of its kernels reads it"),
        (
            shared_by_all(),
            "scores with heads='all'",
            "its template makes one list a query head or one a KV head",
        ),
    ],
    ids=lambda p: p.name if isinstance(p, Pattern) else "",
)
@pytest.mark.usefixtures("_compiles_nothing")
def test_a_stage_without_a_template_is_refused(pattern: Pattern, what: str, reason: str) -> None:
    assert said(pattern, *tensors()) == refused(what, reason)


@pytest.mark.parametrize(
    "pattern", [streaming_llm(), of_two_lists()], ids=["streaming_llm", "of_two_lists"]
)
@pytest.mark.usefixtures("_compiles_nothing")
def test_a_loop_order_without_kernels_is_refused(pattern: Pattern) -> None:
    assert said(pattern, *tensors(sq=1)) == (
        "CannotLower: this selection in the loop order gather cannot be lowered: this backend has "
        "no kernel tiles.\n"
        "  help: use another backend, such as backend='reference'."
    )


# ---- devices -------------------------------------------------------------------------------------


def test_a_gradient_is_refused() -> None:
    q, k, v = tensors()
    assert said(BLOCKS, q.requires_grad_(), k, v) == (
        "NeedsGradient: q requires a gradient, and the ascendc backend has no backward.\n"
        "  help: use backend='reference', or call under torch.no_grad()."
    )


def test_tensors_on_a_card_are_refused() -> None:
    assert text_of(lambda: registry.backend("ascendc").target_of("cuda:0")) == (
        "NotOnThisDevice: the ascendc backend cannot run on cuda:0, since it runs kernels in its "
        "emulator alone.\n"
        "  help: move the tensors to the CPU to emulate, or build the project that "
        "`spcomp compile --target ascend910b -o DIR` writes with CANN."
    )


def test_without_a_compiler_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert said(BLOCKS, *tensors()) == (
        "NoCompiler: the AscendC emulator needs g++, and there is none on the path.\n"
        "  help: install g++ 12 or newer, or leave the emulated checks out."
    )


# ---- the same rules on the host ------------------------------------------------------------------


def calls() -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Yield lengths and strides at both sides of each limit."""
    dense = {f"{t}_{x}": 64 for t, axes in STRIDES.items() for x in axes}
    for heads, rows, keys in product((1, 128, 129), (1, 2), (1, 100, 16 * 2048, 16 * 2048 + 1)):
        lengths = {"B": 1, "Hq": heads, "Hkv": 1, "Sq": rows, "Skv": keys, "D": 64, "Dv": 64}
        for name, apart in product(("q_s", "k_s", "v_s"), (0, 1, 65535, 65536)):
            yield lengths, {**dense, name: apart}


@pytest.mark.parametrize("pattern", [moba(block=16, k_blocks=3000), BLOCKS], ids=lambda p: p.name)
def test_the_tiling_of_the_host_refuses_the_same_calls(pattern: Pattern) -> None:
    spec = Specialisation("float16", 64, 64)
    plan = compiler.lower(pattern, backend=BACKEND, target=TARGET, spec=spec)
    host = Host(compiler.emit(plan, BACKEND, TARGET, spec), forms(plan, TARGET, spec))
    rules = {f"{rule.subject}: {rule.reason}": rule.reason for rule in call_rules(plan)}
    seen: dict[str, bool] = {}
    for lengths, strides in calls():
        here = call_refusal(plan, lengths, strides)
        there = host.refusal([*(lengths[n] for n in LENGTHS), *strides.values()])
        assert (here.reason if here else "") == (rules[there] if there else "")
        seen[there] = True
    expected: Mapping[str, object] = rules
    wanted = {*expected, ""}
    if pattern.name == "block_topk":
        wanted -= {r for r in rules if r.startswith("the units of a list")}
    assert set(seen) == wanted
