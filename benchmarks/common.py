"""What the benchmark scripts share: timing with medians and spread, checks before figures, and
records as JSON.

Timings alternate between the competitors over several rounds, so that a drifting clock hits all of
them. Each figure is the median of the rounds' medians, `spread` the distance between the lowest and
the highest round."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

import spcomp

ROUNDS = 4
Work = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """A median over rounds and the spread between them, in milliseconds."""

    median_ms: float
    spread_ms: float

    def __str__(self) -> str:
        return f"{self.median_ms:9.4f} ms +- {self.spread_ms / 2:.4f}"


def alternate(work: dict[str, Work], rounds: int = ROUNDS, rep_ms: int = 150) -> dict[str, Timing]:
    """Time several functions in alternating rounds with a flushed L2."""
    seen: dict[str, list[float]] = {name: [] for name in work}
    for name in work:
        work[name]()
    for number in range(rounds):
        order = list(work) if number % 2 == 0 else list(reversed(work))
        for name in order:
            median = do_bench(work[name], warmup=30, rep=rep_ms, return_mode="median")
            seen[name].append(float(median))
    return {n: Timing(statistics.median(v), max(v) - min(v)) for n, v in seen.items()}


def graphed(work: Work) -> Work:
    """Capture a function in a CUDA graph after warm-up and give its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay(held: Work = work) -> None:  # what the graph reads lives as long as the graph
        graph.replay()

    return replay


def host_us(work: Work, calls: int = 1000) -> float:
    """Give the host time of one asynchronous warm call in microseconds."""
    for _ in range(20):
        work()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    elapsed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Give ||got - want|| / ||want|| in float32."""
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm())


def check(name: str, error: float, limit: float) -> None:
    """Stop when a result is wrong: a fast wrong kernel has no time worth printing."""
    print(f"  check {name}: relative error {error:.2e} (limit {limit:.0e})", flush=True)
    if not error <= limit:
        raise SystemExit(f"{name} is wrong: {error} > {limit}")


def environment() -> dict[str, Any]:
    """Describe the card and the versions."""
    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "spcomp": spcomp.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    given = os.environ.get("SPCOMP_COMMIT")
    if given:
        return given
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def arguments(description: str) -> argparse.Namespace:
    """Parse the options every script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="the smallest case only")
    parser.add_argument(
        "--peers", type=Path, default=Path(".peers"), help="folder of importable official packages"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    sys.path.insert(0, str(options.peers.resolve()))
    return options


def record(name: str, rows: list[dict[str, Any]], folder: Path) -> None:
    """Write the rows with the environment to <folder>/<name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**environment(), "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}", flush=True)


def as_row(timings: dict[str, Timing], **facts: Any) -> dict[str, Any]:
    """Make one row of a record."""
    return {**facts, "timings": {n: asdict(t) for n, t in timings.items()}}
