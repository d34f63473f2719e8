"""From a plan to AscendC: one device file a launch, and the host's tiling they share."""

from __future__ import annotations

import re

from spcomp.backends.ascendc.contexts.host import TilingContext, tiling_context
from spcomp.backends.ascendc.forms import Form, forms_of
from spcomp.backends.ascendc.source_rules import require_allowed
from spcomp.backends.base import Source, SourceFile, Specialisation
from spcomp.codegen.header import digest_of, header
from spcomp.codegen.render import render
from spcomp.ir.plan import Plan
from spcomp.ir.target import Target


def op_name(plan: Plan) -> str:
    """Name the operator of a plan: a C identifier, other for each phase."""
    name = re.sub(r"\W", "_", plan.pattern.partition("(")[0])
    return f"{name}_{plan.phase}"


def emit(plan: Plan, target: Target, spec: Specialisation) -> Source:
    """Render the device file of every launch."""
    return Source(plan, spec, target, tuple(map(_file, forms(plan, target, spec))))


def _file(form: Form) -> SourceFile:
    text = render(f"ascendc/kernels/{form.kernel}.h.jinja", form.context)
    file = SourceFile(form.number, form.kernel, text, ".h")
    require_allowed(file.file_name, text, form.struct, [field.name for field in form.fields])
    return file


def forms(plan: Plan, target: Target, spec: Specialisation) -> tuple[Form, ...]:
    """Give the forms of a plan's launches."""
    return forms_of(
        plan, spec, op_name(plan), lambda launch: _header(plan, target, spec, launch.kernel)
    )


def tiling(
    plan: Plan, target: Target, spec: Specialisation, made: tuple[Form, ...]
) -> TilingContext:
    """Give the context of the host's tiling; made: the forms of the plan."""
    lines = _header(plan, target, spec, "tiling on the host")
    return tiling_context(plan, spec, op_name(plan), made, lines)


def tiling_header(context: TilingContext) -> str:
    """Render the header that host and kernels share."""
    return render("ascendc/host/tiling.h.jinja", context)


def tiling_source(context: TilingContext) -> str:
    """Render the host's tiling."""
    return render("ascendc/host/tiling.cpp.jinja", context)


def project_header(plan: Plan, target: Target, spec: Specialisation) -> tuple[str, ...]:
    """Give the first lines of the files around the kernels."""
    name = plan.pattern.partition("(")[0]
    command = f"spcomp compile {name} {_options(plan, target, spec)} -o DIR"
    return header(plan.pattern, digest_of(plan.pattern), plan.order, command)


def _header(plan: Plan, target: Target, spec: Specialisation, what: str) -> tuple[str, ...]:
    name = plan.pattern.partition("(")[0]
    command = f"spcomp show {name} --at source {_options(plan, target, spec)}"
    return header(plan.pattern, digest_of(plan.pattern), f"{plan.order} / {what}", command)


def _options(plan: Plan, target: Target, spec: Specialisation) -> str:
    settings = re.findall(r"\b(\w+=[^,)]+)", plan.pattern)
    options = [f"--set {setting}" for setting in settings]
    options += [f"--phase {plan.phase}", f"--target {target.name}", f"--dtype {spec.dtype}"]
    options += [f"--head-dim {spec.head_dim}", f"--value-dim {spec.value_dim}"]
    return " ".join(options)
