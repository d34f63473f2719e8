"""`spcomp tune` and `spcomp bench` without a card: tables, the line to paste, JSON, refusals."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import spcomp as sp
from spcomp.autotune import report
from spcomp.autotune.report import tuning_json
from spcomp.cli import main
from spcomp.patterns import block_topk
from tests.tuning.fates import Fates

SMALL = ("--shape", "Hq=8,Hkv=2,S=8192,D=64")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args, catch_exceptions=False)


def tune(*args: str) -> Result:
    return run("tune", *args)


def test_tune_prints_a_table_a_line_to_paste_and_where_the_report_is(tmp_path: Path) -> None:
    done = tune("block_topk", "--set", "block=64,128", *SMALL)
    assert done.exit_code == 0
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    titles = [line for line in lines if line.startswith("block_topk(")]
    assert [re.sub(r"[\d.]+ ms", "N ms", title) for title in titles] == [
        f"block_topk(block={n}, budget=0.25, sinks=1, locals=2)  prefill, dense N ms"
        for n in (128, 64)
    ]
    header = lines[1].split()
    assert header == ["schedule", "order", "median", "ms", "spread", "predicted", "vs", "dense",
                      "rung", "status"]  # fmt: skip
    first = lines[2].split()
    assert first[-2:] == ["emitted", "best"]
    assert sum(line.endswith(" ok") or line.endswith(" best") for line in lines) == 20
    assert lines.count("  ranked by the cost model, not timed") == 2
    pasted: dict[str, Any] = {"sp": sp, "block_topk": block_topk}
    exec(lines[-1], pasted)
    assert isinstance(pasted["attention"], sp.Attention)
    paths = [f"report/report.{end}" for end in ("html", "json", "md")]
    assert done.stderr == f"wrote {', '.join(paths)}\n"
    assert all((tmp_path / path).stat().st_size > 1000 for path in paths)


def test_tune_says_what_it_does_not_print_and_prints_it_when_asked() -> None:
    short = tune("streaming_llm", *SMALL).stdout
    found = re.search(r"  and (.*): --all prints them, and the report holds them with", short)
    assert found is not None
    whole = tune("streaming_llm", *SMALL, "--all").stdout
    assert "--all" not in whole
    for part in found[1].split(", "):
        count, status = part.split()
        shown = 10 if status == "ok" else 0
        words = [re.search(rf" {status}(:|$)", line.rstrip()) for line in whole.splitlines()]
        assert 0 <= sum(map(bool, words)) - int(count) <= shown, status


def test_tune_knows_what_it_found_before() -> None:
    tune("moba", *SMALL)
    again = tune("moba", *SMALL).stdout
    assert "\nmoba(block=512, k_blocks=8): from the record of 20" in again
    fresh = tune("moba", *SMALL, "--fresh").stdout
    assert "from the record of" not in fresh


def test_tune_prints_json_that_reads_back(tmp_path: Path) -> None:
    done = tune("block_topk", "--set", "block=64,256", *SMALL, "--json", "-o", "elsewhere")
    tunings = tuning_json.from_json(done.stdout)
    assert [one.call.pattern.partition(",")[0] for one in tunings] == [
        "block_topk(block=64",
        "block_topk(block=256",
    ]
    assert (tmp_path / "elsewhere/report.json").read_text() == done.stdout


def test_tune_does_without_plotly_but_for_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "plotly"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("tuning_pages", "tuning_plots", "plots", "pages"):
        monkeypatch.delitem(sys.modules, f"spcomp.autotune.report.{name}", raising=False)
        monkeypatch.delattr(report, name, raising=False)
    done = tune("streaming_llm", *SMALL)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1].startswith("attention = sp.compile(")
    assert done.stderr == (
        "MissingPackage: a report needs the package 'plotly', which is not installed.\n"
        "  help: pip install 'spcomp[report]'.\n"
    )


def test_tune_shows_what_did_not_come_out_right(
    fates: Fates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command names no backend, so the card is put in here."""
    fates.are(4.0, "wrong", "out of memory", 2.0, 3.0)
    whole = sp.tuning.tune
    monkeypatch.setattr(sp.tuning, "tune", lambda p, **o: whole(p, backend="triton", **o))
    done = tune("streaming_llm", "--shape", "S=130,D=16", "--dtype", "fp32")
    assert done.exit_code == 0
    rows = [line.rstrip() for line in done.stdout.splitlines()]
    ends = ("wrong: error inf > 1.0e-03 allowed",
            "failed: RuntimeError: CUDA out of memory. Tried to allocate 20 GiB.")  # fmt: skip
    assert all(any(line.endswith(end) for line in rows) for end in ends)
    best = next(line for line in rows if line.endswith(" best"))
    assert " 2.0000 " in best
    assert "timed" in best


