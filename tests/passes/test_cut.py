"""Cutting programs into launches: the plans' text, their meaning, and what cannot be cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from spcomp.backends.reference.pattern import run_program
from spcomp.backends.reference.plan import run_plan
from spcomp.errors import CannotLower
from spcomp.ir.nodes import Merge
from spcomp.ir.passes import cut
from spcomp.ir.plan import LoopOrder, Phase
from spcomp.ir.program import Program
from spcomp.ir.text import print_plan
from tests.ir.programs import LOWERED, PATTERNS, PHASES, SCHEDULE, normal, plan_of, tensors

SHOWN = ("block_topk", "moba", "quest", "streaming_llm", "two_lists", "joined", "gated")


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


def test_pooled_streams_are_refused_with_a_way_out() -> None:
    with pytest.raises(CannotLower) as caught:
        plan_of("pooled_stream")
    assert "help: use backend='reference', or attend to the tokens." in str(caught.value)
