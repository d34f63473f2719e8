"""compile(pattern) -> Attention: the callable a user holds."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args, overload
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from spcomp import arguments, call_tensors, compiler, packed, torch_op
from spcomp.backends import registry
from spcomp.backends.base import Backend, Specialisation, default_schedule
from spcomp.built import Admitted, Built, Epoch
from spcomp.dsl.pattern import Pattern, PatternFunction
from spcomp.dsl.scaling import with_scale
from spcomp.dsl.tensors import canonical_lists
from spcomp.errors import NotWarmedUp, UnknownChoice, WrongArguments
from spcomp.explanation import explanation
from spcomp.handles import handle_of, lists_of, versions_of
from spcomp.ir.plan import LoopOrder, Phase
from spcomp.ir.program import Program
from spcomp.ir.schedule import AxisChanges
from spcomp.ir.target import Target
from spcomp.settings import current

MOST_ADMITTED = 256  # calls of different shapes that need no check any more
MOST_BUILT = 64  # plans of one pattern: phases, dtypes, devices, scales, widths of lists
_NOTHING_KEPT: Mapping[str, Tensor] = {}
ORDERS: tuple[LoopOrder, ...] = get_args(LoopOrder)


class Compiled:
    """What equal compiles share: program, options, and the plans built of them. It holds no
    tensor of the pattern."""

    def __init__(
        self,
        pattern: Pattern,
        backend: str | None,
        order: LoopOrder | None,
        axes: AxisChanges | None,
        handle: str,
    ) -> None:
        self.program: Program = pattern.program
        self.table_names = tuple(pattern.tensors)
        self.takes = pattern.program.arguments()
        self.backend, self.order, self.axes, self.handle = backend, order, axes, handle
        self.plans: dict[tuple[object, ...], Built] = {}
        self.lock = threading.RLock()
        self._by_tables: WeakValueDictionary[tuple[int, ...], Attention] = WeakValueDictionary()
        self._joining = threading.Lock()
        self._all: WeakSet[Attention] = WeakSet()
        self._without_tables: Attention | None = None

    def backend_of(self, kind: str) -> Backend:
        """Give the backend of calls on a kind of device."""
        name = self.backend or current().backend
        if name == "auto":
            name = "reference" if kind == "cpu" else "triton"
        return registry.backend(name)

    def backend_name(self, device: torch.device) -> str:
        """Name the backend of a call on a device."""
        return self.backend_of(device.type).name

    def join(self, attention: Attention) -> None:
        """Note, weakly, one more compile that means this."""
        with self._joining:
            self._all.add(attention)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """Attend with these tables, and what the call brought behind them; returns (out, lse)."""
        count = len(self.table_names)
        given = tuple(tables[count:])
        return self._with(tables[:count])._attend(q, k, v, scale, _NOTHING_KEPT, given)

    def _with(self, tables: Sequence[Tensor]) -> Attention:
        """Give the compile that brought these very tables, which it keeps alive, so that their
        identities cannot come to mean others; a new one where there is none."""
        wanted = tuple(map(id, tables))
        found = self._by_tables.get(wanted)
        if found is None:
            with self._joining:
                alive = list(self._all)
            found = next((a for a in alive if tuple(map(id, a.tables)) == wanted), None)
            if found is None:
                pattern = Pattern(self.program, dict(zip(self.table_names, tables, strict=True)))
                found = Attention(pattern, self.backend, self.order, self.axes, self)
            self._by_tables[wanted] = found
            if not tables:
                self._without_tables = found
        return found


@dataclass(eq=False)
class Attention:
    """A compiled pattern. Shapes, dtype and device are taken from the tensors of each call.

    Kernels are made once for each (phase, dtype, head dimensions, device kind), never for a length.
    Threads may share it. Copies and pickles compile again. `handle` names what it means in graphs
    (`spcomp.torch_op`).
    """

    pattern: Pattern
    backend_name: str | None = None
    order: LoopOrder | None = None
    axes: AxisChanges | None = None
    compiled: Compiled = field(default=None, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Join the compiles that mean the same."""
        options = self.backend_name, self.order, self.axes
        if self.compiled is None:
            handle = handle_of(self.pattern, *options)
            make = partial(Compiled, self.pattern, *options, handle)
            self.compiled = torch_op.shared(handle, make)
        self.handle = self.compiled.handle
        self.tables = list(self.pattern.tensors.values())
        self.takes = self.compiled.takes
        self._lists = lists_of(self.pattern)
        self._epoch = Epoch(versions_of(self._lists))
        self.compiled.join(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle what it was compiled from."""
        return Attention, (self.pattern, self.backend_name, self.order, self.axes)

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: Literal[False] = False,
        **tensors: Tensor,
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
        **tensors: Tensor,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool,
        **tensors: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        **tensors: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv], any strides with a unit last one. Returns
        out [B,Hq,Sq,Dv] in q's dtype, and with `return_lse` also lse [B,Hq,Sq] f32, natural log. A
        row that sees no key gives 0 and -inf. scale: softmax scale of this call; default the
        pattern's, else 1/sqrt(D). tensors: what the pattern takes beside q, k and v, by name. Under
        torch.autocast q, k, v and tensors declared in their dtype are cast to its dtype first.
        Raises: the errors of `spcomp.errors` for shapes, dtypes, devices, masks and gradients,
                 before any compile; NotWarmedUp inside the capture of a CUDA graph.
        """
        given = self._given(tensors) if tensors or self.takes else ()
        if torch.compiler.is_compiling():
            q, k, v, given = call_tensors.autocast(self.takes, q, k, v, given)
            out, lse = torch_op.attend(q, k, v, [*self.tables, *given], self.handle, scale)
        else:
            out, lse = self._attend(q, k, v, scale, _NOTHING_KEPT, given)
        return (out, lse) if return_lse else out

    def _given(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return call_tensors.in_order(self.pattern.name, self.takes, tensors)

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend to packed sequences: each one alone, as a call of its own would.

        q [Tq,Hq,D], k [Tk,Hkv,D], v [Tk,Hkv,Dv], any strides with a unit last one; sequence n is
        rows cu_seqlens_q[n] … cu_seqlens_q[n+1]-1 of q and likewise of k and v. cu_seqlens: int32
        [B+1] on the tensors' device, from 0 to Tq (Tk), never falling; a length may be 0, and those
        of q and k differ freely. max_seqlen: at least the longest length, from 1 on; computed where
        it is left out and the lengths can be read without waiting for a device. Returns out
        [Tq,Hq,Dv] in q's dtype, and with `return_lse` also lse [Hq,Tq] f32, natural log.

        The values of cu_seqlens are checked on the CPU. On a device they are not: reading them
        would wait for it. Rows that no sequence holds, or that lie past max_seqlen, are undefined
        there, and keys past it are not seen. Inside torch.compile the call cuts the graph.
        Raises: what a call raises; WrongLengths, LengthMissing, CannotPack.
        """
        lengths = packed.Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        run = packed.outside_the_graph if torch.compiler.is_compiling() else packed.attend
        out, lse = run(self, q, k, v, lengths, scale)
        return (out, lse) if return_lse else out

    def explain_varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> str:
        """Say what `varlen` with these tensors runs, and why."""
        lengths = packed.Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        built, env = packed.built_for(self, q, k, v, lengths, None)
        return (
            packed.ONE_BY_ONE
            if built is None
            else explanation(built.plan, built.spec, built.target, env)
        )

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        kept: Mapping[str, Tensor],
        given: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        if torch.is_autocast_enabled("cuda" if q.is_cuda else torch_op.autocast_kind(q)):
            if not kept:
                q, k, v, given = call_tensors.autocast(self.takes, q, k, v, given)
            with torch_op.without_autocast(q):
                return self._attend(q, k, v, scale, kept, given)
        epoch = self.now() if self._lists else self._epoch
        key = (scale, *arguments.call_key(q, k, v, *self.tables, given=given))
        known = epoch.admitted.get(key)
        if known is None:
            if q.is_meta:  # nothing to compute, and no backend that could
                tensors = [*self.tables, *given]
                out, lse = torch_op.attend(q, k, v, tensors, self.handle, scale)
                return out, lse
            env = self._checked(q, k, v, given)
            if 0 in (env["B"], env["Sq"], env["Skv"]):
                return _nothing(q, v)
            built = self._built(epoch, q, k, v, scale, given)
            known = env, built.executable, self.tables_of(epoch)
            self.admit(epoch, key, known)
        env, executable, tables = known
        inputs = {"q": q, "k": k, "v": v, **tables}
        if given:
            inputs |= call_tensors.named(self.takes, given)
        return executable.run(inputs, env, kept)

    def admit(self, epoch: Epoch, key: tuple[object, ...], known: Admitted) -> None:
        """Keep a call that passed its checks; all others go when there are too many."""
        if len(epoch.admitted) >= MOST_ADMITTED:
            epoch.admitted.clear()
        epoch.admitted[key] = known

    def of(self, pattern: Pattern) -> Attention:
        """Give another pattern compiled with the same options."""
        return Attention(pattern, self.backend_name, self.order, self.axes)

    def attend_kept(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: Mapping[str, Tensor],
        *,
        scale: float | None = None,
        **tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Attend with the state a cache holds (`KVCache.attend`); returns (out, lse)."""
        return self._attend(q, k, v, scale, kept, self._given(tensors))

    def update_state(self, k: Tensor, v: Tensor, kept: Mapping[str, Tensor], begin: int) -> None:
        """Bring a cache's state up to date for the tokens from `begin` on (`KVCache.append`)."""
        q = k[:, :, -1:]
        env = arguments.dims_of(q, k, v)
        built = self._built(self.now(), q, k, v, None)
        built.executable.update({"q": q, "k": k, "v": v}, env, kept, begin)

    def _checked(
        self, q: Tensor, k: Tensor, v: Tensor, given: tuple[Tensor, ...]
    ) -> dict[str, int]:
        env = arguments.dims_of(q, k, v)
        arguments.check_tensors(q, k, v)
        call_tensors.check(self.takes, given, q, env)
        if self.tables or env["Sq"] == 0:
            arguments.check_masks(self.pattern, env, str(q.device))
        name = self.compiled.backend_name(q.device)
        if name != "reference":
            arguments.check_strides(q, k, v)
            call_tensors.check_strides(self.takes, given)
        if name != "reference" and torch.is_grad_enabled():
            tables = {f"the table {n}": t for n, t in self.pattern.tensors.items()}
            own = call_tensors.named(self.takes, given)
            arguments.check_gradients(name, {"q": q, "k": k, "v": v, **tables, **own})
        return env

    def now(self) -> Epoch:
        """Begin a new epoch when a list of the pattern was written to since it was sorted.

        Tables of a rule need no such care: the kernels read them at each call.
        """
        epoch, versions = self._epoch, versions_of(self._lists)
        if versions != epoch.versions:
            epoch = self._epoch = Epoch(versions)
        return epoch

    def _canonical(self, epoch: Epoch) -> Pattern:
        """Give the pattern with its lists sorted; twice at once is harmless."""
        if epoch.canonical is None:
            if self._lists and _is_captured(self._lists[0]):
                raise NotWarmedUp(
                    what=f"the lists of the pattern '{self.pattern.name}' are not sorted yet",
                    more=(
                        ", with the same list tensors, and do not write to them in between; "
                        'torch.compile(mode="reduce-overhead") captures copies of them, so choose '
                        "another mode"
                    ),
                )
            epoch.canonical = canonical_lists(self.pattern)
        return epoch.canonical

    def tables_of(self, epoch: Epoch) -> dict[str, Tensor]:
        """Give the pattern's tensors by the names that plans have for them."""
        return self._canonical(epoch).tensors if self.tables else {}

    def built(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **tensors: Tensor
    ) -> Built:
        """Give the plan, source and executable a call with these tensors runs."""
        return self._built(self.now(), q, k, v, scale, self._given(tensors))

    def _built(
        self,
        epoch: Epoch,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        given: tuple[Tensor, ...] = (),
    ) -> Built:
        spec = call_tensors.specialisation(self.takes, given, q, k, v)
        return self.built_as(epoch, q, phase_of(q), spec, scale)

    def built_as(
        self, epoch: Epoch, q: Tensor, phase: Phase, spec: Specialisation, scale: float | None
    ) -> Built:
        """Give the plan, source and executable of calls of one kind on q's device."""
        device = q.device
        backend = self.compiled.backend_of(device.type)
        widths = tuple(t.shape for t in self.tables_of(epoch).values()) if self._lists else ()
        key = (backend.name, phase, spec, device.type, device.index, scale, widths)
        plans = self.compiled.plans
        found = plans.get(key)
        if found is not None:
            return found
        with self.compiled.lock:
            found = plans.get(key)
            if found is None:
                if _is_captured(q):
                    raise NotWarmedUp(
                        what=f"no kernel of the pattern '{self.pattern.name}' is compiled for "
                        f"{phase} in {spec.dtype} with D = {spec.head_dim} and "
                        f"Dv = {spec.value_dim}",
                        more=", on tensors of the same dtype, head dimensions and device",
                    )
                target = backend.target_of(str(device))
                found = self._build(epoch, backend, target, spec, phase, scale)
                if versions_of(self._lists) != epoch.versions:
                    return found  # written to meanwhile: its widths may be others
                if len(plans) >= MOST_BUILT:
                    plans.clear()
                plans[key] = found
        return found

    def _build(
        self,
        epoch: Epoch,
        backend: Backend,
        target: Target,
        spec: Specialisation,
        phase: Phase,
        scale: float | None,
    ) -> Built:
        order = self.order if phase == "prefill" else None
        if self.order is None and not self.axes:
            sorted_pattern = _scaled(self._canonical(epoch), scale)
            interpreted = backend.interpret(sorted_pattern.program)
            if interpreted is not None:
                return Built(None, target, spec, None, interpreted)
        schedule = default_schedule(backend, target, spec).changed(self.axes or {})
        plan = compiler.lower(
            _scaled(self.pattern, scale),
            backend=backend,
            target=target,
            spec=spec,
            phase=phase,
            order=order,
            schedule=schedule,
        )
        source = backend.emit(plan, target, spec)
        return Built(plan, target, spec, source, backend.build(source))

    def to_mask(self, q: Tensor, k: Tensor, **tensors: Tensor) -> Tensor:
        """Give the dense mask the pattern means, bool [B,Hq,Sq,Skv]; for small sizes.

        tensors: what the pattern takes beside q, k and v.
        """
        from spcomp.backends.reference.pattern import to_mask

        v = k
        env = arguments.dims_of(q, k, v)
        arguments.check_masks(self.pattern, env, str(q.device))
        del env["Dv"]  # there is no v: a tensor of the call may give it
        given = self._given(tensors)
        call_tensors.check(self.takes, given, q, env)
        own = call_tensors.named(self.takes, given)
        return to_mask(
            self.pattern.program, {"q": q, "k": k, "v": v, **self.pattern.tensors, **own}
        )

    def explain(self, q: Tensor, k: Tensor, v: Tensor, **tensors: Tensor) -> str:
        """Say what a call with these tensors runs, and why."""
        given = self._given(tensors)
        env = self._checked(q, k, v, given)
        built = self._built(self.now(), q, k, v, None, given)
        return explanation(built.plan, built.spec, built.target, env)


def phase_of(q: Tensor) -> Phase:
    """Tell decode (at most `compiler.DECODE_ROWS` query rows) from prefill."""
    return compiler.phase_for(q.shape[2])


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _scaled(pattern: Pattern, scale: float | None) -> Pattern:
    return pattern if scale is None else with_scale(pattern, scale)


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
    prefill loop order to insist on: "query_major_ws" (warp-specialised, on Hopper), "query_major",
    "key_major" or "gather". axes: values of
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
