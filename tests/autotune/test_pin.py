"""The line to paste: Python that makes the plan of its candidate."""

from __future__ import annotations

import pytest

import spcomp as sp
from spcomp import compiler, patterns
from spcomp.autotune.pin import expression_of, line_to_paste
from spcomp.autotune.record import Candidate
from spcomp.autotune.space import candidates
from spcomp.backends import registry
from spcomp.backends.base import Specialisation
from spcomp.dsl.pattern import Pattern
from spcomp.ir.schedule import Schedule, frozen

SHAPE = {"B": 1, "Hq": 32, "Hkv": 8, "Sq": 8192, "Skv": 8192, "D": 128, "Dv": 128}
TILE = {"attend_keys": {"block_k": 64, "block_m": 128, "stages": 3, "warps": 4}}


def test_the_line_names_pattern_order_and_axes() -> None:
    candidate = Candidate("key_major", frozen(TILE))
    assert line_to_paste("moba(block=512, k_blocks=8)", candidate) == (
        'attention = sp.compile(moba(block=512, k_blocks=8), order="key_major", '
        'axes={"attend_keys": {"block_k": 64, "block_m": 128, "stages": 3, "warps": 4}})'
    )


def test_the_default_schedule_needs_no_more_than_the_pattern() -> None:
    assert (
        line_to_paste("dense()", Candidate(None, ()), name="attn") == "attn = sp.compile(dense())"
    )


@pytest.mark.parametrize(
    ("title", "expression"),
    [
        ("quest(page=16, heads=query)", 'quest(page=16, heads="query")'),
        ("f(a=None, b=True, c=-0.5, d=1e-05)", "f(a=None, b=True, c=-0.5, d=1e-05)"),
        ("f(a=, b=x, y, c=it's)", 'f(a="", b="x, y", c="it\'s")'),
        ("f(starts=Tensor[70], n=1)", "f(starts=starts, n=1)"),
        ("f(table=Parameter[2, 4])", "f(table=table)"),
    ],
)
def test_a_title_becomes_python(title: str, expression: str) -> None:
    assert expression_of(title) == expression


@pytest.mark.parametrize(
    "made",
    [
        patterns.moba(block=256, k_blocks=4),
        patterns.quest(page=16, budget=1024, heads="group"),
        patterns.block_topk(block=64, budget=0.125),
        patterns.streaming_llm(),
    ],
    ids=repr,
)
def test_the_pasted_line_makes_the_plan_of_its_candidate(made: Pattern) -> None:
    backend, target = registry.backend("triton"), registry.target("sm90")
    spec = Specialisation("bfloat16", 128, 128)
    space = candidates(
        made, backend=backend, target=target, spec=spec, phase="prefill", shape=SHAPE
    )
    for candidate in space.candidates()[::7]:
        scope: dict[str, object] = {"sp": sp, **patterns.SHIPPED}
        exec(line_to_paste(made.program.title(), candidate), scope)
        attention = scope["attention"]
        assert isinstance(attention, sp.Attention)
        schedule = Schedule("query_major", backend.axes(target, spec))
        plan = compiler.lower(
            attention.pattern,
            backend=backend,
            target=target,
            spec=spec,
            order=attention.order,
            schedule=schedule.changed(attention.axes or {}),
        )
        assert plan == space.judge(candidate).plan
