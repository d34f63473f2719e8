"""Attention to pooled streams in the Triton kernels: against float64, and what compilers say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp import compiler
from spcomp.backends import registry
from spcomp.backends.base import Specialisation
from spcomp.backends.triton import layouts
from spcomp.backends.triton.contexts import attend, tiles
from spcomp.backends.triton.offline import BuiltKernel, build_offline
from spcomp.dsl import Pattern
from spcomp.ir import dims
from spcomp.ir.launches import AttendLaunch, GatherLaunch, TilesLaunch
from spcomp.ir.plan import Plan
from spcomp.patterns import SHIPPED
from tests import oracle
from tests.backends.triton.rendering import variables_of
from tests.backends.triton.test_attend_ws import loops_that_multiply
from tests.shipped import ON_TRITON

TRITON = registry.backend("triton")
SM90 = registry.target("sm90")


@dataclass(frozen=True)
class Shape:
    b: int
    hq: int
    hkv: int
    sq: int
    skv: int
    d: int = 16
    dv: int = 24
    dtype: torch.dtype = torch.float32
    is_strided: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"b{self.b}-h{self.hq}:{self.hkv}-{self.sq}x{self.skv}-d{self.d}:{self.dv}-{kind}"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw q, k and v; strided ones lie as [B,S,H,D] in the middle of a wider tensor."""
        sizes = (
            (self.b, self.hq, self.sq, self.d),
            (self.b, self.hkv, self.skv, self.d),
            (self.b, self.hkv, self.skv, self.dv),
        )
        drawn = [torch.randn(s).to(self.dtype) for s in sizes]
        if self.is_strided:
            wide = [torch.full((b, s, h, d + 5), 1e4).to(self.dtype) for b, h, s, d in sizes]
            cut = [w.transpose(1, 2)[..., 3:-2] for w in wide]
            drawn = [c.copy_(x) for c, x in zip(cut, drawn, strict=True)]
            assert not any(x.is_contiguous() for x in drawn)
        q, k, v = drawn
        return q, k, v


def spans(skv: int, block: int, stride: int, tail: str) -> list[tuple[int, int]]:
    """Give the first token of each unit and the one behind its last, counted by hand."""
    found: list[tuple[int, int]] = []
    for first in range(0, skv, stride):
        end = min(first + block, skv)
        is_short = first + block > skv
        covers_nothing_new = bool(found) and found[-1][1] >= skv
        if not (is_short and tail == "drop") and not (covers_nothing_new and tail == "keep"):
            found.append((first, end))
    return found


def units(x: Tensor, cut: list[tuple[int, int]], how: str = "mean") -> Tensor:
    """Pool in float64 and round to the dtype of x, which is what a stream stores."""
    if not cut:
        return x[:, :, :0]
    reduce = {"mean": lambda y: y.mean(dim=2), "max": lambda y: y.amax(dim=2)}[how]
    return torch.stack([reduce(x[:, :, a:e].double()) for a, e in cut], dim=2).to(x.dtype)


def ends(cut: list[tuple[int, int]]) -> Tensor:
    """Give the last token of each unit [1, U]."""
    return torch.tensor([e - 1 for _, e in cut], dtype=torch.int64)[None, :]


def assert_is(
    got: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **rule: Any
) -> None:
    """Check out and lse against float64, within twice the error of plain PyTorch in the dtype."""
    out, lse = got
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    if k.shape[2] == 0:
        assert not out.any()
        assert bool((lse == -torch.inf).all())
        return
    want, want_lse = oracle.attention(q, k, v, mask, **rule)
    budget, _ = oracle.budgets(q, k, v, mask, **rule)
    _, budget_lse = oracle.budgets(*(x.float() for x in (q, k, v)), mask, **rule)
    # A unit may round to the neighbour of what float64 rounds to: half an ulp of the dtype more.
    ulp = torch.finfo(q.dtype).eps * float(v.abs().max()) / 2
    ulp_lse = torch.finfo(q.dtype).eps * float((q.double() @ _grouped(q, k).mT).abs().max())
    scale = rule.get("scale") or q.shape[-1] ** -0.5
    assert oracle.error(out, want) <= budget + ulp
    assert oracle.error(lse, want_lse) <= max(budget_lse, 1e-5) + ulp_lse * scale / 2


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    return k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def run(
    pattern: Pattern, tensors: tuple[Tensor, ...], backend: str = "triton"
) -> tuple[Tensor, Tensor]:
    out, lse = sp.compile(pattern, backend=backend)(*tensors, return_lse=True)
    return out, lse


