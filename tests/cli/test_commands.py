"""What each command prints for right input."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

import spcomp as sp
from spcomp import compiler
from spcomp.autotune.fidelity import Agreement
from spcomp.cli import comparison, main
from spcomp.ir.cost import costs_of, evaluate
from spcomp.ir.plan import Phase
from spcomp.ir.text import parse_plan, parse_program
from spcomp.patterns import SHIPPED
from spcomp.version import VERSION
from tests.shipped import NO_KERNELS, ON_TRITON, declared, refusal

SHAPE = "B=1,Hq=32,Hkv=8,Sq=4096,D=128"


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args, catch_exceptions=False)


def ok(*args: str) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def as_json(*args: str) -> Any:
    return json.loads(ok(*args, "--json"))


def test_version_is_that_of_the_package() -> None:
    assert ok("--version") == f"spcomp {VERSION}\n"


# ---- list ----------------------------------------------------------------------------------------


def test_list_names_every_shipped_pattern_with_its_hyper_parameters() -> None:
    rows = as_json("list")
    assert [r["name"] for r in rows] == list(SHIPPED)
    assert list(SHIPPED) == sorted(SHIPPED)
    found = {r["name"]: r["parameters"] for r in rows}
    assert found["moba"] == {"block": 512, "k_blocks": 8}
    assert found["flexprefill"]["max_budget"] is None
    assert "targets" not in rows[0]
    assert all(r["summary"] and "\n" not in r["summary"] for r in rows)
    assert "block=512 k_blocks=8" in ok("list")


@pytest.fixture(scope="module")
def standings() -> dict[str, Any]:
    return {row["name"]: row["targets"] for row in as_json("list", "--targets")}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", SHIPPED)
def test_list_says_where_each_phase_runs(name: str, phase: Phase, standings: Any) -> None:
    assert standings[name][phase] == {
        "reference": "runs",
        "sm90": refusal("triton", name, phase) or "emitted",
        "ascend910b": refusal("ascendc", name, phase) or "emitted",
    }


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("name", SHIPPED)
def test_the_reference_runs_each_phase_as_the_list_says(name: str, rows: int) -> None:
    pattern, shape = SHIPPED[name](), {"B": 2, "Hq": 2, "Sq": rows}
    q, k = torch.randn(2, 2, rows, 8), torch.randn(2, 1, 70, 8)
    more = declared(pattern, shape, q.dtype)
    out = sp.compile(pattern, backend="reference")(q, k, torch.randn_like(k), **more)
    assert isinstance(out, Tensor) and bool(out.isfinite().all()) and bool(out.any())


def test_the_table_of_targets_has_a_line_for_phases_that_agree() -> None:
    lines = [line.rstrip() for line in ok("list", "--targets").splitlines()]
    assert lines[0].split() == ["pattern", "target", "phase", "what", "runs"]
    assert re.fullmatch(r"block_topk +reference +prefill, decode +runs", lines[1])
    assert re.fullmatch(r" +sm90 +prefill, decode +emitted", lines[2])
    nsa = lines.index(next(line for line in lines if line.startswith("nsa ")))
    for line, phase in zip(lines[nsa + 2 : nsa + 4], ("prefill", "decode"), strict=True):
        said = refusal("ascendc", "nsa", phase)  # type: ignore[arg-type]
        assert said and re.fullmatch(rf" +ascend910b +{phase} +{re.escape(said)}", line)


def test_plain_list_lowers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any, **named: Any) -> None:
        raise AssertionError("a plain list lowers nothing")

    monkeypatch.setattr(compiler, "lower", never)
    assert "moba" in ok("list")
    with pytest.raises(AssertionError, match="lowers nothing"):
        ok("list", "--targets")


# ---- show ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_show_pattern_reads_back(name: str) -> None:
    assert parse_program(ok("show", name, "--at", "pattern")) == SHIPPED[name]().program


def test_show_pattern_after_a_pass_holds_what_the_pass_gives() -> None:
    assert "Region(" not in ok("show", "moba", "--at", "pattern")
    assert "Region(" in ok("show", "moba", "--at", "pattern", "--after", "infer_masks")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "gfx942"])
@pytest.mark.parametrize("name", ON_TRITON)
def test_show_plan_reads_back(name: str, target: str, phase: str) -> None:
    args = ("show", name, "--at", "plan", "--target", target, "--phase", phase)
    plan = parse_plan(ok(*args))
    assert plan.phase == phase
    assert plan.pattern == SHIPPED[name]().program.title()
    found = as_json(*args)
    assert parse_plan(found["text"]) == plan
    assert [x["kernel"] for x in found["launches"]] == [x.kernel for x in plan.launches()]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("show", ("--at", "plan")),
        ("show", ("--at", "source")),
        ("explain", ("--shape", SHAPE)),
        ("bench", ("--shape", SHAPE)),
        ("compile", ("-o",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", NO_KERNELS["triton"])
def test_commands_that_lower_say_what_has_no_kernel(
    name: str, command: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    folder = [str(tmp_path / "out")] if command == "compile" else []
    result = run(command, name, *options, *folder)
    assert (result.exit_code, result.stdout) == (1, "")
    said = result.stderr.splitlines()
    assert f"CannotLower: {refusal('triton', name, 'prefill')}" in said
    assert said[-1] == "  help: use backend='reference'."
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "states"),
    [("infllm_v2", {"k1", "k2"}), ("nsa", {"k_compressed", "v_compressed"})],
)
def test_explain_names_the_windows_that_a_system_keeps(name: str, states: set[str]) -> None:
    for rows in (4096, 1):
        found = as_json("explain", name, "--shape", f"B=1,Hq=32,Hkv=8,Sq={rows},Skv=4096,D=128")
        assert {b["state"].partition(".")[0] for b in found["buffers"]} == {"", *states}
        assert {"part_lse", "block_scores", "topk"} <= {x["kernel"] for x in found["launches"]}


@pytest.mark.parametrize("name", ["block_topk", "moba"])
def test_commands_that_lower_take_a_pattern_to_ascend(name: str) -> None:
    target = ("--target", "ascend910b")
    text = ok("show", name, "--at", "source", *target)
    kernels = re.findall(r"^// ==== \d\d_(\w+)\.h\n// Generated by spcomp", text, re.MULTILINE)
    assert kernels[-3:] == ["score", "topk", "attend_gather"]
    assert set(kernels[:-3]) == {"pool"}
    assert text.count('extern "C" __global__ __aicore__ void ') == len(kernels)
    shape = ("--shape", "Hq=8,Hkv=2,S=4096,D=64")
    assert "Ascend 910B (Atlas A2, A3) (ascend910b)" in ok("explain", name, *shape, *target)
    assert [row["kind"] for row in as_json("bench", name, *shape, *target)] == ["predicted"] * 2


def test_show_plan_takes_hyper_parameters_axes_and_an_order() -> None:
    args = ("--set", "block=64", "--axis", "attend_gather.block_k=32", "--order", "gather")
    plan = parse_plan(ok("show", "moba", *args))
    gather = next(x for x in plan.launches() if x.kernel == "attend_gather")
    assert (plan.order, gather.axis("block_k")) == ("gather", 32)
    assert "block=64" in plan.pattern


def test_show_source_prints_one_file_a_launch() -> None:
    text = ok("show", "streaming_llm", "--at", "source")
    assert text.count("# ==== ") == 2
    assert "# ==== 01_attend_ws.py\n# Generated by spcomp" in text
    files = as_json("show", "streaming_llm", "--at", "source")["files"]
    assert [f["name"] for f in files] == ["00_tiles.py", "01_attend_ws.py"]
    assert all(f["text"] in text for f in files)


def test_show_graph_draws_stages_and_launches_in_three_forms() -> None:
    tree = ok("show", "streaming_llm", "--at", "graph")
    assert "      └─ %5 Local(count=2044)\n" in tree
    assert "attend_ws -> out, lse\n" in tree
    assert ok("show", "moba", "--at", "graph", "--format", "dot").count("digraph {") == 2
    assert ok("show", "moba", "--at", "graph", "--format", "mermaid").count("flowchart TD") == 2
    found = as_json("show", "moba", "--at", "graph")
    assert {n["label"] for n in found["launches"]["nodes"]} >= {"attend_keys", "merge", "k_mean"}


def test_cost_prints_formulas_alone_without_a_shape() -> None:
    text = ok("show", "moba", "--cost")
    assert "  flops         = 2*B*Hq*P*(D + Dv)\n" in text
    assert "  W             = Min(Skv, 512*Min(8, ceiling(Skv/512)))\n" in text
    assert "roofline" not in text
    assert "values" not in as_json("show", "moba", "--cost")["launches"][0]


def test_cost_values_are_those_of_the_cost_model() -> None:
    found = as_json("show", "block_topk", "--cost", "--shape", SHAPE)
    plan = parse_plan(ok("show", "block_topk", "--at", "plan"))
    env = {"B": 1, "Hq": 32, "Hkv": 8, "Sq": 4096, "Skv": 4096, "D": 128, "Dv": 128, "E": 2}
    expected = [evaluate(c, env) for c in costs_of(plan)]
    assert [r["values"]["flops"] for r in found["launches"]] == [f.flops for f in expected]
    assert found["total"]["floor_bytes"] == sum(f.floor_bytes for f in expected)
    assert 0 < found["density"] < 1
    assert found["slabs"] == 1
    text = ok("show", "block_topk", "--cost", "--shape", SHAPE)
    assert "times are predicted by the roofline of NVIDIA H100 for bfloat16" in text


# ---- explain -------------------------------------------------------------------------------------


def test_explain_says_what_runs_and_why() -> None:
    text = ok("explain", "moba", "--shape", SHAPE)
    assert "  target   NVIDIA H100 (sm90), bfloat16\n" in text
    assert "  phase    prefill: 4096 query rows, 4096 keys\n" in text
    assert "  order    key_major: each query has its own list" in text
    assert "k_mean" in text


def test_explain_takes_the_phase_from_the_rows_and_names_the_state() -> None:
    shape = "B=1,Hq=32,Hkv=8,Sq=1,Skv=4096,D=128"
    assert "  state    pages: a cache keeps it" in ok("explain", "quest", "--shape", shape)
    found = as_json("explain", "quest", "--shape", shape)
    assert found["phase"] == "decode"
    assert {b["name"]: b["shape"] for b in found["buffers"]}["k_max"] == [1, 8, 256, 128]


# ---- check ---------------------------------------------------------------------------------------

SMALL = ("--shape", "B=1,Hq=2,Hkv=1,Sq=40,Skv=70,D=16", "--backend", "reference")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_check_prints_our_error_beside_that_of_plain_pytorch(dtype: str) -> None:
    (row,) = as_json("check", "quest", "--set", "budget=32", "--dtype", dtype, *SMALL)
    assert row["ok"] is True
    assert 0 <= row["error"] <= row["allowed"]
    assert row["plain_error"] < row["allowed"]


def test_check_covers_prefill_and_decode_by_default() -> None:
    rows = as_json("check", "streaming_llm", "--set", "recent=60", "--backend", "reference")
    assert [r["phase"] for r in rows] == ["prefill", "decode"]


def test_check_exits_with_one_when_the_error_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "agreement", lambda *a, **k: Agreement(error=0.5, allowed=0.1))
    result = run("check", "moba", *SMALL)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout


def test_check_holds_a_nan_to_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "agreement", lambda *a, **k: Agreement(float("nan"), 0.1))
    assert run("check", "moba", *SMALL).exit_code == 1


# ---- compile -------------------------------------------------------------------------------------


def test_compile_writes_source_binaries_and_a_manifest_without_a_card(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    args = ("compile", "streaming_llm", "--dtype", "fp16", "--head-dim", "64", "-o", str(folder))
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    assert "compiling 2 kernels" in result.stderr
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["target"], manifest["dtype"], manifest["rung"]) == (
        "sm90",
        "float16",
        "compiled",
    )
    for kernel in manifest["kernels"]:
        for kind in ("source", "binary"):
            data = (folder / kernel[kind]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == kernel[f"{kind}_sha256"]
        assert kernel["registers"] > 0
        assert (folder / kernel["binary"]).read_bytes()[:4] == b"\x7fELF"
    assert parse_plan((folder / "plan.txt").read_text()).pattern == manifest["pattern"]
    assert ok("show", str(folder / "pattern.ir"), "--at", "pattern")


# ---- doctor --------------------------------------------------------------------------------------


def test_doctor_lists_packages_backends_cache_and_settings() -> None:
    found = as_json("doctor")
    assert found["spcomp"] == VERSION
    assert found["packages"]["torch"]
    assert list(found["backends"]) == ["reference", "triton", "ascendc"]
    assert found["cache"]["writable"] is True
    assert [s["variable"] for s in found["settings"]] == [
        "SPCOMP_CACHE_DIR",
        "SPCOMP_CACHE_READ_ONLY",
        "SPCOMP_BACKEND",
        "SPCOMP_CHECK",
    ]
    assert found["problems"] == []


@pytest.mark.parametrize("has_compiler", [True, False])
def test_doctor_says_whether_there_is_a_compiler_for_the_emulator(
    has_compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_compiler and shutil.which("g++") is None:
        pytest.skip("there is no g++ on the path")
    if not has_compiler:
        monkeypatch.setenv("PATH", "")
    status = as_json("doctor")["backends"]["ascendc"]["status"]
    here = r"runs here on the emulator of Ascend 910B \(Atlas A2, A3\), compiled by g\+\+ [\d.]+"
    without = r"the AscendC emulator needs g\+\+, and there is none on the path\."
    assert re.fullmatch(here if has_compiler else without, status)


def test_doctor_exits_with_one_when_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(taken))
    result = run("doctor")
    assert result.exit_code == 1
    assert f"the cache folder {taken} set by SPCOMP_CACHE_DIR cannot be written" in result.stderr
    assert "NOT writable" in result.stdout


def test_doctor_reports_a_wrong_setting_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPCOMP_CHECK", "yes")
    result = run("doctor")
    assert result.exit_code == 1
    assert result.stderr.count("BadSetting") == 1


# ---- output --------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [("list",), ("show", "moba", "--cost", "--shape", SHAPE)])
def test_output_that_is_no_terminal_holds_no_colour_and_cuts_nothing(args: tuple[str, ...]) -> None:
    text = ok(*args)
    assert "\x1b" not in text
    assert "…" not in text


def test_no_color_is_respected_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1m" in ok("list")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in ok("list")
