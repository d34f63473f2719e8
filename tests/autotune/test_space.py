"""The space: what may be tried for one call, what is ruled out before anything is compiled, why."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import pytest

from spcomp import compiler
from spcomp.autotune.record import PREDICTED_NOISE, Candidate, Row, precedence
from spcomp.autotune.search import EveryCandidateFailed, search
from spcomp.autotune.space import (
    MOST_CHANGES,
    MOST_COMBINATIONS,
    ORDER_RATIO,
    PRUNE_RATIO,
    Space,
    candidates,
)
from spcomp.backends import registry
from spcomp.backends.base import Backend, Refusal, Specialisation
from spcomp.dsl import attend, downsample, pattern
from spcomp.dsl.pattern import Pattern
from spcomp.errors import UnknownChoice
from spcomp.ir import cost
from spcomp.ir.plan import LoopOrder, Phase, Plan
from spcomp.ir.schedule import AxisSpace, KernelAxes, Schedule
from spcomp.ir.target import Target
from spcomp.patterns import block_topk, moba, quest, streaming_llm

TRITON = registry.backend("triton")
SM90 = registry.target("sm90")
BF16 = Specialisation("bfloat16", 128, 128)
LONG = {"B": 1, "Hq": 32, "Hkv": 8, "Sq": 32768, "Skv": 32768, "D": 128, "Dv": 128}
STEP = {**LONG, "Sq": 1}
SHIPPED = {"moba": moba(), "block_topk": block_topk(), "quest": quest(), "llm": streaming_llm()}
PHASES: tuple[Phase, ...] = ("prefill", "decode")


def space_of(
    made: Pattern,
    phase: Phase = "prefill",
    *,
    target: Target = SM90,
    spec: Specialisation = BF16,
    backend: Backend = TRITON,
    orders: tuple[LoopOrder, ...] | None = None,
    shape: Mapping[str, int] | None = None,
) -> Space:
    shape = shape or (LONG if phase == "prefill" else STEP)
    return candidates(
        made, backend=backend, target=target, spec=spec, phase=phase, shape=shape, orders=orders
    )


def lowered(made: Pattern, candidate: Candidate, phase: Phase) -> Plan:
    schedule = Schedule("query_major", TRITON.axes(SM90, BF16))
    return compiler.lower(
        made,
        backend=TRITON,
        target=SM90,
        spec=BF16,
        phase=phase,
        order=candidate.order,
        schedule=schedule.changed({k: dict(axes) for k, axes in candidate.axes}),
    )


def reasons(space: Space, status: str) -> list[str]:
    return sorted({row.reason for row in space.rows if row.status == status})


# ---- what is in it -------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", SHIPPED)
def test_the_default_is_first_and_every_candidate_is_a_plan_of_its_own(
    name: str, phase: Phase
) -> None:
    space = space_of(SHIPPED[name], phase)
    found = space.candidates()
    assert found[0] == Candidate(None, ())
    plans = [lowered(SHIPPED[name], c, phase) for c in found]
    assert len(set(plans)) == len(found) > 10
    assert [space.judge(c).plan for c in found] == plans
    assert not {row.candidate for row in space.rows} & set(found)
    assert len({row.candidate for row in space.rows}) == len(space.rows)


def test_axes_of_a_changed_kernel_are_written_out_in_full() -> None:
    space = space_of(moba())
    full = {kernel: {name for name, _ in axes} for kernel, axes in TRITON.axes(SM90, BF16)}
    for candidate in space.candidates()[1:]:
        for kernel, axes in candidate.axes:
            assert {name for name, _ in axes} == full[kernel]


def test_every_combination_of_a_small_kernel_is_there_or_has_its_reason() -> None:
    space = space_of(moba(), orders=("key_major",))
    choices = TRITON.space(SM90, BF16)["attend_keys"]
    every = 1
    for values in choices.values():
        every *= len(values)
    assert every <= MOST_COMBINATIONS
    named = [c for c in space.candidates() if "attend_keys" in dict(c.axes)]
    ruled_out = [row for row in space.rows if "attend_keys" in dict(row.candidate.axes)]
    assert len(named) + len(ruled_out) + 1 == every  # and the default


def test_a_large_kernel_changes_at_most_two_axes_at_once() -> None:
    space = space_of(quest(), "decode")
    default = dict(dict(TRITON.axes(SM90, BF16))["attend_gather"])
    named = [dict(c.axes)["attend_gather"] for c in space.candidates()[1:] if "gather" in str(c)]
    changes = [sum(default[n] != v for n, v in axes) for axes in named]
    assert set(changes) == {1, MOST_CHANGES}
    assert len(named) > MOST_COMBINATIONS


def test_axes_that_follow_another_kernel_are_not_searched() -> None:
    space = space_of(moba())
    start = dict(dict(TRITON.axes(SM90, BF16))["invert_fill"])
    for candidate in space.candidates():
        axes = dict(dict(candidate.axes).get("invert_fill", ()))
        assert axes.get("rows", start["rows"]) == start["rows"]  # that of invert_count


def test_axes_that_lowering_fixes_are_not_searched() -> None:
    made = moba()
    start = dict(dict(TRITON.axes(SM90, BF16))["merge"])
    default = lowered(made, Candidate(None, ()), "decode")
    live = set()
    for axis, values in TRITON.space(SM90, BF16)["merge"].items():
        for value in values:
            axes = tuple(sorted({**start, axis: value}.items()))
            if lowered(made, Candidate(None, (("merge", axes),)), "decode") != default:
                live.add(axis)
    assert live < set(start)
    found = [dict(dict(c.axes).get("merge", ())) for c in space_of(made, "decode").candidates()]
    assert {n for axes in found for n in axes if axes[n] != start[n]} == live


def test_tiles_that_a_list_makes_equal_are_one_candidate() -> None:
    space = space_of(block_topk(block=64), orders=("query_major",))
    tiles = {
        (dict(axes)["block_q"], dict(axes)["block_k"])
        for c in space.candidates()
        for kernel, axes in c.axes
        if kernel == "attend"
    }
    # A granule of 64 rows makes 64 of every block_q, and a unit of 64 keys 64 of 128.
    assert {block_k for _, block_k in tiles} == {32, 128}


def test_kernels_come_with_the_largest_share_first() -> None:
    for order in space_of(moba()).orders:
        shares = [kernel.share for kernel in order.kernels]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)


def test_loop_orders_start_with_the_one_that_lowering_chooses() -> None:
    space = space_of(moba())
    assert [order.order for order in space.orders] == [None, "gather"]
    assert reasons(space, "refused")[0].startswith(
        "CannotLower: this selection in the loop order query_major cannot be lowered: "
    )
    assert Candidate("query_major", ()) in {row.candidate for row in space.rows}


def test_asked_loop_orders_are_the_only_ones() -> None:
    space = space_of(moba(), orders=("gather",))
    assert space.candidates()[0] == Candidate("gather", ())
    assert {c.order for c in space.candidates()} == {"gather"}
    own = space_of(moba(), orders=("key_major",))
    assert {c.order for c in own.candidates()} == {None}


def test_decode_has_one_loop_order_whatever_is_asked() -> None:
    assert [o.order for o in space_of(moba(), "decode", orders=("key_major",)).orders] == [None]


def test_a_loop_order_that_does_not_exist_is_named() -> None:
    with pytest.raises(UnknownChoice) as caught:
        space_of(moba(), orders=("rows",))  # type: ignore[arg-type]
    assert str(caught.value) == (
        "UnknownChoice: tune was given orders = 'rows'.\n"
        "  help: choose one of 'query_major', 'query_major_ws', 'key_major', 'gather'."
    )


def test_the_reference_backend_has_one_candidate_a_loop_order() -> None:
    backend = registry.backend("reference")
    space = space_of(moba(), backend=backend, target=registry.target("torch"))
    assert space.candidates() == (Candidate(None, ()), Candidate("gather", ()))


def test_a_pattern_without_a_plan_is_one_refused_row() -> None:
    @pattern
    def pairs_as_keys(q, k, v):
        return attend(q, downsample(k, block=8, by="minmax"), downsample(v, block=8))

    space = space_of(pairs_as_keys())
    assert space.candidates() == ()
    (row,) = space.rows
    text = (
        "CannotLower: a minmax pair in the place of one tensor cannot be lowered: only score() "
        "reads a pair."
    )
    assert row == Row(Candidate(None, ()), "refused", "emitted", text)
    with pytest.raises(EveryCandidateFailed) as caught:
        search(space, lambda c: row, budget_s=1, seed=0)
    assert str(caught.value).startswith(
        "EveryCandidateFailed: none of the 1 candidates of pairs_as_keys() can be taken:\n"
        f"    1 refused: {text}\n"
    )


# ---- what is ruled out ---------------------------------------------------------------------------


def test_a_plan_that_does_not_fit_on_chip_is_refused_with_both_figures() -> None:
    space = space_of(streaming_llm(), orders=("query_major",))
    refused = [row for row in space.rows if row.status == "refused"]
    assert refused
    for row in refused:
        axes = dict(row.candidate.axes[0][1])
        needed = (axes["block_q"] + axes["stages"] * axes["block_k"] * 2) * 128 * 2
        assert needed > SM90.shared_bytes
        assert row.reason == (
            f"at head dimensions 128 and 128 of 2 bytes it needs {needed} bytes on chip, "
            "and sm90 has 232448"
        )


def test_a_slow_prediction_is_pruned_with_both_figures() -> None:
    space = space_of(streaming_llm(), orders=("query_major",))
    best = min(space.judge(c).predicted_ms for c in space.candidates())
    pruned = [row for row in space.rows if row.status == "pruned"]
    assert pruned
    for row in pruned:
        assert row.predicted_ms is not None
        assert row.predicted_ms > PRUNE_RATIO * best
        assert row.reason == (
            f"predicted {row.predicted_ms:.4g} ms, more than 1.5 times the best of its loop order, "
            f"{best:.4g} ms"
        )
    for candidate in space.candidates()[1:]:
        assert space.judge(candidate).predicted_ms <= PRUNE_RATIO * best


def test_a_hopeless_loop_order_keeps_its_default_alone() -> None:
    space = space_of(moba())
    _, other = space.orders
    assert [kernel.choices for kernel in other.kernels] == [()] * len(other.kernels)
    best = {o: min(r.predicted_ms or 0 for r in rows_of(space, o)) for o in (None, "gather")}
    assert best["gather"] > ORDER_RATIO * best[None]
    texts = {r.reason for r in space.rows if r.status == "pruned" and r.candidate.order == "gather"}
    assert texts == {
        f"predicted {best['gather']:.4g} ms for the best of its loop order, more than 3 times the "
        f"{best[None]:.4g} ms of key_major"
    }
    assert Candidate("gather", ()) in space.candidates()


def rows_of(space: Space, order: str | None) -> list[Row]:
    """Give what is known of all candidates of a loop order."""
    tried = [
        Row(c, "ok", "emitted", predicted_ms=space.judge(c).predicted_ms)
        for c in space.candidates()
    ]
    every = [*tried, *(row for row in space.rows if row.status != "refused")]
    return [row for row in every if row.candidate.order == order]


def test_the_own_loop_order_is_pruned_where_another_is_predicted_far_better() -> None:
    space = space_of(quest())  # gathers by its own choice, which the model finds slow
    assert space.candidates()[0] == Candidate(None, ())
    assert {c.order for c in space.candidates()[1:]} == {"key_major"}
    assert any(text.endswith(" ms of key_major") for text in reasons(space, "pruned"))


def test_predictions_are_the_rooflines_of_all_launches_with_their_slabs() -> None:
    space = space_of(moba())
    judged = space.judge(Candidate(None, ()))
    assert judged.plan is not None
    figures = [cost.evaluate(one, {**LONG, "E": 2}) for one in cost.costs_of(judged.plan)]
    # 1 GiB of scratch holds a part of the parts [B,Hq,R,8,Dv] in bf16, so there are 3 slabs.
    runs = [1 if one.kernel == "pool" else 3 for one in figures]
    whole = sum(
        cost.roofline_ms(one, SM90, "bfloat16", count)
        for one, count in zip(figures, runs, strict=True)
    )
    assert judged.predicted_ms == pytest.approx(whole)


@pytest.mark.parametrize("shared_bytes", [65536, 49152])
def test_a_smaller_card_keeps_what_fits_it_and_refuses_the_rest(shared_bytes: int) -> None:
    card = replace(SM90, name="small", shared_bytes=shared_bytes)
    space = space_of(moba(), target=card)
    assert space.candidates()[0] == Candidate(None, ())
    assert all(f"and small has {shared_bytes}" in r for r in reasons(space, "refused")[2:])
    assert not [c for c in space.candidates() if refused_by(card, space, c)]


class _Stubborn:
    """A backend whose defaults are those of a larger card."""

    name = "stubborn"

    def axes(self, target: Target, spec: Specialisation) -> KernelAxes:
        return TRITON.axes(SM90, spec)

    def lacking(self, target: Target, spec: Specialisation) -> Mapping[str, str]:
        return {}

    def space(self, target: Target, spec: Specialisation) -> AxisSpace:
        return TRITON.space(SM90, spec)

    def refuses(self, plan: Plan, target: Target, spec: Specialisation) -> Refusal | None:
        return TRITON.refuses(plan, target, spec)


def test_where_the_default_is_refused_smaller_candidates_are_found() -> None:
    card = replace(SM90, name="small", shared_bytes=98304)
    space = space_of(moba(), backend=cast(Backend, _Stubborn()), target=card)
    default = next(row for row in space.rows if row.candidate == Candidate(None, ()))
    assert default.reason == (
        "at head dimensions 128 and 128 of 2 bytes it needs 131072 bytes on chip, and small has "
        "98304"
    )
    tried: list[Candidate] = []

    def trial(candidate: Candidate) -> Row:
        tried.append(candidate)
        return Row(candidate, "ok", "compiled")

    result = search(space, trial, budget_s=1e9, seed=0)
    assert not [c for c in tried if refused_by(card, space, c)]
    own = [c for c in tried if c.order is None]
    assert all("attend_keys" in dict(c.axes) for c in own)
    assert any("select" in dict(c.axes) for c in own)  # its turn comes beside tiles that fit
    assert "attend_keys" in dict(result.best.candidate.axes)


def refused_by(card: Target, space: Space, candidate: Candidate) -> Refusal | None:
    plan = space.judge(candidate).plan
    assert plan is not None
    return TRITON.refuses(plan, card, BF16)


# ---- together ------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", SHIPPED)
def test_without_a_card_the_search_ranks_by_the_model_and_is_reproducible(
    name: str, phase: Phase
) -> None:
    space = space_of(SHIPPED[name], phase)
    seen: list[list[Candidate]] = []

    def found(seed: int) -> tuple[Row, ...]:
        seen.append([])
        result = search(
            space,
            lambda c: (seen[-1].append(c), Row(c, "ok", "emitted"))[1],
            budget_s=1e9,
            seed=seed,
        )
        assert not result.is_timed
        return result.rows

    rows = found(0)
    assert rows == found(0)
    assert seen[0] == seen[1]
    other = found(1)
    assert seen[2] != seen[0]
    best, again = (next(r for r in rows if r.status == "best") for rows in (rows, other))
    assert best.candidate == again.candidate
    right = [row.predicted_ms or 0 for row in rows if row.status in ("best", "ok")]
    assert best.predicted_ms is not None
    assert best.predicted_ms <= min(right) * (1 + PREDICTED_NOISE)
    assert [row.candidate for row in rows] == sorted((r.candidate for r in rows), key=precedence)


def test_building_the_largest_space_takes_a_few_seconds() -> None:
    """At most 2 on an idle machine; the same work takes twice the processor time beside others."""
    began = time.process_time()
    for made in SHIPPED.values():
        space_of(made, shape={**LONG, "Sq": 40960, "Skv": 40960})
        took_s = time.process_time() - began
        assert took_s < 6, f"{made.name}: {took_s:.1f} s"
        began = time.process_time()
