"""The pages of a tuning: every candidate with its reason, and nothing claimed that was not done."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from spcomp.autotune.record_text import Recorder
from spcomp.autotune.report import tuning_json, tuning_pages, tuning_tables
from spcomp.autotune.report.json_text import ReportUnreadable
from spcomp.cli import main
from tests.autotune.test_report import sample
from tests.autotune.tunings import measured, predicted
from tests.backends.triton.rendering import field_names, variables_of

ROOT = Path(__file__).resolve().parents[2]
LINE = (
    'attention = sp.compile(moba(block=512, rule="a<b|c"), axes={"attend_keys": {"block_k": 64, '
    '"block_m": 128, "stages": 3, "warps": 4}})'
)


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("tuning.html.jinja", tuning_pages.TuningHtmlContext),
        ("tuning.md.jinja", tuning_pages.TuningMarkdownContext),
    ],
)
def test_a_template_reads_exactly_the_fields_of_its_context(name: str, context: type) -> None:
    assert variables_of(f"report/{name}") == field_names(context)


def test_tunings_read_back_as_they_were() -> None:
    held = (measured(), predicted())
    assert tuning_json.from_json(tuning_json.to_json(held)) == held


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda d: d.update(schema=0), "its schema is 0"),
        (lambda d: d.update(kind="x"), "the document has no kind 'spcomp tuning report'"),
        (lambda d: d.update(tunings=[]), "report.tunings is empty"),
        (lambda d: d["tunings"][0].pop("seed"), "report.tunings[0].seed is missing"),
        (lambda d: d["tunings"][0].update(seed="1"), "report.tunings[0].seed is"),
    ],
)
def test_another_form_of_json_is_refused_with_its_place(edit: object, problem: str) -> None:
    document = json.loads(tuning_json.to_json((measured(),)))
    edit(document)  # type: ignore[operator]
    with pytest.raises(ReportUnreadable) as caught:
        tuning_json.from_json(json.dumps(document))
    assert problem in str(caught.value)


def test_every_candidate_stands_in_one_of_the_two_tables() -> None:
    tuning = measured()
    tried, untried = (tuning_tables.candidate_table(tuning, was_tried=x) for x in (True, False))
    shown = [row[9].text for row in (*tried.rows, *untried.rows)]
    assert shown == [
        "best", "ok", "ok", "wrong", "failed", "timeout", "refused", "pruned", "skipped"
    ]  # fmt: skip
    reasons = {row[9].text: row[10].text for row in (*tried.rows, *untried.rows)}
    assert reasons["wrong"] == "error 3.1e-02 > 4.0e-03 allowed"
    assert all(reasons[s] for s in ("wrong", "failed", "timeout", "refused", "pruned", "skipped"))


def test_ratios_compare_like_with_like() -> None:
    rows = tuning_tables.candidate_table(measured(), was_tried=True).rows
    best, default, other, wrong, *_ = rows
    assert [cell.text for cell in best[2:6]] == ["1.2500", "0.0100", "4.00×", "1.20×"]
    assert [cell.text for cell in default[4:6]] == ["3.33×", "1.00×"]
    assert other[5].text == "0.43×"
    assert [cell.text for cell in wrong[4:6]] == ["–", "–"], "what is wrong has no speed"
    ranked = tuning_tables.candidate_table(predicted(), was_tried=True).rows[0]
    assert (ranked[2].text, ranked[4].text, ranked[4].kind) == ("–", "2.00×", "predicted")


def test_the_pages_lead_with_the_winner_the_noise_and_what_is_missing(tmp_path: Path) -> None:
    words = {f.figure: f.words for f in tuning_pages.findings((measured(),))}
    assert "1.2500 ms" in words and "1.20×" in words
    assert words["+0.2500 ms"].endswith("where the noise is 0.0125 ms")
    assert "partial" in words and "not timed" not in words
    assert "not timed" in {f.figure for f in tuning_pages.findings((predicted(),))}
    assert tuning_pages.pinned((measured(),))[0].line == LINE


def test_html_and_markdown_hold_the_same_rows_and_keep_text_as_text(tmp_path: Path) -> None:
    html, _, markdown = tuning_pages.write_all((measured(), measured(64)), tmp_path)
    page, text = html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")
    assert "<b>in bold</b>" not in page and "a note &lt;b&gt;in bold" in page
    assert "rule=a<b" not in page.replace("rule=a&lt;b", "")
    for row in measured().rows:
        assert row.reason.replace(">", "&gt;") in page and row.reason in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in tables} == {2, 7, 11}
    assert 'axes={"attend_keys"' in text


def test_text_for_a_terminal_ends_with_the_line_to_paste() -> None:
    lines = tuning_tables.text((measured(),)).splitlines()
    assert lines[0] == "moba(block=512, rule=a<b|c), dense 5.0000 ms"
    assert lines[1].split()[:4] == ["best", "1.2500", "ms", "timed"]
    assert lines[-1] == f"  {LINE}"
    assert "  a note <b>in bold</b>" in lines


# ---- the command ---------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["report", *map(str, arguments)])
    return result.exit_code, result.stderr


def test_report_takes_a_record_and_both_kinds_of_json(tmp_path: Path) -> None:
    from spcomp.autotune.report import pages

    tuning = measured()
    with Recorder(tmp_path / "tuning", tuning.call) as recorder:
        for row in tuning.rows:
            recorder.row(row)
        recorder.session(seed=7, elapsed_s=61.5, is_partial=True)
    tuned = tuning_pages.write_all((tuning,), tmp_path / "tuned")[1]
    demo = pages.write_all(sample(), tmp_path / "demo")[1]
    for number, path in enumerate((recorder.path, tuned, demo)):
        status, said = run(path, "-o", tmp_path / str(number))
        assert status == 0, said
        names = ("report.html", "report.json", "report.md")
        assert all((tmp_path / str(number) / name).stat().st_size > 500 for name in names)
    assert (tmp_path / "1" / "report.json").read_text() == tuned.read_text()


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("x.json", "{", "NotAReport: {path} is not a report of spcomp: it is no JSON."),
        ("x.json", "[]", "NotAReport: {path} is not a report of spcomp: its kind is None."),
        (
            "x.json",
            '{"kind": "y"}',
            "NotAReport: {path} is not a report of spcomp: its kind is 'y'.",
        ),
        ("x.jsonl", '{"kind": "y"}\n', "TuningUnreadable: "),
        ("x.jsonl", "", "TuningUnreadable: "),
    ],
)
def test_report_refuses_other_files_by_name(
    tmp_path: Path, name: str, text: str, problem: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    status, said = run(path, "-o", tmp_path / "out")
    assert status == 1
    assert said.startswith(problem.format(path=path)), said
    assert not (tmp_path / "out").exists()


def test_the_command_line_needs_no_plotly_and_a_report_says_so(tmp_path: Path) -> None:
    """plotly is an extra: a machine with a card often has none."""
    import subprocess
    import sys

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
