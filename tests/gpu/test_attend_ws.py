"""The warp-specialised schedule on a card: it means what the plain one means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.dsl import Pattern
from spcomp.patterns import block_topk, streaming_llm
from tests.conformance import cases as shared
from tests.conformance.cases import Case, assert_same_selection, assert_within, read_keys, rule_of

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the schedule is for Hopper")


@sp.pattern
def union(q, k, v):
    rows, units = (sp.downsample(x, block=64) for x in (q, k))
    best = sp.topk(sp.score(rows, units, heads="group", reduce="max"), k=1)
    chosen = best | sp.window(9) | sp.sink(3)
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))


@sp.pattern
def bidirectional(q, k, v):
    rows, units = (sp.downsample(x, block=64) for x in (q, k))
    best = sp.topk(sp.score(rows, units, mask=None), k=2)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best), mask=None)


def given(case: Case) -> Pattern:
    shape = case.b, case.hkv, -(-case.sq // 128), -(-case.skv // 64)
    marks = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.5

    @sp.pattern
    def marked(q, k, v):
        chosen = sp.block_mask(marks, block=(128, 64))
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))

    return marked()


def sunk(case: Case) -> Pattern:
    """Make lists of a KV head beside sink logits."""
    logits = shared.sinks_of(case)

    @sp.pattern
    def beside_sinks(q, k, v):
        rows, units = (sp.downsample(x, block=64) for x in (q, k))
        best = sp.topk(sp.score(rows, units, heads="group"), k=2, always=sp.own())
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best), sinks=logits)

    return beside_sinks()


PATTERNS: dict[str, Callable[[Case], Pattern]] = {
    "block_topk-64": lambda _: block_topk(block=64, budget=0.5),
    "block_topk-128": lambda _: block_topk(block=128, budget=0.5),
    "block_topk-256": lambda _: block_topk(block=256, budget=0.5),
    "streaming_llm": lambda _: streaming_llm(sinks=4, recent=70),
    "dense": lambda _: shared.dense(),
    "documents": shared.documents,
    "per_head": lambda _: shared.per_head(),
    "softcapped": lambda _: shared.softcapped(),
    "merged": lambda _: shared.merged(),
    "union": lambda _: union(),
    "bidirectional": lambda _: bidirectional(),
    "given": given,
    "sunk": sunk,
    "sunk-merge": shared.sunk_merge,
}
CASES = (
    Case(2, 4, 2, 200, 240, 128, BF16, columns=256),
    Case(1, 3, 1, 130, 130, 80, FP16, "swapped", columns=144),
    Case(3, 2, 2, 65, 33, 64, BF16, "sliced", columns=64),
    Case(1, 6, 1, 17, 100, 256, BF16, "swapped", columns=128),
    Case(1, 4, 4, 257, 200, 96, FP16, columns=256),
    Case(2, 6, 2, 128, 128, 192, BF16, columns=192),
)


def compiled(pattern: Pattern, **options: Any) -> sp.Attention:
    moved = {n: t.cuda() for n, t in pattern.tensors.items()}
    return sp.compile(sp.Pattern(pattern.program, moved), order="query_major_ws", **options)


def run(attention: sp.Attention, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    plan = attention.built(*tensors).plan
    assert plan is not None
    assert any(launch.kernel == "attend_ws" for launch in plan.launches())
    out, lse = attention(*tensors, return_lse=True)
    for _ in range(2):
        again = attention(*tensors, return_lse=True)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_it_reads_the_keys_and_gives_the_values_of_the_pattern(name: str, case: Case) -> None:
    pattern = PATTERNS[name](case)
    q, k, v = case.tensors("cuda")
    out, lse = run(compiled(pattern), q, k, v)
    q, k, v = (x.cpu() for x in (q, k, v))
    want = sp.compile(pattern, backend="reference").to_mask(q, k)
    got = read_keys(out, case.skv)
    assert_same_selection(pattern, q, k, got, want)
    assert_within(out, lse, q, k, v, got, **rule_of(name, case))


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize(
    "axes", [{}, {"heads": 1}, {"block_q": 64}, {"block_k": 64}, {"stages": 3}], ids=str
)
def test_no_axis_changes_more_than_rounding(block: int, axes: dict[str, int]) -> None:
    case = Case(1, 4, 2, 1023, 2049, 64, BF16)
    q, k, v = case.tensors("cuda", probe=False)
    attention = compiled(block_topk(block=block, budget=0.25), axes={"attend_ws": axes})
    out, lse = run(attention, *(x.contiguous() for x in (q, k, v)))
    q, k, v = (x.cpu() for x in (q, k, v))
    assert_within(out, lse, q, k, v, attention.to_mask(q, k))


def test_rows_and_heads_that_read_nothing_give_zero() -> None:
    case = Case(2, 2, 1, 300, 280, 128, BF16, columns=128)
    marks = torch.ones(2, 2, 3, 3, dtype=torch.bool)
    marks[0, 0, 1], marks[1, 1] = False, False

    @sp.pattern
    def holes(q, k, v):
        chosen = sp.block_mask(marks, block=128)
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen), mask=None)

    out, lse = run(compiled(holes()), *case.tensors("cuda", probe=False))
    for empty in ((0, 0, slice(128, 256)), (1, 1)):
        assert not out[empty].any()
        assert bool((lse[empty] == -torch.inf).all())
    assert bool(lse[0, 1].isfinite().all())
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16], ids=str)
def test_sinks_of_any_dtype_and_stride_take_their_share(dtype: torch.dtype) -> None:
    """None, nothing, everything, and usual ones; an odd group, and rows that see nothing."""
    case = Case(2, 6, 2, 300, 280, 128, BF16, columns=128)
    marks = torch.ones(2, 2, 3, 3, dtype=torch.bool)
    marks[0, 0, 1], marks[1, 1] = False, False
    values = torch.tensor([0.5, -torch.inf, 2.5, -300.0, torch.inf, 3.0]).to(dtype)
    laid = values.repeat_interleave(2).cuda()[::2]

    @sp.pattern
    def holes(q, k, v):
        chosen = sp.block_mask(marks.cuda(), block=128)
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen), mask=None, sinks=laid)

    q, k, v = case.tensors("cuda", probe=False)
    attention = sp.compile(holes(), order="query_major_ws")
    out, lse = run(attention, q, k, v)
    q, k, v = (x.cpu() for x in (q, k, v))
    mask = marks.repeat_interleave(3, 1).repeat_interleave(128, 2).repeat_interleave(128, 3)
    assert_within(out, lse, q, k, v, mask[:, :, :300, :280], sinks=values)
    assert not out[:, 4].any()
    for empty in ((0, slice(0, 3), slice(128, 256)), (1, slice(3, 6))):
        assert not out[empty].any()
        assert bool((lse[empty] == -torch.inf).all())


def test_what_was_in_the_results_memory_does_not_matter() -> None:
    case = Case(1, 4, 2, 1000, 1000, 128, BF16)
    q, k, v = case.tensors("cuda", probe=False)
    v = v.new_empty(*v.shape[:3], 128).normal_()
    attention = compiled(block_topk(block=128, budget=0.3))
    want = attention(q, k, v)
    poison = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(4)]
    del poison
    assert torch.equal(attention(q, k, v), want)


@pytest.mark.parametrize("layout", ["shifted", "expanded"])
def test_tensors_that_the_copy_engine_cannot_read_take_the_plain_schedule(layout: str) -> None:
    q = torch.randn(1, 4, 300, 64, device="cuda", dtype=BF16)
    k = torch.randn(1, 2, 300, 64, device="cuda", dtype=BF16)
    if layout == "shifted":
        k = torch.randn(1, 2, 300, 68, device="cuda", dtype=BF16)[..., 4:]
    else:
        k = k[:, :1].expand(-1, 2, -1, -1)
    attention = sp.compile(streaming_llm(sinks=4, recent=70))
    plan = attention.built(q, k, k).plan
    assert plan is not None
    assert plan.order == "query_major"
    out, lse = attention(q, k, k, return_lse=True)
    q, k = q.cpu(), k.cpu()
    assert_within(out.cpu(), lse.cpu(), q, k, k, attention.to_mask(q, k))
    even = torch.randn(1, 2, 300, 64, device="cuda", dtype=BF16)
    plan = attention.built(q.cuda(), even, even).plan
    assert plan is not None
    assert plan.order == "query_major_ws"


def test_streams_at_once_do_not_share_their_work() -> None:
    case = Case(1, 8, 2, 2048, 2048, 128, BF16)
    attention = compiled(block_topk(block=128, budget=0.3))
    drawn = [case.tensors("cuda", probe=False)[:2] for _ in range(3)]
    calls = [(q, k, torch.randn_like(k)) for q, k in drawn]
    want = [attention(*call) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(20):
        got = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                got.append(attention(*call))
        torch.cuda.synchronize()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_a_captured_graph_gives_the_same_at_every_replay() -> None:
    case = Case(1, 8, 2, 1024, 1024, 128, BF16)
    q, k, _ = case.tensors("cuda", probe=False)
    v = torch.randn_like(k)
    attention = compiled(block_topk(block=128, budget=0.3))
    want = attention(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)


@pytest.mark.slow
def test_a_hundred_thousand_calls_on_changing_shapes_all_end() -> None:
    """A barrier that is missed once in a while would hang, or leave a tile half written."""
    attention = compiled(block_topk(block=64, budget=0.4))
    calls = []
    for n, (heads, length) in enumerate([(4, 64), (8, 200), (12, 513), (4, 1000), (2, 1300)]):
        q = torch.randn(1 + n % 3, heads, length, 128, device="cuda", dtype=BF16)
        k = torch.randn(1 + n % 3, heads // 2, length, 128, device="cuda", dtype=BF16)
        calls.append((q, k, torch.randn_like(k)))
    want = [attention(*call) for call in calls]
    for number in range(100_000):
        got = attention(*calls[number % len(calls)])
        if number % 997 == 0:
            assert torch.equal(got, want[number % len(calls)])
    torch.cuda.synchronize()