@sp.pattern
def compressed(q, k, v, *, block=32, stride=16, tail="drop", by="mean"):
    """NSA's compressed branch (arXiv:2502.11089), with plain pooling."""
    pool = [sp.downsample(x, block=block, stride=stride, tail=tail, by=by) for x in (k, v)]
    return sp.attend(q, *pool)


SHAPES = (
    Shape(1, 3, 1, 129, 257, 80, 80, torch.bfloat16),
    Shape(3, 6, 2, 1, 257, 64, 64, torch.float16),
    Shape(3, 4, 2, 37, 101),
    Shape(1, 2, 2, 50, 131, 80, 40, torch.float16, is_strided=True),
    Shape(1, 2, 1, 40, 33, 17, 16, torch.bfloat16, is_strided=True),
)
GEOMETRY = ((32, 16), (64, 64), (16, 16), (8, 4))


CASES = [  # each geometry and tail on two of the shapes, in turn
    (block, stride, tail, SHAPES[(n + m) % len(SHAPES)])
    for n, ((block, stride), tail) in enumerate(product(GEOMETRY, ["keep", "drop"]))
    for m in (0, 2)
]


@pytest.mark.parametrize(("block", "stride", "tail", "shape"), CASES, ids=str)
def test_a_row_sees_the_units_whose_last_token_it_sees(
    block: int, stride: int, tail: str, shape: Shape
) -> None:
    tensors = q, k, v = shape.tensors()
    pattern = compressed(block=block, stride=stride, tail=tail)
    got = run(pattern, tensors)
    cut = spans(shape.skv, block, stride, tail)
    mask = ends(cut) <= oracle.positions(shape.sq, shape.skv)
    assert_is(got, q, units(k, cut), units(v, cut), mask)
    same = run(pattern, tensors, "reference")
    assert oracle.error(got[1], same[1]) <= 1e-2
    assert torch.equal(got[1] == -torch.inf, same[1] == -torch.inf)


@pytest.mark.parametrize("sq", [1, 5, 20])
@pytest.mark.parametrize("tail", ["keep", "drop"])
def test_a_sequence_shorter_than_a_unit_has_none_or_a_short_one(tail: str, sq: int) -> None:
    shape = Shape(2, 4, 2, sq, 20)
    tensors = q, k, v = shape.tensors()
    out, lse = run(compressed(tail=tail), tensors)
    if tail == "drop":
        assert not out.any()
        assert bool((lse == -torch.inf).all())
        return
    cut = [(0, 20)]
    assert_is((out, lse), q, units(k, cut), units(v, cut), ends(cut) <= oracle.positions(sq, 20))
    assert not out[:, :, :-1].any()
    assert bool(out[:, :, -1].any())


@pytest.mark.parametrize("sq", [1, 70])
def test_windows_and_sinks_count_tokens(sq: int) -> None:
    """A unit is in a window with its last token, and among the sinks with its first."""

    @sp.pattern
    def near_and_first(q, k, v):
        pool = [sp.downsample(x, block=8, stride=4, by="max") for x in (k, v)]
        chosen = sp.window(21) | sp.sink(10)
        return sp.attend(q, *(sp.gather(x, chosen) for x in pool), scale=0.3)

    shape = Shape(1, 4, 2, sq, 90, 32, 32, torch.bfloat16)
    tensors = q, k, v = shape.tensors()
    cut = spans(90, 8, 4, "keep")
    t, last = oracle.positions(sq, 90), ends(cut)
    first = torch.tensor([a for a, _ in cut])[None, :]
    mask = ((last > t - 21) | (first < 10)) & (last <= t)
    got = run(near_and_first(), tensors)
    assert_is(got, q, units(k, cut, "max"), units(v, cut, "max"), mask, scale=0.3)


