"""What holds of every pattern, drawn at random."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from spcomp.backends.reference.pattern import run_program, to_mask
from spcomp.backends.reference.plan import run_plan
from spcomp.errors import CannotLower
from spcomp.ir.passes import PATTERN_PIPELINE
from spcomp.ir.spec import check
from spcomp.ir.text import parse_plan, parse_program, print_plan, print_program
from tests import oracle
from tests.properties.strategies import Call, TopK, Tree, dense_mask, drawn_calls, pattern_of
from tests.reference.lower import plans_of
from tests.reference.make import inputs, run

# Rows and units that plans can cut into tiles of 16, beside some that they cannot.
TILEABLE = st.sampled_from([16, 16, 32, 48, 7])
SINKS = st.sampled_from([-torch.inf, torch.inf, 1e30, -50.0]) | st.floats(-4, 4)
SHORT = Call(1, 2, 1, 40, 50, 4, "plain", 0)
Drawn = tuple[Call, Tree, bool]


@given(drawn_calls())
def test_a_pattern_reads_the_pairs_of_its_selection(drawn: Drawn) -> None:
    call, tree, causal = drawn
    q, k, v = call.tensors()
    pattern = pattern_of(tree, causal)
    want = dense_mask(tree, causal, q, k)
    assert torch.equal(to_mask(pattern.program, inputs(pattern, q, k, v)), want)


@given(drawn_calls(TILEABLE), st.lists(SINKS, min_size=6, max_size=6), st.sampled_from([None, 17]))
def test_sinks_join_the_softmax_of_any_pattern_and_of_its_plans(
    drawn: Drawn, logits: list[float], rows: int | None
) -> None:
    call, tree, causal = drawn
    q, k, v = call.tensors()
    sinks = torch.tensor(logits[: call.hq], dtype=torch.float64)
    pattern = pattern_of(tree, causal, sinks)
    want, want_lse = oracle.attention(q, k, v, dense_mask(tree, causal, q, k), sinks=sinks)
    out, lse = run(pattern, q, k, v)
    assert oracle.error(out, want) <= 1e-12
    assert oracle.error(lse, want_lse) <= 1e-12
    canonical, plans = plans_of(pattern)
    for plan in plans:
        check(plan, "cut")
        assert parse_plan(print_plan(plan)) == plan
        out, _ = run_plan(plan, inputs(canonical, q, k, v), slab_rows=rows)
        assert oracle.error(out, want) <= 1e-12


@given(drawn_calls(), st.sampled_from([1, 5, 64]))
def test_a_pattern_attends_to_the_pairs_of_its_selection(drawn: Drawn, rows: int) -> None:
    call, tree, causal = drawn
    q, k, v = call.tensors()
    out, lse = run(pattern_of(tree, causal), q, k, v, chunk_rows=rows)
    want, want_lse = oracle.attention(q, k, v, dense_mask(tree, causal, q, k))
    assert oracle.error(out, want) <= 1e-12
    assert oracle.error(lse, want_lse) <= 1e-12


@given(drawn_calls())
def test_a_gradient_is_that_of_the_selection(drawn: Drawn) -> None:
    call, tree, causal = drawn
    q, k, v = (x.detach().requires_grad_() for x in call.tensors())
    out, _ = run(pattern_of(tree, causal), q, k, v)
    want, _ = oracle.attention(q, k, v, dense_mask(tree, causal, q, k))
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    for g, w in zip(got, torch.autograd.grad(want.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@given(drawn_calls())
def test_passes_keep_the_meaning_and_their_rules(drawn: Drawn) -> None:
    call, tree, causal = drawn
    q, k, v = call.tensors()
    pattern = pattern_of(tree, causal)
    want = to_mask(pattern.program, inputs(pattern, q, k, v))
    program = pattern.program
    for step in PATTERN_PIPELINE:
        try:
            program = step(program)
        except CannotLower:
            return
        check(program, step.__name__)
        assert torch.equal(to_mask(program, inputs(pattern, q, k, v)), want)


@given(drawn_calls())
def test_text_reads_back_to_the_same_pattern(drawn: Drawn) -> None:
    _, tree, causal = drawn
    program = pattern_of(tree, causal).program
    for step in (None, *PATTERN_PIPELINE):
        program = program if step is None else step(program)
        assert parse_program(print_program(program)) == program


@given(drawn_calls(TILEABLE), st.sampled_from([None, 17]))
@example((SHORT, TopK(1, 16, "mean", "query", "mean", k=0, sinks=0, nearest=0), False), None)
@example((SHORT, TopK(7, 16, "mean", "query", "mean", k=0, sinks=0, nearest=1), True), None)
@example((SHORT, TopK(7, 64, "mean", "group", "max", k=2, sinks=1, nearest=0), True), 17)
def test_every_plan_means_what_its_pattern_means(drawn: Drawn, rows: int | None) -> None:
    call, tree, causal = drawn
    q, k, v = call.tensors()
    pattern = pattern_of(tree, causal)
    want, want_lse = run_program(pattern.program, inputs(pattern, q, k, v))
    canonical, plans = plans_of(pattern)
    for plan in plans:
        check(plan, "cut")
        assert parse_plan(print_plan(plan)) == plan
        out, lse = run_plan(plan, inputs(canonical, q, k, v), slab_rows=rows)
        assert oracle.error(out, want) <= 1e-12
        assert oracle.error(lse, want_lse) <= 1e-12
