"""The measuring process from outside: started, asked, timed out, replaced when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

TRIAL = "spcomp.tuning.trial"

START_S = 300.0
"""How long a process may take to import, to read the sample and to compute the reference."""

FIRST_TRY_S = 120.0
LEAST_TRY_S = 30.0
SLOWER = 50.0
"""A candidate may take this times what the first one took, compiling included, and LEAST_TRY_S in
any case; then it counts as hung. The first one may take FIRST_TRY_S."""

END_S = 5.0
"""How long a process may take to end once it has closed its output."""

RUN = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__')"
)


class Died(Exception):
    """The process ended or was ended; the text is why."""

    def __init__(self, reason: str, *, is_timeout: bool = False) -> None:
        super().__init__(reason)
        self.is_timeout = is_timeout


class NotStarted(Died):
    """The process could not be got ready, which says nothing of the candidate it was for."""


class Worker:
    """A process that measures candidates, with a folder of its own for everything it writes.

    Kernels it compiles go to that folder, and with it when the worker is closed: losers leave
    nothing behind. `with Worker(load) as worker: worker.attempt({...})`.
    """

    def __init__(
        self, load: Mapping[str, Any], *, module: str = TRIAL, try_timeout_s: float | None = None
    ) -> None:
        """load: the request that gets the process ready, without its folder. try_timeout_s: seconds
        a candidate may take; by default it follows from the first one."""
        self.folder = Path(tempfile.mkdtemp(prefix="spcomp-tuning-"))
        self._load = {"baseline": None, "ahead": [], **load}
        self._module = module
        self._try_s = try_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self.starts = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> dict[str, Any]:
        """Start the process and get it ready; gives its answer to the load.

        Raises: NotStarted.
        """
        self._end()
        self.starts += 1
        self._answers = queue.Queue()
        with (self.folder / "stderr").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", RUN, json.dumps(sys.path), self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C is for the parent, which then ends it in order
            )
        threading.Thread(
            target=_read, args=(self._process.stdout, self._answers), daemon=True
        ).start()
        try:
            answer = self._ask({"op": "load", "folder": str(self.folder), **self._load}, START_S)
        except Died as death:
            raise NotStarted(str(death)) from None
        problem = answer.get("reason", "")
        if not problem and self._process is None:
            broke = "the device broke while the sample was got ready"
            problem = "; ".join([broke, *answer["notes"]])
        if problem:
            self._end()
            raise NotStarted(problem)
        return answer

    def attempt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Have one candidate checked and timed, in a new process where there is none.

        Raises: Died, when the process did not live to answer; NotStarted.
        """
        if self._process is None:
            self.start()
        began = time.monotonic()
        answer = self._ask({"op": "try", **request}, self._try_s or FIRST_TRY_S)
        if self._try_s is None:
            self._try_s = max(LEAST_TRY_S, SLOWER * (time.monotonic() - began))
        if answer["status"] == "ok" and self._load["baseline"] is None:
            self._load["baseline"] = dict(request)  # what a later process compares with
        return answer

    def close(self) -> None:
        """End the process and remove its folder."""
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self._end()
            raise Died(f"no answer within {seconds:g} s", is_timeout=True) from None
        except OSError:
            line = None
        except BaseException:
            self._end()  # its answer would be taken for that of the next request
            raise
        if line is None:
            raise Died(self._last_words())
        return self._understood(line)

    def _understood(self, line: str) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(line)
            is_broken = answer.pop("is_broken")
        except (ValueError, KeyError, AttributeError):
            self._end()
            raise Died(f"the process answered {line.strip()[:80]!r}") from None
        if is_broken:
            self._end()
        return answer

    def _last_words(self) -> str:
        """Say how the process ended, with the last line it wrote."""
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        status = process.poll()
        self._end()
        if status is None:
            return "the process closed its output"
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        said = (self.folder / "stderr").read_text(errors="replace").strip().splitlines()
        return f"the process ended with {how}" + (f": {said[-1][:200]}" if said else "")

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "SPCOMP_CACHE_DIR": str(self.folder / "kernels"),
            "SPCOMP_CACHE_READ_ONLY": "0",
            "TRITON_CACHE_DIR": str(self.folder / "triton"),
            "TMPDIR": str(self.folder),
        }

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _read(pipe: IO[str] | None, into: queue.Queue[str | None]) -> None:
    """Pass lines on, and None when there are no more: the process is gone."""
    assert pipe is not None
    with contextlib.suppress(ValueError, OSError):  # closed while it was read
        for line in pipe:
            into.put(line)
    into.put(None)
