"""The search over a space: one kernel after the other, within a budget, and never without a trace.

The best axes found for one kernel are kept while the next one is searched. Every candidate leaves a
row, whatever happens to it; noise and seed do not change which of two equal ones is taken."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from spcomp.autotune.judging import Judged, first_line
from spcomp.autotune.record import FINAL, RIGHT, Candidate, Row, Status, settled, winner
from spcomp.autotune.space import KernelSpace, OrderSpace, Space
from spcomp.errors import SpcompError
from spcomp.ir.plan import LoopOrder, Plan

Trial: TypeAlias = Callable[[Candidate], Row]
"""Checks and times one candidate. What it raises, KeyboardInterrupt apart, becomes a row."""

Tell: TypeAlias = Callable[[Row, int, int], None]
"""Told of each new row: the row, how many rows there are, and how many there will be at most."""

SMALL_SHARE = 0.02
"""Kernels below this share of the predicted time come after all others."""

STOPPED = "stopped by the user"


class EveryCandidateFailed(SpcompError):
    """No candidate came out right. ``figures["rows"]`` holds the row of each."""

    message = "none of the {count} candidates of {pattern} can be taken:\n{reasons}"
    help = "{way_out}"


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found.

    rows: one for each candidate, in the fixed order. best: the row to take. is_timed: whether it
    was measured, or ranked by the cost model. is_partial: some were skipped. elapsed_s: of this
    search, by its clock.
    """

    rows: tuple[Row, ...]
    best: Row
    is_timed: bool
    is_partial: bool
    elapsed_s: float


def search(
    space: Space,
    trial: Trial,
    *,
    budget_s: float,
    seed: int,
    known: Iterable[Row] = (),
    clock: Callable[[], float] = time.monotonic,
    tell: Tell | None = None,
) -> SearchResult:
    """Try the candidates of a space until all had their turn or the budget is over.

    The default schedule is the first to be tried; then, loop order by loop order, the kernels with
    the largest share of the predicted time, each from the best prediction on, equal ones shuffled
    by `seed`. Where the default of a loop order does not come out right, kernels take turns until
    one change does. known: rows of an earlier search of the same call; the final ones among them
    are not tried again. No trial begins after budget_s seconds. A KeyboardInterrupt ends the search
    and what was measured stays.

    Raises: EveryCandidateFailed; KeyboardInterrupt when it came before anything was measured.
    """
    run = _Search(space, trial, budget_s, seed, known, clock, tell)
    run.run()
    return run.result()


