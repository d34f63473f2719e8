"""The process from outside: how long it may take, what it inherits, how it is replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spcomp.tuning import worker
from spcomp.tuning.worker import Died, NotStarted, Worker

STARTS = """
import json, os, sys
from pathlib import Path
for line in sys.stdin:
    request = json.loads(line)
    {body}
"""
ANSWER = 'print(json.dumps({"status": "ok", "is_broken": False, **extra}), flush=True)'


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give a worker whose process runs a few lines for each request."""
    monkeypatch.syspath_prepend(str(tmp_path))
    workers: list[Worker] = []

    def make(name: str, body: str, **options: Any) -> Worker:
        (tmp_path / f"{name}.py").write_text(STARTS.replace("{body}", body))
        workers.append(Worker({}, module=name, **options))
        return workers[-1]

    yield make
    for one in workers:
        one.close()
        assert not one.folder.exists()


def test_a_process_has_the_parents_path_and_a_cache_of_its_own(made: Any) -> None:
    extra = 'extra = {"path": sys.path, "env": dict(os.environ)}'
    one = made("inherits", f"{extra}\n    {ANSWER}")
    answer = one.attempt({})
    assert one.starts == 1
    environment = answer["env"]
    assert environment["SPCOMP_CACHE_DIR"] == str(one.folder / "kernels")
    assert environment["TRITON_CACHE_DIR"] == str(one.folder / "triton")
    same = {k: v for k, v in os.environ.items() if k not in environment or environment[k] != v}
    assert set(same) <= {"SPCOMP_CACHE_DIR", "TRITON_CACHE_DIR", "SPCOMP_CACHE_READ_ONLY"}
    assert str(worker.LEAST_TRY_S) == "30.0"


def test_the_limit_of_a_candidate_follows_from_the_first_one(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LEAST_TRY_S", 0.5)
    monkeypatch.setattr(worker, "SLOWER", 1.0)
    sleeps = (
        'import time; time.sleep(request.get("s", 0)); extra = {"pid": os.getpid()}'
        f"\n    {ANSWER}"
    )
    one = made("sleeps", sleeps)
    first = one.attempt({"s": 2.0})["pid"]
    assert one.attempt({"s": 0.6})["pid"] == first
    with pytest.raises(Died, match=r"^no answer within 2\.\d+ s$") as caught:
        one.attempt({"s": 30.0})
    assert caught.value.is_timeout
    assert one.attempt({})["pid"] != first
    assert one.starts == 2


def test_an_answer_that_is_none_costs_the_process(made: Any) -> None:
    one = made("babbles", 'print("hello" if request["op"] == "try" else "{}")')
    with pytest.raises(Died, match=r"^the process answered '{}'$"):
        one.start()
    one = made(
        "babbles_later",
        f'extra = {{}}\n    if request["op"] == "try": print("hello")\n    {ANSWER}',
    )
    with pytest.raises(Died, match=r"^the process answered 'hello'$") as caught:
        one.attempt({})
    assert not caught.value.is_timeout


def test_a_device_that_breaks_before_the_first_candidate_is_said_so(made: Any) -> None:
    body = 'print(json.dumps({"notes": ["a note"], "is_broken": True}), flush=True)'
    with pytest.raises(NotStarted) as caught:
        made("breaks", body).attempt({})
    assert str(caught.value) == "the device broke while the sample was got ready; a note"


def test_a_process_that_ends_at_once_says_its_last_line(made: Any) -> None:
    one = made("ends", 'sys.exit("no driver here")')
    with pytest.raises(Died) as caught:
        one.start()
    assert str(caught.value) == "the process ended with exit status 1: no driver here"


def test_a_later_process_is_told_what_came_out_right(made: Any) -> None:
    body = (
        'extra = {"load": request} if request["op"] == "load" else {}\n'
        '    if request.get("die"): sys.exit(3)\n    ' + ANSWER
    )
    one = made("remembers", body)
    assert one.start()["load"]["baseline"] is None
    one.attempt({"order": None, "axes": [["attend", [["warps", 4]]]]})
    one.attempt({"order": "gather", "axes": []})
    with pytest.raises(Died):
        one.attempt({"die": True})
    again = one.start()["load"]
    assert json.dumps(again["baseline"]) == (
        '{"order": null, "axes": [["attend", [["warps", 4]]]]}'
    )
