"""What can be tried for one call: loop orders and axis values, and what the cost model rules out.

The search is per kernel, since launches run one after the other: the candidates of a kernel change
its axes alone and leave every other kernel at its default. Axes that several kernels share follow
the attend kernel through `cut`, so a candidate names the one kernel they are read from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from spcomp.autotune.judging import Judge, Judged
from spcomp.autotune.record import Candidate, Row, Status
from spcomp.backends.base import Backend, Specialisation
from spcomp.dsl.pattern import Pattern
from spcomp.errors import UnknownChoice
from spcomp.ir.plan import Axes, LoopOrder, Phase, Plan
from spcomp.ir.schedule import AxisSpace
from spcomp.ir.target import Target

PRUNE_RATIO = 1.5
"""A candidate predicted to take longer than this times the best of its loop order is not tried."""

ORDER_RATIO = 3.0
"""A loop order whose best prediction is beyond this times that of the best loop order is tried with
its default schedule only."""

MOST_COMBINATIONS = 64
"""A kernel with more combinations than this is tried with at most two axes changed."""

MOST_CHANGES = 2

ORDERS: tuple[LoopOrder, ...] = get_args(LoopOrder)


@dataclass(frozen=True, slots=True)
class KernelSpace:
    """The axes to try for one kernel, its default left out, in the fixed order.

    share: of the predicted time of the loop order's default schedule."""

    kernel: str
    share: float
    choices: tuple[Axes, ...]


@dataclass(frozen=True, slots=True)
class OrderSpace:
    """One loop order (None: the one that the lowering chooses) and its kernels, the largest share
    first."""

    order: LoopOrder | None
    kernels: tuple[KernelSpace, ...]

    @property
    def default(self) -> Candidate:
        """The default schedule in this loop order."""
        return Candidate(self.order, ())

    def candidates(self) -> Iterator[Candidate]:
        """Yield the default, then what changes one kernel of it."""
        yield self.default
        for kernel in self.kernels:
            for axes in kernel.choices:
                yield Candidate(self.order, ((kernel.kernel, axes),))


@dataclass(frozen=True, slots=True)
class Space:
    """All that may be tried, and a row for each candidate that is ruled out.

    pattern: its title. rows: refused and pruned candidates, each with its reason. judge: lowers any
    candidate over the space's kernels, also one that changes several."""

    pattern: str
    orders: tuple[OrderSpace, ...]
    rows: tuple[Row, ...]
    judge: Callable[[Candidate], Judged]

    def candidates(self) -> tuple[Candidate, ...]:
        """Give every candidate that is not ruled out and changes at most one kernel; the default
        schedule first."""
        every = itertools.chain.from_iterable(order.candidates() for order in self.orders)
        return tuple(c for c in every if not self.judge(c).reason)


def candidates(
    pattern: Pattern,
    *,
    backend: Backend,
    target: Target,
    spec: Specialisation,
    phase: Phase,
    shape: Mapping[str, int],
    orders: Iterable[LoopOrder] | None = None,
) -> Space:
    """Give the space of one call; nothing is compiled and no device is asked.

    shape: B, Hq, Hkv, Sq, Skv, D, Dv. orders: prefill loop orders to look at, default every one;
    decode knows one. The first candidate is the default schedule of the first loop order, which is
    never pruned; nor are the defaults of the others.
    Raises: what is wrong with the pattern itself (see `spcomp.compile`); UnknownChoice for a loop
    order that does not exist.
    """
    wanted = _wanted(orders)
    judge = Judge(pattern, backend, target, spec, phase, shape)
    defaults, rows = _defaults(judge, wanted)
    seen: set[Plan] = set()
    found: list[OrderSpace] = []
    for default in defaults:
        found.append(_order_space(judge, default, backend.space(target, spec), seen, rows))
    return Space(judge.title, _pruned(judge, found, rows), tuple(rows), judge)


def _wanted(orders: Iterable[LoopOrder] | None) -> tuple[LoopOrder, ...]:
    wanted = ORDERS if orders is None else tuple(orders)
    for order in wanted:
        if order not in ORDERS:
            shown = ", ".join(map(repr, ORDERS))
            raise UnknownChoice(verb="tune", name="orders", value=order, choices=shown)
    return wanted


def _defaults(judge: Judge, wanted: tuple[LoopOrder, ...]) -> tuple[list[Candidate], list[Row]]:
    """Give the default schedule of each loop order that can be lowered, the lowering's own first;
    and a refused row for each that cannot."""
    own = Candidate(None, ())
    plan = judge(own).plan
    if plan is None:
        return [], [_row(own, "refused", judge(own))]
    if judge.phase == "decode":
        return [own], []
    found = [own] if plan.order in wanted else []
    rows: list[Row] = []
    for order in wanted:
        other = Candidate(order, ())
        asked = judge(other)
        if asked.plan is None:
            rows.append(_row(other, "refused", asked))
        elif asked.plan != plan:
            found.append(other)
    return found, rows


def _row(candidate: Candidate, status: Status, judged: Judged, reason: str = "") -> Row:
    """Give the row of a candidate that is not tried."""
    predicted_ms = judged.predicted_ms if judged.plan is not None else None
    return Row(candidate, status, "emitted", reason or judged.reason, predicted_ms)


# ---- one loop order ------------------------------------------------------------------------------


