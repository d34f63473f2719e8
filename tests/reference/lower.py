"""Patterns lowered to plans with tiles so small that short calls have many of them."""

from __future__ import annotations

from typing import get_args

from spcomp.backends.reference.axes import AXES
from spcomp.dsl import Pattern
from spcomp.dsl.tensors import canonical_lists
from spcomp.errors import CannotLower
from spcomp.ir.passes import PATTERN_PIPELINE, cut
from spcomp.ir.plan import LoopOrder, Phase, Plan
from spcomp.ir.schedule import Schedule

SMALL = (
    Schedule("query_major", AXES)
    .with_axes("attend", block_q=32, block_k=16)
    .with_axes("attend_gather", block_k=16, programs=8)
    .with_axes("attend_keys", block_m=16, block_k=16)
    .with_axes("invert_count", rows=16)
    .with_axes("invert_fill", rows=16)
)
ORDERS: tuple[LoopOrder, ...] = get_args(LoopOrder)
PHASES: tuple[Phase, ...] = get_args(Phase)


def plan_of(pattern: Pattern, phase: Phase = "prefill", order: LoopOrder | None = None) -> Plan:
    """Lower a pattern whose lists are canonical."""
    program = pattern.program
    for step in PATTERN_PIPELINE:
        program = step(program)
    return cut(program, phase, SMALL, order)


def plans_of(pattern: Pattern) -> tuple[Pattern, tuple[Plan, ...]]:
    """Give the pattern with canonical lists, and its plans in every phase and loop order it has."""
    canonical = canonical_lists(pattern)
    found: dict[Plan, None] = {}
    for phase in PHASES:
        for order in ORDERS:
            try:
                found[plan_of(canonical, phase, order)] = None
            except CannotLower:
                continue
    return canonical, tuple(found)
