"""The process that compiles kernels: it imports Triton once, and a fork of it compiles each job.

A job is a folder with `job.json`. Its fork writes the files of the cache entry to `entry/` there,
and what it says on stderr to `stderr`. One line on stdin is a folder; one line on stdout is a
folder and the exit status of its fork. The process knows neither torch nor Triton's interpreter,
so it does the same on a laptop, in a test run under the interpreter, and on a GPU machine."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import selectors
import sys
import traceback
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spcomp.backends.triton import generated
from spcomp.backends.triton.manifest import Signature
from spcomp.backends.triton.store import Form, compile_form, files_of, gpu_target

JOB = "job.json"
ENTRY = "entry"
ERRORS = "stderr"


def written(form: Form, folder: Path) -> str:
    """Give a form as the text of a job; folder: of its cache entry, where debuggers will look for
    its lines. The environment of this moment goes with it, since Triton reads it when it
    compiles."""
    fields = {
        "folder": str(folder),
        "environment": {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        "kernel": form.generated.kernel,
        "text": form.generated.text,
        "types": form.signature.types,
        "divisible": sorted(form.signature.divisible),
        "arch": f"{form.target.backend}:{form.target.arch}",
        "warp_size": form.target.warp_size,
        "options": form.options,
    }
    return json.dumps(fields)


def _read(job: dict[str, Any]) -> Form:
    types = tuple((name, kind) for name, kind in job["types"])
    return Form(
        generated.read(job["kernel"], job["text"]),
        Signature(types, frozenset(job["divisible"])),
        gpu_target(job["arch"], job["warp_size"]),
        tuple((name, value) for name, value in job["options"]),
    )


def compile_job(folder: Path) -> None:
    """Compile the job of a folder.

    Raises: what Triton's compiler raises.
    """
    job = json.loads((folder / JOB).read_text())
    os.environ.clear()
    os.environ.update(job["environment"])
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")  # ours keeps what is worth keeping
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    form, log = _read(job), io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = compile_form(form, Path(job["folder"]))
    warnings = tuple(sorted(set(re.findall(r"C75\d\d", log.getvalue()))))
    (folder / ENTRY).mkdir()
    for name, data in files_of(form, compiled, warnings).items():
        (folder / ENTRY / name).write_bytes(data)


# ---- the conversation ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Running:
    """A fork at work; alive: the read end of a pipe that closes when it ends, however it does."""

    folder: str
    process: int
    alive: int


def serve(most: int) -> None:
    """Compile the folders named on stdin, `most` at once, until stdin ends."""
    waiting: deque[str] = deque()
    running: dict[int, _Running] = {}
    with selectors.DefaultSelector() as ready:
        ready.register(0, selectors.EVENT_READ)
        rest = b""
        while True:
            for key, _ in ready.select():
                if key.fd == 0:
                    got = os.read(0, 1 << 16)
                    if not got:
                        return  # whoever asked is gone; forks end with their job
                    *lines, rest = (rest + got).split(b"\n")
                    waiting.extend(line.decode() for line in lines)
                else:
                    ready.unregister(key.fd)
                    _report(running.pop(key.fd))
            while waiting and len(running) < most:
                fork = _started(waiting.popleft())
                running[fork.alive] = fork
                ready.register(fork.alive, selectors.EVENT_READ)


def _started(folder: str) -> _Running:
    alive, held = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(alive)
        os._exit(_forked(Path(folder)))
    os.close(held)
    return _Running(folder, process, alive)


def _forked(folder: Path) -> int:
    os.dup(1)  # the server's stdout ends when its last fork does, even where the server was killed
    errors = os.open(folder / ERRORS, os.O_WRONLY | os.O_CREAT, 0o600)
    for stream in (1, 2):  # what libraries print is no answer
        os.dup2(errors, stream)
    try:
        compile_job(folder)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()
    return 0


def _report(fork: _Running) -> None:
    os.close(fork.alive)
    _, status = os.waitpid(fork.process, 0)
    os.write(1, f"{fork.folder}\t{os.waitstatus_to_exitcode(status)}\n".encode())


def main(most: int) -> None:
    """Import what every job needs, then serve."""
    import triton.backends.nvidia.compiler
    import triton.language  # noqa: F401

    serve(most)


if __name__ == "__main__":
    main(int(sys.argv[1]))
