"""The search: whom it tries and when, what stops it, and that noise and seed choose nobody."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spcomp.autotune.record import FINAL, RIGHT, Candidate, Row, settled, winner
from spcomp.autotune.search import EveryCandidateFailed, search
from spcomp.errors import Refused
from tests.autotune.tuning import (
    CALL,
    DEFAULT,
    Clock,
    Timer,
    judged,
    one,
    plan,
    sizes,
    space_of,
    timed,
)

FOREVER = 1e9
TWELVE = space_of({"attend": (0.9, 11)})  # with the default


def by_size(candidate: Candidate) -> float:
    """Take less time the larger the sizes are."""
    return 10.0 - sum(dict(axes)["size"] for _, axes in candidate.axes)


# ---- the order of the search ---------------------------------------------------------------------


def test_the_default_comes_first_and_the_largest_kernel_next() -> None:
    space = space_of({"attend": (0.9, 3), "merge": (0.1, 2)})
    timer = Timer(by_size)
    search(space, timer, budget_s=FOREVER, seed=0)
    assert timer.seen[0] == DEFAULT
    assert set(timer.seen[1:4]) == set(one(1, 2, 3))
    assert [[k for k, _ in c.axes] for c in timer.seen[4:]] == [["attend", "merge"]] * 2


def test_the_best_of_a_kernel_is_kept_while_the_next_one_is_searched() -> None:
    space = space_of({"attend": (0.6, 3), "select": (0.3, 2), "merge": (0.1, 4)})
    result = search(space, Timer(by_size), budget_s=FOREVER, seed=0)
    (three, two, four) = sizes(3, 2, 4)
    assert result.best.candidate == Candidate(
        None, (("attend", three), ("merge", four), ("select", two))
    )
    assert not result.is_partial
    assert len(result.rows) == 10


def test_small_kernels_come_after_all_loop_orders() -> None:
    space = space_of({"attend": (0.99, 1), "scan": (0.01, 1)}, orders=(None, "gather"))
    timer = Timer(lambda c: 1.0)
    search(space, timer, budget_s=FOREVER, seed=0)
    shown = [(c.order, [kernel for kernel, _ in c.axes]) for c in timer.seen]
    assert shown == [
        (None, []),
        (None, ["attend"]),
        ("gather", []),
        ("gather", ["attend"]),
        (None, ["scan"]),
        ("gather", ["scan"]),
    ]


def test_better_predictions_come_first_and_equal_ones_are_shuffled_by_the_seed() -> None:
    times = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 1.0, 6: 1.0}

    def judge(candidate: Candidate):  # type: ignore[no-untyped-def]
        return judged(candidate, times[candidate.axes[0][1][0][1]] if candidate.axes else 5.0)

    space = space_of({"attend": (1.0, 6)}, judge=judge)
    orders = []
    for seed in (0, 0, 1, 2, 3):
        timer = Timer(lambda c: 1.0)
        search(space, timer, budget_s=FOREVER, seed=seed)
        orders.append([c.axes[0][1][0][1] for c in timer.seen[1:]])
    assert orders[0] == orders[1]
    assert len(set(map(tuple, orders))) > 1
    for order in orders:
        assert sorted(order[:4]) == [2, 4, 5, 6]
        assert order[4:] == [3, 1]


def test_a_candidate_with_the_plan_of_another_is_not_tried_twice() -> None:
    def only_attend(candidate: Candidate) -> Candidate:
        return Candidate(None, tuple(axes for axes in candidate.axes if axes[0] == "attend"))

    space = space_of(
        {"merge": (0.6, 1), "attend": (0.4, 2)}, judge=lambda c: judged(only_attend(c))
    )
    timer = Timer(by_size)
    told: list[tuple[int, ...]] = []
    search(space, timer, budget_s=FOREVER, seed=0, tell=lambda row, *counts: told.append(counts))
    assert len(timer.seen) == 3
    assert told == [(1, 4), (2, 3), (3, 3)]


def test_each_row_is_told_once_with_the_count_of_all() -> None:
    pruned = Row(one(9)[0], "pruned", "emitted", "slow", 9.0)
    told: list[tuple[Candidate, int, int]] = []
    space = space_of({"attend": (1.0, 2)}, rows=(pruned,))
    result = search(
        space,
        Timer(by_size),
        budget_s=FOREVER,
        seed=0,
        tell=lambda row, done, total: told.append((row.candidate, done, total)),
    )
    assert [counts for _, *counts in told] == [[1, 4], [2, 4], [3, 4], [4, 4]]
    assert {candidate for candidate, _, _ in told} == {row.candidate for row in result.rows}
    assert pruned in result.rows


def test_a_change_that_is_refused_beside_the_others_is_a_row_and_no_trial() -> None:
    both = Candidate(None, (("attend", sizes(2)[0]), ("merge", sizes(1)[0])))
    space = space_of(
        {"attend": (0.9, 2), "merge": (0.1, 1)},
        judge=lambda c: judged(c, 1.0, "9 bytes needed, 8 there" if c == both else ""),
    )
    timer = Timer(by_size)
    result = search(space, timer, budget_s=FOREVER, seed=0)
    assert both not in timer.seen
    row = next(row for row in result.rows if row.candidate == both)
    assert (row.status, row.reason) == ("refused", "9 bytes needed, 8 there")


# ---- the winner ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "runs"), [(0.006, 50), (0.03, 200)])
def test_noise_never_changes_the_winner_in_fifty_fresh_tunings(noise: float, runs: int) -> None:
    near = {1: 1.002, 2: 1.0, 3: 1.2}  # 1 and 2 differ by less than their noise

    def times(candidate: Candidate) -> float:
        return near[candidate.axes[0][1][0][1]] if candidate.axes else 1.5

    space = space_of({"attend": (1.0, 3)})
    results = [
        search(space, Timer(times, noise, runs, seed), budget_s=FOREVER, seed=seed)
        for seed in range(50)
    ]
    assert {result.best.candidate for result in results} == {one(1)[0]}
    fastest = {min(result.rows, key=lambda row: row.median_ms or 0).candidate for result in results}
    assert len(fastest) == 2  # the timer alone would have taken one or the other


def test_the_default_wins_every_near_tie() -> None:
    rows = [timed(DEFAULT, 1.009), *(timed(c, 1.0) for c in one(1, 2))]
    for order in itertools.permutations(rows):
        assert [(row.candidate, row.status) for row in settled(order)] == [
            (DEFAULT, "best"),
            *((c, "ok") for c in one(1, 2)),
        ]


def test_of_several_rows_of_a_candidate_the_last_one_holds() -> None:
    rows = [timed(DEFAULT, 1.0), Row(DEFAULT, "wrong", "compiled", "max error 1")]
    assert settled(rows) == (rows[1],)
    assert settled(rows[::-1])[0].median_ms == 1.0


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [
        ((1.009, 0.0), (1.0, 0.0), 0),  # within 1 %
        ((1.011, 0.0), (1.0, 0.0), 1),  # beyond
        ((1.04, 0.1), (1.0, 0.0), 0),  # within half the spread of either
        ((1.04, 0.0), (1.0, 0.1), 0),
        ((1.06, 0.1), (1.0, 0.1), 1),
        ((1.0, 0.0), (1.009, 0.0), 0),
    ],
)
def test_two_times_are_equal_within_half_the_larger_spread_or_one_percent(
    first: tuple[float, float], second: tuple[float, float], taken: int
) -> None:
    rows = [timed(c, *figures) for c, figures in zip(one(1, 2), (first, second), strict=True)]
    assert winner(rows) == rows[taken]


def test_without_a_card_the_lowest_prediction_wins() -> None:
    times = {1: 2.0, 2: 1.0, 3: 1.0005, 4: 1.002}
    space = space_of(
        {"attend": (1.0, 4)},
        judge=lambda c: judged(c, times[c.axes[0][1][0][1]] if c.axes else 3.0),
    )
    result = search(space, lambda c: Row(c, "ok", "compiled"), budget_s=FOREVER, seed=0)
    assert result.best.candidate == one(2)[0]
    assert result.best.predicted_ms == 1.0
    assert not result.is_timed
    swapped = {**times, 2: 1.0005, 3: 1.0}
    times.update(swapped)
    result = search(space, lambda c: Row(c, "ok", "compiled"), budget_s=FOREVER, seed=0)
    assert result.best.candidate == one(2)[0]  # equal within 0.1 %: the first of the fixed order


def test_a_measured_row_beats_a_prediction() -> None:
    first, second = one(1, 2)
    rows = [Row(first, "ok", "compiled", predicted_ms=0.1), timed(second, 7.0)]
    assert winner(rows) == rows[1]


# ---- failures (B57) ------------------------------------------------------------------------------


def raises(error: BaseException) -> Callable[[Candidate], Row]:
    def trial(candidate: Candidate) -> Row:
        raise error

    return trial


OUTCOMES: dict[str, Callable[[Candidate], Row]] = {
    "ok": lambda c: timed(c, by_size(c)),
    "raised": raises(RuntimeError("out of resource: shared memory\nRequired: 300000")),
    "compiler": raises(Refused(backend="triton", what="attend", reason="no", way_out="other")),
    "wrong": lambda c: Row(c, "wrong", "compiled", "max error nan > 4.0e-03", error=float("nan")),
    "failed": lambda c: Row(c, "failed", "compiled", "signal 6"),
    "timeout": lambda c: Row(c, "timeout", "compiled", "no answer in 30 s"),
}


@pytest.mark.parametrize("of_default", OUTCOMES)
def test_every_mix_of_failures_leaves_a_row_each_and_takes_the_best_that_is_right(
    of_default: str,
) -> None:
    space = space_of({"attend": (1.0, 3)})
    every = (DEFAULT, *one(1, 2, 3))
    for mix in itertools.product(OUTCOMES, repeat=3):
        outcomes = dict(zip(every, (of_default, *mix), strict=True))
        right = [c for c, outcome in outcomes.items() if outcome == "ok"]
        try:
            result = search(space, outcome_of(outcomes), budget_s=FOREVER, seed=0)
        except EveryCandidateFailed as error:
            rows = error.figures["rows"]
            assert not right
        else:
            rows = result.rows
            assert (result.best.candidate, result.best.status) == (right[-1], "best")
        assert [row.candidate for row in rows] == list(every)
        assert all(row.reason for row in rows if row.status not in RIGHT)


def outcome_of(outcomes: Mapping[Candidate, str]) -> Callable[[Candidate], Row]:
    """Let each candidate have its outcome."""
    return lambda candidate: OUTCOMES[outcomes[candidate]](candidate)


@given(
    st.dictionaries(
        st.tuples(st.integers(0, 3), st.integers(0, 2)), st.sampled_from(sorted(OUTCOMES))
    )
)
def test_a_right_candidate_is_found_wherever_it_stands(
    outcomes: dict[tuple[int, int], str],
) -> None:
    def outcome(candidate: Candidate) -> str:
        found = dict(candidate.axes)
        place = tuple(dict(found.get(k, (("size", 0),)))["size"] for k in ("attend", "merge"))
        return outcomes.get(place, "failed")  # type: ignore[arg-type]

    space = space_of({"attend": (0.995, 3), "merge": (0.005, 2)})
    singles = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (0, 2)]
    try:
        result = search(space, lambda c: OUTCOMES[outcome(c)](c), budget_s=FOREVER, seed=0)
    except EveryCandidateFailed:
        assert all(outcomes.get(place) != "ok" for place in singles)
    else:
        assert outcome(result.best.candidate) == "ok"
        assert len({row.candidate for row in result.rows}) == len(result.rows)


def test_a_failing_small_kernel_costs_few_trials_before_its_change_is_tried() -> None:
    def trial(candidate: Candidate) -> Row:
        is_right = "scan" in dict(candidate.axes)
        return OUTCOMES["ok" if is_right else "raised"](candidate)

    seen: list[str] = []
    space = space_of({"attend": (0.99, 20), "scan": (0.01, 2)})
    result = search(
        space, trial, budget_s=FOREVER, seed=0, tell=lambda row, *_: seen.append(row.status)
    )
    assert seen.index("ok") == 2
    assert seen.count("failed") == 2
    best = dict(result.best.candidate.axes)
    assert (best["attend"], best["scan"]) == (sizes(20)[0], sizes(2)[0])


def test_a_refused_default_is_left_for_a_change_of_the_kernel_that_is_refused() -> None:
    reason = "9 bytes needed, 8 there"
    refused = Row(DEFAULT, "refused", "emitted", reason)
    space = space_of(
        {"merge": (0.9, 2), "attend": (0.1, 2)},
        rows=(refused,),
        judge=lambda c: judged(c, 1.0, "" if "attend" in dict(c.axes) else reason),
    )
    timer = Timer(by_size)
    result = search(space, timer, budget_s=FOREVER, seed=0)
    assert [row for row in result.rows if row.status == "refused"] == [refused]
    assert all("attend" in dict(c.axes) for c in timer.seen)
    best = dict(result.best.candidate.axes)
    assert (best["attend"], best["merge"]) == (sizes(2)[0], sizes(2)[0])


def test_when_all_fail_the_error_lists_each_reason_with_its_count() -> None:
    outcomes = dict(zip((DEFAULT, *one(1, 2, 3, 4)), OUTCOMES, strict=False))
    outcomes |= {DEFAULT: "raised", one(1)[0]: "raised", one(2)[0]: "wrong"}
    outcomes |= {one(3)[0]: "compiler", one(4)[0]: "timeout"}
    pruned = Row(one(9)[0], "pruned", "emitted", "predicted 9 ms", 9.0)
    refused = Row(one(8)[0], "refused", "emitted", "278528 bytes on chip, and sm90 has 232448")
    space = space_of({"attend": (1.0, 4)}, rows=(pruned, refused))
    with pytest.raises(EveryCandidateFailed) as caught:
        search(space, outcome_of(outcomes), budget_s=FOREVER, seed=0)
    assert str(caught.value) == (
        "EveryCandidateFailed: none of the 7 candidates of pattern(a=1) can be taken:\n"
        "    2 failed: RuntimeError: out of resource: shared memory\n"
        "    1 failed: Refused: the triton backend refuses attend: no.\n"
        "    1 pruned: the cost model rules them out\n"
        "    1 refused: 278528 bytes on chip, and sm90 has 232448\n"
        "    1 timeout: no answer in 30 s\n"
        "    1 wrong: max error nan > 4.0e-03\n"
        "  help: use backend='reference', which needs no kernel; `spcomp doctor` says what is "
        "installed here."
    )


def test_when_the_budget_ends_before_one_is_right_the_error_says_so() -> None:
    with pytest.raises(EveryCandidateFailed) as caught:
        search(TWELVE, OUTCOMES["failed"], budget_s=2, seed=0, clock=Clock())
    assert str(caught.value) == (
        "EveryCandidateFailed: none of the 12 candidates of pattern(a=1) can be taken:\n"
        "    11 skipped: the budget of 2 s was over\n"
        "    1 failed: signal 6\n"
        "  help: give a larger budget, or use backend='reference', which needs no kernel; "
        "`spcomp doctor` says what is installed here."
    )


# ---- stopping (B56) ------------------------------------------------------------------------------


def interrupting(after: int) -> Callable[[Candidate], Row]:
    """Time candidates until Ctrl-C comes in the middle of one."""
    seen = itertools.count()

    def trial(candidate: Candidate) -> Row:
        if next(seen) == after:
            raise KeyboardInterrupt
        return timed(candidate, by_size(candidate))

    return trial


def test_ctrl_c_after_three_of_twelve_keeps_the_three() -> None:
    told: list[Row] = []
    result = search(
        TWELVE, interrupting(3), budget_s=FOREVER, seed=0, tell=lambda row, *_: told.append(row)
    )
    measured = [row for row in result.rows if row.status in RIGHT]
    skipped = [row for row in result.rows if row.status == "skipped"]
    assert (len(measured), len(skipped)) == (3, 9)
    assert {row.reason for row in skipped} == {"stopped by the user"}
    assert result.is_partial
    assert result.best.median_ms == min(row.median_ms for row in measured if row.median_ms)
    assert len(told) == 12


def test_ctrl_c_before_anything_was_measured_is_passed_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        search(TWELVE, interrupting(0), budget_s=FOREVER, seed=0)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_ctrl_c_while_a_row_is_told_loses_no_row(times: int) -> None:
    told: list[Candidate] = []
    interruptions = iter(range(times))

    def tell(row: Row, done: int, total: int) -> None:
        if done >= 3 and next(interruptions, None) is not None:
            raise KeyboardInterrupt
        told.append(row.candidate)

    result = search(TWELVE, Timer(by_size), budget_s=FOREVER, seed=0, tell=tell)
    assert len(told) == len(result.rows) == 12
    assert set(told) == {row.candidate for row in result.rows}
    assert sum(row.status in RIGHT for row in result.rows) == 3


def test_no_trial_begins_after_the_budget() -> None:
    result = search(TWELVE, Timer(by_size), budget_s=4, seed=0, clock=Clock())
    counted = [row.status for row in result.rows]
    assert (counted.count("skipped"), len(counted)) == (9, 12)
    reasons = {row.reason for row in result.rows if row.status == "skipped"}
    assert reasons == {"the budget of 4 s was over"}
    assert result.is_partial


def test_the_default_is_tried_however_small_the_budget_is() -> None:
    result = search(TWELVE, Timer(by_size), budget_s=1.5, seed=0, clock=Clock())
    assert result.best.candidate == DEFAULT


@given(st.integers(1, 11), st.integers(0, 5), st.integers(0, 5))
def test_known_rows_are_not_tried_again_and_the_end_is_the_same(
    cut: int, first_seed: int, second_seed: int
) -> None:
    whole = search(TWELVE, Timer(by_size), budget_s=FOREVER, seed=0)
    before = search(TWELVE, interrupting(cut), budget_s=FOREVER, seed=first_seed)
    timer = Timer(by_size)
    after = search(TWELVE, timer, budget_s=FOREVER, seed=second_seed, known=before.rows)
    known = {row.candidate for row in before.rows if row.status in FINAL}
    assert len(known) == cut
    assert not known & set(timer.seen)
    assert after.rows == whole.rows
    assert not after.is_partial


def test_when_all_is_known_nothing_is_tried_nor_told() -> None:
    space = space_of({"attend": (0.9, 4), "merge": (0.1, 3)})
    before = search(space, Timer(by_size), budget_s=FOREVER, seed=3)
    told: list[Row] = []
    timer = Timer(by_size)
    after = search(
        space,
        timer,
        budget_s=FOREVER,
        seed=4,
        known=before.rows,
        tell=lambda row, *_: told.append(row),
    )
    assert (timer.seen, told) == ([], [])
    assert after.rows == before.rows


def test_a_known_row_of_a_loop_order_that_is_not_searched_takes_no_part() -> None:
    other = timed(Candidate("key_major", ()), 0.001)
    result = search(TWELVE, Timer(by_size), budget_s=FOREVER, seed=0, known=[other])
    assert other.candidate not in {row.candidate for row in result.rows}


def test_a_known_measurement_holds_where_the_model_would_prune_it() -> None:
    pruned = Row(one(12)[0], "pruned", "emitted", "slow", 9.0)
    space = space_of({"attend": (1.0, 2)}, rows=(pruned,))
    result = search(
        space, Timer(by_size), budget_s=FOREVER, seed=0, known=[timed(pruned.candidate, 0.5)]
    )
    assert result.best.candidate == pruned.candidate


def test_the_call_of_the_tests_is_one_plan_each() -> None:
    assert plan("a") == plan("a") != plan("b")
    assert CALL.phase == plan("a").phase