@pytest.mark.parametrize("sq", [1, 40])
def test_hooks_and_tables_see_the_number_of_a_unit(sq: int) -> None:
    skv = 75
    cut = spans(skv, 16, 8, "drop")
    odd = torch.arange(skv) % 2 == 1
    bias = torch.randn(skv)

    @sp.pattern
    def ruled(q, k, v):
        pool = [sp.downsample(x, block=16, stride=8, tail="drop") for x in (k, v)]
        rule = sp.mask_mod(lambda b, h, q_idx, kv_idx: odd[kv_idx])
        return sp.attend(
            q,
            *(sp.gather(x, rule) for x in pool),
            score_mod=lambda score, b, h, q_idx, kv_idx: score + bias[kv_idx],
        )

    shape = Shape(2, 2, 1, sq, skv)
    tensors = q, k, v = shape.tensors()
    mask = (ends(cut) <= oracle.positions(sq, skv)) & odd[None, : len(cut)]
    added = bias[: len(cut)]
    got = run(ruled(), tensors)
    assert_is(got, q, units(k, cut), units(v, cut), mask, hook=lambda x: x + added.to(x.dtype))


@pytest.mark.parametrize("sq", [1, 20])
def test_one_softmax_over_units_and_tokens(sq: int) -> None:
    @sp.pattern
    def coarse_and_near(q, k, v):
        pool = sp.stream(*(sp.downsample(x, block=8) for x in (k, v)))
        far = sp.stream(*(sp.downsample(x, block=32, stride=16, tail="drop") for x in (k, v)))
        return sp.attend(q, [sp.gather(sp.stream(k, v), sp.window(5)), pool, far])

    @sp.pattern
    def as_a_merge(q, k, v):
        pool = sp.attend(q, *(sp.downsample(x, block=8) for x in (k, v)))
        far = sp.attend(q, *(sp.downsample(x, block=32, stride=16, tail="drop") for x in (k, v)))
        near = sp.attend(q, sp.gather(k, sp.window(5)), sp.gather(v, sp.window(5)))
        return sp.merge(far, sp.merge(near, pool))

    shape = Shape(1, 4, 2, sq, 71, 16, 16, torch.float16)
    tensors = q, k, v = shape.tensors()
    cuts = spans(71, 8, 8, "keep"), spans(71, 32, 16, "drop")
    t = oracle.positions(sq, 71)
    mask = torch.cat([oracle.window_mask(sq, 71, 5), *(ends(c) <= t for c in cuts)], dim=1)
    keys, values = (torch.cat([x, *(units(x, c) for c in cuts)], dim=2) for x in (k, v))
    for pattern in (coarse_and_near(), as_a_merge()):
        assert_is(run(pattern, tensors), q, keys, values, mask)


# ---- lists of the units of a stream --------------------------------------------------------------


@sp.pattern
def chosen_units(q, k, v, *, granule=1, block=8, listed=8, keep=3, heads="group", near=0):
    """Attend to the pooled keys of the units that score best."""
    pool = [sp.downsample(x, block=block) for x in (k, v)]
    ranked = pool[0] if listed == block else sp.downsample(k, block=listed)
    rows = q if granule == 1 else sp.downsample(q, block=granule)
    best = sp.topk(sp.score(rows, ranked, heads=heads), k=keep)
    rule = best | sp.window(near) if near else best
    return sp.attend(q, *(sp.gather(x, rule) for x in pool))


LISTED = {
    "token-rows": (chosen_units(), None, "gather"),
    "own-lists": (chosen_units(heads="query", listed=16), None, "gather"),
    "key-major": (chosen_units(heads="query", listed=16), "key_major", "key_major"),
    "wide-units": (chosen_units(block=2, listed=128, keep=2, heads="query"), None, "key_major"),
    "blocks": (chosen_units(granule=16, block=2, listed=32), None, "query_major"),
    "union": (chosen_units(granule=16, block=2, listed=32, near=9, keep=1), None, "query_major"),
}


