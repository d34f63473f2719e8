"""compile(pattern) -> Attention: the callable a user holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from spcomp import arguments, compiler
from spcomp.backends import registry
from spcomp.backends.base import Backend, Executable, Source, Specialisation
from spcomp.dsl.pattern import Pattern, PatternFunction
from spcomp.dsl.tensors import canonical_lists
from spcomp.errors import UnknownChoice, WrongArguments
from spcomp.ir import dims
from spcomp.ir.nodes import Attend, Captured, Given, Node
from spcomp.ir.nodes.base import rebuild
from spcomp.ir.plan import LoopOrder, Phase, Plan
from spcomp.ir.schedule import AxisChanges, Schedule
from spcomp.ir.target import Target
from spcomp.settings import current

DECODE_ROWS = 16
MOST_ADMITTED = 256  # calls of different shapes that need no check any more
ORDERS: tuple[LoopOrder, ...] = ("query_major", "key_major", "gather")


@dataclass(frozen=True, slots=True)
class Built:
    """One plan of a pattern, ready to run; without plan and source where a backend interprets the
    pattern itself."""

    plan: Plan | None
    target: Target
    spec: Specialisation
    source: Source | None
    executable: Executable


Admitted: TypeAlias = tuple[dict[str, int], Executable, dict[str, Tensor]]
"""A call that passed its checks: its symbols, what runs it, the tables of its pattern."""


@dataclass(slots=True)
class Attention:
    """A compiled pattern. Shapes, dtype and device are taken from the tensors of each call.

    Kernels are made once for each (phase, dtype, head dimensions, device kind), never for a length.
    """

    pattern: Pattern
    backend_name: str | None = None
    order: LoopOrder | None = None
    axes: AxisChanges | None = None
    _built: dict[tuple[object, ...], Built] = field(default_factory=dict, repr=False)
    _canonical: Pattern | None = field(default=None, repr=False)
    _versions: tuple[int, ...] = field(default=(), repr=False)
    _listed: tuple[Tensor, ...] | None = field(default=None, repr=False)
    _admitted: dict[tuple[object, ...], Admitted] = field(default_factory=dict, repr=False)

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv], any strides with a unit last one. Returns
        out [B,Hq,Sq,Dv] in q's dtype, and with `return_lse` also lse [B,Hq,Sq] f32, natural log. A
        row that sees no key gives 0 and -inf. scale: softmax scale of this call; default the
        pattern's, else 1/sqrt(D).
        Raises: the errors of `spcomp.errors` for shapes, dtypes, devices, masks and gradients,
                 before any compile.
        """
        out, lse = self._attend(q, k, v, scale, {})
        return (out, lse) if return_lse else out

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, kept: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.pattern.tensors:
            self._resort_changed_lists()
        key = (scale, *arguments.call_key(q, k, v, *self.pattern.tensors.values()))
        known = self._admitted.get(key)
        if known is None:
            env = self._checked(q, k, v)
            if 0 in (env["B"], env["Sq"], env["Skv"]):
                return _nothing(q, v)
            known = env, self.built(q, k, v, scale=scale).executable, self._tables()
            if len(self._admitted) >= MOST_ADMITTED:
                self._admitted.clear()
            self._admitted[key] = known
        env, executable, tables = known
        return executable.run({"q": q, "k": k, "v": v, **tables}, env, kept)

    def attend_kept(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: Mapping[str, Tensor],
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend with the state a cache holds (`KVCache.attend`); returns (out, lse)."""
        return self._attend(q, k, v, scale, kept)

    def update_state(self, k: Tensor, v: Tensor, kept: Mapping[str, Tensor], begin: int) -> None:
        """Bring a cache's state up to date for the tokens from `begin` on (`KVCache.append`)."""
        q = k[:, :, -1:]
        env = arguments.dims_of(q, k, v)
        built = self.built(q, k, v)
        built.executable.update({"q": q, "k": k, "v": v}, env, kept, begin)

    def _checked(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
        env = arguments.dims_of(q, k, v)
        arguments.check_tensors(q, k, v)
        if self.pattern.tensors or env["Sq"] == 0:
            arguments.check_masks(self.pattern, env, str(q.device))
        name = self._backend(q).name
        if name != "reference":
            arguments.check_strides(q, k, v)
        if name != "reference" and torch.is_grad_enabled():
            tables = {f"the table {n}": t for n, t in self.pattern.tensors.items()}
            arguments.check_gradients(name, {"q": q, "k": k, "v": v, **tables})
        return env

    def _resort_changed_lists(self) -> None:
        """Forget the plans when a list of the pattern was written to since it was sorted for them.

        Tables of a rule need no such care: the kernels read them at each call.
        """
        versions = tuple(0 if t.is_inference() else t._version for t in self._lists())
        if versions != self._versions:
            self._versions = versions
            self._canonical = None
            self._built.clear()
            self._admitted.clear()

    def _lists(self) -> tuple[Tensor, ...]:
        """Give the index lists, counts and block masks the pattern brought."""
        if self._listed is None:
            given = [n for n in self.pattern.program.stages() if isinstance(n, Given)]
            sides = [side for n in given for side in (n.tensor, n.counts)]
            self._listed = tuple(
                self.pattern.tensors[side.name] for side in sides if isinstance(side, Captured)
            )
        return self._listed

    def _tables(self) -> dict[str, Tensor]:
        if not self.pattern.tensors:
            return {}
        if self._canonical is None:
            self._canonical = canonical_lists(self.pattern)
        return self._canonical.tensors

    def _backend(self, q: Tensor) -> Backend:
        name = self.backend_name or current().backend
        if name == "auto":
            name = "reference" if q.device.type == "cpu" else "triton"
        return registry.backend(name)

    def built(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Built:
        """Give the plan, source and executable a call with these tensors runs."""
        phase = phase_of(q)
        spec = arguments.specialisation(q, v)
        key = (phase, spec, q.device.type, q.device.index, scale)
        if key not in self._built:
            backend = self._backend(q)
            target = backend.target_of(str(q.device))
            self._built[key] = self._build(backend, target, spec, phase, scale)
        return self._built[key]

    def _build(
        self,
        backend: Backend,
        target: Target,
        spec: Specialisation,
        phase: Phase,
        scale: float | None,
    ) -> Built:
        pattern = self.pattern if scale is None else with_scale(self.pattern, scale)
        order = self.order if phase == "prefill" else None
        if self.order is None and not self.axes:
            interpreted = backend.interpret(canonical_lists(pattern).program)
            if interpreted is not None:
                return Built(None, target, spec, None, interpreted)
        schedule = Schedule("query_major", backend.axes(target, spec)).changed(self.axes or {})
        plan = compiler.lower(
            pattern,
            backend=backend,
            target=target,
            spec=spec,
            phase=phase,
            order=order,
            schedule=schedule,
        )
        source = backend.emit(plan, target, spec)
        return Built(plan, target, spec, source, backend.build(source))

    def to_mask(self, q: Tensor, k: Tensor) -> Tensor:
        """Give the dense mask the pattern means, bool [B,Hq,Sq,Skv]; for small sizes."""
        from spcomp.backends.reference.pattern import to_mask

        v = k
        arguments.check_masks(self.pattern, arguments.dims_of(q, k, v), str(q.device))
        return to_mask(self.pattern.program, {"q": q, "k": k, "v": v, **self.pattern.tensors})

    def explain(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        """Say what a call with these tensors runs, and why."""
        env = self._checked(q, k, v)
        built = self.built(q, k, v)
        return explanation(built, env)


def phase_of(q: Tensor) -> Phase:
    """Tell decode (at most DECODE_ROWS query rows) from prefill."""
    return "decode" if q.shape[2] <= DECODE_ROWS else "prefill"


def explanation(built: Built, env: Mapping[str, int]) -> str:
    """Describe a plan for one shape: backend, loop order and reason, launches, scratch."""
    from spcomp.ir.passes.place_buffers import slab_rows

    plan = built.plan
    if plan is None:
        return f"the {built.target.backend} backend interprets the pattern; it has no launches"
    rows = min(slab_rows(plan, env, built.spec.element_bytes), env["Sq"])
    here = {**env, "R": rows, "R0": 0}
    lines = [
        f"{plan.pattern}",
        f"  backend   {built.target.backend} on {built.target.title} "
        f"({built.target.name}), {built.spec.dtype}",
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


def with_scale(pattern: Pattern, scale: float) -> Pattern:
    """Give the pattern with another softmax scale."""

    def visit(node: Node) -> Node:
        changed = rebuild(node, visit)
        return replace(changed, scale=scale) if isinstance(changed, Attend) else changed

    return Pattern(replace(pattern.program, result=visit(pattern.program.result)), pattern.tensors)


def _nothing(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give the result of a call without queries or without keys."""
    out = q.new_zeros((*q.shape[:3], v.shape[-1]))
    return out, torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)


def compile(
    pattern: Pattern | PatternFunction,
    *,
    backend: str | None = None,
    order: LoopOrder | None = None,
    axes: AxisChanges | None = None,
) -> Attention:
    """Compile a pattern to a callable.

    pattern: `quest(page=16)`, or a function under @pattern (its defaults are taken). backend:
    "reference", "triton", or None for the tensors' device (CPU: reference; GPU: triton). order: a
    prefill loop order to insist on: "query_major", "key_major" or "gather". axes: values of
    schedule axes by kernel, `{"attend": {"block_q": 64}}`, as a tuning report prints them; others
    keep the backend's default. A wrong name is an error of the first call, which knows the backend.
    Raises: WrongArguments, UnknownBackend, UnknownChoice; and, here and not at the first call, what
             is wrong with the pattern
    itself: ForcedSetTooLarge, WrongStage, CannotLower.
    """
    if isinstance(pattern, PatternFunction):
        pattern = pattern()
    if not isinstance(pattern, Pattern):
        raise WrongArguments(
            pattern=_name(pattern),
            problem=f"is a {type(pattern).__name__}, not a pattern",
            signature="a function under @spcomp.pattern, or the result of calling one",
        )
    if backend is not None:
        registry.backend(backend)
    if order is not None and order not in ORDERS:
        shown = ", ".join(repr(o) for o in ORDERS)
        raise UnknownChoice(verb="compile", name="order", value=order, choices=shown)
    compiler.normalise(pattern.program)
    return Attention(pattern, backend, order, axes)


def _name(value: Any) -> str:
    return str(getattr(value, "__name__", type(value).__name__))
