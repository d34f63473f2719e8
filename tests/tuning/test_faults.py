"""Candidates that fail, hang, crash or answer wrongly, and processes that are stopped in the
middle: what was measured stays, and nothing stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spcomp.autotune.record import Row
from spcomp.autotune.search import EveryCandidateFailed
from tests.tuning.fates import Fates, candidate_of, tensors

ROOT = Path(__file__).resolve().parents[2]


def rows_as_tried(fates: Fates, rows: tuple[Row, ...]) -> list[Row]:
    """Give the rows of the candidates in the order they were tried in."""
    found = {(row.candidate.order, row.candidate.axes): row for row in rows}
    return [found[candidate_of(line)] for line in fates.tried]


def test_each_failure_costs_its_row_and_its_process_alone(fates: Fates) -> None:
    fates.are(
        5.0, "out of memory", "abort", "exit", "hang", "illegal access",
        "babble", "wrong", "refused", 2.0, 9.0,
    )  # fmt: skip
    report = fates.tune(try_timeout_s=2.0)
    rows = rows_as_tried(fates, report.tunings[0].rows)
    aborted = rows[2].reason
    assert aborted.startswith("the process ended with signal SIGABRT")
    assert [(row.status, row.rung, row.reason) for row in rows[:10]] == [
        ("ok", "timed", ""),
        ("failed", "emitted", "RuntimeError: CUDA out of memory. Tried to allocate 20 GiB."),
        ("failed", "emitted", aborted),
        ("failed", "emitted", "the process ended with exit status 7: the driver is gone"),
        ("timeout", "emitted", "no answer within 2 s"),
        ("failed", "emitted", "RuntimeError: an illegal memory access was encountered"),
        ("ok", "timed", ""),
        ("wrong", "compiled", "error inf > 1.0e-03 allowed"),
        ("refused", "emitted", "Refused: the triton backend refuses it: no room."),
        ("best", "timed", ""),
    ]
    assert report.best.median_ms == 2.0
    # A process goes on after what it could answer: one for the start, one after each death.
    pids = [line["pid"] for line in fates.tried[:10]]
    assert [len(set(pids[: n + 1])) for n in range(10)] == [1, 1, 1, 2, 3, 4, 5, 5, 5, 5]
    assert not report.is_partial


def test_all_failing_is_one_error_that_counts_every_reason(fates: Fates) -> None:
    fates.are("wrong", "out of memory", "wrong", "refused")
    with pytest.raises(EveryCandidateFailed) as caught:
        fates.tune()
    text = re.sub(r"\d+(?= candidates| refused: Refused| pruned)", "N", str(caught.value))
    assert text == (
        "EveryCandidateFailed: none of the N candidates of block_topk(block=64, budget=0.25, "
        "sinks=1, locals=2) can be taken:\n"
        "    N refused: Refused: the triton backend refuses it: no room.\n"
        "    2 wrong: error inf > 1.0e-03 allowed\n"
        "    1 failed: RuntimeError: CUDA out of memory. Tried to allocate 20 GiB.\n"
        "  help: use backend='reference', which needs no kernel; `spcomp doctor` says what is "
        "installed here."
    )


def test_a_process_that_cannot_load_is_an_error_and_condemns_no_candidate(fates: Fates) -> None:
    fates.are("no load")
    with pytest.raises(EveryCandidateFailed) as caught:
        fates.tune()
    lines = str(caught.value).splitlines()
    assert re.sub(r"\d+", "N", lines[1]) == (
        "    N skipped: the measuring process could not be got ready: MemoryError: the sample does "
        "not fit"
    )
    assert fates.tried == []
    fates.are(3.0)
    assert fates.tune().best.median_ms == 3.0


def test_a_known_row_is_not_tried_again(fates: Fates) -> None:
    sample = {"sample": tensors(), "shape": None}
    fates.are(5.0, "wrong", 2.0, 9.0)
    first = fates.tune(**sample)
    fates.are(1.0)
    second = fates.tune(seed=3, **sample)
    assert fates.tried == []
    assert second.tunings == first.tunings
    assert second.remarks() == (
        "block_topk(block=64, budget=0.25, sinks=1, locals=2): from the record of "
        f"{first.tunings[0].created}",
    )
    third = fates.tune(fresh=True, **sample)
    assert len(fates.tried) > 10
    assert third.remarks() == ()


def test_a_budget_that_is_over_keeps_what_was_measured_and_the_next_call_goes_on(
    fates: Fates,
) -> None:
    fates.are("slow")
    report = fates.tune(budget_s=1.0)
    first = len(fates.tried)
    assert 0 < first < 10
    assert report.is_partial
    skipped = {row.reason for row in report.tunings[0].rows if row.status == "skipped"}
    assert skipped == {"the budget of 1 s was over"}
    assert report.remarks() == ("partial: not every candidate had its turn",)
    fates.are(7.0)
    whole = fates.tune()
    assert not whole.is_partial
    assert whole.best.median_ms == 5.0
    tried = {json.dumps(line["axes"]) for line in fates.tried}
    assert len(tried) == len(fates.tried) > first


def test_a_winner_within_the_noise_does_not_depend_on_the_seed(fates: Fates) -> None:
    winners = set()
    for seed in range(2):
        fates.are(5.0)
        winners.add(fates.tune(seed=seed, fresh=True).best.candidate)
    assert len(winners) == 1


# ---- stopped from outside ------------------------------------------------------------------------

SCRIPT = """
import json, signal, sys
from pathlib import Path
import pytest
from tests.tuning.fates import Fates

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a background job

def told(title, row, done, total):
    if row.status == "ok":
        print("row", flush=True)

report = Fates(Path(sys.argv[1]), pytest.MonkeyPatch()).tune(progress=told)
rows = report.tunings[0].rows
skipped = {row.reason for row in rows if row.status == "skipped"}
print(json.dumps([report.is_partial, report.best.median_ms, sorted(skipped)]))
"""


def started(folder: Path) -> subprocess.Popen[str]:
    """Start a tuning in a process of its own, whose temporary folders are below `folder`."""
    (folder / "tmp").mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and is not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_until_gone(pid: int, folder: Path) -> None:
    """Wait for a process to end and for its folder to go."""
    for _ in range(100):
        if not is_alive(pid) and not list(folder.glob("spcomp-*")):
            return
        time.sleep(0.1)
    raise AssertionError((is_alive(pid), list(folder.glob("spcomp-*"))))


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
def test_ctrl_c_keeps_what_was_measured(fates: Fates) -> None:
    fates.are("slow")
    process = started(fates.folder)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "row\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the whole group
    rest = process.stdout.read().splitlines()
    assert process.wait(60) == 0
    assert json.loads(rest[-1]) == [True, 5.0, ["stopped by the user"]]
    wait_until_gone(fates.tried[-1]["pid"], fates.folder / "tmp")


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
def test_a_killed_tuning_leaves_no_process_and_the_next_one_goes_on(fates: Fates) -> None:
    fates.are(5.0, 4.0, 5.0, "hang")
    process = started(fates.folder)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "row\n"
    while len(fates.tried) < 4:
        time.sleep(0.05)
    process.kill()
    process.wait()
    wait_until_gone(fates.tried[-1]["pid"], fates.folder / "tmp")
    done = [candidate_of(line) for line in fates.tried[:3]]
    fates.are(6.0)
    report = fates.tune()
    assert not set(done) & {candidate_of(line) for line in fates.tried}
    assert report.best.median_ms == 4.0
    assert not report.is_partial
