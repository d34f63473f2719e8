"""Cutting programs into launches: the plans' text, their meaning, and what cannot be cut."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from spcomp.backends.reference.pattern import run_program
from spcomp.backends.reference.plan import run_plan
from spcomp.dsl import attend, downsample, pattern
from spcomp.errors import CannotLower
from spcomp.ir import dims
from spcomp.ir.launches import AttendLaunch, TopKLaunch
from spcomp.ir.lifetimes import lifetimes
from spcomp.ir.lowering.attend import Target, lower_attend
from spcomp.ir.lowering.builder import PlanBuilder
from spcomp.ir.nodes import Attend, Merge
from spcomp.ir.passes import PATTERN_PIPELINE, cut
from spcomp.ir.plan import Buffer, LoopOrder, Phase, Slabs
from spcomp.ir.program import Program
from spcomp.ir.spec import faults
from spcomp.ir.text import print_plan
from tests.ir.programs import LOWERED, PATTERNS, PHASES, SCHEDULE, normal, plan_of, tensors

SHOWN = (
    "block_topk",
    "moba",
    "quest",
    "streaming_llm",
    "two_lists",
    "joined",
    "pooled_stream",
    "gated",
)


class PlanText(SingleFileSnapshotExtension):
    """One real file of text a plan."""

    _write_mode = WriteMode.TEXT
    file_extension = "plan"


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", SHOWN)
def test_plan_of_a_pattern_is_as_recorded(
    name: str, phase: Phase, snapshot: SnapshotAssertion
) -> None:
    assert print_plan(plan_of(name, phase)) == snapshot(extension_class=PlanText)


ORDERS: tuple[LoopOrder | None, ...] = (None, "query_major", "key_major", "gather")


def expressible() -> list[tuple[str, LoopOrder | None]]:
    """List the loop orders that can express each pattern; without a wish, one always can."""
    found = []
    for name, order in itertools.product(LOWERED, ORDERS):
        try:
            plan_of(name, "prefill", order)
        except CannotLower:
            assert order is not None, name
        else:
            found.append((name, order))
    return found


@pytest.mark.parametrize(("name", "order"), expressible())
def test_cut_keeps_the_meaning_in_every_loop_order_that_can_express_it(
    name: str, order: LoopOrder | None
) -> None:
    _assert_means(name, PATTERNS[name].tensors, "prefill", order, 70, 70)


@pytest.mark.parametrize("name", [n for n in LOWERED if not PATTERNS[n].tensors])
def test_cut_for_decode_keeps_the_meaning(name: str) -> None:
    for rows in (1, 5):
        _assert_means(name, {}, "decode", None, rows, 70)


@pytest.mark.parametrize(
    "name", ["block_topk", "moba-small", "quest", "streaming_llm", "gated", "indexed"]
)
def test_slabs_of_any_size_give_the_same(name: str) -> None:
    inputs, plan = tensors(), plan_of(name)
    whole, _ = run_plan(plan, inputs)
    for rows in (64, 16):
        cut_up, _ = run_plan(plan, inputs, slab_rows=rows)
        torch.testing.assert_close(cut_up, whole, rtol=1e-12, atol=1e-12)


def _assert_means(
    name: str,
    captured: dict[str, torch.Tensor],
    phase: Phase,
    order: LoopOrder | None,
    sq: int,
    skv: int,
) -> None:
    inputs = {**tensors(sq, skv), **captured}
    want = run_program(PATTERNS[name].program, inputs)
    got = run_plan(plan_of(name, phase, order), inputs)
    # Parts pass through float32 buffers where a plan has them, so 1e-6 and not 1e-12.
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)


def test_each_list_is_made_once_when_two_branches_read_it() -> None:
    single = normal("block_topk")
    twice = Program("p", (), Merge((single.result, single.result)))
    kernels = [x.kernel for x in cut(twice, "prefill", SCHEDULE).launches()]
    assert kernels.count("select") == 1
    assert kernels.count("attend") == 2


@pytest.mark.parametrize(
    ("name", "order", "text"),
    [
        (
            "moba",
            "query_major",
            "its lists change every 1 query rows, and a query tile needs multiples of 16",
        ),
        (
            "block_topk",
            "key_major",
            "key-major needs exactly one list, one row a query, narrowed by rules only",
        ),
    ],
)
def test_an_order_that_cannot_express_a_pattern_is_refused(
    name: str, order: LoopOrder, text: str
) -> None:
    with pytest.raises(CannotLower, match=text):
        plan_of(name, "prefill", order)


@pattern
def pairs_as_keys(q, k, v):
    """Attend to what only scores can read."""
    return attend(q, downsample(k, block=8, by="minmax"), downsample(v, block=8))


@pattern
def units_of_units(q, k, v):
    """Attend to units that were pooled twice."""
    return attend(q, *(downsample(downsample(x, block=4), block=2) for x in (k, v)))


def test_what_cannot_be_a_stream_of_units_is_refused_with_a_way_out() -> None:
    for made, text in (
        (
            pairs_as_keys(),
            "a minmax pair in the place of one tensor cannot be lowered: only score() reads a "
            "pair.\n  help: pool it by mean, max or min.",
        ),
        (
            units_of_units(),
            "a downsample() of a downsample() as a stream cannot be lowered: no kernel pools units "
            "again.\n  help: use backend='reference', or pool the tokens once.",
        ),
    ):
        program = made.program
        for step in PATTERN_PIPELINE:
            program = step(program)
        with pytest.raises(CannotLower) as caught:
            cut(program, "prefill", SCHEDULE)
        lines = str(caught.value).splitlines()
        assert "\n".join(x for x in lines if "-->" not in x) == f"CannotLower: {text}"


def test_a_stream_of_units_counts_them_apart_from_tokens() -> None:
    plan = plan_of("pooled_stream")
    by_stream = {x.k_buf: x for x in plan.launches() if isinstance(x, AttendLaunch)}
    assert by_stream["k"].keys == dims.Skv
    assert by_stream["k_mean"].keys == dims.ceildiv(dims.Skv, 8)
    assert by_stream["k_mean"].v_buf == "v_mean"
    assert plan.buffer("v_mean").dims == (dims.B, dims.Hkv, dims.ceildiv(dims.Skv, 8), dims.Dv)
    wrong = [
        replace(x, keys=dims.Skv) if x is by_stream["k_mean"] else x
        for x in plan.steps[-1].launches  # type: ignore[union-attr]
    ]
    broken = replace(plan, steps=(*plan.steps[:-1], Slabs(tuple(wrong), 128)))
    (problems,) = faults(broken).values()
    assert problems == [
        f"attend counts Skv entries, and '{name}' ceiling(Skv/8)"
        for name in ("k_mean", "v_mean", by_stream["k_mean"].tiles_buf)
    ]


def test_the_lse_of_a_branch_has_a_name_that_a_later_launch_can_read() -> None:
    """A score that takes its probabilities from a branch needs that branch's lse, row by row."""
    branch = normal("pooled_stream").result
    assert isinstance(branch, Attend)
    coarse = replace(branch, streams=branch.streams[1:])
    near = replace(branch, streams=branch.streams[:1])
    builder = PlanBuilder("prefill", SCHEDULE)
    shape = (dims.B, dims.Hq, dims.R)
    for node in (coarse, near):
        target = Target(
            builder.scratch("branch", (*shape, dims.Dv), "float32"),
            builder.scratch("branch_lse", shape, "float32"),
        )
        lower_attend(builder, node, node.streams[0], target, None)  # type: ignore[arg-type]
        assert builder.made[node] == target
    found = builder.made[coarse]
    assert isinstance(found, Target)
    assert builder.buffers[found.lse].dims == shape
    merged = cut(Program("p", (), Merge((coarse, near))), "prefill", SCHEDULE)
    slabs = merged.steps[-1]
    assert isinstance(slabs, Slabs)
    lse = next(x.lse_buf for x in slabs.launches if isinstance(x, AttendLaunch))
    assert lse == "stream_lse#0"
    reader = TopKLaunch(
        scores_buf=lse, indices_buf="i", counts_buf="c", k=1, width=1, axes=(("block_u", 16),)
    )
    made = tuple(Buffer(n, (dims.B, dims.Hq, dims.R, 1), "int32", "scratch") for n in "ic")
    read = replace(
        merged,
        buffers=(*merged.buffers, *made),
        steps=(*merged.steps[:-1], Slabs((*slabs.launches, reader), slabs.align)),
    )
    assert faults(read) == {}
    assert lifetimes(read)["stream_lse"].last == len(read.launches()) - 1
