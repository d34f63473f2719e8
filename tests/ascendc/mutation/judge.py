"""Judging mutants, each in a process of its own: it may crash, loop or write where it should not.

A child is forked with everything imported, renders through the mutation, compiles into a cache
folder of its own, and says by a pipe what noticed. It has a limit on its own processor time, so an
endless loop ends on a busy machine after the same work as on an idle one, and the parent ends a
child that hangs without working.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from threading import Lock
from typing import Literal, NoReturn
from unittest.mock import patch

from spcomp.backends.ascendc import emulate
from spcomp.backends.ascendc.emulate import EmulatorFault, KernelDoesNotCompile
from spcomp.codegen.render import render
from tests.ascendc.mutation.mutants import Edit, Mutant, unchanged
from tests.ascendc.mutation.schema import FLAGS as SCHEMA_FLAGS
from tests.ascendc.mutation.schema import PRELUDE, VARIABLE, Schema, compiler_errors, schema_of
from tests.ascendc.mutation.suites import Suite

Outcome = Literal["compiler", "fault", "result", "crash", "timeout", "survived", "error"]
KILLS: tuple[Outcome, ...] = ("compiler", "fault", "result", "crash", "timeout")

RIGHT_LIMIT_S = 60.0
"""Of the templates as they are, for one suite; processor time, without the compiler."""

LEAST_LIMIT_S, SLOWER = 10.0, 4
"""A mutant has so many seconds, or so many times what the templates as they are took: on a busy
machine the same work takes twice the processor time."""

CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
"""SIGILL is how the compiler ends a process that uses an index beyond an array."""

WORTH_A_SCHEMA = 30
"""Edits in one text; putting them into one library takes as long as compiling a few."""

WALL_LIMIT_S = 300.0
MEMORY_LIMIT_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mutant; suite: the specialisation that noticed, said: how.

    cpu_s: of one that survived, the processor time of the suite that took longest.
    """

    outcome: Outcome
    suite: str = ""
    said: str = ""
    cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """A mutant to judge; is_exact: as a text of its own, though a schema has it.

    What the kernel computes is then known, so that one suite is enough to see whether it compiles.
    """

    mutant: Mutant
    is_exact: bool


class Bench:
    """Where mutants are judged: a folder that holds the headers compiled once, and all caches."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._folder, self._workers = folder, workers
        swap = {"-O1": "-O0"}  # compiling is what takes long, and the kernels are tiny
        flags = tuple(swap.get(flag, flag) for flag in emulate.FLAGS)
        self._host_flags = tuple(swap.get(flag, flag) for flag in emulate.HOST_FLAGS)
        header = folder / "headers.h"
        header.write_text(f'#include "kernel_operator.h"\n#include "host.h"\n{PRELUDE}')
        command = ["g++", *(flag for flag in flags if flag != "-shared"), "-x", "c++-header"]
        command += [f"-I{emulate.HEADERS}", str(header), "-o", f"{header}.gch"]
        subprocess.run(command, check=True)
        self._flags = (*flags, "-include", str(header))
        self._schemas: dict[str, Schema] = {}
        self._limit_s = LEAST_LIMIT_S

    def prepare(self, mutants: Iterable[Mutant], suites: Mapping[str, Suite]) -> None:
        """Put many mutants of a suite into one library, where they can share one (schema.py)."""
        edits: dict[str, list[Edit]] = {}
        for mutant in mutants:
            for name, edit in mutant.edits.items():
                edits.setdefault(name, []).append(edit)
        lock = Lock()
        command = ("g++", *self._flags, *SCHEMA_FLAGS, f"-I{emulate.HEADERS}")

        def made(name: str) -> Schema:
            def errors_of(text: str) -> set[int]:
                with lock:
                    source = _source(suites[name], text)
                return compiler_errors(command, source)

            return schema_of(suites[name].text(), edits[name], errors_of)

        many = [name for name, some in edits.items() if len(some) >= WORTH_A_SCHEMA]
        many = [name for name in many if hasattr(suites[name].module, "compile_kernel")]
        with ThreadPoolExecutor(self._workers) as pool:
            self._schemas = dict(zip(many, pool.map(made, many), strict=True))
        whole = [unchanged("", name) for name in many]
        for mutant, verdict in self._judge_all([Job(m, is_exact=False) for m in whole], suites):
            if verdict.outcome != "survived":
                said = f"{verdict.outcome}: {verdict.said}"
                raise AssertionError(
                    f"all mutants of {[*mutant.edits]} in one, none chosen: {said}"
                )

    def judge(
        self, mutants: Iterable[Mutant], suites: Mapping[str, Suite]
    ) -> Iterator[tuple[Mutant, Verdict]]:
        """Yield each mutant with its verdict, in the order in which they are ready."""
        again: list[Job] = []
        for mutant, verdict in self._judge_all([Job(m, is_exact=False) for m in mutants], suites):
            if verdict.outcome == "survived" and any(map(self._number, mutant.edits.items())):
                again.append(Job(mutant, is_exact=True))
            else:
                yield mutant, verdict
        yield from self._judge_all(again, suites)

    def _judge_all(
        self, jobs: Iterable[Job], suites: Mapping[str, Suite]
    ) -> Iterator[tuple[Mutant, Verdict]]:
        children: dict[int, Child] = {}
        waiting = iter(jobs)
        try:
            while True:
                while len(children) < self._workers and (job := next(waiting, None)) is not None:
                    names = [*job.mutant.edits][: 1 if job.is_exact else None]
                    child = self._start(job, [suites[name] for name in names])
                    children[child.process.sentinel] = child
                if not children:
                    return
                wait(list(children), timeout=1.0)
                for sentinel, child in list(children.items()):
                    verdict = child.verdict()
                    if verdict is not None:
                        del children[sentinel]
                        if all(edit.kind == "none" for edit in child.mutant.edits.values()):
                            self._limit_s = max(self._limit_s, SLOWER * verdict.cpu_s)
                        yield child.mutant, verdict
        finally:  # the caller may have lost interest
            for child in children.values():
                child.end()

    def _number(self, named: tuple[str, Edit]) -> int:
        """Give the number of an edit in the schema of its suite, 0 without one."""
        name, edit = named
        return self._schemas[name].numbers.get(edit, 0) if name in self._schemas else 0

    def _start(self, job: Job, suites: list[Suite]) -> Child:
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        cache = self._folder / f"cache-{time.monotonic_ns()}"
        process = context.Process(target=self._work, args=(job, suites, cache, sender))
        process.start()
        sender.close()
        return Child(job.mutant, process, receiver, cache, time.monotonic())

    def _work(self, job: Job, suites: list[Suite], cache: Path, sender: Connection) -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        longest = 0.0
        for suite in suites:
            sender.send(("", suite.name, ""))  # so that a crash has a place
            edit = job.mutant.edits[suite.name]
            # Unlike a limit on the process, the timer is not handed on to the compiler.
            limit = RIGHT_LIMIT_S if edit.kind == "none" else self._limit_s
            signal.setitimer(signal.ITIMER_PROF, limit)
            begun = time.process_time()
            number = self._number((suite.name, edit))
            if edit.kind == "none" and suite.name in self._schemas:
                is_shared = not job.is_exact
            else:
                is_shared = number > 0 and not job.is_exact
            if is_shared:
                os.environ[VARIABLE] = str(number)
                flags, text = (*self._flags, *SCHEMA_FLAGS), self._schemas[suite.name].text
            else:
                flags, text = self._flags, edit.apply(suite.text())
            os.environ["SPCOMP_CACHE_DIR"] = str(self._folder / "shared" if is_shared else cache)
            with (
                patch.object(emulate, "FLAGS", flags),
                patch.object(emulate, "HOST_FLAGS", self._host_flags),
            ):
                outcome, said = _run(suite, text)
            longest = max(longest, time.process_time() - begun)
            if outcome != "survived":
                sender.send((outcome, suite.name, said))
                return
        sender.send(("survived", "", str(longest)))


def _source(suite: Suite, text: str) -> str:
    """Give what the suite's tests would have compiled."""
    found: list[str] = []

    def compile_kernel(source: str, entry: str) -> NoReturn:
        found.append(f"{source}\nSPCOMP_EMULATED_ENTRY({entry})\n")
        raise LookupError

    with (
        patch.object(suite.module, "render", lambda template, context: text),
        patch.object(suite.module, "compile_kernel", compile_kernel),
        contextlib.suppress(LookupError),
    ):
        suite.checks[0]()
    return found[0]


