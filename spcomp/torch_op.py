"""The op `spcomp::attend`: what a compiled pattern is in a graph of torch.compile or torch.export.

    spcomp::attend(q, k, v, Tensor[] tables, str handle, float? scale) -> (out, lse)

`handle` names what the pattern means: a digest of its IR text and of the options it was compiled
with, equal in every process. Tables travel as arguments, so what is kept here by handle holds no
tensor: weakly while a compiled pattern is alive, and for good once its op was traced or called, so
that a graph outlives the object it was traced from. An exported graph runs in another process as
soon as an equal pattern is compiled there.

The backward recomputes the result with the reference backend, in plain torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from spcomp import arguments, call_tensors
from spcomp.errors import UnknownHandle

Result = tuple[Tensor, Tensor]


class Meaning(Protocol):
    """What equal compiled patterns share; it holds no tensor."""

    @property
    def table_names(self) -> tuple[str, ...]:
        """The names of the pattern's tensors, in the order the op takes them."""
        ...

    @property
    def takes(self) -> call_tensors.Takes:
        """What a call brings beside q, k and v, in the order the op takes it behind the tables."""
        ...

    def backend_name(self, device: torch.device) -> str:
        """Name the backend of a call on a device."""
        ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], scale: float | None
    ) -> Result:
        """Attend, after the checks of a call."""
        ...


# ---- what handles name ---------------------------------------------------------------------------

_LOCK = threading.Lock()
_alive: WeakValueDictionary[str, Any] = WeakValueDictionary()
_traced: dict[str, Any] = {}


def shared(handle: str, make: Callable[[], Any]) -> Any:
    """Give what a handle names; where this process does not hold it, what `make` gives, from now
    on."""
    with _LOCK:
        found = _traced.get(handle) or _alive.get(handle)
        if found is None:
            found = _alive[handle] = make()
        return found


def meaning_of(handle: str) -> Meaning:
    """Give what a handle in a graph names, and keep it.

    Raises: UnknownHandle.
    """
    found: Meaning | None = _traced.get(handle)
    if found is None:
        with _LOCK:
            found = _alive.get(handle)
            if found is None:
                raise UnknownHandle(handle=handle)
            _traced[handle] = found
    return found


# ---- forward -------------------------------------------------------------------------------------


@torch.library.custom_op(
    "spcomp::attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] tables, str handle, float? scale)"
    " -> (Tensor, Tensor)",
)
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    handle: str,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend as the pattern that `handle` names; see `Attention.__call__`.

    q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv], any strides with a unit last one; tables: the
    pattern's tensors, and behind them what the call brings beside q, k and v. Returns out
    [B,Hq,Sq,Dv] in q's dtype and lse [B,Hq,Sq] float32 (float64 for float64), both contiguous.
    Raises: the errors of a call, UnknownHandle.
    """
    with without_autocast(q):
        out, lse = meaning_of(handle).attend(q, k, v, tables, scale)
    return out.contiguous(), lse.contiguous()


@attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    handle: str,
    scale: float | None,
) -> Result:
    meaning = meaning_of(handle)
    env = arguments.dims_of(q, k, v)
    arguments.check_tensors(q, k, v)
    call_tensors.check(meaning.takes, tables[len(meaning.table_names) :], q, dict(env))
    rows = env["B"], env["Hq"], env["Sq"]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*rows, env["Dv"])), q.new_empty(rows, dtype=exact)


def without_autocast(q: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off: it would round what a backend computes in float32 on purpose."""
    kind = autocast_kind(q)
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def autocast_kind(q: Tensor) -> str:
    """Give the device type whose autocast a call obeys; the meta device has none of its own."""
    return "cpu" if q.is_meta else q.device.type


# ---- backward ------------------------------------------------------------------------------------

# A custom_op always runs with autograd taken out of the dispatcher, and the backward needs it to
# differentiate what it recomputes; an op defined plainly runs with what the caller has.
torch.library.define(
    "spcomp::attend_backward",
    "(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor[] tables, "
    "str handle, float? scale, bool[] wanted) -> Tensor[]",
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)


