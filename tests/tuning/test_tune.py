"""`sp.tune` without a card: what is ranked, recorded, reused, refused, and left untouched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import spcomp as sp
from spcomp.autotune import record_text
from spcomp.autotune.record import TunedCall
from spcomp.errors import (
    CacheNotWritable,
    DtypeMix,
    DtypeUnsupported,
    HeadsDoNotDivide,
    MaskOfOtherLength,
    NothingToTune,
    SpcompError,
    StrideTooLarge,
    TuneInCapture,
    UnknownChoice,
    UnknownTarget,
)
from spcomp.patterns import block_topk, moba, streaming_llm
from spcomp.tuning.trials import BY_MODEL
from tests.tuning.fates import SHAPE, tensors

LONG = {"B": 1, "Hq": 32, "Hkv": 8, "Sq": 32768, "Skv": 32768, "D": 128, "Dv": 128}


def tune(pattern: Any, folder: Path, **options: Any) -> sp.TuningReport:
    return sp.tune(pattern, folder=folder, **({"shape": SHAPE} | options))


# ---- what comes out ------------------------------------------------------------------------------


def test_without_a_card_the_cost_model_ranks_and_everything_says_so(tmp_path: Path) -> None:
    report = tune(streaming_llm(), tmp_path, shape=LONG)
    (tuning,) = report.tunings
    assert tuning.call.device == "none"
    assert tuning.notes == (BY_MODEL,) == ("ranked by the cost model, not timed",)
    assert {row.rung for row in tuning.rows} == {"emitted"}
    assert all(row.median_ms is None for row in tuning.rows)
    assert tuning.dense_by == "the roofline of NVIDIA H100 (sm90)"
    assert BY_MODEL in str(report)
    assert str(report).count("sp.compile(streaming_llm(sinks=4, recent=2044)") == 1
    assert report.best.status == "best"


def test_each_meaning_is_its_own_tuning_and_the_fastest_is_taken(tmp_path: Path) -> None:
    report = tune(block_topk, tmp_path, shape=LONG)
    assert [one.call.pattern.partition(",")[0] for one in report.tunings] == [
        "block_topk(block=128",
        "block_topk(block=64",
        "block_topk(block=256",
    ]
    times = [tuning.best.predicted_ms for tuning in report.tunings if tuning.best is not None]
    assert report.best.predicted_ms == min(t for t in times if t is not None)
    assert len(list(tmp_path.glob("*.jsonl"))) == 3


def test_the_line_and_the_callable_are_the_winner(tmp_path: Path) -> None:
    report = tune(block_topk, tmp_path, shape=LONG, target="sm80")
    chosen = report.choose()
    pasted: dict[str, Any] = {"sp": sp, "block_topk": block_topk}
    exec(report.line(), pasted)
    attention, pinned = report.compile(), pasted["attention"]
    assert attention.pattern == pinned.pattern == chosen.pattern
    assert attention.order == pinned.order == chosen.best.candidate.order
    axes = {kernel: dict(values) for kernel, values in chosen.best.candidate.axes}
    assert (attention.axes or {}) == (pinned.axes or {}) == axes
    q, k, v = tensors()
    assert torch.equal(attention(q, k, v), sp.compile(chosen.pattern)(q, k, v))


def test_a_sample_on_the_cpu_tells_what_each_meaning_keeps(tmp_path: Path) -> None:
    q, k, v = tensors(700, 700)
    report = tune(block_topk, tmp_path, sample=(q, k, v), shape=None, block=(64, 128))
    kept = [tuning.kept for tuning in report.tunings]
    for one in kept:
        assert one is not None
        assert one.tokens == 700
        assert 0.25 < one.density < one.mass_mean <= 1
    masses = {one.mass or 0.0: one for one in report.tuned}
    chosen = report.choose(least_mass=max(masses))
    assert chosen is masses[max(masses)]
    with pytest.raises(NothingToTune) as caught:
        report.choose(least_mass=0.999)
    assert str(caught.value) == (
        "NothingToTune: block_topk cannot be tuned: no meaning keeps 0.999 of attention (the most "
        f"is {max(masses):.3f}).\n"
        "  help: ask for less, or tune with other hyper-parameters and a sample."
    )


def test_random_tensors_say_nothing_of_what_is_kept(tmp_path: Path) -> None:
    report = tune(streaming_llm(), tmp_path)
    assert report.tunings[0].kept is None
    with pytest.raises(NothingToTune, match=r"keeps 0\.500 of attention \(it was not measured\)"):
        report.choose(least_mass=0.5)


def test_a_decode_is_tuned_as_one(tmp_path: Path) -> None:
    report = tune(moba(), tmp_path, shape={**SHAPE, "Sq": 16})
    assert report.tunings[0].call.phase == "decode"
    assert {row.candidate.order for row in report.tunings[0].rows} == {None}


# ---- records -------------------------------------------------------------------------------------


def calls(folder: Path) -> list[TunedCall]:
    return [record_text.read(path).call for path in sorted(folder.glob("*.jsonl"))]


def test_every_call_has_a_record_of_its_own_and_none_serves_another(tmp_path: Path) -> None:
    """B54: lengths, head counts, dtypes, head dimensions, meanings, targets, samples and tables."""
    table = torch.arange(400)

    @sp.pattern
    def by_table(q, k, v, *, names):  # type: ignore[no-untyped-def]
        rule = sp.mask_mod(lambda b, h, q_idx, kv_idx: names[q_idx] == names[kv_idx])
        return sp.attend(q, sp.gather(k, rule), sp.gather(v, rule))

    q, k, v = tensors()
    wide = torch.zeros(1, 2, 130, 32)[..., :16].copy_(q)
    variants: list[tuple[Any, dict[str, Any]]] = [
        (streaming_llm(), {}),
        (streaming_llm(), {"shape": {**SHAPE, "Sq": 200}}),
        (streaming_llm(), {"shape": {**SHAPE, "Skv": 300}}),
        (streaming_llm(), {"shape": {**SHAPE, "Hkv": 2}}),
        (streaming_llm(), {"shape": {**SHAPE, "B": 2}}),
        (streaming_llm(), {"shape": {**SHAPE, "D": 32}}),
        (streaming_llm(), {"shape": {**SHAPE, "Dv": 32}}),
        (streaming_llm(), {"dtype": "float16"}),
        (streaming_llm(), {"dtype": "float32"}),
        (streaming_llm(), {"target": "sm80"}),
        (streaming_llm(), {"seed": 1}),
        (streaming_llm(recent=100), {}),
        (block_topk(block=64, budget=0.1), {}),
        (block_topk(block=64, budget=0.9), {}),
        (by_table(names=table), {}),
        (by_table(names=table // 2), {}),
        (streaming_llm(), {"sample": (q, k, v), "shape": None}),
        (streaming_llm(), {"sample": (q + 1, k, v), "shape": None}),
        (streaming_llm(), {"sample": (wide, k, v), "shape": None}),
    ]
    for number, (pattern, options) in enumerate(variants, start=1):
        assert tune(pattern, tmp_path, **options).remarks() == ()
        assert len(list(tmp_path.glob("*.jsonl"))) == number
    for pattern, options in variants:
        assert "from the record of" in tune(pattern, tmp_path, **options).remarks()[0]
    assert len(calls(tmp_path)) == len(variants)


def test_records_stand_in_the_cache_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path / "cache"))
    sp.tune(streaming_llm(), shape=SHAPE)
    held = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.parent for path in held if path.suffix != ".lock"] == [Path("cache/tuning")]


def test_a_cache_that_is_only_read_serves_its_records_and_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path))
    first = sp.tune(streaming_llm(), shape=SHAPE)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setenv("SPCOMP_CACHE_READ_ONLY", "1")
    again = sp.tune(streaming_llm(), shape=SHAPE)
    assert again.tunings == first.tunings
    assert again.remarks() != ()
    assert sp.tune(streaming_llm(recent=7), shape=SHAPE).remarks() == ()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_cache_that_cannot_be_written_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(CacheNotWritable):
        sp.tune(streaming_llm(), shape=SHAPE)


def test_a_file_in_place_of_the_cache_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path / "cache"))
    told: list[Any] = []
    with pytest.raises(CacheNotWritable):
        sp.tune(streaming_llm(), shape=SHAPE, progress=lambda *row: told.append(row))
    assert told == []


def test_a_search_of_some_loop_orders_does_not_stand_for_all(tmp_path: Path) -> None:
    some = tune(moba(block=64), tmp_path, orders=("key_major",))
    every = tune(moba(block=64), tmp_path)
    assert every.remarks() == ()
    rows = {row.candidate.order for row in some.tunings[0].rows}
    assert rows < {row.candidate.order for row in every.tunings[0].rows}
    assert not every.is_partial


def test_progress_is_told_of_every_row(tmp_path: Path) -> None:
    told: list[tuple[str, Any, int, int]] = []
    report = tune(block_topk, tmp_path, block=(64, 128), progress=lambda *row: told.append(row))
    for tuning in report.tunings:
        mine = [row for title, row, _, _ in told if title == tuning.call.pattern]
        assert {row.candidate for row in mine} == {row.candidate for row in tuning.rows}
    assert all(1 <= done <= total for _, _, done, total in told)


def test_meanings_that_the_user_stopped_before_are_named(tmp_path: Path) -> None:
    def told(title: str, row: Any, done: int, total: int) -> None:
        if title.startswith("block_topk(block=64") and row.status == "ok":
            raise KeyboardInterrupt

    report = tune(block_topk, tmp_path, progress=told)
    assert [one.tuning.call.pattern.partition(",")[0] for one in report.tuned] == [
        "block_topk(block=128",
        "block_topk(block=64",
    ]
    assert report.is_partial
    assert report.remarks() == (
        "block_topk(block=256, budget=0.25, sinks=1, locals=2): not tried, since the search was "
        "stopped",
        "partial: not every candidate had its turn",
    )


# ---- what stays as it was ------------------------------------------------------------------------


def test_tuning_changes_neither_tensors_nor_global_state(tmp_path: Path) -> None:
    q, k, v = tensors()
    table = torch.arange(400)

    @sp.pattern
    def by_table(q, k, v):  # type: ignore[no-untyped-def]
        rule = sp.mask_mod(lambda b, h, q_idx, kv_idx: table[q_idx] >= table[kv_idx])
        return sp.attend(q, sp.gather(k, rule), sp.gather(v, rule))

    q.requires_grad_()
    held = (q, k, v, table)
    copies, versions = [x.detach().clone() for x in held], [x._version for x in held]
    state = torch.get_rng_state()
    environment = dict(os.environ)
    tune(by_table, tmp_path, sample=(q, k, v), shape=None)
    assert all(torch.equal(x, copy) for x, copy in zip(held, copies, strict=True))
    assert [x._version for x in held] == versions
    assert q.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(os.environ) == environment
    assert torch.is_grad_enabled()


# ---- what is refused -----------------------------------------------------------------------------


def refusal(kind: type[SpcompError], pattern: Any = None, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        sp.tune(streaming_llm() if pattern is None else pattern, **options)
    return str(caught.value)


def test_one_of_sample_and_shape_is_needed() -> None:
    way_out = "  help: pass sample=(q, k, v), or shape={'B': 1, 'Hq': 32, ...}."
    assert refusal(NothingToTune) == (
        "NothingToTune: streaming_llm cannot be tuned: neither a sample nor a shape was given.\n"
        + way_out
    )
    assert refusal(NothingToTune, sample=tensors(), shape=SHAPE) == (
        "NothingToTune: streaming_llm cannot be tuned: both a sample and a shape was given.\n"
        + way_out
    )


@pytest.mark.parametrize("budget_s", [0, -1.5, float("nan")])
def test_a_budget_is_above_zero(budget_s: float) -> None:
    assert refusal(NothingToTune, shape=SHAPE, budget_s=budget_s) == (
        f"NothingToTune: streaming_llm cannot be tuned: budget_s is {budget_s:g}.\n"
        "  help: give seconds above 0."
    )


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"B": 1}, "its shape gives no Hq, Hkv, Sq, Skv, D, Dv"),
        ({**SHAPE, "Sq": 0}, "its shape gives no Sq"),
        ({**SHAPE, "Sq": 1.5}, "its shape gives no Sq"),
        ({**SHAPE, "S": 5}, "its shape names S"),
    ],
)
def test_a_shape_is_whole(shape: dict[str, Any], why: str) -> None:
    assert refusal(NothingToTune, shape=shape) == (
        f"NothingToTune: streaming_llm cannot be tuned: {why}.\n"
        "  help: a shape names B, Hq, Hkv, Sq, Skv, D, Dv, each 1 or more."
    )


def test_a_sample_is_three_tensors_that_fit() -> None:
    q, k, v = tensors()
    assert refusal(NothingToTune, sample=(q, k)) == (
        "NothingToTune: streaming_llm cannot be tuned: its sample is not three tensors.\n"
        "  help: pass sample=(q, k, v) with q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv]."
    )
    refusal(DtypeMix, sample=(q, k.half(), v))
    refusal(SpcompError, sample=(q, k, v[:, :, 1:]))
    refusal(NothingToTune, sample=(q[:, :, :0], k, v))
    refusal(HeadsDoNotDivide, shape={**SHAPE, "Hq": 3, "Hkv": 2})


def test_rows_too_far_apart_are_refused_as_in_a_call() -> None:
    q = torch.empty(1, 1, 2, 16, dtype=torch.float16)
    wide = torch.empty(2 * (1 << 23) + 16, dtype=torch.float16)
    k = wide.as_strided((1, 1, 2, 16), (1 << 24, 1 << 24, 1 << 23, 1))
    refusal(StrideTooLarge, sample=(q, k, k))


def test_unknown_names_are_refused() -> None:
    assert refusal(DtypeUnsupported, shape=SHAPE, dtype="float64") == (
        "DtypeUnsupported: the sample is float64, which the triton backend does not compute in.\n"
        "  help: use one of float32, float16, bfloat16."
    )
    refusal(UnknownTarget, shape=SHAPE, target="sm70")
    refusal(UnknownChoice, shape=SHAPE, orders=("sideways",))
    assert refusal(UnknownChoice, shape=SHAPE, backend="triton", target="sm90") == (
        "UnknownChoice: tune on this device was given target = 'sm90'.\n"
        "  help: choose one of 'interpreter'."
    )


def test_a_mask_of_another_length_is_refused() -> None:
    @sp.pattern
    def given(q, k, v):  # type: ignore[no-untyped-def]
        mask = sp.block_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), block=64)
        return sp.attend(q, k, v, mask=mask & sp.causal())

    refusal(MaskOfOtherLength, given, shape=SHAPE)


def test_torch_compile_cannot_hold_a_tuning(tmp_path: Path) -> None:
    def caller(x: torch.Tensor) -> torch.Tensor:
        tune(streaming_llm(), tmp_path)
        return x + 1

    compiled = torch.compile(caller, backend="eager")
    with pytest.raises(TuneInCapture) as caught:
        compiled(torch.ones(2))
    assert str(caught.value) == (
        "TuneInCapture: tune was called while torch.compile was running its caller, which it would "
        "disturb.\n"
        "  help: tune before, and compile with the line that the report prints."
    )
    assert list(tmp_path.iterdir()) == []
    caller(torch.ones(2))


def test_records_survive_in_another_folder(tmp_path: Path) -> None:
    """A folder of records can be carried elsewhere; what it says holds for the same call alone."""
    first = tune(streaming_llm(), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert tune(streaming_llm(), tmp_path / "b").tunings == first.tunings
