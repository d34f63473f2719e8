"""Accidents of a tuning file: cut, foreign, unwritable, or wanted by two tuners at once."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spcomp.autotune import record_text
from spcomp.autotune.record import FINAL, settled
from spcomp.autotune.record_lines import Dense, Event, Session, header_of, line_of
from spcomp.autotune.record_text import Recorder, TuningBusy, path_of, read
from tests.autotune.tuning import CALL, DEFAULT, ROWS, one, timed, write

ROOT = Path(__file__).resolve().parents[2]
LONGER = replace(CALL, shape={**CALL.shape, "Sq": 8192})


@pytest.fixture(autouse=True)
def _no_file_is_left_open() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    yield
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


# ---- accidents (B56, B52) ------------------------------------------------------------------------


@given(st.data())
def test_a_file_cut_anywhere_after_its_header_is_readable(data: st.DataObject) -> None:
    events: list[Event] = [*ROWS, Dense(3.5, "torch"), "a note", Session(0, 2.5, True, "")]
    lines = [header_of(CALL), *map(line_of, events)]
    whole = b"".join(lines)
    length = data.draw(st.integers(len(lines[0]), len(whole)))
    kept = len(whole[:length].split(b"\n")) - 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = record_text.parse(whole[:length], Path("tuning.jsonl"))
    assert repr(found.events) == repr(events[:kept])
    is_cut = not whole[:length].endswith(b"\n")
    assert [str(w.message) for w in caught] == is_cut * [
        "spcomp: the last line of tuning.jsonl is cut; it is left out."
    ]


def test_after_a_cut_last_line_the_next_row_begins_a_fresh_line(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    whole = path.read_bytes()
    for length in range(len(header_of(CALL)), len(whole)):
        path.write_bytes(whole[:length])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Recorder(tmp_path, CALL) as recorder:
                before = recorder.known()
                recorder.row(timed(one(9)[0], 9.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            after = [row for row in read(path).rows if row.status in FINAL]
        assert {r.candidate for r in after} == {r.candidate for r in before} | {one(9)[0]}


def test_a_file_cut_within_its_header_is_begun_anew(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    header = header_of(CALL)
    for length in (0, 1, len(header) - 1):
        path.write_bytes(header[:length])
        with Recorder(tmp_path, CALL) as recorder:
            assert recorder.known() == ()
            recorder.row(ROWS[0])
        assert len(read(path).rows) == 1


def test_a_cut_line_in_the_middle_is_left_out_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:40] + b"\n"
    lines.insert(4, b"\xff\x00\n")
    path.write_bytes(b"".join(lines))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuning = read(path)
    assert [str(w.message) for w in caught] == [
        f"spcomp: line {number} of {path} is cut; it is left out." for number in (3, 5)
    ]
    assert {row.candidate for row in tuning.rows} == {DEFAULT, *one(2, 3, 4)}


def test_a_file_of_another_call_is_moved_aside_and_never_used(tmp_path: Path) -> None:
    other = LONGER
    foreign = write(tmp_path / "other", ROWS, other).read_bytes()
    path = path_of(tmp_path, CALL)
    path.write_bytes(foreign)
    with pytest.warns(UserWarning) as caught, Recorder(tmp_path, CALL) as recorder:
        assert recorder.known() == ()
        recorder.row(ROWS[0])
    assert [str(w.message) for w in caught] == [
        f"spcomp: {path} is not used (it belongs to another call); "
        f"it is moved to {path.name}.other."
    ]
    assert path.with_name(f"{path.name}.other").read_bytes() == foreign
    assert read(path).call == CALL


def test_a_file_of_another_version_is_moved_aside_and_tuning_goes_on(tmp_path: Path) -> None:
    path = path_of(tmp_path, CALL)
    path.write_text('{"kind": "spcomp tuning", "schema": 99, "call": {}}\n')
    with pytest.warns(UserWarning) as caught, Recorder(tmp_path, CALL) as recorder:
        recorder.row(ROWS[0])
    assert [str(w.message) for w in caught] == [
        f"spcomp: {path} is not used (its schema is 99); it is moved to {path.name}.other."
    ]
    assert len(read(path).rows) == 1


WRITER = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from spcomp.autotune.record_text import Recorder
    from spcomp.autotune.search import search
    from tests.autotune.tuning import CALL, Timer, space_of

    assert "torch" not in sys.modules
    folder, dies_at, in_the_middle = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "middle"
    whole_write = os.write

    def half_write(file, data):
        global dies_at
        if data.startswith(b'{"row"'):
            dies_at -= 1
            if dies_at < 0:
                if in_the_middle:
                    whole_write(file, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        return whole_write(file, data)

    os.write = half_write
    with Recorder(folder, CALL) as recorder:
        space = space_of({"attend": (0.9, 6), "merge": (0.1, 5)})
        timer = Timer(lambda c: 10.0 - sum(dict(axes)["size"] for _, axes in c.axes))
        result = search(
            space, timer, budget_s=1e9, seed=0, known=recorder.known(),
            tell=lambda row, done, total: recorder.row(row),
        )
        recorder.session(seed=0, elapsed_s=1.0, is_partial=result.is_partial)
    print(len(timer.seen))
""")


