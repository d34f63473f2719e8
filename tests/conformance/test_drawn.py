"""Patterns that AscendC has kernels for, drawn with shapes, layouts and cores: each reads the keys
and gives the values that the reference does."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spcomp as sp
from spcomp import compiler
from spcomp.backends import registry
from spcomp.backends.ascendc.executor import EmulatedExecutable
from spcomp.backends.base import Specialisation
from spcomp.dsl.pattern import Pattern
from tests.conformance.cases import (
    COLUMNS,
    Case,
    assert_same_selection,
    assert_within,
    read_keys,
    why_not,
)

BACKEND = registry.backend("ascendc")
TARGET = registry.target("ascend910b")
SPEC = Specialisation("float16", 64, COLUMNS)

RULES = (
    ("query", "mean", "causal", False),
    ("query", "mean", None, True),
    ("group", "mean", "causal", True),
    ("group", "max", None, False),
    ("group", "sum", "causal", True),
)
"""Heads, reduction, mask, and whether units are forced: what kernels are compiled for."""


@sp.pattern
def drawn(q, k, v, *, by="mean", heads="query", reduce="mean", mask="causal", edge=False, kept=2):
    score = sp.score(q, sp.downsample(k, block=16, by=by), heads=heads, reduce=reduce, mask=mask)
    best = sp.topk(score, k=kept, always=(sp.sink(1), sp.own()) if edge else ())
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best), mask=mask)


patterns = st.builds(
    lambda rule, by, kept: drawn(
        by=by,
        kept=max(kept, 2 * rule[3]),
        **dict(zip(("heads", "reduce", "mask", "edge"), rule, strict=True)),
    ),
    rule=st.sampled_from(RULES),
    by=st.sampled_from(("mean", "max", "min")),
    kept=st.integers(0, 9),
)

cases = st.builds(
    lambda b, hkv, group, sq, skv, layout: Case(
        b, group * hkv, hkv, sq, skv, SPEC.head_dim, torch.float16, layout, COLUMNS
    ),
    b=st.sampled_from((1, 1, 2, 3)),
    hkv=st.integers(1, 2),
    group=st.sampled_from((1, 2, 3, 4, 16)),
    sq=st.integers(compiler.DECODE_ROWS + 1, 70),
    skv=st.integers(1, COLUMNS - 8),
    layout=st.sampled_from(("plain", "swapped", "sliced")),
)


@dataclass(frozen=True)
class Cores:
    number: int
    descending: bool


cores = st.builds(Cores, st.sampled_from((1, 2, 24)), st.booleans())


@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(pattern=patterns, case=cases, cores=cores)
def test_a_drawn_pattern_means_what_it_means(pattern: Pattern, case: Case, cores: Cores) -> None:
    reason = why_not("ascendc")
    if reason is not None:
        pytest.skip(f"the ascendc backend cannot run here: {reason}")
    torch.manual_seed(case.sq * case.skv)
    q, k, v = case.tensors("cpu")
    plan = compiler.lower(pattern, backend=BACKEND, target=TARGET, spec=SPEC)
    source = compiler.emit(plan, BACKEND, TARGET, SPEC)
    run = EmulatedExecutable(source, ai_cores=cores.number, descending=cores.descending)
    lengths = {"B": case.b, "Hq": case.hq, "Hkv": case.hkv, "Sq": case.sq, "Skv": case.skv}
    env = {**lengths, "D": case.d, "Dv": COLUMNS}
    out, lse = run.run({"q": q, "k": k, "v": v}, env, {})
    got = read_keys(out, case.skv)
    want = sp.compile(pattern, backend="reference").to_mask(q, k)
    assert_same_selection(pattern, q, k, got, want)
    assert_within(out, lse, q, k, v, got)
