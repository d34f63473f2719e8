"""Every rule of both levels holds for what the compiler makes, and catches a seeded fault."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from spcomp.errors import RuleBroken
from spcomp.ir import dims
from spcomp.ir.expr import Expr, Lit, Load, Sym, op
from spcomp.ir.launches import (
    AttendLaunch,
    GatherLaunch,
    InvertLaunch,
    ListLeaf,
    MergeLaunch,
    PoolLaunch,
    SelectLaunch,
    TilesLaunch,
)
from spcomp.ir.nodes import (
    Attend,
    Captured,
    Downsample,
    Gather,
    Input,
    Local,
    MaskMod,
    Merge,
    Region,
    Score,
    Sink,
    State,
    Stream,
    TopK,
    Union,
)
from spcomp.ir.passes import PATTERN_PIPELINE
from spcomp.ir.plan import Buffer, Launch, Phase, Plan, Slabs
from spcomp.ir.plan_rules import RULES_PLAN
from spcomp.ir.program import Program
from spcomp.ir.spec import AFTER, RULES_PATTERN, check, faults
from tests.ir.programs import LOWERED, PATTERNS, PHASES, plan_of

Q, K, V = Input("q", "query"), Input("k", "key"), Input("v", "value")
S = Stream(K, V)


def attended(selection: Any, **fields: Any) -> Program:
    return Program("p", (), Attend(Q, (Gather(S, selection),), **fields))


def ranked(**fields: Any) -> Program:
    return attended(TopK(**{"scores": Score(Q, Downsample(K, 16, 16)), "k": 4, **fields}))


# ---- what the compiler makes ---------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
def test_rules_hold_after_every_pass(name: str) -> None:
    program = PATTERNS[name].program
    for step in PATTERN_PIPELINE:
        program = step(program)
        check(program, step.__name__)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", LOWERED)
def test_rules_hold_for_every_plan(name: str, phase: Phase) -> None:
    check(plan_of(name, phase), "cut")


def test_every_pass_has_its_rules() -> None:
    assert list(AFTER) == [step.__name__ for step in PATTERN_PIPELINE]


# ---- seeded faults of programs -------------------------------------------------------------------

LESS = op("lt", Sym("q"), Sym("k"))


def masked(predicate: Expr, *tables: Captured) -> Program:
    return attended(MaskMod(predicate, tables))


TABLE = Captured("t", (8,), "int32")
LOGITS = Captured("s", (8,), "float32")
WRONG_PROGRAMS = {
    "one_result": (
        Program("p", (), S),
        "the result is a Stream, not an Attend or a Merge",
    ),
    "operands_fit": (
        attended(Union((S,))),
        "a stage gives Union.parts a Stream, where a Selection is needed",
    ),
    "operands_fit-number": (
        attended(Local(0)),
        "a stage gives Local.count the value 0, which is below 1",
    ),
    "operands_fit-sinks": (
        attended(Sink(1), sinks=Q),
        "a stage gives Attend.sinks a Input, where a Captured is needed",
    ),
    "operands_fit-part": (
        Program("p", (), Merge((Attend(Q, (S,)), Attend(Q, (S,), sinks=LOGITS)))),
        "a stage gives Merge.parts a result with sinks, where the Merge itself would have them",
    ),
    "operands_fit-gates": (
        Program("p", (), Merge((Attend(Q, (S,), sinks=LOGITS),), "gates", (LOGITS,), LOGITS)),
        "a stage gives a Merge by gates sinks, which has no softmax",
    ),
    "types_agree-sinks": (
        attended(Sink(1), sinks=TABLE),
        "WrongStage: attend takes one logit a query head, [Hq] of float32, float16, bfloat16, "
        "float64, as its sinks, but was given a tensor int32[8].",
    ),
    "types_agree-rank": (
        Program("p", (), Merge((Attend(Q, (S,)),), sinks=Captured("s", (1, 8), "float32"))),
        "WrongStage: merge takes one logit a query head, [Hq] of float32, float16, bfloat16, "
        "float64, as its sinks, but was given a tensor float32[1, 8].",
    ),
    "types_agree": (
        ranked(scores=Score(K, Downsample(K, 16, 16))),
        "WrongStage: score takes queries as its q, "
        "but was given something made from the key input.",
    ),
    "names_are_unique": (
        Program("p", (), Attend(Q, (Gather(Stream(Input("q", "key"), V), Sink(1)),))),
        "'q' names two different stages",
    ),
    "names_are_unique-state": (
        Program(
            "p",
            (),
            Merge(
                tuple(
                    Attend(Q, (Gather(S, TopK(Score(Q, State(Downsample(K, n, n), "s")), 2)),))
                    for n in (8, 16)
                )
            ),
        ),
        "'s' names two different stages",
    ),
    "expressions_are_closed": (
        masked(op("lt", Sym("q_lo"), Sym("k"))),
        "MaskMod.predicate reads 'q_lo', which it may not",
    ),
    "expressions_are_closed-kind": (
        masked(op("add", Sym("q"), Sym("k"))),
        "MaskMod.predicate is of kind int, not bool",
    ),
    "expressions_are_closed-flag": (
        attended(Region(op("and", LESS, Sym("chosen1")), (TopK(Score(Q, K), 2),))),
        "Region.predicate reads 'chosen1', which it may not",
    ),
    "expressions_are_closed-table": (
        masked(op("lt", Load("t", (Sym("q"),), "int"), Sym("k"))),
        "MaskMod.predicate reads the table 't', which is not among its own",
    ),
    "expressions_are_closed-rank": (
        masked(op("lt", Load("t", (Sym("q"), Sym("k")), "int"), Sym("k")), TABLE),
        "MaskMod.predicate reads 't' with 2 indices, and it has 1 dimensions",
    ),
    "expressions_are_closed-hook": (
        attended(Sink(1), score_mod=op("add", Sym("score"), Sym("k_lo"))),
        "Attend.score_mod reads 'k_lo', which it may not",
    ),
    "forced_sets_fit": (
        ranked(k=2, always=(Sink(1, 16), Local(2, 16))),
        "a TopK keeps 2 units and forces 3",
    ),
    "no_identity_stage": (
        ranked(scores=Score(Downsample(Q, 1, 1), Downsample(K, 16, 16))),
        "a Downsample pools single tokens",
    ),
    "no_identity_stage-merge": (
        Program("p", (), Merge((Attend(Q, (S,)),))),
        "a Merge joins one part",
    ),
    "no_identity_stage-sinks": (
        Program("p", (), Merge((Attend(Q, (S,)),), sinks=LOGITS)),
        "a Merge joins one part",
    ),
    "no_identity_stage-nested": (
        Program("p", (), Merge((Attend(Q, (S,)), Merge((Attend(Q, (S,)), Attend(Q, (S,))))))),
        "a Merge joins a Merge by the same rule",
    ),
    "regions_everywhere": (
        attended(Sink(1)),
        "an Attend still has its causal flag; a Gather holds a Sink, no Region",
    ),
    "regions_everywhere-gather": (
        Program("p", (), Attend(Q, (S,), causal=False)),
        "an Attend reads a Stream that is not gathered",
    ),
    "regions_everywhere-list": (
        attended(Region(LESS, (TopK(Score(Q, K), 2),)), causal=False),
        "a Region never reads its list chosen0",
    ),
}


def rule_of(case: str) -> str:
    return case.partition("-")[0]


@pytest.mark.parametrize("case", WRONG_PROGRAMS)
def test_rule_of_programs_catches_its_fault(case: str) -> None:
    program, problem = WRONG_PROGRAMS[case]
    found = faults(program, "infer_masks")
    assert "; ".join(found[rule_of(case)]) == problem


def test_broken_rule_names_step_rule_and_problem() -> None:
    with pytest.raises(RuleBroken) as caught:
        check(masked(op("add", Sym("q"), Sym("k"))), "infer_types")
    assert str(caught.value) == (
        "RuleBroken: after infer_types, rule 'expressions_are_closed' does not hold: "
        "MaskMod.predicate is of kind int, not bool.\n"
        "  help: this is a fault of spcomp or of a hand-written IR file, not of your pattern; "
        "please report it with the output of `spcomp show`."
    )


def test_rule_of_a_later_pass_is_not_asked_before_it() -> None:
    check(attended(Sink(1)), "simplify")
    with pytest.raises(RuleBroken, match="regions_everywhere"):
        check(attended(Sink(1)), "infer_masks")


# ---- seeded faults of plans ----------------------------------------------------------------------


def changed(plan: Plan, kind: type[Launch], **fields: Any) -> Plan:
    """Give the plan with some fields of its launches of one class changed."""

    def change(launch: Launch) -> Launch:
        return replace(launch, **fields) if isinstance(launch, kind) else launch

    steps = tuple(
        replace(s, launches=tuple(change(x) for x in s.launches))
        if isinstance(s, Slabs)
        else change(s)
        for s in plan.steps
    )
    return replace(plan, steps=steps)


def resized(plan: Plan, name: str, **fields: Any) -> Plan:
    """Give the plan with one buffer changed."""
    return replace(
        plan, buffers=tuple(replace(b, **fields) if b.name == name else b for b in plan.buffers)
    )


def slabs_of(plan: Plan) -> Slabs:
    return next(s for s in plan.steps if isinstance(s, Slabs))


def with_align(plan: Plan, align: int) -> Plan:
    return replace(
        plan,
        steps=tuple(replace(s, align=align) if isinstance(s, Slabs) else s for s in plan.steps),
    )


def reordered(plan: Plan) -> Plan:
    slabs = slabs_of(plan)
    steps = tuple(replace(s, launches=s.launches[::-1]) if s is slabs else s for s in plan.steps)
    return replace(plan, steps=steps)


def without_slabs(plan: Plan) -> Plan:
    return replace(plan, steps=plan.launches())


BLOCKS, KEYS = plan_of("block_topk"), plan_of("moba")
WINDOW, STEP = plan_of("streaming_llm"), plan_of("streaming_llm", "decode")
TILES = next(x for x in BLOCKS.launches() if isinstance(x, TilesLaunch))
PART = op("lt", Load("t", (Sym("q"),), "int"), Lit(1))
WRONG_PLANS = {
    "buffers_are_declared": (
        replace(BLOCKS, buffers=tuple(b for b in BLOCKS.buffers if b.name != "counts")),
        "select touches 'counts', which is not declared; "
        "tiles touches 'counts', which is not declared",
    ),
    "buffers_are_declared-twice": (
        replace(BLOCKS, buffers=(*BLOCKS.buffers, BLOCKS.buffers[0])),
        "the buffer 'q' is declared twice",
    ),
    "buffers_are_declared-result": (
        replace(BLOCKS, lse="nothing"),
        "'nothing' is returned but not declared",
    ),
    "reads_follow_writes": (
        reordered(WINDOW),
        "attend reads 'tiles' before any launch writes it; "
        "attend reads 'partial' before any launch writes it; "
        "attend reads 'total' before any launch writes it",
    ),
    "inputs_are_not_written": (
        changed(BLOCKS, AttendLaunch, out_buf="q"),
        "attend writes the input 'q'",
    ),
    "writes_are_single": (
        changed(BLOCKS, PoolLaunch, out_buf="k_mean"),
        "pool writes 'k_mean' after pool did",
    ),
    "results_are_written": (
        changed(BLOCKS, AttendLaunch, lse_buf="total"),
        "no launch writes the result 'lse'",
    ),
    "results_are_written-scratch": (
        replace(BLOCKS, buffers=(*BLOCKS.buffers, Buffer("x", (1,), "int32", "scratch"))),
        "no launch writes the scratch buffer 'x'",
    ),
    "results_are_written-output": (
        replace(BLOCKS, buffers=(*BLOCKS.buffers, Buffer("x", (1,), "int32", "output"))),
        "the output 'x' is not returned",
    ),
    "slab_dims_stay_in_slabs": (
        without_slabs(WINDOW),
        "; ".join(
            f"{kernel} runs once a call and touches '{name}', which holds the rows of a slab"
            for kernel in ("tiles", "attend")
            for name in ("tiles", "partial", "total")
        ),
    ),
    "tiles_fit_lists": (
        changed(BLOCKS, TilesLaunch, leaves=(ListLeaf(granule=24, unit=16),)),
        "block_q 16 of tiles does not divide 24 of list 0",
    ),
    "tiles_fit_lists-attend": (
        changed(BLOCKS, AttendLaunch, axes=(("block_k", 16), ("block_q", 32))),
        "attend takes block_q 32 and its tile list 16",
    ),
    "tiles_fit_lists-gather": (
        changed(STEP, GatherLaunch, unit=64),
        "attend_gather reads tiles of (16, 32) as units of (16, 64)",
    ),
    "tiles_fit_lists-number": (
        changed(BLOCKS, TilesLaunch, leaves=()),
        "tiles has lists, counts and leaves of different numbers",
    ),
    "tiles_fit_lists-flags": (
        changed(
            BLOCKS,
            TilesLaunch,
            list_bufs=("indices",) * 8,
            count_bufs=("counts",) * 8,
            leaves=TILES.leaves * 8,
        ),
        "tiles joins 8 lists, and an entry has 7 flag bits",
    ),
    "slabs_align": (
        with_align(BLOCKS, 8),
        "slabs of a multiple of 8 rows split the 16 rows of a list of select; "
        "slabs of a multiple of 8 rows split the 16 rows of a list of tiles; "
        "slabs of a multiple of 8 rows split the 16 rows of a list of tiles",
    ),
    "slabs_align-least": (with_align(BLOCKS, 0), "slabs align 0 is below 1"),
    "dims_are_known": (
        resized(BLOCKS, "counts", dims=(dims.B, dims.sympy.Symbol("N"))),
        "a dim of 'counts' reads the unknown symbol 'N'",
    ),
    "expressions_fit_kernels": (
        changed(BLOCKS, TilesLaunch, everywhere=op("lt", Sym("q"), Sym("k_lo"))),
        "tiles.everywhere reads 'q', which its kernel does not know",
    ),
    "expressions_fit_kernels-table": (
        changed(BLOCKS, TilesLaunch, predicate=PART),
        "tiles.predicate reads the table 't', which the launch is not given",
    ),
    "streams_have_their_length": (
        changed(BLOCKS, AttendLaunch, k_buf="k_mean"),
        f"attend counts Skv entries, and 'k_mean' {dims.ceildiv(dims.Skv, 16)}",
    ),
    "streams_have_their_length-tiles": (
        changed(BLOCKS, TilesLaunch, keys=dims.ceildiv(dims.Skv, 16)),
        f"attend counts Skv entries, and 'tiles' {dims.ceildiv(dims.Skv, 16)}",
    ),
    "gates_fit_parts": (
        changed(KEYS, MergeLaunch, gates_buf="q"),
        f"merge joins {dims.least(1, dims.ceildiv(dims.Skv, 64))} parts by 'q' of [B, Hq, Sq, D]",
    ),
    "weights_fit_rows": (
        changed(plan_of("weighed"), SelectLaunch, rows_buf="q"),
        "select scores rows [B, Hq, Sq, D] of 1 queries by the weights 'iw' of [B, 6, Sq]",
    ),
    "merges_join_stacks": (
        changed(KEYS, MergeLaunch, parts=3),
        f"merge joins 3 parts of 'parts', which has {dims.least(1, dims.ceildiv(dims.Skv, 64))}",
    ),
    "sinks_end_a_softmax": (
        changed(plan_of("sunk_merge"), AttendLaunch, sinks_buf="table0"),
        "attend reads the sinks 'table0' and writes a part alone; "
        "attend reads the sinks 'table0' and writes a part alone",
    ),
    "sinks_end_a_softmax-kind": (
        changed(WINDOW, AttendLaunch, sinks_buf="partial"),
        "attend takes 'partial' for sinks, which is no list of logits",
    ),
    "sinks_end_a_softmax-rank": (
        resized(plan_of("sunk"), "table0", dims=(2, 2)),
        "attend takes 'table0' for sinks, which is no list of logits",
    ),
    "sinks_end_a_softmax-dtype": (
        resized(plan_of("sunk"), "table0", dtype="int32"),
        "attend takes 'table0' for sinks, which is no list of logits",
    ),
}


@pytest.mark.parametrize("case", WRONG_PLANS)
def test_rule_of_plans_catches_its_fault(case: str) -> None:
    plan, problem = WRONG_PLANS[case]
    assert "; ".join(faults(plan)[rule_of(case)]) == problem


def test_every_rule_has_a_seeded_fault() -> None:
    given = {name for rules in AFTER.values() for name in rules}
    assert {rule_of(case) for case in WRONG_PROGRAMS} == {*RULES_PATTERN, *given}
    assert {rule_of(case) for case in WRONG_PLANS} == set(RULES_PLAN)


def test_a_scan_may_work_in_place_but_only_on_its_counts() -> None:
    assert "writes_are_single" not in faults(KEYS)
    twice = changed(KEYS, SelectLaunch, indices_buf="unit_prefix")
    assert "writes_are_single" in faults(twice)
    assert any(isinstance(x, InvertLaunch) for x in KEYS.launches())
