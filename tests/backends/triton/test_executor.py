"""Where a call's scratch lies, and when a call is worked out anew."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import spcomp as sp
from spcomp import compiler
from spcomp.backends import registry
from spcomp.backends.base import Specialisation
from spcomp.backends.triton import executor, launcher
from spcomp.backends.triton.bind import bind
from spcomp.backends.triton.layouts import Layout, Shelf, contiguous, layout_of
from spcomp.backends.triton.sites import view
from spcomp.ir.plan import SCRATCH_LIMIT_BYTES, Phase, Plan
from spcomp.patterns import SHIPPED, moba, streaming_llm
from tests.shipped import ON_TRITON

BACKEND = registry.backend("triton")


def plan_of(name: str, phase: Phase, dim: int = 64) -> Plan:
    spec = Specialisation("bfloat16", dim, dim)
    target = registry.target("sm90")
    return compiler.lower(SHIPPED[name](), backend=BACKEND, target=target, spec=spec, phase=phase)


def shelf_of(plan: Plan) -> Shelf:
    return Shelf(plan, [bind(n, plan) for n in plan.launches()], 2)


def dims_of(length: int, rows: int | None = None, dim: int = 64) -> dict[str, int]:
    sq = length if rows is None else rows
    return {"B": 2, "Hq": 6, "Hkv": 2, "Sq": sq, "Skv": length, "D": dim, "Dv": dim}


def bytes_of(layout: Layout) -> int:
    """Give the bytes from the first element to behind the last."""
    last = sum((n - 1) * s for n, s in zip(layout.shape, layout.strides, strict=True))
    return (last + 1) * layout.item_bytes


@pytest.mark.parametrize("length", [1, 37, 1000, 4097])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", ON_TRITON)
def test_scratch_buffers_do_not_overlap(name: str, phase: Phase, length: int) -> None:
    rows = 1 if phase == "decode" else None
    _, placed, total = shelf_of(plan_of(name, phase)).place(dims_of(length, rows), 5, {})
    spans = sorted((x.offset, x.offset + bytes_of(x)) for x in placed.values())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert spans[-1][1] <= total
    assert all(x.place == 5 and x.offset % 256 == 0 for x in placed.values())


@pytest.mark.parametrize("dim", [64, 17])
@pytest.mark.parametrize("length", [131072, 1 << 20])
@pytest.mark.parametrize("name", ON_TRITON)
def test_padded_scratch_stays_within_the_limit(name: str, length: int, dim: int) -> None:
    env = {**dims_of(length, dim=dim), "B": 1, "Hq": 32, "Hkv": 8}
    shelf = shelf_of(plan_of(name, "prefill", dim))
    rows, _, total = shelf.place(env, 0, {})
    assert 0 < total <= SCRATCH_LIMIT_BYTES
    assert 0 < rows < length + 128


def test_a_buffer_that_a_cache_keeps_takes_no_room() -> None:
    plan = plan_of("quest", "decode")
    shelf, env = shelf_of(plan), dims_of(1000, 1)
    states = {b.state for b in plan.buffers if b.state}
    kept = {s: Layout(3, (2, 2, 63, 64), (8064, 4032, 64, 1), 2) for s in states}
    _, placed, total = shelf.place(env, 7, kept)
    assert len(states) == 2
    assert [x.place for x in placed.values()].count(3) == 2
    assert total < shelf.place(env, 7, {})[2]


def test_only_strides_that_depend_on_a_length_are_padded() -> None:
    plan = plan_of("moba", "prefill", 17)
    shelf = shelf_of(plan)
    _, placed, _ = shelf.place(dims_of(1000, dim=17), 0, {})
    padded = {room.name: room.padded_axis for room in shelf.rooms}
    for name, axis in padded.items():
        if axis >= 0:
            assert placed[name].strides[axis] % 16 == 0, name
    means = next(b.name for b in plan.scratch() if b.dims[-1] == plan.buffer("k").dims[-1])
    assert padded[means] == -1
    assert placed[means].strides[2] == 17


def test_a_padded_axis_rounds_its_stride_up() -> None:
    assert contiguous((2, 3, 5, 7)) == (105, 35, 7, 1)
    assert contiguous((2, 3, 5, 7), padded_axis=2) == (240, 80, 16, 1)
    assert contiguous((2, 3, 5, 7), padded_axis=1) == (144, 48, 7, 1)


def test_the_odd_stride_of_a_dimension_of_one_is_no_class_of_its_own() -> None:
    given = layout_of(0, (2, 1, 5, 1), (35, 3, 32, 1), 0, 2)
    assert given.strides == (35, 0, 32, 1)


def test_a_view_points_into_an_allocation() -> None:
    arena = torch.arange(64, dtype=torch.uint8)
    assert view(arena, 8, torch.int32)[0] == arena[8:12].view(torch.int32)[0]
    lists = torch.arange(24, dtype=torch.int32).view(2, 3, 4)[:, 1:]
    assert view(lists, 16, torch.int32).data_ptr() == lists.data_ptr() + 16
    assert view(lists, 0, torch.int32) is lists


def inputs(length: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = torch.randn(1, 2, length, 16), torch.randn(1, 1, length, 16)
    return q, k, torch.randn_like(k)


def test_a_call_is_prepared_once_for_its_shapes_strides_and_alignment() -> None:
    attention = sp.compile(streaming_llm(sinks=1, recent=8), backend="triton")
    q, k, v = inputs()
    rows = k.transpose(1, 2).repeat(1, 1, 2, 1).transpose(1, 2)[:, :1]
    counts = []
    for given in (k, k.clone(), rows, k[:, :, :39]):
        before = launcher.STATS.prepared
        attention(q[:, :, : given.shape[2]], given, v[:, :, : given.shape[2]])
        counts.append(launcher.STATS.prepared - before)
    assert counts == [1, 0, 1, 1]


def test_a_repeated_call_gives_the_same_bits() -> None:
    """Scratch is shared memory that the call before left as it was."""
    attention = sp.compile(moba(block=16, k_blocks=2), backend="triton")
    first = attention(*(given := inputs()), return_lse=True)
    attention(*inputs(61))
    again = attention(*given, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_so_many_shapes_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "MOST_PREPARED", 3)
    attention = sp.compile(streaming_llm(sinks=1, recent=4), backend="triton")
    before = launcher.STATS.prepared
    for n in (17, 18, 19, 20, 20, 17):
        attention(*inputs(n))
    assert launcher.STATS.prepared - before == 5, "20 is known, 17 is not any more"


def test_a_call_that_passed_its_checks_is_not_excused_for_other_tensors() -> None:
    attention = sp.compile(streaming_llm(sinks=1, recent=4), backend="triton")
    q, k, v = inputs()
    attention(q, k, v)
    with pytest.raises(sp.errors.SpcompError):
        attention(q, k, v.half())
    with pytest.raises(sp.errors.SpcompError):
        attention(q, k.requires_grad_(), v)
    with torch.no_grad():
        attention(q, k, v)
    with pytest.raises(sp.errors.SpcompError):
        attention(q, k.transpose(2, 3).contiguous().transpose(2, 3), v)