@pytest.mark.parametrize("sq", [1, 33])
@pytest.mark.parametrize("name", LISTED)
def test_lists_of_units_are_followed_in_every_loop_order(name: str, sq: int) -> None:
    pattern, order, taken = LISTED[name]
    if sq == 1 and order:
        pytest.skip("decode has one loop order")
    shape = Shape(1, 4, 2, sq, 140)
    tensors = q, k, v = shape.tensors()
    attention = sp.compile(pattern, backend="triton", order=order)
    assert attention.built(*tensors).plan.order == ("gather" if sq == 1 else taken)
    given = dict(pattern.program.parameters)
    block, listed, granule = (int(given[n]) for n in ("block", "listed", "granule"))
    cut = spans(140, block, block, "keep")
    t, last = oracle.positions(sq, 140), ends(cut)
    mask = _chosen(q, k, granule, listed, int(given["keep"]), given["heads"] == "query")
    mask = mask[..., last[0] // listed]
    if given["near"]:
        mask = mask | (last > t - int(given["near"]))
    got = attention(*tensors, return_lse=True)
    assert_is(got, q, units(k, cut), units(v, cut), mask & (last <= t))


def _chosen(q: Tensor, k: Tensor, granule: int, listed: int, keep: int, by_head: bool) -> Tensor:
    """Tell which listed units each query chose, [B,Hq,Sq,U], row by row in float64."""
    (b, hq, sq, _), (_, hkv, skv, _) = q.shape, k.shape
    group = hq // hkv
    ranked = oracle.pooled(k, listed, oracle.mean).repeat_interleave(group, dim=1)
    rows = oracle.pooled(q, granule, oracle.mean)
    scores = rows @ ranked.mT
    if not by_head:
        shared = scores.unflatten(1, (hkv, group)).mean(dim=2)
        scores = shared.repeat_interleave(group, dim=1)
    mask = torch.zeros(b, hq, sq, ranked.shape[2], dtype=torch.bool)
    for item in range(b):
        for head in range(hq):
            for row in range(rows.shape[2]):
                end = min((row + 1) * granule, sq)
                able = oracle.complete_units(end - 1 + skv - sq, listed, skv)
                kept = oracle.choose(scores[item, head, row].tolist(), able, (), keep)
                mask[item, head, row * granule : end, sorted(kept)] = True
    return mask


def test_a_list_may_name_units_that_the_stream_dropped() -> None:
    """Blocks of 16 keep the short tail; the stream of 8 drops what it has no whole unit for."""
    marks = torch.ones(1, 1, 3, 3, dtype=torch.bool)

    @sp.pattern
    def brought(q, k, v):
        pool = [sp.downsample(x, block=8, tail="drop") for x in (k, v)]
        chosen = sp.block_mask(marks, block=16)
        return sp.attend(q, *(sp.gather(x, chosen) for x in pool))

    shape = Shape(1, 2, 1, 37, 37)
    tensors = q, k, v = shape.tensors()
    cut = spans(37, 8, 8, "drop")
    mask = ends(cut) <= oracle.positions(37, 37)
    assert_is(run(brought(), tensors), q, units(k, cut), units(v, cut), mask)


# ---- plans ---------------------------------------------------------------------------------------


def plan_of(pattern: Pattern, phase: str, spec: Specialisation, target: str = "sm90") -> Plan:
    chip = registry.target(target)
    return compiler.lower(pattern, backend=TRITON, target=chip, spec=spec, phase=phase)  # type: ignore[arg-type]


BF16 = Specialisation("bfloat16", 128, 128)


@pytest.mark.parametrize("tail", ["keep", "drop"])
@pytest.mark.parametrize(("block", "stride"), GEOMETRY)
def test_the_formulas_of_a_plan_count_the_units(block: int, stride: int, tail: str) -> None:
    """Counts of units and of their tiles hold at every length, also none at all."""
    plan = plan_of(compressed(block=block, stride=stride, tail=tail), "prefill", BF16)
    listing = next(x for x in plan.launches() if isinstance(x, TilesLaunch))
    keys, capacity = dims.evaluator(listing.keys), dims.evaluator(listing.capacity)
    step = listing.axis("block_k")
    for skv in (1, 3, 4, 7, 8, 15, 16, 31, 32, 33, 47, 48, 63, 64, 65, 100, 1000, 4097, 70001):
        env = {"B": 2, "Hq": 4, "Hkv": 2, "Sq": 5, "Skv": skv, "D": 128, "Dv": 128, "R": 5}
        want = len(spans(skv, block, stride, tail))
        assert keys(env) == want, skv
        assert capacity(env) == -(-want // step), skv


def test_slabs_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    @sp.pattern
    def branches(q, k, v):
        pool = [sp.downsample(x, block=8, stride=4) for x in (k, v)]
        near = sp.attend(q, sp.gather(k, sp.window(9)), sp.gather(v, sp.window(9)))
        return sp.merge(sp.attend(q, *pool), near)

    tensors = Shape(1, 2, 1, 45, 50).tensors()
    attention = sp.compile(branches(), backend="triton", order="gather")
    prepared = attention.built(*tensors).executable._prepared
    runs, shots = [], []
    for limit in (layouts.SCRATCH_LIMIT_BYTES, 20_000):
        monkeypatch.setattr(layouts, "SCRATCH_LIMIT_BYTES", limit)
        prepared.clear()
        runs.append(attention(*tensors, return_lse=True))
        shots.append(sum(len(call.shots) for call in prepared.values()))
    assert shots[1] > shots[0], "the smaller limit makes slabs"
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tokens_of_a_shipped_pattern_have_the_length_of_the_keys() -> None:
    """Only NSA attends to pooled keys, in one branch: a tiles launch and its attention."""
    pooled: dict[str, int] = {}
    for name in ON_TRITON:
        for launch in plan_of(SHIPPED[name](), "prefill", BF16).launches():
            if isinstance(launch, (TilesLaunch, AttendLaunch, GatherLaunch)):
                pooled[name] = pooled.get(name, 0) + (launch.keys != dims.Skv)
    assert {name: count for name, count in pooled.items() if count} == {"nsa": 2}


def test_the_templates_take_what_their_contexts_give() -> None:
    for name, kind in (("attend", attend.AttendContext), ("tiles", tiles.TilesContext)):
        assert "is_pooled" in variables_of(f"triton/kernels/{name}.py.jinja")
        assert "is_pooled" in kind.__dataclass_fields__


# ---- compiled without a card ---------------------------------------------------------------------


COMPILED = (
    (compressed(), "prefill", replace(BF16, is_aligned=False), "attend"),
    (compressed(), "prefill", replace(BF16, dtype="float32"), "attend"),
    (compressed(), "decode", BF16, "attend_gather"),
    (chosen_units(block=16, listed=16, keep=8), "prefill", BF16, "attend_gather"),
    (chosen_units(block=2, listed=128, heads="query"), "prefill", BF16, "attend_keys"),
)


def built_for_hopper(pattern: Pattern, phase: str, spec: Specialisation) -> dict[str, BuiltKernel]:
    source = compiler.emit(plan_of(pattern, phase, spec), TRITON, SM90, spec)
    return {k.kernel: k for k in build_offline(source)}


@pytest.mark.parametrize(("pattern", "phase", "spec", "kernel"), COMPILED)
def test_it_compiles_for_hopper_without_spills(
    pattern: Pattern, phase: str, spec: Specialisation, kernel: str
) -> None:
    built = built_for_hopper(pattern, phase, spec)
    most = 16 if kernel == "attend_gather" and phase == "prefill" else 0
    assert built[kernel].spill_bytes <= most
    assert {k.spill_bytes for k in built.values() if k.kernel != kernel} <= {0}
    assert [k.warnings for k in built.values() if k.warnings] == []


@pytest.mark.parametrize(("dim", "tail"), [(64, "keep"), (128, "drop")])
def test_the_kernel_for_hopper_keeps_its_loops_on_chip(dim: int, tail: str) -> None:
    spec = replace(BF16, head_dim=dim, value_dim=dim)
    built = built_for_hopper(compressed(tail=tail), "prefill", spec)["attend_ws"]
    assert (built.registers, built.warnings) == (168, ())
    loops = loops_that_multiply(built.binary)
    assert loops
    assert [loop.count("LDL") + loop.count("STL") for loop in loops] == [0] * len(loops)
