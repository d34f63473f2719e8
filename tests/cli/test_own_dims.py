"""Commands on patterns that take tensors beside q, k and v: sizes of the dims they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spcomp.cli import main
from spcomp.ir.text import parse_plan, parse_program

SOURCE = """
import spcomp as sp


@sp.pattern
def indexed(q, k, v, iq: sp.tensor("B Hi Sq Di"), ik: sp.tensor("B 1 Skv Di")):
    best = sp.topk(sp.score(iq, sp.downsample(ik, block=16), heads="all", reduce="sum"), k=2)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


@sp.pattern
def gated(q, k, v, gates: sp.tensor("B Hq Sq 2")):
    first = sp.attend(q, sp.gather(k, sp.sink(4)), sp.gather(v, sp.sink(4)))
    return sp.merge(first, sp.attend(q, k, v), gates=gates)
"""
SHAPE = ("--shape", "B=2,Hq=8,Hkv=2,S=1024,D=64")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return str(path)


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def ok(*args: str) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: str) -> str:
    result = run(*args)
    assert result.exit_code != 0
    return result.stderr


def test_show_reads_back_at_both_levels(file: str) -> None:
    text = ok("show", f"{file}:indexed", "--at", "pattern")
    assert 'Argument(name="iq", dims=[B, Hi, Sq, Di])' in text
    assert [a.name for a in parse_program(text).arguments()] == ["iq", "ik"]
    plan = parse_plan(ok("show", f"{file}:indexed", "--at", "plan", "--dim", "Di=32"))
    assert [str(d) for d in plan.buffer("ik_mean").dims] == ["B", "1", "ceiling(Skv/16)", "Di"]
    assert "HEAD_DIM = tl.constexpr(32)" in ok(
        "show", f"{file}:indexed", "--at", "source", "--dim", "Di=32"
    )


def test_a_larger_indexer_costs_more(file: str) -> None:
    def flops(hi: int) -> int:
        text = ok(
            "explain", f"{file}:indexed", *SHAPE, "--json", "--dim", "Di=32", "--dim", f"Hi={hi}"
        )
        select = next(x for x in json.loads(text)["launches"] if x["kernel"] == "select")
        return int(select["values"]["flops"])

    assert flops(4) == 2 * 2 * 4 * 1024 * 64 * 32
    assert flops(8) == 2 * flops(4)


def test_a_merge_by_gates_is_shown_and_priced(file: str) -> None:
    assert 'gates_buf="gates"' in ok("show", f"{file}:gated", "--at", "plan")
    assert "gate_ptr" in ok("show", f"{file}:gated", "--at", "source", "--phase", "decode")
    assert "gated()" in ok("bench", f"{file}:gated", *SHAPE)


def test_a_size_that_is_missing_or_of_no_dim_is_refused(file: str) -> None:
    needs = "SizeUnknown: the pattern 'indexed' names the dim {}, and nothing says how large it is."
    assert needs.format("Di") in refused("show", f"{file}:indexed")
    assert needs.format("Di") in refused("compile", f"{file}:indexed", "-o", "out")
    assert needs.format("Hi") in refused("explain", f"{file}:indexed", *SHAPE, "--dim", "Di=32")
    assert "choose one of Hi, Di." in refused("show", f"{file}:indexed", "--dim", "Dj=32")
    assert "it names none." in refused("show", f"{file}:gated", "--dim", "Di=32")
    assert "'Di=0' is not of the form name=number" in refused(
        "show", f"{file}:indexed", "--dim", "Di=0"
    )


def test_tune_and_check_refuse_the_tensors_by_name(file: str) -> None:
    assert "gated cannot be tuned: it takes the tensor gates beside q, k and v" in refused(
        "tune", f"{file}:gated", *SHAPE
    )
    assert "'indexed' takes the tensor iq beside q, k and v." in refused("check", f"{file}:indexed")