@pytest.mark.parametrize("where", ["between", "middle"])
def test_after_kill_9_the_file_is_readable_and_tuning_goes_on(where: str, tmp_path: Path) -> None:
    def run(dies_at: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", WRITER, str(tmp_path), str(dies_at), where],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    first = run(5)
    assert first.returncode == -signal.SIGKILL, first.stderr
    path = path_of(tmp_path, CALL)
    is_cut = where == "middle"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuning = read(path)
    assert len(caught) == is_cut
    assert (len(tuning.rows), tuning.is_partial) == (5, True)
    assert tuning.best is not None
    second = run(10**6)
    assert second.returncode == 0, second.stderr
    assert int(second.stdout) == 12 - 5
    whole = read(path)
    assert (len(whole.rows), whole.is_partial) == (12, False)


def test_a_folder_that_cannot_be_made_costs_one_warning_and_no_row(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning) as caught, Recorder(tmp_path / "file" / "x", CALL) as recorder:
        for row in ROWS:
            recorder.row(row)
        recorder.session(seed=0, elapsed_s=1.0, is_partial=True)
    assert [str(w.message) for w in caught] == [
        f"spcomp: the tuning in {recorder.path} is not recorded from here on (Not a directory)."
    ]
    assert recorder.tuning().rows == settled(ROWS)


@pytest.mark.parametrize("fault", ["raises", "short"])
@pytest.mark.parametrize("at", range(4))
def test_a_full_disk_costs_one_warning_and_no_row(
    at: int, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_write, counted = os.write, iter(range(100))

    def write_until_full(file: int, data: bytes) -> int:
        if next(counted) < at:
            return whole_write(file, data)
        if fault == "raises":
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole_write(file, data[:10])

    monkeypatch.setattr(os, "write", write_until_full)
    with pytest.warns(UserWarning) as caught, Recorder(tmp_path, CALL) as recorder:
        for row in ROWS:
            recorder.row(row)
    monkeypatch.undo()
    assert len(caught) == 1
    assert "is not recorded from here on (" in str(caught[0].message)
    assert recorder.tuning().rows == settled(ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Recorder(tmp_path, CALL) as again:
            assert len(again.known()) == min(max(at - 1, 0), 3)


def test_a_record_that_may_only_be_read_still_gives_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, ROWS)
    before = path.read_bytes()
    really_open = os.open

    def open_to_read(name: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return really_open(name, flags, *rest, **named)

    monkeypatch.setattr(os, "open", open_to_read)
    with pytest.warns(UserWarning) as caught, Recorder(tmp_path, CALL) as recorder:
        assert len(recorder.known()) == 3
        recorder.row(timed(one(9)[0], 0.1))
    monkeypatch.undo()
    assert [str(w.message) for w in caught] == [
        f"spcomp: the tuning in {path} is not recorded from here on (Read-only file system)."
    ]
    assert len(recorder.known()) == 4
    assert path.read_bytes() == before


# ---- two tuners of one call ----------------------------------------------------------------------


def test_a_second_tuner_waits_and_finds_the_rows_of_the_first(tmp_path: Path) -> None:
    waits = threading.Event()
    said: list[str] = []
    known: list[int] = []

    def second() -> None:
        def on_wait(text: str) -> None:
            said.append(text)
            waits.set()

        with Recorder(tmp_path, CALL, on_wait=on_wait) as recorder:
            known.append(len(recorder.known()))

    with Recorder(tmp_path, CALL) as first:
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(20)
        for row in ROWS:
            first.row(row)
    thread.join(20)
    assert said == [f"another process tunes {CALL.pattern}; waiting for its result"]
    assert known == [3]


def test_a_second_tuner_does_not_wait_for_ever(tmp_path: Path) -> None:
    with Recorder(tmp_path, CALL) as first:
        with pytest.raises(TuningBusy) as caught, Recorder(tmp_path, CALL, wait_s=0.1):
            pass
        assert str(caught.value) == (
            "TuningBusy: another process has been tuning moba(block=512, k_blocks=8) for 0.1 s, in "
            f"{first.path}.\n"
            "  help: wait for it and take its result, stop it, or tune into another folder."
        )
    with Recorder(tmp_path, CALL, wait_s=0):
        pass


def test_tuners_of_two_calls_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with Recorder(tmp_path, CALL), Recorder(tmp_path, LONGER, wait_s=0) as other:
        other.row(ROWS[0])


def test_a_folder_without_locks_is_tuned_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(self: object, *args: object, **named: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(record_text.filelock.FileLock, "acquire", no_locks)
    assert len(read(write(tmp_path, ROWS)).rows) == 5
