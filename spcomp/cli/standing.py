"""Where each shipped pattern runs: what emits its kernels, and what refuses it in which words."""

from __future__ import annotations

from typing import get_args

from spcomp import compiler
from spcomp.cli.options import setup_for
from spcomp.dsl import Pattern
from spcomp.errors import CannotLower, Refused
from spcomp.ir.plan import Phase

REFERENCE = "reference"
TARGETS = ("sm90", "ascend910b")
"""One target of each backend that makes kernels."""

DTYPE, HEAD_DIM = "bfloat16", 128
EMITTED, RUNS = "emitted", "runs"

Standing = dict[Phase, dict[str, str]]


def standing_of(pattern: Pattern) -> Standing:
    """Tell what each phase of a pattern is on the reference and on each target: `runs`, `emitted`
    where lowering and rendering succeed (nothing is compiled), else the refusal's sentence.

    For bfloat16 and a head dimension of 128, with the hyper-parameters of the pattern.
    """
    return {
        phase: {REFERENCE: RUNS, **{name: _on(pattern, name, phase) for name in TARGETS}}
        for phase in get_args(Phase)
    }


def merged(standing: Standing) -> list[tuple[str, str, str]]:
    """Give (place, phases, what it is), phases that agree on one line, by place."""
    rows: dict[tuple[str, str], list[str]] = {}
    for phase, places in standing.items():
        for place, what in places.items():
            rows.setdefault((place, what), []).append(phase)
    order = (REFERENCE, *TARGETS)
    found = [(place, ", ".join(phases), what) for (place, what), phases in rows.items()]
    return sorted(found, key=lambda row: order.index(row[0]))


def _on(pattern: Pattern, target: str, phase: Phase) -> str:
    setup = setup_for(target, DTYPE, HEAD_DIM, None)
    try:
        plan = compiler.lower(
            pattern, backend=setup.backend, target=setup.target, spec=setup.spec, phase=phase
        )
        compiler.emit(plan, setup.backend, setup.target, setup.spec)
    except (CannotLower, Refused) as error:
        return error.message.format(**error.figures)
    return EMITTED
