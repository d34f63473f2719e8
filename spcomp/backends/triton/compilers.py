"""Kernels compiled in other processes, several at once; each form once, however many ask for it."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import IO

from spcomp import processors
from spcomp.backends.triton.compile_server import ENTRY, ERRORS, JOB, written
from spcomp.backends.triton.store import Form
from spcomp.cache import default_store

ROOT = Path(__file__).resolve().parents[3]
END_S = 5.0


class CompilerFailed(Exception):
    """The compiler did not make a kernel of a form; the text is all that it said."""


class Compilers:
    """One compile server and the jobs it has. Safe from several threads."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="spcomp-build-"))
        self._lock = threading.Lock()
        self._has_ended = False
        self._jobs: dict[str, Future[dict[str, bytes]]] = {}  # under way, by the digest of the form
        self._digests: dict[str, str] = {}  # of the jobs, by their folder
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "spcomp.backends.triton.compile_server",
                str(processors.usable()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            text=True,
            bufsize=1,
            start_new_session=True,  # Ctrl-C is for who asked, and `close` ends all of it at once
        )
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,))
        self._listener.daemon = True
        self._listener.start()

    def is_alive(self) -> bool:
        """Tell whether it can take jobs."""
        return not self._has_ended and self._process.poll() is None

    def files(self, form: Form) -> Future[dict[str, bytes]]:
        """Begin to compile a form; gives the files of its cache entry, or raises CompilerFailed."""
        digest = form.key.digest
        with self._lock:
            job = self._jobs.get(digest)
            if job is None:
                job = self._jobs[digest] = Future()
                self._begin(digest, form, job)
            return job

    def close(self) -> None:
        """End the server and its forks; jobs that are under way fail."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(END_S)
        except (OSError, subprocess.TimeoutExpired):
            pass
        with contextlib.suppress(ProcessLookupError):  # its forks still write into the folder
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join(END_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, digest: str, form: Form, job: Future[dict[str, bytes]]) -> None:
        try:
            folder = Path(tempfile.mkdtemp(dir=self._folder))
            self._digests[str(folder)] = digest
            (folder / JOB).write_text(written(form, default_store().path_of(form.key)))
            assert self._process.stdin is not None
            self._process.stdin.write(f"{folder}\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            del self._jobs[digest]
            job.set_exception(CompilerFailed(f"the process that compiles is gone ({error})"))

    def _listen(self, answers: IO[str] | None) -> None:
        assert answers is not None
        for line in answers:
            folder, _, status = line.rstrip("\n").rpartition("\t")
            with self._lock:
                job = self._jobs.pop(self._digests.pop(folder))
            _settle(job, Path(folder), int(status))
        self._has_ended = True  # its pipe closes before the system knows that it is gone
        with self._lock:
            left, self._jobs = self._jobs, {}
        for job in left.values():
            job.set_exception(CompilerFailed("the process that compiles ended"))


def _settle(job: Future[dict[str, bytes]], folder: Path, status: int) -> None:
    files, said = {}, ""
    try:
        said = (folder / ERRORS).read_text(errors="replace").strip()
        if status == 0:
            files = {path.name: path.read_bytes() for path in (folder / ENTRY).iterdir()}
    except OSError as error:
        said = str(error)
    shutil.rmtree(folder, ignore_errors=True)
    if files:
        job.set_result(files)
    else:
        job.set_exception(CompilerFailed(said or f"its process ended with status {status}"))


# ---- the one that a process shares ---------------------------------------------------------------

_shared: tuple[int, Compilers] | None = None  # of the process with this number
_shared_lock = threading.Lock()


def compilers() -> Compilers:
    """Give the compilers of this process."""
    global _shared
    with _shared_lock:
        owner, held = _shared or (None, None)
        if owner == os.getpid() and held is not None and held.is_alive():
            return held
        if owner is None:
            atexit.register(_close)
        elif owner == os.getpid() and held is not None:
            held.close()
        made = Compilers()
        _shared = (os.getpid(), made)
        return made


def _environment() -> dict[str, str]:
    """Give the environment of the server; that of a job comes with it."""
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    given["PYTHONPATH"] = os.pathsep.join([str(ROOT), given.get("PYTHONPATH", "")])
    return given


def _close() -> None:
    if _shared is not None and _shared[0] == os.getpid():
        _shared[1].close()
