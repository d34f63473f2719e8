"""The file form of a tuning: one JSON line an event, one file a call, readable after any accident.

`spcomp.autotune.record_lines` holds what a line may say. A line is one write in append mode, so a
process that dies leaves at most one cut line, the last."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import filelock

from spcomp.autotune.record import FINAL, Kept, Row, TunedCall, Tuning
from spcomp.autotune.record_lines import (
    Dense,
    Event,
    Parsed,
    Session,
    TuningUnreadable,
    digest_of,
    header_of,
    line_of,
    parse,
    tuning_of,
    warn,
)
from spcomp.errors import SpcompError

__all__ = ["Recorder", "TuningBusy", "TuningUnreadable", "digest_of", "path_of", "read"]

SUFFIX = ".jsonl"
LOCK_WAIT_S = 600.0
"""How long a second tuner of the same call waits for the first."""


class TuningBusy(SpcompError):
    """Another process tunes the same call, and takes longer than one waits."""

    message = "another process has been tuning {pattern} for {waited_s:g} s, in {path}."
    help = "wait for it and take its result, stop it, or tune into another folder."


def path_of(folder: Path, call: TunedCall) -> Path:
    """Give where the tuning of a call stands or would stand: `<name>-<phase>-<digest>.jsonl`."""
    name = re.sub(r"[^0-9A-Za-z_]+", "_", call.pattern.partition("(")[0])[:40]
    return folder / f"{name}-{call.phase}-{digest_of(call)}{SUFFIX}"


def read(path: Path) -> Tuning:
    """Read a tuning back.

    A cut line is left out with one warning that names it; without any `session` the tuning counts
    as partial.
    Raises: TuningUnreadable (no header, another schema, a field too many or too few, a wrong type),
        OSError.
    """
    found = parse(path.read_bytes(), path)
    return tuning_of(found.call, found.events)


class Recorder:
    """Keeps the tuning of one call while it is made: `with Recorder(folder, call) as recorder`.

    An existing file of the same call is gone on with, and `known()` gives the rows that need no new
    trial. The file is locked from entry to exit, so that no two processes measure the same call:
    the second waits, up to `wait_s` seconds, and then finds the rows of the first; `on_wait` is
    told what it waits for. A file of another call, or one that cannot be read, is moved aside as
    `*.other`. Where the folder cannot be written, or the disk is full, one warning says so and
    everything stays in memory. `fresh` forgets what the file held.

    Raises on entry: TuningBusy.
    """

    def __init__(
        self,
        folder: Path,
        call: TunedCall,
        *,
        fresh: bool = False,
        wait_s: float = LOCK_WAIT_S,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self.call = call
        self.path = path_of(folder, call)
        self._fresh, self._wait_s, self._on_wait = fresh, wait_s, on_wait
        self._events: list[Event] = []
        self._file: int | None = None
        self._lock: filelock.FileLock | None = None

    def __enter__(self) -> Recorder:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            self._lose(error)
            return self
        self._take_lock()
        try:
            self._open()
        except OSError as error:
            self._lose(error)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and give the lock back; what was recorded stays readable here."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def tuning(self) -> Tuning:
        """Give all that is known of the call, from earlier sessions and from this one."""
        return tuning_of(self.call, self._events)

    def known(self) -> tuple[Row, ...]:
        """Give the rows that need not be tried again."""
        return tuple(row for row in self.tuning().rows if row.status in FINAL)

    def row(self, row: Row) -> None:
        """Record what became of a candidate."""
        # What can be worked out again may be lost with the machine's power; a measurement may not.
        self._add(row, is_lasting=row.status in FINAL)

    def dense(self, ms: float, by: str) -> None:
        """Record the time of dense attention, and what computed or predicted it."""
        self._add(Dense(ms, by))

    def kept(self, kept: Kept) -> None:
        """Record how much of dense attention the pattern keeps."""
        self._add(kept)

    def note(self, text: str) -> None:
        """Record something a reader of the report has to know."""
        self._add(text)

    def session(
        self, *, seed: int, elapsed_s: float, is_partial: bool, created: str | None = None
    ) -> None:
        """Record that a search came to its end; created: ISO 8601 in UTC, default now."""
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._add(Session(seed, elapsed_s, is_partial, created or now))

    # ---- the file ----

    def _add(self, event: Event, is_lasting: bool = True) -> None:
        self._events.append(event)
        try:
            self._append(line_of(event), is_lasting)
        except OSError as error:
            self._lose(error)

    def _append(self, line: bytes, is_lasting: bool) -> None:
        if self._file is None:
            return
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes were written")
        if is_lasting:
            os.fsync(self._file)

    def _open(self) -> None:
        found = None if self._fresh else self._existing()
        if found is not None:
            self._events = found.events
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        whole_bytes = 0 if found is None else found.whole_bytes
        if os.fstat(self._file).st_size != whole_bytes:
            os.ftruncate(self._file, whole_bytes)
        if found is None:
            self._append(header_of(self.call), is_lasting=True)

    def _existing(self) -> Parsed | None:
        """Read the file that is there, if it is one of this call; move any other aside."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        if b"\n" not in data:  # a process died while it wrote the first line
            return None
        try:
            found = parse(data, self.path)
            is_ours = digest_of(found.call) == digest_of(self.call)
            problem = "" if is_ours else "it belongs to another call"
        except TuningUnreadable as error:
            problem = f"{error.figures['place']} {error.figures['problem']}"
        if not problem:
            return found
        aside = self.path.with_name(f"{self.path.name}.other")
        warn(f"{self.path} is not used ({problem}); it is moved to {aside.name}.")
        os.replace(self.path, aside)
        return None

    def _lose(self, error: OSError) -> None:
        """Go on in memory alone; the file is given up, so there is one warning and no more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        reason = error.strerror or error
        warn(f"the tuning in {self.path} is not recorded from here on ({reason}).")

    def _take_lock(self) -> None:
        lock = filelock.FileLock(f"{self.path}.lock", mode=0o600)
        try:
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                self._say_waiting()
                lock.acquire(timeout=self._wait_s)
        except filelock.Timeout:
            raise TuningBusy(
                pattern=self.call.pattern, waited_s=self._wait_s, path=self.path
            ) from None
        except (OSError, NotImplementedError):
            return  # a folder without locks: two tuners measure twice, and both files stay readable
        self._lock = lock

    def _say_waiting(self) -> None:
        if self._on_wait is not None:
            self._on_wait(f"another process tunes {self.call.pattern}; waiting for its result")