def _run(suite: Suite, text: str) -> tuple[Outcome, str]:
    """Run the checks of a suite on a text in place of its own until one fails."""

    def mutated(template: str, context: object) -> str:
        if template != suite.template:
            return render(template, context)
        if context != suite.context:  # its model would be that of another kernel
            raise LookupError(f"a check of {suite.name} renders another specialisation")
        return text

    try:
        with patch.object(suite.module, "render", mutated):
            for check in suite.checks:
                check()
    except KernelDoesNotCompile as error:
        said = str(error)
        if "error:" not in said or "fatal error:" in said or "internal compiler" in said:
            return "error", said
        return "compiler", said
    except EmulatorFault as error:
        return "fault", str(error)
    except AssertionError as error:
        return "result", str(error)
    except Exception as error:  # not what a mutant does: the bench itself is broken
        return "error", f"{type(error).__name__}: {error}"
    return "survived", ""


@dataclass(frozen=True, slots=True)
class Child:
    """A process that judges one mutant."""

    mutant: Mutant
    process: ForkProcess
    receiver: Connection
    cache: Path
    started: float

    def verdict(self) -> Verdict | None:
        """Give the verdict of a child that has ended or has had its time; else None."""
        is_late = time.monotonic() - self.started > WALL_LIMIT_S
        if self.process.is_alive() and not is_late:
            return None
        is_late = self.process.is_alive()
        self.end()
        outcome, suite, said = "", "", ""
        with contextlib.suppress(EOFError):
            while self.receiver.poll():
                outcome, suite, said = self.receiver.recv()
        self.receiver.close()
        if outcome == "survived":
            return Verdict(outcome, cpu_s=float(said))
        if outcome:
            return Verdict(outcome, suite, said)  # type: ignore[arg-type]
        code = self.process.exitcode or 0
        if is_late or code == -signal.SIGPROF:
            return Verdict("timeout", suite)
        if -code in CRASHES:
            return Verdict("crash", suite, signal.Signals(-code).name)
        return Verdict("error", suite, f"the process ended with {code}")

    def end(self) -> None:
        """End the process with the compiler it may be waiting for, and remove what it left."""
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        shutil.rmtree(self.cache, ignore_errors=True)
