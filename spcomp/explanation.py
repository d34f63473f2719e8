"""What a call runs and why, as text."""

from __future__ import annotations

from collections.abc import Mapping

from spcomp.backends.base import Specialisation
from spcomp.ir import dims
from spcomp.ir.passes.place_buffers import slab_rows
from spcomp.ir.plan import Plan
from spcomp.ir.target import Target


def explanation(
    plan: Plan | None, spec: Specialisation, target: Target, env: Mapping[str, int]
) -> str:
    """Describe a plan for one shape: backend, loop order and reason, launches, scratch."""
    if plan is None:
        return f"the {target.backend} backend interprets the pattern; it has no launches"
    rows = min(slab_rows(plan, env, spec.element_bytes), env["Sq"])
    here = {**env, "R": rows, "R0": 0}
    lines = [
        f"{plan.pattern}",
        f"  backend   {target.backend} on {target.title} ({target.name}), {spec.dtype}",
        f"  phase     {plan.phase}: {env['Sq']} query rows, {env['Skv']} keys",
        *(f"  order     {note}" for note in plan.notes),
        f"  slabs     {-(-env['Sq'] // rows)} of {rows} query rows",
        "  launches",
    ]
    for launch in plan.launches():
        axes = ", ".join(f"{k}={v}" for k, v in launch.axes)
        lines.append(f"    {launch.kernel:<14} {' + '.join(launch.stages):<18} {axes}")
    lines.append("  scratch")
    for buffer in plan.scratch():
        shape = [dims.evaluate(d, here) for d in buffer.dims]
        lines.append(f"    {buffer.name:<14} {buffer.dtype} {shape}")
    return "\n".join(lines)
