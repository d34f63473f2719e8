"""The measuring process on real plans in Triton's interpreter: right candidates pass, wrong ones
are caught whatever part of the result is wrong, and nothing stays behind."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp import api
from spcomp.ir.text import print_program
from spcomp.patterns import block_topk, moba
from spcomp.settings import cache_dir
from spcomp.tuning import checking, sample, trial
from spcomp.tuning.trials import BY_MODEL, RANDOM
from tests.tuning.fates import SHAPE, tensors

DEFAULT = {"op": "try", "order": None, "axes": []}
SMALL = {"op": "try", "order": None, "axes": [["pool", [["stages", 1], ["token_tile", 64]]]]}


def loaded(
    folder: Path, pattern: sp.Pattern, qkv: tuple[Tensor, ...] | None = None, **request: Any
) -> tuple[trial.CardBench, dict[str, Any]]:
    """Give a bench that holds a pattern and a sample, and its answer."""
    sample.save(folder / "sample", dict(zip("qkv", qkv or (), strict=False)))
    sample.save(folder / "tables", pattern.tensors)
    bench = trial.CardBench()
    answer = bench.load(
        {
            "folder": str(folder),
            "pattern": print_program(pattern.program, comments=False),
            "backend": "triton",
            "device": "cpu",
            "shape": SHAPE,
            "dtype": "float32",
            "seed": 0,
            "baseline": None,
            "ahead": [],
            **request,
        }
    )
    return bench, answer


def broken(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], None], *, rows: Callable[[int], bool]
) -> None:
    """Spoil what Triton kernels give for calls of some numbers of query rows."""
    honest = api.Attention.__call__

    def spoilt(self: api.Attention, q: Tensor, *rest: Any, **more: Any) -> Any:
        out = honest(self, q, *rest, **more)
        if self.backend_name == "triton" and rows(q.shape[2]):
            spoil(out)
        return out

    monkeypatch.setattr(api.Attention, "__call__", spoilt)


def test_a_right_candidate_is_matched_and_not_timed_without_a_card(tmp_path: Path) -> None:
    bench, answer = loaded(tmp_path, block_topk(block=64), tensors())
    assert answer["notes"] == []
    assert answer["dense_ms"] is None
    assert answer["kept"]["tokens"] == 200
    for request in (DEFAULT, SMALL):
        row = bench.attempt(request)
        assert (row["status"], row["rung"]) == ("ok", "matched")
        assert 0 <= row["error"] <= row["allowed"] < 1e-4
        assert "median_ms" not in row


@pytest.mark.parametrize("value", [float("nan"), 7.0])
def test_a_wrong_result_is_caught_by_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    bench, _ = loaded(tmp_path, block_topk(block=64), tensors())
    broken(monkeypatch, lambda out: out[:, 1, 100:].fill_(value), rows=lambda n: True)
    row = bench.attempt(DEFAULT)
    assert (row["status"], row["rung"]) == ("wrong", "compiled")
    assert row["reason"].startswith("error ")
    assert row["reason"].endswith(f" > {row['allowed']:.1e} allowed")


def test_what_is_wrong_only_beyond_the_part_is_caught_by_the_default_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "CHECKED_ROWS", 33)
    bench, _ = loaded(tmp_path, block_topk(block=64), tensors())
    assert bench.attempt(DEFAULT)["status"] == "ok"
    broken(monkeypatch, lambda out: out[:, :, 100:].add_(0.1), rows=lambda n: n == 130)
    row = bench.attempt(SMALL)
    assert row["status"] == "wrong"
    assert row["error"] == pytest.approx(0.1, rel=0.01)


def test_a_later_process_compares_with_what_an_earlier_one_found_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "CHECKED_ROWS", 33)
    bench, _ = loaded(tmp_path, block_topk(block=64), tensors(), baseline=DEFAULT)
    broken(monkeypatch, lambda out: out[:, :, 100:].add_(0.1), rows=lambda n: n == 130)
    assert bench.attempt(SMALL)["status"] == "wrong"


def test_without_a_reference_the_default_schedule_is_the_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask of fixed lengths cannot be cut, and here the reference would be too large."""
    monkeypatch.setattr(checking, "CHECKED_ROWS", 33)

    @sp.pattern
    def given(q, k, v):  # type: ignore[no-untyped-def]
        mask = sp.block_mask(torch.ones(1, 1, 3, 4, dtype=torch.bool), block=64)
        return sp.attend(q, k, v, mask=mask & sp.causal())

    bench, answer = loaded(tmp_path, given(), tensors())
    assert answer["notes"][0].startswith("checked against the default schedule alone (MaskOf")
    assert bench.attempt(DEFAULT)["status"] == "ok"
    broken(monkeypatch, lambda out: out[:, :, 100:].add_(0.1), rows=lambda n: True)
    assert bench.attempt({**DEFAULT, "axes": [["tiles", [["warps", 1]]]]})["status"] == "wrong"


