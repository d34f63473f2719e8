"""One launch of a plan after the other in Triton's interpreter, on the buffers that the plan's own
interpreter wrote before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spcomp import compiler
from spcomp.backends import registry
from spcomp.backends.base import Specialisation
from spcomp.backends.reference.plan import RUNNERS, Trace, env_of, run_plan
from spcomp.backends.reference.slab import UNWRITTEN, Slab
from spcomp.backends.triton import generated
from spcomp.backends.triton.layouts import Call, layout_of
from spcomp.backends.triton.sites import Site
from spcomp.dsl import Pattern
from spcomp.dsl.tensors import canonical_lists
from spcomp.ir.plan import Launch, Phase, Plan
from spcomp.ir.schedule import AxisChanges, Schedule

BACKEND = registry.backend("triton")


@dataclass(frozen=True)
class Fired:
    """What one launch wrote: by the kernel, in plain torch in the dtype of the call, and in
    float64."""

    launch: Launch
    plan: Plan
    env: Mapping[str, int]
    before: Mapping[str, Tensor]
    got: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]
    exact: Mapping[str, Tensor]


def fired(
    pattern: Pattern,
    tensors: tuple[Tensor, Tensor, Tensor],
    phase: Phase,
    kernels: frozenset[str],
    *,
    axes: AxisChanges,
    slab_rows: int | None = None,
) -> Iterator[Fired]:
    """Fire the launches of some kernels, slab by slab."""
    q, k, v = tensors
    canonical = canonical_lists(pattern)
    target = BACKEND.target_of("cpu")
    dtype = str(q.dtype).removeprefix("torch.")
    spec = Specialisation(dtype, q.shape[3], v.shape[3])
    schedule = Schedule("query_major", BACKEND.axes(target, spec)).changed(axes)
    plan = compiler.lower(
        canonical, backend=BACKEND, target=target, spec=spec, phase=phase, schedule=schedule
    )
    files = BACKEND.emit(plan, target, spec).files
    inputs = {"q": q, "k": k, "v": v, **canonical.tensors}
    traces: list[Trace] = []
    run_plan(plan, inputs, slab_rows=slab_rows, trace=traces)
    for trace in traces:
        env = {**env_of(plan, inputs), "R": trace.rows, "R0": trace.begin}
        for launch, file in zip(plan.launches(), files, strict=True):
            if launch.kernel in kernels:
                site = Site(launch, plan, generated.read(launch.kernel, file.text), dtype, True)
                yield _one(launch, site, plan, trace, env)


def _one(launch: Launch, site: Site, plan: Plan, trace: Trace, env: dict[str, int]) -> Fired:
    before = {n: x.detach().clone() for n, x in trace.buffers.items()}
    for name in launch.writes():
        unwritten = torch.nan if before[name].is_floating_point() else UNWRITTEN
        before[name].fill_(unwritten)
    got = {n: x.clone() for n, x in before.items()}
    layouts = {
        n: layout_of(place, tuple(x.shape), x.stride(), 0, x.element_size())
        for place, (n, x) in enumerate(got.items())
    }
    shot = site.shot(Call(layouts, env), -1)
    if shot is not None:
        shot.fire(list(got.values()))
    return Fired(
        launch,
        plan,
        env,
        before,
        got,
        _ran(launch, plan, before, env),
        _ran(
            launch,
            plan,
            {n: x.double() if x.is_floating_point() else x for n, x in before.items()},
            env,
        ),
    )


def _ran(
    launch: Launch, plan: Plan, before: Mapping[str, Tensor], env: Mapping[str, int]
) -> dict[str, Tensor]:
    slab = Slab(plan, {n: x.clone() for n, x in before.items()}, env)
    RUNNERS[type(launch)](launch, slab)
    return slab.tensors
