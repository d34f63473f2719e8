"""`sp.tune`: every meaning's space searched within a budget, on the card or by the cost model."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from spcomp.autotune import record_text, space
from spcomp.autotune.record import Row, TunedCall, Tuning
from spcomp.autotune.search import STOPPED, EveryCandidateFailed, SearchResult, Tell, search
from spcomp.dsl.pattern import Pattern, PatternFunction
from spcomp.errors import NothingToTune
from spcomp.ir.plan import LoopOrder
from spcomp.settings import cache_dir, cache_place
from spcomp.tuning import worker
from spcomp.tuning.meanings import meanings
from spcomp.tuning.report import Tuned, TuningReport
from spcomp.tuning.setting import Sample, Setting, called, check_moment, setting_of
from spcomp.tuning.trials import Trials

Progress: TypeAlias = Callable[[str, Row, int, int], None]
"""Told of each new row: title of the meaning, row, rows so far, rows at most."""

RECORDS = "tuning"  # folder of the cache

LEAST_BUDGET_S = 1.0
"""Of a meaning whose turn comes after the budget: its default schedule is tried."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to search, which changes nothing about what is found."""

    orders: tuple[LoopOrder, ...] | None
    seed: int
    fresh: bool
    progress: Progress | None
    folder: Path | None
    try_timeout_s: float | None


def tune(
    pattern: Pattern | PatternFunction,
    *,
    sample: Sample | None = None,
    shape: Mapping[str, int] | None = None,
    dtype: str = "bfloat16",
    backend: str | None = None,
    target: str | None = None,
    orders: Iterable[LoopOrder] | None = None,
    budget_s: float = 60.0,
    seed: int = 0,
    fresh: bool = False,
    progress: Progress | None = None,
    folder: str | Path | None = None,
    try_timeout_s: float | None = None,
    **hyper: Any,
) -> TuningReport:
    """Find the fastest schedule of a pattern for one call, and what each meaning of it keeps.

    sample: q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv], which are copied and never written to;
    or shape: B, Hq, Hkv, Sq, Skv, D, Dv of random tensors, with dtype. On a CUDA device candidates
    are checked against the reference and timed, in a process of their own. Without one they are
    ranked by the cost model for `target` (default sm90), and the report says so. backend: "triton"
    on CPU tensors checks candidates in Triton's interpreter. orders: prefill loop orders to look
    at. budget_s: seconds for all meanings together; it and Ctrl-C end the search and keep what was
    measured. fresh: forget the record of this call. progress: is told of each row. folder: of the
    records, by default `tuning` in the cache. try_timeout_s: seconds after which a candidate counts
    as hung; by default 50 times what the default schedule took, 30 or more. hyper: hyper-parameters
    of a pattern function; a tuple or list is tried value by value, and so is what the function
    leaves open.

    A result is kept under its call (pattern, shape, dtype, device, versions, sample) and is used
    for no other. No state of this process changes: cache, random generators, current device.
    Raises: TuneInCapture, NothingToTune, WrongArguments, EveryCandidateFailed, TuningBusy,
        CacheNotWritable, and what `compile` and a call raise for the pattern and the tensors.
    """
    check_moment()
    chosen = meanings(pattern, hyper)
    name = chosen[0].name
    for node in chosen[0].program.arguments():
        raise NothingToTune(
            pattern=name,
            why=f"it takes the tensor {node.name} beside q, k and v, which a tuning does not draw",
            way_out="tune what it is made of, and pass order= and axes= to compile.",
        )
    if not budget_s > 0:
        raise NothingToTune(
            pattern=name, why=f"budget_s is {budget_s:g}", way_out="give seconds above 0."
        )
    setting = setting_of(
        name,
        sample=sample,
        shape=shape,
        dtype=dtype,
        backend=backend,
        target=target,
        seed=seed,
    )
    options = Options(
        orders=None if orders is None else tuple(orders),
        seed=seed,
        fresh=fresh,
        progress=progress,
        folder=None if folder is None else Path(folder),
        try_timeout_s=try_timeout_s,
    )
    return _tune_all(chosen, setting, options, budget_s)