def test_tune_says_that_ascend_has_nothing_to_choose() -> None:
    done = tune("moba", "--target", "ascend910b", *SMALL)
    assert done.exit_code == 0
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines[2].startswith("default   chosen")
    assert lines[2].endswith("emitted  best")
    assert lines[-4:-2] == [
        "  ranked by the cost model, not timed",
        "  it has one schedule alone, so there was nothing to choose",
    ]


# ---- bench ---------------------------------------------------------------------------------------


def test_bench_without_a_card_predicts_and_says_so() -> None:
    done = run("bench", "moba", *SMALL)
    assert done.exit_code == 0
    assert done.stderr == "no card here: predicted by the cost model for sm90\n"
    ours, dense = (line.rstrip() for line in done.stdout.splitlines()[1:])
    assert re.fullmatch(r"moba\(block=512, k_blocks=8\)( +[\d.]+| +-| +predicted| +[\d.]+x)+", ours)
    assert re.fullmatch(r"dense( +[\d.]+| +-| +predicted| +1\.00x)+", dense)


def test_bench_takes_axes_and_gives_json() -> None:
    rows = [
        json.loads(run("bench", "streaming_llm", *SMALL, "--json", *more).stdout)
        for more in ((), ("--axis", "attend_ws.block_q=64"), ("--target", "sm80"))
    ]
    assert [row["name"] for row in rows[0]] == ["streaming_llm(sinks=4, recent=2044)", "dense"]
    assert {row["kind"] for row in rows[0]} == {"predicted"}
    assert rows[0] != rows[1]
    assert rows[0] != rows[2]
    ours, dense = rows[0]
    assert ours["vs_dense"] == pytest.approx(dense["ms"] / ours["ms"])
    for row in rows[0]:
        assert row["spread_ms"] is None
        assert max(row["compute_floor_ms"], row["bytes_floor_ms"]) <= row["ms"] * 1.001


# ---- refusals ------------------------------------------------------------------------------------

REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("moba",), "Error: Missing option '--shape'.\n"),
    (
        ("moba", "--shape", "S=128", "--budget-s", "0"),
        "Error: Invalid value for '--budget-s': 0.0 is not in the range x>0.\n",
    ),
    (
        ("moba", "--shape", "S=128", "--set", "block"),
        "Error: Invalid value for '--set': 'block' is not of the form name=value or "
        "name=value,value.\n",
    ),
    (
        ("moba", "--shape", "S=128", "--set", "block=64,[1]"),
        "Error: Invalid value for '--set': '[1]' is not a number, a word, True, False or None.\n",
    ),
    (
        ("mobba", "--shape", "S=128"),
        "UnknownPattern: there is no pattern 'mobba'.\n  help: did you mean 'moba'? choose one of "
        "block_topk, flexprefill, infllm_v2, minference, moba, nsa, quest, spargeattn, "
        "streaming_llm, xattention; or name a function: ./mine.py:my_pattern.\n",
    ),
    (
        ("moba", "--shape", "S=128", "--target", "sm70"),
        "UnknownTarget: there is no target 'sm70'.\n"
        "  help: choose one of torch, sm80, sm90, sm100, gfx942, interpreter, ascend910b.\n",
    ),
]


@pytest.mark.parametrize(("args", "text"), REFUSED)
def test_tune_refuses_what_it_cannot_read(args: tuple[str, ...], text: str) -> None:
    done = tune(*args)
    usage, error, problem = done.stderr.rpartition("Error: ")  # click's words before it vary
    assert (error + problem if usage.startswith("Usage: ") else done.stderr) == text
    assert done.exit_code == 2
    assert done.stdout == ""


def test_an_unknown_hyper_parameter_names_the_signature() -> None:
    done = tune("moba", "--shape", "S=128", "--set", "blok=64,128")
    assert done.exit_code == 2
    first, place, way_out = done.stderr.splitlines()
    assert first == (
        "WrongArguments: the pattern 'moba' was called wrongly: got an unexpected keyword argument "
        "'blok'."
    )
    assert place.startswith("  --> ")
    assert way_out == "  help: its signature is moba(q, k, v, *, block=512, k_blocks=8)."


def test_all_candidates_failing_is_an_error_of_the_command() -> None:
    done = tune("quest", "--shape", "S=128,D=512", "--dtype", "bf16")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("EveryCandidateFailed: none of the ")
    assert " refused: its tiles hold at most 256\n" in done.stderr
    assert "Traceback" not in done.stderr