@torch.library.impl("spcomp::attend_backward", "default")
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    handle: str,
    scale: float | None,
    wanted: list[bool],
) -> list[Tensor]:
    """Give the gradients of those of (q, k, v, *tables) that are wanted, contiguous."""

    def work() -> list[Tensor]:
        with torch.enable_grad():
            pairs = zip((q, k, v, *tables), wanted, strict=True)
            inputs = [_leaf(x) if is_wanted else x for x, is_wanted in pairs]
            given = grad_out, grad_lse
            found = gradients(given, inputs, handle, scale, wanted, create_graph=False)
        return [x.contiguous() for x in found]

    return work() if _autograd_records() else _in_a_thread(work, q)


def _leaf(x: Tensor) -> Tensor:
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def _autograd_records() -> bool:
    """Tell whether autograd is there: a graph without a backward of its own runs below it."""
    with torch.enable_grad():
        return bool(torch.zeros((), device="cpu", requires_grad=True).view(1).requires_grad)


def _in_a_thread(work: Callable[[], list[Tensor]], q: Tensor) -> list[Tensor]:
    """Work in a new thread, whose dispatcher has everything, on the current stream."""
    stream = torch.cuda.current_stream(q.device) if q.is_cuda else None

    def on_stream() -> list[Tensor]:
        with torch.cuda.stream(stream):
            return work()

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(on_stream).result()


@torch.library.register_fake("spcomp::attend_backward")  # type: ignore[untyped-decorator]
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    handle: str,
    scale: float | None,
    wanted: list[bool],
) -> list[Tensor]:
    inputs = (q, k, v, *tables)
    return [x.new_empty(x.shape) for x, w in zip(inputs, wanted, strict=True) if w]


def gradients(
    given: Result,
    inputs: Sequence[Tensor],
    handle: str,
    scale: float | None,
    wanted: Sequence[bool],
    *,
    create_graph: bool,
) -> list[Tensor]:
    """Recompute a call from (q, k, v, *tables) and give the gradients of those that are wanted.

    given: the gradients of out and lse.
    """
    q, k, v, *tables = inputs
    leaves = [x for x, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
    with without_autocast(q):
        results = meaning_of(handle).attend(q, k, v, tables, scale)
        pairs = [(x, g) for x, g in zip(results, given, strict=True) if x.requires_grad]
        if not pairs:  # no queries, or no keys: the result depends on nothing
            return [torch.zeros_like(x) for x in leaves]
        outs, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outs, leaves, grads, create_graph=create_graph, materialize_grads=True
        )
    return list(found)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    """Keep what the backward recomputes from.

    Raises: NeedsGradient, where the backend of the call has no backward.
    """
    q, k, v, tables, handle, scale = inputs
    meaning = meaning_of(handle)
    name = meaning.backend_name(q.device)
    if name != "reference":
        names = [f"the table {n}" for n in meaning.table_names]
        names += [a.name for a in meaning.takes]
        of_tables = dict(zip(names, tables, strict=True))
        arguments.check_gradients(name, {"q": q, "k": k, "v": v, **of_tables})
    ctx.save_for_backward(q, k, v, *tables)
    ctx.handle, ctx.scale = handle, scale


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    of_q, of_k, of_v, of_tables, *_ = ctx.needs_input_grad
    wanted = [bool(w) for w in (of_q, of_k, of_v, *of_tables)]
    if torch.is_grad_enabled():  # a gradient of the gradient will be asked for
        given = grad_out, grad_lse
        found = gradients(given, inputs, ctx.handle, ctx.scale, wanted, create_graph=True)
    else:
        q, k, v, *tables = inputs
        found = torch.ops.spcomp.attend_backward(
            grad_out, grad_lse, q, k, v, tables, ctx.handle, ctx.scale, wanted
        )
    one_by_one = iter(found)
    of_q, of_k, of_v, *of_tables = [next(one_by_one) if w else None for w in wanted]
    return of_q, of_k, of_v, of_tables, None, None


attend.register_autograd(_backward, setup_context=_remember)
