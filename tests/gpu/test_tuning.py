"""Tuning on a real card: timed in another process, the winner pinned, tensors untouched."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import spcomp as sp
from spcomp.autotune import measure
from spcomp.cli import main
from spcomp.errors import TuneInCapture
from spcomp.patterns import block_topk, quest, streaming_llm
from spcomp.settings import cache_dir
from spcomp.tuning import checking, trial, worker
from spcomp.tuning.trials import BY_MODEL, GRAPHED, RANDOM
from tests.gpu.card import DEVICE, tensors

pytestmark = pytest.mark.gpu

SHAPE = {"B": 1, "Hq": 8, "Hkv": 2, "Sq": 2048, "Skv": 2048, "D": 64, "Dv": 64}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path / "cache"))


def test_a_tuning_is_timed_and_its_winner_gives_the_same_result() -> None:
    q, k, v = tensors((1, 8, 2, 2048, 2048), 64, torch.bfloat16)
    report = sp.tune(block_topk, sample=(q, k, v), block=(64, 128), budget_s=40)
    assert len(report.tunings) == 2
    for tuning in report.tunings:
        assert tuning.call.device == torch.cuda.get_device_name()
        assert BY_MODEL not in tuning.notes
        assert GRAPHED in tuning.notes
        assert tuning.dense_ms is not None and tuning.dense_ms > 0
        assert tuning.kept is not None and tuning.kept.tokens == 2048
        default = next(row for row in tuning.rows if row.candidate.axes == ())
        right = [row for row in tuning.rows if row.status in ("best", "ok")]
        assert default in right
        assert len(right) > 3, [row.reason for row in tuning.rows]
        for row in right:
            assert row.rung == "timed"
            assert row.runs is not None and row.runs >= 10
            assert row.median_ms is not None and row.median_ms > 0
            assert row.error is not None and row.allowed is not None and row.error <= row.allowed
        best = tuning.best
        assert best is not None and best.median_ms is not None and default.median_ms is not None
        assert best.median_ms <= default.median_ms * 1.01
        bad = [row for row in tuning.rows if row.status in ("wrong", "timeout")]
        assert not bad, bad
    chosen = report.choose()
    want = sp.compile(chosen.pattern, backend="triton")(q, k, v)
    assert checking.error_between(report.compile()(q, k, v), want) < 0.05


def test_nothing_of_a_tuning_stays_but_its_record_and_nothing_changes(tmp_path: Path) -> None:
    q, k, v = tensors((1, 8, 2, 1024, 1024), 64, torch.float16, layout="swapped")
    copies, versions = [x.clone() for x in (q, k, v)], [x._version for x in (q, k, v)]
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        sp.tune(streaming_llm(recent=200), sample=(q, k, v), budget_s=12)
        assert torch.cuda.current_stream() == side
    assert [x._version for x in (q, k, v)] == versions
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, v), copies, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    assert torch.cuda.current_device() == 0
    files = [path for path in cache_dir().rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".jsonl", ".lock"}


def test_a_record_is_reused_for_the_same_sample_alone() -> None:
    options: dict[str, Any] = {"shape": SHAPE, "budget_s": 60, "orders": ("query_major",)}
    first = sp.tune(streaming_llm(recent=200), **options)
    assert first.remarks() == ()
    assert RANDOM in first.tunings[0].notes
    again = sp.tune(streaming_llm(recent=200), **options)
    assert "from the record of" in again.remarks()[0]
    assert again.tunings == first.tunings
    other = sp.tune(streaming_llm(recent=200), **{**options, "seed": 1, "budget_s": 2})
    assert "from the record of" not in " ".join(other.remarks())


def test_a_decode_is_tuned_in_a_graph() -> None:
    q, k, v = tensors((2, 8, 2, 1, 4096), 128, torch.bfloat16)
    report = sp.tune(quest(page=16, budget=512), sample=(q, k, v), budget_s=20)
    (tuning,) = report.tunings
    assert tuning.call.phase == "decode"
    assert GRAPHED in tuning.notes
    assert report.best.median_ms is not None
    assert report.best.median_ms < 1.0
    assert tuning.kept is not None and tuning.kept.tokens == 4096


def test_a_wrong_kernel_is_caught_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors((1, 8, 2, 1500, 1500), 64, torch.bfloat16)
    bench = trial.CardBench()
    bench.device, bench.backend, bench.is_timed = DEVICE, "triton", True
    bench.q, bench.k, bench.v, bench.pattern = q, k, v, block_topk(block=64)
    bench.standard, bench.default = None, None
    bench.ahead = trial.Ahead(bench.pattern, "triton", DEVICE, q, k, v)
    notes: list[str] = []
    assert bench._reference(notes) is not None
    assert notes == []
    request = {"order": None, "axes": []}
    assert bench.attempt(request)["status"] == "ok"
    honest = sp.Attention.__call__

    def spoilt(self: sp.Attention, q: Tensor, *rest: Any, **more: Any) -> Any:
        out = honest(self, q, *rest, **more)
        return out.roll(1, 2) if self.backend_name == "triton" else out

    monkeypatch.setattr(sp.Attention, "__call__", spoilt)
    assert bench.attempt(request)["status"] == "wrong"


def test_a_candidate_that_poisons_the_device_costs_its_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD_TRIAL", str(tmp_path))
    monkeypatch.setattr(worker, "TRIAL", "tests.tuning.poison_trial")
    q, k, v = tensors((1, 2, 1, 512, 512), 64, torch.bfloat16)
    report = sp.tune(streaming_llm(recent=100), sample=(q, k, v), budget_s=20)
    failed = [row.reason for row in report.tunings[0].rows if row.status == "failed"]
    assert len(failed) == 1, failed
    assert "CUDA error" in failed[0]
    right = [row for row in report.tunings[0].rows if row.status in ("best", "ok")]
    assert len(right) > 1
    assert all(row.rung == "timed" for row in right)
    torch.cuda.synchronize()
    assert bool(q.isfinite().all())


def test_tuning_inside_the_capture_of_a_graph_is_refused() -> None:
    q, k, v = tensors((1, 2, 1, 128, 128), 64, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q.add_(1)
        with pytest.raises(TuneInCapture) as caught:
            sp.tune(streaming_llm(), sample=(q, k, v))
    assert str(caught.value).startswith(
        "TuneInCapture: tune was called while a CUDA graph was being captured"
    )


def test_dense_attention_is_aligned_bottom_right() -> None:
    for rows, keys in ((512, 512), (1, 512), (200, 512)):
        q, k, v = tensors((1, 8, 2, rows, keys), 64, torch.bfloat16)
        got = measure.dense_attention(q, k, v)()
        assert isinstance(got, Tensor)
        want = sp.compile(_everything(), backend="reference")(q, k, v)
        assert checking.error_between(got, want) < 0.02


@sp.pattern
def _everything(q, k, v):  # type: ignore[no-untyped-def]
    """Dense causal attention."""
    return sp.attend(q, k, v)


def test_a_graph_replays_what_was_captured_and_what_cannot_be_is_none() -> None:
    x = torch.zeros(8, device=DEVICE)
    replay = measure.graphed(lambda: x.add_(1))
    assert replay is not None
    before = float(x[0])
    replay()
    torch.cuda.synchronize()
    assert float(x[0]) == before + 1
    assert measure.graphed(lambda: x.cpu()) is None
    assert float((x + 1)[0]) == before + 2


def test_the_commands_measure_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shape = ",".join(f"{name}={size}" for name, size in SHAPE.items())
    run = CliRunner()
    bench = run.invoke(main, ["bench", "block_topk", "--shape", shape, "--json"])
    assert bench.exit_code == 0, bench.output
    rows = json.loads(bench.stdout)
    assert {row["kind"] for row in rows} == {"measured"}
    assert all(row["ms"] > 0 and row["spread_ms"] >= 0 for row in rows)
    done = run.invoke(
        main, ["tune", "block_topk", "--shape", shape, "--set", "block=128", "--budget-s", "10"]
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].startswith("attention = sp.compile(block_topk(block=128")
    assert "timed" in done.stdout
    is_drawn = importlib.util.find_spec("plotly") is not None
    assert (tmp_path / "report/report.html").exists() == is_drawn
    assert is_drawn or "spcomp[report]" in done.stderr