def _tune_all(
    chosen: tuple[Pattern, ...], setting: Setting, options: Options, budget_s: float
) -> TuningReport:
    """Tune one meaning after the other, each with its share of the time that is left."""
    calls = [called(one, setting) for one in chosen]
    ends = time.monotonic() + budget_s
    tuned: list[Tuned] = []
    failures: list[EveryCandidateFailed] = []
    for one, call in zip(chosen, calls, strict=True):
        left_s = max(0.0, ends - time.monotonic())
        share_s = max(LEAST_BUDGET_S, left_s / (len(chosen) - len(tuned)))
        try:
            with _records(options.folder, call) as folder:
                found = _tune_one(one, setting, options, call, folder, min(share_s, budget_s))
        except KeyboardInterrupt:
            if not tuned:
                raise
            break
        tuned.append(found.tuned)
        if found.failure is not None:
            failures.append(found.failure)
        if found.is_stopped:
            break
    if len(failures) == len(tuned):
        raise failures[0]
    left_out = tuple(call.pattern for call in calls[len(tuned) :])
    return TuningReport(tuple(tuned), left_out)


@contextmanager
def _records(folder: Path | None, call: TunedCall) -> Iterator[Path]:
    """Give the folder of the records; where the cache is only to be read, a copy that goes."""
    place = cache_place()
    if folder is not None:
        yield folder
    elif place.may_write:
        yield cache_dir() / RECORDS
    else:
        with tempfile.TemporaryDirectory(prefix="spcomp-tuning-") as name:
            held = record_text.path_of(place.folder / RECORDS, call)
            if held.is_file():
                shutil.copy(held, name)
            yield Path(name)


@dataclass(frozen=True, slots=True)
class _Outcome:
    tuned: Tuned
    failure: EveryCandidateFailed | None
    is_stopped: bool


def _tune_one(
    pattern: Pattern,
    setting: Setting,
    options: Options,
    call: TunedCall,
    folder: Path,
    budget_s: float,
) -> _Outcome:
    found = space.candidates(
        pattern,
        backend=setting.backend,
        target=setting.target,
        spec=setting.spec,
        phase=setting.phase,
        shape=setting.shape,
        orders=options.orders,
    )
    with (
        record_text.Recorder(folder, call, fresh=options.fresh) as recorder,
        Trials(
            pattern,
            setting,
            found,
            recorder,
            module=worker.TRIAL,
            try_timeout_s=options.try_timeout_s,
        ) as trials,
    ):
        before = recorder.tuning()
        known = recorder.known()
        news = _News(recorder, call.pattern, options.progress)
        began = time.monotonic()
        result, failure = _searched(found, trials, budget_s, options.seed, known, news)
        is_partial = (result is not None and result.is_partial) or _leaves_orders(before, found)
        if trials.tried or news.recorded or (before.is_partial and not is_partial):
            elapsed_s = time.monotonic() - began
            recorder.session(seed=options.seed, elapsed_s=elapsed_s, is_partial=is_partial)
        tuning = recorder.tuning()
    tuned = Tuned(pattern, setting.backend.name, tuning, is_reused=not trials.tried)
    is_stopped = any(row.reason == STOPPED for row in (result.rows if result else ()))
    return _Outcome(tuned, failure, is_stopped)


def _leaves_orders(before: Tuning, found: space.Space) -> bool:
    """Tell whether an earlier search skipped candidates of loop orders that this one leaves out."""
    searched = {order.order for order in found.orders}
    skipped = (row.candidate.order for row in before.rows if row.status == "skipped")
    return any(order not in searched for order in skipped)


def _searched(
    found: space.Space,
    trials: Trials,
    budget_s: float,
    seed: int,
    known: tuple[Row, ...],
    tell: Tell,
) -> tuple[SearchResult | None, EveryCandidateFailed | None]:
    try:
        result = search(found, trials, budget_s=budget_s, seed=seed, known=known, tell=tell)
    except EveryCandidateFailed as failure:
        return None, failure
    return result, None


class _News:
    """Records rows that the record does not hold yet, and passes every row on."""

    def __init__(
        self, recorder: record_text.Recorder, title: str, progress: Progress | None
    ) -> None:
        self._held = {row.candidate: row for row in recorder.tuning().rows}
        self._recorder, self._title, self._progress = recorder, title, progress
        self._passed: set[Row] = set()
        self.recorded = 0

    def __call__(self, row: Row, done: int, total: int) -> None:
        if self._held.get(row.candidate) != row:
            self._recorder.row(row)
            self._held[row.candidate] = row
            self.recorded += 1
        # The search tells a row again when it was interrupted; who raised to stop it knows the row.
        if self._progress is not None and row not in self._passed:
            self._passed.add(row)
            self._progress(self._title, row, done, total)
