"""The process that measures: `python -m spcomp.tuning.trial`, JSON lines in and out.

It holds the card's context, so that a candidate which hangs or corrupts it costs this process and
nothing else. It ends when its input does, whatever it is doing.

| request | answer |
|---|---|
| `load` with folder, pattern (IR text), backend, device, dtype, shape, seed, baseline, ahead | notes, kept, dense_ms |
| `try` with order and axes | status, rung, reason, times, error, allowed, spill_bytes, is_graphed |

An answer with `is_broken` is the last one: the device no longer works for this process.
"""  # noqa: E501

from __future__ import annotations

import json
import os
import queue
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

from spcomp import api
from spcomp.autotune import measure
from spcomp.autotune.judging import first_line
from spcomp.dsl.pattern import Pattern
from spcomp.errors import Refused, SpcompError
from spcomp.ir.text import parse_program
from spcomp.tuning import checking, sample
from spcomp.tuning.ahead import Ahead

SPAN_MS = 150.0
"""Time a candidate is run for, beside its warm-up."""

FATAL = 3  # exit status of a process whose device no longer works


class Bench(Protocol):
    """What a trial process answers requests with."""

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Get the sample and the pattern ready."""

    def attempt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Check and time one candidate."""

    def is_broken(self) -> bool:
        """Tell whether the device no longer works."""


class CardBench:
    """Candidates on tensors of one device; without a card they are checked and not timed."""

    device = "cpu"

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Get the sample, the reference's result and dense attention's time."""
        folder, self.device = Path(request["folder"]), request["device"]
        if self.device.startswith("cuda"):
            torch.cuda.set_device(self.device)
        tensors = sample.load(folder / "sample", self.device)
        if not tensors:
            shape, dtype = request["shape"], request["dtype"]
            drawn = sample.random_sample(shape, dtype, self.device, request["seed"])
            tensors = dict(zip("qkv", drawn, strict=True))
        self.q, self.k, self.v = (tensors[name] for name in "qkv")
        tables = sample.load(folder / "tables", self.device)
        self.pattern = Pattern(parse_program(request["pattern"]), tables)
        self.backend: str = request["backend"]
        self.is_timed = self.q.is_cuda
        self.ahead = Ahead(self.pattern, self.backend, self.device, self.q, self.k, self.v)
        self.ahead.begin(request["ahead"])
        self.standard: checking.Standard | None = None
        self.default = self._baseline(request["baseline"])
        notes: list[str] = []
        kept = self._reference(notes)
        dense_ms = self._dense(notes) if self.is_timed else None
        return {"notes": notes, "kept": kept, "dense_ms": dense_ms}

    def attempt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Build, run, check and time a candidate."""
        built = self.ahead.take(request)
        attention = self._compiled(request)
        with torch.no_grad():
            error, allowed = self._check(attention)
        figures = {"error": error, "allowed": allowed, **built}
        if not error <= allowed:
            reason = f"error {error:.1e} > {allowed:.1e} allowed"
            return {"status": "wrong", "rung": "compiled", "reason": reason, **figures}
        if not self.is_timed:
            return {"status": "ok", "rung": "matched", **figures}
        with torch.no_grad():
            run = lambda: attention(self.q, self.k, self.v)  # noqa: E731
            graph = measure.graphed(run)
            times = measure.time_ms(graph or run, least_runs=10, span_ms=SPAN_MS)
        return {
            "status": "ok",
            "rung": "timed",
            "median_ms": times.median_ms,
            "spread_ms": times.spread_ms,
            "runs": times.runs,
            "is_graphed": graph is not None,
            **figures,
        }

    def is_broken(self) -> bool:
        """Ask the device for a sign of life."""
        if self.device == "cpu":
            return False
        try:
            torch.cuda.synchronize()
            return int(torch.ones(1, device=self.device).item()) != 1
        except RuntimeError:
            return True

    def _compiled(self, request: Mapping[str, Any]) -> api.Attention:
        axes = {kernel: dict(values) for kernel, values in request["axes"]}
        return api.compile(self.pattern, backend=self.backend, order=request["order"], axes=axes)

    def _baseline(self, request: Mapping[str, Any] | None) -> Tensor | None:
        """Give the whole output of a candidate that an earlier process found right."""
        if request is None:
            return None
        with torch.no_grad():
            whole: Tensor = self._compiled(request)(self.q, self.k, self.v)
            return whole.clone()

    def _reference(self, notes: list[str]) -> dict[str, float] | None:
        """Get what candidates are compared with, and measure what the pattern keeps."""
        reference = api.compile(self.pattern, backend="reference")
        try:
            part = checking.part_of(
                self.q, self.k, self.v, checking.CHECKED_PAIRS, checking.CHECKED_ROWS
            )
            with torch.no_grad():
                self.standard = checking.standard(reference, part)
        except (SpcompError, RuntimeError) as error:
            notes.append(f"checked against the default schedule alone ({first_line(error)})")
        kept, why = checking.kept_of(reference, self.q, self.k, self.v)
        if why:
            notes.append(why)
        return kept

    def _check(self, attention: api.Attention) -> tuple[float, float]:
        """Compare with the reference on a part, and with the first right output on the whole."""
        error, allowed = 0.0, 0.0
        if self.standard is not None:
            part, allowed = self.standard.part, self.standard.allowed
            error = checking.error_between(attention(part.q, part.k, part.v), self.standard.out)
            if not error <= allowed:
                return error, allowed
        whole = attention(self.q, self.k, self.v)
        if self.default is None:
            if not bool(whole.isfinite().all()):
                return float("inf"), allowed
            self.default = whole.clone()
            return error, allowed
        beside = 2 * allowed or checking.LOOSE[str(whole.dtype).removeprefix("torch.")]
        apart = checking.error_between(whole, self.default)
        return (error, allowed) if apart <= beside else (apart, beside)

    def _dense(self, notes: list[str]) -> float | None:
        run = measure.dense_attention(self.q, self.k, self.v)
        try:
            with torch.no_grad():
                times = measure.time_ms(measure.graphed(run) or run, span_ms=SPAN_MS)
        except RuntimeError as error:
            notes.append(f"dense attention was not timed ({first_line(error)})")
            return None
        return times.median_ms


# ---- the conversation ----------------------------------------------------------------------------


def serve(bench: Bench, requests: Iterator[str], answers: TextIO) -> None:
    """Answer requests until there are no more; a broken device ends the process."""
    for line in requests:
        request = json.loads(line)
        try:
            work = bench.load if request["op"] == "load" else bench.attempt
            answer = work(request)
        except Refused as error:
            answer = {"status": "refused", "rung": "emitted", "reason": first_line(error)}
        except Exception as error:
            answer = {"status": "failed", "rung": "emitted", "reason": first_line(error)}
        is_broken = bench.is_broken()
        answers.write(json.dumps({**answer, "is_broken": is_broken}) + "\n")
        answers.flush()
        if is_broken:
            os._exit(FATAL)


def main(bench: Bench) -> None:
    """Serve stdin on stdout; what libraries print goes to stderr instead."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin, lines), daemon=True).start()
    serve(bench, iter(lines.get, ""), answers)


def _listen(requests: TextIO, lines: queue.SimpleQueue[str]) -> None:
    """Pass requests on. When they end the parent is gone, in order or not: a kernel that hangs must
    not stay behind, nor the folder."""
    folder = ""
    for line in requests:
        folder = json.loads(line).get("folder", folder)
        lines.put(line)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main(CardBench())