class _Search:
    """One search under way. `rows` holds what is settled, `stop` why nothing is tried any more."""

    def __init__(
        self,
        space: Space,
        trial: Trial,
        budget_s: float,
        seed: int,
        known: Iterable[Row],
        clock: Callable[[], float],
        tell: Tell | None,
    ) -> None:
        self.space, self.trial, self.budget_s, self.seed = space, trial, budget_s, seed
        self.clock, self.tell = clock, tell
        orders = {order.order for order in space.orders}
        self.known = {
            row.candidate: replace(row, status="ok" if row.status in RIGHT else row.status)
            for row in known
            if row.status in FINAL and row.candidate.order in orders
        }
        self.rows: dict[Candidate, Row] = {}
        self.plans: dict[Plan, Candidate] = {}
        self.untold: list[Row] = []
        self.stop = ""
        self.most = len(space.rows) + len(space.candidates())
        self.began = clock()

    def run(self) -> None:
        while True:
            try:
                for row in self.space.rows:
                    if row.candidate not in self.known:
                        self._settle(row)
                for candidate in self._walk():
                    self._visit(candidate)
                self._tell_all()
                return
            except KeyboardInterrupt:
                self.stop = STOPPED  # the walk begins again, and skips what has no row yet

    def result(self) -> SearchResult:
        every = settled({**self.known, **self.rows}.values())
        best = winner(every)
        if best is None:
            if self.stop == STOPPED:
                raise KeyboardInterrupt
            raise _nothing_right(self.space.pattern, every)
        return SearchResult(
            rows=every,
            best=best,
            is_timed=best.median_ms is not None,
            is_partial=any(row.status == "skipped" for row in every),
            elapsed_s=self.clock() - self.began,
        )

    # ---- which candidate is next ----

    def _walk(self) -> Iterator[Candidate]:
        """Yield candidates in the order of the search; each has its row when the next is asked for.

        The walk depends on the rows alone, so it can begin again after an interruption.
        """
        bases: dict[LoopOrder | None, Candidate] = {}
        for order in self.space.orders:
            yield order.default
            bases[order.order] = order.default
            if not self._is_right(order.default):
                yield from self._rescue(order)
                bases[order.order] = self._best_of(order)
            large = [kernel for kernel in order.kernels if kernel.share >= SMALL_SHARE]
            yield from self._descend(large, order.order, bases)
        for order in self.space.orders:
            small = [kernel for kernel in order.kernels if kernel.share < SMALL_SHARE]
            yield from self._descend(small, order.order, bases)

    def _descend(
        self,
        kernels: list[KernelSpace],
        order: LoopOrder | None,
        bases: dict[LoopOrder | None, Candidate],
    ) -> Iterator[Candidate]:
        """Search one kernel after the other, and keep in `bases` the best found so far."""
        for kernel in kernels:
            base = bases[order]
            tried = turns(self.space, base, kernel, self.seed)
            yield from tried
            found = winner(self._row(candidate) for candidate in (base, *tried))
            bases[order] = base if found is None else found.candidate

    def _rescue(self, order: OrderSpace) -> Iterator[Candidate]:
        """Let the kernels take turns until a change of one of them comes out right: any kernel may
        be the one that fails."""
        base = order.default
        refusal = self._judged(base).reason
        queues = [iter(turns(self.space, base, kernel, self.seed)) for kernel in order.kernels]
        while queues:
            for queue in tuple(queues):
                candidate = next(queue, None)
                if candidate is None:
                    queues.remove(queue)
                    continue
                if refusal and self._judged(candidate).reason == refusal:
                    continue  # the refused kernel is still as it was
                yield candidate
                if self._is_right(candidate):
                    return

    def _best_of(self, order: OrderSpace) -> Candidate:
        found = winner(r for r in self.rows.values() if r.candidate.order == order.order)
        return order.default if found is None else found.candidate

    def _is_right(self, candidate: Candidate) -> bool:
        return self._row(candidate).status in RIGHT

    def _row(self, candidate: Candidate) -> Row:
        """Give the row of a candidate, or of the one that came before it with the same plan."""
        if candidate not in self.rows:
            plan = self._judged(candidate).plan
            assert plan is not None
            candidate = self.plans[plan]
        return self.rows[candidate]

    def _judged(self, candidate: Candidate) -> Judged:
        return self.space.judge(candidate)

    # ---- what becomes of it ----

    def _visit(self, candidate: Candidate) -> None:
        if candidate in self.rows:
            return
        judged = self._judged(candidate)
        if judged.plan is not None and judged.plan in self.plans:
            self.most -= 1
            return
        known = self.known.get(candidate)
        if known is not None:
            self.rows[candidate] = known
        elif judged.reason:
            self._settle(_untried(candidate, "refused", judged, judged.reason))
            return
        else:
            self._settle(self._tried(candidate, judged))
        if judged.plan is not None:
            self.plans[judged.plan] = candidate

    def _tried(self, candidate: Candidate, judged: Judged) -> Row:
        if not self.stop and self.clock() - self.began >= self.budget_s:
            self.stop = f"the budget of {self.budget_s:g} s was over"
        if self.stop:
            return _untried(candidate, "skipped", judged, self.stop)
        try:
            row = self.trial(candidate)
        except Exception as error:
            row = Row(candidate, "failed", "emitted", first_line(error))
        return replace(
            row,
            candidate=candidate,
            status="ok" if row.status in RIGHT else row.status,
            predicted_ms=judged.predicted_ms if row.predicted_ms is None else row.predicted_ms,
        )

    def _settle(self, row: Row) -> None:
        if row.candidate not in self.rows:
            self.rows[row.candidate] = row
            self.untold.append(row)
            self._tell_all()

    def _tell_all(self) -> None:
        """Tell what is not told; a row whose telling was interrupted is told again."""
        while self.untold:
            done = len(self.rows) - len(self.untold) + 1
            if self.tell is not None:
                self.tell(self.untold[0], done, max(done, self.most))
            del self.untold[0]


def turns(space: Space, base: Candidate, kernel: KernelSpace, seed: int) -> list[Candidate]:
    """Give what changes one kernel of a base, the best prediction first and equal ones shuffled."""
    axes = list(kernel.choices)
    random.Random(f"{seed} {base.order} {kernel.kernel}").shuffle(axes)
    tried = [base.with_kernel(kernel.kernel, a) for a in axes]
    return sorted(tried, key=lambda one: float(f"{space.judge(one).predicted_ms:.6g}"))


def expected(space: Space, seed: int) -> list[Candidate]:
    """Give the candidates in the order of a search in which no default is ever beaten."""
    found: list[Candidate] = []
    for is_large in (True, False):
        for order in space.orders:
            found += [order.default] if is_large else []
            for kernel in order.kernels:
                if (kernel.share >= SMALL_SHARE) == is_large:
                    found += turns(space, order.default, kernel, seed)
    return [candidate for candidate in found if not space.judge(candidate).reason]


def _untried(candidate: Candidate, status: Status, judged: Judged, reason: str) -> Row:
    predicted_ms = judged.predicted_ms if judged.plan is not None else None
    return Row(candidate, status, "emitted", reason, predicted_ms)


def _nothing_right(pattern: str, rows: tuple[Row, ...]) -> EveryCandidateFailed:
    """Give each distinct reason with how many candidates had it; those of rows that nobody tried
    only by number, since each of them has its own figures."""
    counted: Counter[str] = Counter()
    for row in rows:
        if row.status == "pruned":
            counted["pruned: the cost model rules them out"] += 1
        else:
            counted[f"{row.status}: {row.reason}"] += 1
    lines = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    is_cut_short = any(row.status == "skipped" for row in rows)
    return EveryCandidateFailed(
        pattern=pattern,
        count=len(rows),
        rows=rows,
        reasons="\n".join(f"    {count} {line}" for line, count in lines),
        way_out=("give a larger budget, or " if is_cut_short else "")
        + "use backend='reference', which needs no kernel; `spcomp doctor` says what is "
        "installed here.",
    )