def _order_space(
    judge: Judge, default: Candidate, space: AxisSpace, seen: set[Plan], rows: list[Row]
) -> OrderSpace:
    """Give the kernels of one loop order; adds plans to `seen` and what is refused to `rows`."""
    judged = judge(default)
    assert judged.plan is not None
    seen.add(judged.plan)
    if judged.reason:
        rows.append(_row(default, "refused", judged))
    shares = judged.shares()
    kernels = [
        KernelSpace(kernel, share, _choices(judge, default, kernel, space, seen, rows))
        for kernel, share in shares.items()
    ]
    return OrderSpace(default.order, tuple(sorted(kernels, key=lambda k: -k.share)))


def _choices(
    judge: Judge,
    default: Candidate,
    kernel: str,
    space: AxisSpace,
    seen: set[Plan],
    rows: list[Row],
) -> tuple[Axes, ...]:
    """Give the axes of one kernel that make a new plan and may be tried."""
    choices: list[Axes] = []
    for axes in sorted(_combinations(judge, default, kernel, space.get(kernel, {}))):
        candidate = default.with_kernel(kernel, axes)
        judged = judge(candidate)
        if judged.plan is not None and judged.plan in seen:
            continue
        if judged.plan is not None:
            seen.add(judged.plan)
        # Where the default is refused, so is every candidate that leaves the refused kernel as it
        # is; it may be tried once that kernel has other axes.
        if judged.reason in ("", judge(default).reason):
            choices.append(axes)
        else:
            rows.append(_row(candidate, "refused", judged))
    return tuple(choices)


def _combinations(
    judge: Judge, default: Candidate, kernel: str, values: Mapping[str, tuple[int, ...]]
) -> Iterator[Axes]:
    """Yield axes of a kernel other than its default: all, or of a large kernel those that differ
    from it in few."""
    start = judge.default_axes(kernel)
    live = _live(judge, default, kernel, values)
    is_large = math.prod(map(len, live.values())) > MOST_COMBINATIONS
    for chosen in itertools.product(*live.values()):
        changes = {n: v for n, v in zip(live, chosen, strict=True) if v != start[n]}
        if changes and not (is_large and len(changes) > MOST_CHANGES):
            yield judge.axes_of(kernel, **changes)


def _live(
    judge: Judge, default: Candidate, kernel: str, values: Mapping[str, tuple[int, ...]]
) -> dict[str, list[int]]:
    """Give the axes that change the plan, each with its default and the values that make a plan of
    their own; an axis that the lowering fixes, or that another kernel's decides, has none."""
    start = judge.default_axes(kernel)
    live: dict[str, list[int]] = {}
    for axis, choices in values.items():
        plans = [judge(default).plan]
        kept = [start[axis]]
        for value in choices:
            plan = judge(default.with_kernel(kernel, judge.axes_of(kernel, **{axis: value}))).plan
            if plan is None or plan not in plans:
                plans.append(plan)
                kept.append(value)
        if len(kept) > 1:
            live[axis] = kept
    return live


# ---- pruning -------------------------------------------------------------------------------------


def _pruned(judge: Judge, orders: list[OrderSpace], rows: list[Row]) -> tuple[OrderSpace, ...]:
    """Take out what the cost model rules out, defaults never; adds a row for each."""
    best = {order.order: _best_ms(judge, order) for order in orders}
    fastest = min(orders, key=lambda order: best[order.order], default=None)
    kept: list[OrderSpace] = []
    for order in orders:
        assert fastest is not None
        rules = _Rules(judge, best[order.order], fastest.default, best[fastest.order])
        kernels: list[KernelSpace] = []
        for kernel in order.kernels:
            reasons = {a: rules.against(order.default, kernel.kernel, a) for a in kernel.choices}
            for axes, reason in reasons.items():
                if reason:
                    candidate = order.default.with_kernel(kernel.kernel, axes)
                    rows.append(_row(candidate, "pruned", judge(candidate), reason))
            choices = tuple(axes for axes, reason in reasons.items() if not reason)
            kernels.append(replace(kernel, choices=choices))
        kept.append(replace(order, kernels=tuple(kernels)))
    return tuple(kept)


def _best_ms(judge: Judge, order: OrderSpace) -> float:
    judged = map(judge, order.candidates())
    return min((j.predicted_ms for j in judged if not j.reason), default=math.inf)


@dataclass(frozen=True, slots=True)
class _Rules:
    """What rules a candidate out: the best predictions of its loop order and of the fastest one."""

    judge: Judge
    least_ms: float
    fastest: Candidate
    fastest_ms: float

    def against(self, default: Candidate, kernel: str, axes: Axes) -> str:
        """Say why a candidate is not worth a try, or ""."""
        if self.least_ms > ORDER_RATIO * self.fastest_ms:
            plan = self.judge(self.fastest).plan
            assert plan is not None
            return (
                f"predicted {self.least_ms:.4g} ms for the best of its loop order, more than "
                f"{ORDER_RATIO:g} times the {self.fastest_ms:.4g} ms of {plan.order}"
            )
        judged = self.judge(default.with_kernel(kernel, axes))
        if judged.reason or judged.predicted_ms <= PRUNE_RATIO * self.least_ms:
            return ""
        return (
            f"predicted {judged.predicted_ms:.4g} ms, more than {PRUNE_RATIO:g} times the best of "
            f"its loop order, {self.least_ms:.4g} ms"
        )
