"""lower(pattern) -> Plan -> Source -> Executable. No tuning, no globals."""

from __future__ import annotations

from collections.abc import Mapping

from spcomp.backends import registry
from spcomp.backends.base import Backend, Executable, Source, Specialisation, default_schedule
from spcomp.dsl.pattern import Pattern
from spcomp.dsl.tensors import canonical_lists
from spcomp.errors import Refused, SizeUnknown
from spcomp.ir.passes import PATTERN_PIPELINE, cut
from spcomp.ir.plan import LoopOrder, Phase, Plan
from spcomp.ir.program import Program
from spcomp.ir.schedule import AxisChanges, Schedule
from spcomp.ir.spec import check
from spcomp.ir.target import Target
from spcomp.settings import current

DECODE_ROWS = 16
"""At most this many query rows are the phase decode."""


def phase_for(rows: int) -> Phase:
    """Give the phase of a call with so many query rows."""
    return "decode" if rows <= DECODE_ROWS else "prefill"


def normalise(program: Program) -> Program:
    """Run the passes of the pattern level.

    Raises: WrongStage, ForcedSetTooLarge, CannotLower; RuleBroken under SPCOMP_CHECK=1.
    """
    checking = current().check
    for step in PATTERN_PIPELINE:
        program = step(program)
        if checking:
            check(program, step.__name__)
    return program


def lower(
    pattern: Pattern,
    *,
    backend: Backend,
    target: Target,
    spec: Specialisation,
    phase: Phase = "prefill",
    order: LoopOrder | None = None,
    schedule: Schedule | None = None,
) -> Plan:
    """Lower a pattern to the plan of one phase.

    order: a loop order to insist on; None lets the lowering choose and say why. schedule: axis
    values, default the backend's.
    Raises: what the passes raise, SizeUnknown for a width that `spec` does not hold, and Refused
        when the backend will not build the plan.
    """
    program = normalise(canonical_lists(pattern).program)
    for name in program.widths():
        if name not in dict(spec.widths):
            raise SizeUnknown(where=program.where, pattern=program.name, name=name)
    axes = schedule or default_schedule(backend, target, spec)
    plan = cut(program, phase, axes, order, spec.heads, spec.is_packed)
    if current().check:
        check(plan, "cut")
    refusal = backend.refuses(plan, target, spec)
    if refusal is not None:
        raise Refused(
            backend=backend.name,
            what=refusal.what,
            reason=refusal.reason,
            way_out=refusal.way_out,
            where=program.where,
        )
    return plan


def plan_for(
    pattern: Pattern,
    shape: Mapping[str, int],
    dtype: str,
    order: LoopOrder | None,
    axes: AxisChanges,
    target: str,
) -> tuple[Plan, Specialisation, Target]:
    """Lower a pattern for a call on a chip that need not be here; shape: Sq, D, Dv, and Hq, Hkv and
    the pattern's own dims where they are there, count.

    Raises: UnknownTarget, UnknownChoice, and what lowering raises.
    """
    chip = registry.target(target)
    backend = registry.backend(chip.backend)
    heads = shape.get("Hq", 0), shape.get("Hkv", 0)
    widths = tuple((n, shape[n]) for n in pattern.program.widths() if n in shape)
    spec = Specialisation(dtype, shape["D"], shape["Dv"], heads=heads, widths=widths)
    phase = phase_for(shape["Sq"])
    schedule = default_schedule(backend, chip, spec).changed(axes)
    plan = lower(
        pattern,
        backend=backend,
        target=chip,
        spec=spec,
        phase=phase,
        order=order if phase == "prefill" else None,
        schedule=schedule,
    )
    return plan, spec, chip


def emit(plan: Plan, backend: Backend, target: Target, spec: Specialisation) -> Source:
    """Generate the source of a plan."""
    return backend.emit(plan, target, spec)


def build(source: Source, backend: Backend) -> Executable:
    """Make source runnable on this machine."""
    return backend.build(source)
