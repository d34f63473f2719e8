"""What the tests of tuning share: a call, spaces made by hand, and a timer that needs no card."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spcomp.autotune.judging import Judged
from spcomp.autotune.record import Candidate, Row, TunedCall
from spcomp.autotune.record_text import Recorder
from spcomp.autotune.space import KernelSpace, OrderSpace, Space
from spcomp.ir.plan import Axes, LoopOrder, Plan

DEFAULT = Candidate(None, ())
CALL = TunedCall(
    pattern="moba(block=512, k_blocks=8)",
    program_sha256="0" * 64,
    tables_sha256="",
    phase="prefill",
    shape={"B": 1, "Hq": 32, "Hkv": 8, "Sq": 1024, "Skv": 1024, "D": 64, "Dv": 64},
    dtype="float16",
    backend="triton",
    target="sm90",
    device="Example Card 80GB",
    toolchain={"spcomp": "0.1.0", "torch": "2.13.0", "triton": "3.7.1"},
    sample="random, seed 0",
)


def plan(name: str) -> Plan:
    """Give a plan that is equal to those of the same name alone."""
    return Plan(name, "prefill", "gather", (), (), "out", "lse")


def sizes(*values: int) -> tuple[Axes, ...]:
    """Give axes that differ in one number."""
    return tuple((("size", value),) for value in values)


def space_of(
    kernels: Mapping[str, tuple[float, int]],
    *,
    orders: tuple[LoopOrder | None, ...] = (None,),
    rows: tuple[Row, ...] = (),
    judge: Callable[[Candidate], Judged] | None = None,
) -> Space:
    """Give a space by hand: kernel -> (share of the time, choices beside the default)."""
    spaces = tuple(
        KernelSpace(kernel, share, sizes(*range(1, count + 1)))
        for kernel, (share, count) in kernels.items()
    )
    every = tuple(OrderSpace(order, spaces) for order in orders)
    return Space("pattern(a=1)", every, rows, judge or (lambda c: judged(c)))


def judged(candidate: Candidate, ms: float = 1.0, reason: str = "") -> Judged:
    """Judge a candidate whose plan is its own."""
    return Judged(plan(str(candidate)), reason, (("attend", ms),))


def one(*choices: int, kernel: str = "attend") -> tuple[Candidate, ...]:
    """Give the candidates that change one kernel."""
    return tuple(Candidate(None, ((kernel, axes),)) for axes in sizes(*choices))


def timed(candidate: Candidate, ms: float, spread_ms: float = 0.0) -> Row:
    """Give the row of a candidate that came out right on a card."""
    return Row(
        candidate,
        "ok",
        "timed",
        median_ms=ms,
        spread_ms=spread_ms,
        runs=20,
        error=1e-4,
        allowed=1e-3,
    )


class Timer:
    """A trial that gives each candidate its time, and remembers whom it saw.

    With noise (the standard deviation of one run, as a share) a row holds the median and the
    quartiles of many runs, as on a card."""

    def __init__(
        self,
        times: Callable[[Candidate], float],
        noise: float = 0.0,
        runs: int = 20,
        seed: int = 0,
    ) -> None:
        self.times, self.noise, self.runs = times, noise, runs
        self.random = random.Random(seed)
        self.seen: list[Candidate] = []

    def __call__(self, candidate: Candidate) -> Row:
        self.seen.append(candidate)
        ms = self.times(candidate)
        runs = [ms * (1 + self.random.gauss(0, self.noise)) for _ in range(self.runs)]
        low, median, high = statistics.quantiles(runs, n=4)
        return timed(candidate, median, high - low)


class Clock:
    """A clock that goes on by one second for each reading."""

    def __init__(self) -> None:
        self.now = -1.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


SKIPPED = [Row(c, "skipped", "emitted", "stopped by the user", 1.5) for c in one(3, 4)]
ROWS = [
    timed(DEFAULT, 2.0, 0.02),
    timed(one(1)[0], 1.0, 0.01),
    Row(one(2)[0], "wrong", "compiled", "max error inf", error=float("inf"), allowed=1e-3),
    *SKIPPED,
]


def write(folder: Path, rows: list[Row], call: TunedCall = CALL, **session: Any) -> Path:
    """Record rows and the end of their session, and give the file."""
    with Recorder(folder, call) as recorder:
        for row in rows:
            recorder.row(row)
        recorder.session(
            **{"seed": 0, "elapsed_s": 2.5, "is_partial": True, "created": "2026-01-02", **session}
        )
    return recorder.path