def test_what_is_tuned_is_the_pattern_on_the_sample(tmp_path: Path) -> None:
    """B60: five percent of density and one query that all others agree with; no made-up mask."""
    q, k, v = tensors(700, 700)
    k[:, :, 300] = 30 * q[:, :1, -1]
    table = torch.arange(700) // 35

    @sp.pattern
    def documents(q, k, v):  # type: ignore[no-untyped-def]
        rule = sp.mask_mod(lambda b, h, q_idx, kv_idx: table[q_idx] == table[kv_idx])
        return sp.attend(q, sp.gather(k, rule), sp.gather(v, rule))

    bench, answer = loaded(tmp_path, documents(), (q, k, v))
    assert all(
        torch.equal(x, y) for x, y in zip((bench.q, bench.k, bench.v), (q, k, v), strict=True)
    )
    assert torch.equal(next(iter(bench.pattern.tensors.values())), table)
    assert answer["kept"]["density"] == pytest.approx(36 / 701, rel=1e-3)


def test_requests_are_answered_in_turn_and_errors_are_answers() -> None:
    class Bench:
        def load(self, request: Any) -> dict[str, Any]:
            return {"got": request["n"]}

        def attempt(self, request: Any) -> dict[str, Any]:
            raise ZeroDivisionError("first line\nsecond line")

        def is_broken(self) -> bool:
            return False

    answers = io.StringIO()
    lines = iter(['{"op": "load", "n": 5}\n', '{"op": "try"}\n'])
    trial.serve(Bench(), lines, answers)
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [
        {"got": 5, "is_broken": False},
        {
            "status": "failed",
            "rung": "emitted",
            "reason": "ZeroDivisionError: first line",
            "is_broken": False,
        },
    ]


def test_a_tuning_in_the_interpreter_leaves_one_small_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B53: no kernel of a candidate, no temporary folder; the record is all."""
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    shape = {**SHAPE, "Sq": 70, "Skv": 100}
    report = sp.tune(moba(block=64, k_blocks=1), shape=shape, backend="triton", budget_s=6.0)
    (tuning,) = report.tunings
    assert tuning.call.device == "cpu"
    assert tuning.call.target == "interpreter"
    assert report.best.rung == "matched"
    assert report.best.median_ms is None
    assert tuning.kept is not None
    assert set(tuning.notes) == {BY_MODEL, RANDOM}
    assert list((tmp_path / "temporary").glob("spcomp-*")) == []
    files = [path for path in cache_dir().rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".jsonl", ".lock"}
    assert sum(path.stat().st_size for path in files) < 500_000
    q, k, v = sample.random_sample(shape, "float32", "cpu", 1)
    want = sp.compile(moba(block=64, k_blocks=1), backend="reference")(q, k, v)
    assert checking.error_between(report.compile()(q, k, v), want) < 1e-5
