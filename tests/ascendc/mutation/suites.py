"""What is mutated, and the checks that must notice: per template its specialisations, each with the
launches that its own tests run, in a selection that takes a moment once the kernel is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

from spcomp.backends.ascendc import emit
from spcomp.backends.ascendc.emulate import Launch
from spcomp.codegen.render import render
from tests.ascendc import test_kernel_attend_gather as attend_gather
from tests.ascendc import test_kernel_pool as pool
from tests.ascendc import test_kernel_score as score
from tests.ascendc import test_kernel_topk as topk
from tests.ascendc.mutation import host

Check = Callable[[], None]


@dataclass(frozen=True)
class Suite:
    """One specialisation of a template. module: where its tests look `render` up.

    checks: they compile, run and compare; those that notice most come first.
    """

    name: str
    template: str
    context: Any
    module: ModuleType
    checks: tuple[Check, ...]

    def text(self) -> str:
        """Render the text that is mutated."""
        return render(self.template, self.context)


def _pool() -> Iterator[Suite]:
    for number in (0, 2, 3, 5, 6):
        kind = pool.KINDS[number]
        checks: list[Check] = []
        for tokens in (257, 1, 17, 600):
            checks.append(
                partial(pool.test_units_are_pooled_with_the_tokens_they_have, kind, tokens)
            )
        for blocks, descending in ((2, False), (5, True), (48, False)):
            checks.append(partial(pool.test_cores_share_the_units, kind, descending, blocks))
        checks.append(partial(pool.test_inputs_may_be_strided, kind))
        checks.append(
            partial(pool.test_a_load_may_bring_two_strided_tokens_or_one_without_a_stride, kind)
        )
        if number == 0:
            checks.append(pool.test_a_tail_may_be_left_out_and_nothing_may_be_asked_for)
        if number == 5:
            checks.append(pool.test_an_infinite_value_stays)
        yield Suite(str(kind), pool.TEMPLATE, kind.context(), pool, tuple(checks))


def _topk() -> Iterator[Suite]:
    sizes = [
        *((5, 48, 4, 6), (33, 100, 16, 64), (9, 129, 3, 65), (40, 512, 16, 32), (1, 1, 1, 1)),
        *((3, 65, 0, 5), (3, 50, 2000, 2048), (3, 2047, 10, 16), (4, 7, 3, 2)),
        *((3, 2049, 10, 16), (4, 5000, 100, 300), (3, 2050, 2000, 2048), (3, 4096, 64, 64)),
    ]
    checks: list[Check] = [partial(topk.check, topk.drawn(n, u), k, w) for n, u, k, w in sizes]
    for blocks, descending in ((2, False), (7, True), (48, False)):
        for lists, units in ((33, 100), (5, 3000), (200, 20)):
            checks.append(partial(topk.test_cores_share_the_rows, lists, units, blocks, descending))
    checks += [partial(topk.test_equal_scores_keep_the_lower_units, units) for units in (40, 3000)]
    checks += [
        partial(topk.test_forced_units_may_exceed_k_but_not_the_width, units)
        for units in (200, 5000)
    ]
    checks += [
        partial(topk.test_the_last_unit_counts_wherever_its_chunk_ends, units)
        for units in (2049, 2057, 2111)
    ]
    checks += [
        topk.test_what_an_earlier_chunk_left_behind_is_not_chosen,
        topk.test_there_may_be_no_list_and_no_unit,
    ]
    context = topk.context()
    yield Suite("chunk 2048", topk.TEMPLATE, context, topk, tuple(checks))
    small = tuple(
        partial(topk.test_a_small_kernel_gives_the_same, units) for units in (50, 1, 200, 1500)
    )
    yield Suite("chunk 256", topk.TEMPLATE, topk.context(256, 64), topk, small)


def _score() -> Iterator[Suite]:
    several = score.MOVING_AND_OWN
    small = {"group": 4, "queries": 40, "keys": 40, "units": 10, "kv_heads": 2}
    two = {"group": 2, "queries": 2, "keys": 9, "units": 2, "is_strided": True}
    before = {"group": 2, "queries": 45, "keys": 33, "units": 9}
    wide = {"group": 128, "kv_heads": 4, "queries": 1, "keys": 9, "units": 1, "is_strided": True}
    # One forced span of those of QUERY, MEAN and BLIND is empty; here none is.
    bases = {name: getattr(score, name) for name in ("QUERY", "MEAN", "SUM", "MAX", "BLIND")}
    for name, base in bases.items():
        cases = [case for case in score.SHAPES if score.context_of(case) == score.context_of(base)]
        cases += [replace(base, **changed) for changed in (two, before)]
        if name == "MAX":
            cases.append(replace(base, **wide))
        if base.forced == score.OWN:
            base, cases = replace(base, forced=several), [replace(c, forced=several) for c in cases]
        checks: list[Check] = []
        for descending, case in product((False, True), cases):
            checks.append(partial(score.check, case, 3, descending))
        for blocks in (1, 24):
            checks.append(partial(score.check, replace(base, **small), blocks))
        checks += [partial(score.check, replace(base, rows=0))]
        checks += [partial(score.check, replace(base, units=0))]
        if name == "SUM":
            checks.append(score.test_overflow_is_neither_forced_nor_excluded)
        yield Suite(name, score.TEMPLATE, score.context_of(base), score, tuple(checks))


def _attend_gather() -> Iterator[Suite]:
    all_cases = [*attend_gather.SHAPES.values(), *attend_gather.EDGES.values()]
    for name in ("TOKEN", "TILE", "ODD", "WIDE", "UNEVEN", "HOLED"):
        kernel = getattr(attend_gather, name)
        cases = [case for case in all_cases if case.kernel == kernel]
        checks: list[Check] = [partial(attend_gather.check, case) for case in cases]
        for blocks, descending in ((1, True), (2, False), (40, True)):
            launch = Launch("mix", blocks, descending=descending, physical_ai_cores=40)
            checks += [partial(attend_gather.check, replace(cases[0], launch=launch))]
        checks.append(partial(attend_gather.check, replace(cases[-1], empty_every=1)))
        checks.append(partial(attend_gather.check, replace(cases[-1], scale=-0.2)))
        if name in ("TOKEN", "TILE", "ODD"):
            checks.append(partial(attend_gather.test_the_largest_score_may_be_any_key, kernel))
        checks += [
            partial(attend_gather.test_a_hidden_key_may_have_the_largest_score, *hidden)
            for hidden in attend_gather.HIDDEN
            if hidden[0] == kernel
        ]
        if name == "TOKEN":
            checks.append(attend_gather.test_one_key_may_have_a_stride_that_no_load_can_step)
        template = "ascendc/kernels/attend_gather.h.jinja"
        yield Suite(name, template, kernel.context(), attend_gather, tuple(checks))


def _tiling(file: str) -> Iterator[Suite]:
    for name, phase in (("block_topk", "prefill"), ("moba", "decode")):
        plan = host.HostPlan(name, phase)
        template = f"ascendc/host/{file}.jinja"
        yield Suite(f"{name} {phase}", template, plan.context, emit, plan.checks())


SUITES: dict[str, Callable[[], Iterator[Suite]]] = {
    "pool": _pool,
    "topk": _topk,
    "score": _score,
    "attend_gather": _attend_gather,
    "tiling.h": partial(_tiling, "tiling.h"),
    "tiling.cpp": partial(_tiling, "tiling.cpp"),
}
"""The specialisations of every template, by its short name."""
