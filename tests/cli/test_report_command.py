"""`spcomp report`: three kinds of file become pages, and any other is refused by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spcomp.autotune.record import Tuning
from spcomp.autotune.record_text import Recorder
from spcomp.autotune.report import json_text, tuning_json
from spcomp.cli import main
from tests.autotune.test_report import sample
from tests.autotune.tunings import measured

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("report.html", "report.json", "report.md")


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert result.stdout == "", "the answer is files"
    return result.exit_code, result.stderr


def recorded(folder: Path, tuning: Tuning) -> Path:
    with Recorder(folder, tuning.call) as recorder:
        for row in tuning.rows:
            recorder.row(row)
        for note in tuning.notes:
            recorder.note(note)
        if tuning.kept is not None and tuning.dense_ms is not None:
            recorder.kept(tuning.kept)
            recorder.dense(tuning.dense_ms, tuning.dense_by)
        recorder.session(
            seed=tuning.seed,
            elapsed_s=tuning.elapsed_s,
            is_partial=tuning.is_partial,
            created=tuning.created,
        )
    return recorder.path


def written(folder: Path, path: Path) -> str:
    status, said = run(path, "-o", folder)
    assert (status, said) == (0, f"wrote {', '.join(str(folder / name) for name in NAMES)}\n")
    assert all((folder / name).stat().st_size > 500 for name in NAMES)
    return (folder / "report.json").read_text(encoding="utf-8")


def test_a_record_and_both_kinds_of_json_become_pages_with_all_they_hold(tmp_path: Path) -> None:
    record = recorded(tmp_path / "tuning", measured())
    text = written(tmp_path / "from record", record)
    (read,) = tuning_json.from_json(text)
    assert read == replace(measured(), rows=read.rows)
    assert set(read.rows) == set(measured().rows)
    assert written(tmp_path / "again", tmp_path / "from record" / "report.json") == text
    demo = tmp_path / "demo.json"
    demo.write_text(json_text.to_json(sample()), encoding="utf-8")
    assert json_text.from_json(written(tmp_path / "demo", demo)) == sample()


def test_a_record_is_known_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    record = recorded(tmp_path, measured())
    other = record.rename(tmp_path / "record.txt")
    (read,) = tuning_json.from_json(written(tmp_path / "out", other))
    assert len(read.rows) == len(measured().rows)


def test_a_record_that_was_only_begun_is_a_page_without_a_winner(tmp_path: Path) -> None:
    with Recorder(tmp_path, measured().call) as recorder:
        pass
    written(tmp_path / "out", recorder.path)
    assert "No winner" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_a_cut_record_gives_the_rows_that_are_whole_and_says_which_line_is_not(
    tmp_path: Path,
) -> None:
    record = recorded(tmp_path, measured())
    lines = record.read_text(encoding="utf-8").splitlines(keepends=True)
    record.write_text("".join([*lines[:4], lines[4][:40]]), encoding="utf-8")
    status, said = run(record, "-o", tmp_path / "out")
    assert (status, said.splitlines()[0]) == (
        0,
        f"spcomp: the last line of {record} is cut; it is left out.",
    )
    (read,) = tuning_json.from_json((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert len(read.rows) == 3
    assert read.is_partial


def tuned(edit: Callable[[Any], None]) -> str:
    document = json.loads(tuning_json.to_json((measured(),)))
    edit(document)
    return json.dumps(document)


def demo(edit: Callable[[Any], None]) -> str:
    document = json.loads(json_text.to_json(sample()))
    edit(document)
    return json.dumps(document)


HEADER = '{"kind": "spcomp tuning", "schema": 1, "call": {}}\n'
NO_REPORT = "NotAReport: {path} is not a report of spcomp: %s.\n"
MAKE_ONE = "  help: write one with `spcomp tune` or `make demo`.\n"
UNREADABLE = "ReportUnreadable: {path} cannot be read: %s.\n"
ANEW = "  help: this version reads schema 1; make the report anew with `%s`.\n"
NO_TUNING = "TuningUnreadable: the tuning {path} cannot be read: %s.\n"
AWAY = "  help: this version reads schema 1; move the file away and tune again.\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "x.json",
            "no JSON",
            NO_REPORT % "it is no JSON (Expecting value: line 1 column 1 (char 0))" + MAKE_ONE,
        ),
        (
            "x.json",
            tuned(lambda d: None)[:60],
            NO_REPORT
            % "it is no JSON (Unterminated string starting at: line 1 column 60 (char 59))"
            + MAKE_ONE,
        ),
        ("x.json", "[" * 100_000, NO_REPORT % "it is no JSON (it is nested too deeply)" + MAKE_ONE),
        ("x.json", "[]", NO_REPORT % "it names no kind" + MAKE_ONE),
        ("x.json", '{"kind": 3}', NO_REPORT % "it names no kind" + MAKE_ONE),
        ("x.json", '{"kind": "y"}', NO_REPORT % "its kind is 'y'" + MAKE_ONE),
        (
            "x.json",
            tuned(lambda d: d.update(schema=9)),
            UNREADABLE % "its schema is 9" + ANEW % "spcomp tune",
        ),
        (
            "x.json",
            tuned(lambda d: d["tunings"][0].pop("call")),
            UNREADABLE % "report.tunings[0].call is missing" + ANEW % "spcomp tune",
        ),
        (
            "x.json",
            demo(lambda d: d.update(schema=9)),
            UNREADABLE % "its schema is 9" + ANEW % "make demo",
        ),
        ("x.jsonl", "", NO_TUNING % "line 1 is cut" + AWAY),
        ("x.jsonl", HEADER[:30], NO_TUNING % "line 1 is cut" + AWAY),
        ("x.jsonl", '{"kind": "y"}\n', NO_TUNING % "line 1 has no kind 'spcomp tuning'" + AWAY),
        ("x.jsonl", HEADER.replace("1", "9"), NO_TUNING % "its schema is 9" + AWAY),
        ("x.txt", HEADER, NO_TUNING % "line 1.call.pattern is missing" + AWAY),
    ],
    ids=[
        "no JSON",
        "cut",
        "deep",
        "a list",
        "a kind that is no text",
        "another kind",
        "another schema",
        "a field too few",
        "another schema of the demo",
        "an empty record",
        "a record cut in its first line",
        "a record of another kind",
        "a record of another schema",
        "a record without its call",
    ],
)
def test_another_file_is_refused_by_its_name(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert run(path, "-o", tmp_path / "out") == (1, said.format(path=path))
    assert not (tmp_path / "out").exists()


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(bytes(range(256)))
    status, said = run(path)
    assert status == 1
    assert said.startswith(f"NotAReport: {path} is not a report of spcomp: it is no JSON (")


def test_a_file_or_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    status, said = run(tmp_path / "nothing.json")
    assert (status, said.splitlines()[-1]) == (
        2,
        f"Error: Invalid value for 'PATH': File '{tmp_path}/nothing.json' does not exist.",
    )
    path = tmp_path / "report.json"
    path.write_text(tuned(lambda d: None), encoding="utf-8")
    status, said = run(path, "-o", path / "out")
    assert (status, said.splitlines()[-1]) == (
        2,
        f"Error: Invalid value for -o: cannot write into {path}/out: Not a directory.",
    )


def test_the_command_line_needs_no_plotly_and_a_report_says_so(tmp_path: Path) -> None:
    """plotly is an extra: a machine with a card often has none."""
    (tmp_path / "plotly.py").write_text("raise ImportError(name='plotly')")
    (tmp_path / "x.json").write_text("{}")
    command = [sys.executable, "-m", "spcomp", "report", "x.json"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "MissingPackage: a report needs the package 'plotly', which is not installed.\n"
        "  help: pip install 'spcomp[report]'.\n"
    )
