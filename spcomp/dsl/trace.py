"""Tracing a user's callable with symbolic operands into an element expression.

The callable runs once, on `Traced` values. Python operators and a few torch functions build the
expression; indexing a tensor with a traced value captures the tensor. Anything that needs a
concrete value (`if`, `int()`, `.item()`) is refused with its line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spcomp.dsl.recording import Recording, current, user_line
from spcomp.errors import ControlFlowOnData, NotTraceable
from spcomp.ir import expr as E
from spcomp.ir.nodes import Captured, Node

if TYPE_CHECKING:
    from torch import Tensor

Traceable = Callable[..., Any]
_OPERAND = (bool, int, float)


def _operator(name: str, swap: bool = False) -> Callable[[Traced, Any], Traced]:
    """Make the method of one Python operator."""

    def method(self: Traced, other: Any) -> Traced:
        return self._op(name, other, swap=swap)

    return method


class Traced:
    """A value that is known only inside the kernel."""

    __slots__ = ("expr", "trace")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expr: E.Expr, trace: _Trace) -> None:
        self.expr = expr
        self.trace = trace

    def _op(self, name: str, *others: Any, swap: bool = False) -> Traced:
        operands = [self.expr, *(self.trace.expr_of(o) for o in others)]
        if swap:
            operands.reverse()
        return Traced(self.trace.apply(name, operands), self.trace)

    __add__, __radd__ = _operator("add"), _operator("add", swap=True)
    __sub__, __rsub__ = _operator("sub"), _operator("sub", swap=True)
    __mul__, __rmul__ = _operator("mul"), _operator("mul", swap=True)
    __floordiv__, __rfloordiv__ = _operator("floordiv"), _operator("floordiv", swap=True)
    __mod__, __rmod__ = _operator("mod"), _operator("mod", swap=True)
    __truediv__, __rtruediv__ = _operator("div"), _operator("div", swap=True)
    __lt__ = _operator("lt")
    __le__ = _operator("le")
    __gt__ = _operator("gt")
    __ge__ = _operator("ge")
    __and__, __rand__ = _operator("and"), _operator("and", swap=True)
    __or__, __ror__ = _operator("or"), _operator("or", swap=True)
    __eq__ = _operator("eq")  # type: ignore[assignment]
    __ne__ = _operator("ne")  # type: ignore[assignment]

    def __neg__(self) -> Traced:
        return self._op("neg")

    def __abs__(self) -> Traced:
        return self._op("abs")

    def __invert__(self) -> Traced:
        return self._op("not")

    def __bool__(self) -> bool:
        raise ControlFlowOnData(
            where=user_line(), callable=self.trace.name, expression=show(self.expr)
        )

    def __index__(self) -> int:
        raise ControlFlowOnData(
            where=user_line(), callable=self.trace.name, expression=show(self.expr)
        )

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.__index__())

    def item(self) -> Any:
        """Refuse: there is no value before the kernel runs."""
        return self.__index__()

    def __getattr__(self, name: str) -> Any:
        raise NotTraceable(
            where=user_line(), callable=self.trace.name, operation=f"the attribute .{name}"
        )

    def to(self, *_: Any, **__: Any) -> Traced:
        """Keep the value: an expression has no dtype of its own."""
        return self

    def abs(self) -> Traced:
        """Give the absolute value."""
        return self._op("abs")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        trace = next(
            a.trace for a in _flat((*args, *(kwargs or {}).values())) if isinstance(a, Traced)
        )
        return trace.torch_call(func, args)


_TORCH = {
    "where": "where",
    "minimum": "min",
    "maximum": "max",
    "abs": "abs",
    "exp": "exp",
    "log": "log",
    "tanh": "tanh",
    "logical_and": "and",
    "logical_or": "or",
    "logical_not": "not",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "floor_divide": "floordiv",
    "remainder": "mod",
    "eq": "eq",
    "ne": "ne",
    "lt": "lt",
    "le": "le",
    "gt": "gt",
    "ge": "ge",
    "__and__": "and",
    "__rand__": "and",
    "__or__": "or",
    "__ror__": "or",
}


class _Trace:
    """One run of a user's callable."""

    def __init__(self, name: str, recording: Recording) -> None:
        self.name = name
        self.recording = recording
        self.tables: dict[str, Captured] = {}

    def expr_of(self, value: Any) -> E.Expr:
        if isinstance(value, Traced):
            return value.expr
        if isinstance(value, _OPERAND):
            return E.Lit(value)
        if _is_scalar_tensor(value):
            return self.load(value, ())
        raise NotTraceable(
            where=user_line(),
            callable=self.name,
            operation=f"an operand of type {type(value).__name__}",
        )

    def load(self, tensor: Tensor, index: tuple[Any, ...]) -> E.Expr:
        if len(index) != tensor.dim():
            raise NotTraceable(
                where=user_line(),
                callable=self.name,
                operation=f"a tensor of {tensor.dim()} dimensions with {len(index)} indices",
            )
        node = self.recording.capture(tensor)
        self.tables[node.name] = node
        kind: E.Kind = (
            "bool" if node.dtype == "bool" else "float" if tensor.is_floating_point() else "int"
        )
        return E.Load(node.name, tuple(self.expr_of(i) for i in index), kind)

    def torch_call(self, func: Any, args: tuple[Any, ...]) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "__getitem__":
            tensor, index = args
            parts = index if isinstance(index, tuple) else (index,)
            return Traced(self.load(tensor, parts), self)
        if name not in _TORCH:
            raise NotTraceable(where=user_line(), callable=self.name, operation=f"torch.{name}")
        return Traced(self.apply(_TORCH[name], [self.expr_of(a) for a in args]), self)

    def apply(self, name: str, operands: list[E.Expr]) -> E.Expr:
        """Apply an operator; `&`, `|` and `~` join conditions and do not work on bits."""
        if name in ("and", "or", "not") and any(E.kind_of(a) != "bool" for a in operands):
            raise NotTraceable(
                where=user_line(), callable=self.name, operation=f"'{name}' on the bits of numbers"
            )
        return E.op(name, *operands)


def _is_scalar_tensor(value: Any) -> bool:
    return hasattr(value, "dim") and hasattr(value, "is_floating_point") and value.dim() == 0


def _flat(values: Any) -> list[Any]:
    out: list[Any] = []
    for v in values:
        out.extend(_flat(v)) if isinstance(v, (tuple, list)) else out.append(v)
    return out


def _run(rule: Traceable, symbols: tuple[str, ...], role: str) -> tuple[E.Expr, tuple[Node, ...]]:
    from torch.overrides import TorchFunctionMode

    trace = _Trace(getattr(rule, "__name__", role), current() or Recording())

    class Interceptor(TorchFunctionMode):
        """Sees plain tensors indexed by traced values, which the operand protocol alone does
        not."""

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            operands = _flat((*args, *(kwargs or {}).values()))
            if any(isinstance(a, Traced) for a in operands):
                return trace.torch_call(func, args)
            return func(*args, **(kwargs or {}))

    with Interceptor():
        result = rule(*(Traced(E.Sym(s), trace) for s in symbols))
    return trace.expr_of(result), tuple(trace.tables.values())


def trace_mask_mod(rule: Traceable) -> tuple[E.Expr, tuple[Node, ...]]:
    """Trace `mask_mod(b, h, q_idx, kv_idx)` to a predicate and the tables it reads.

    Raises: ControlFlowOnData, NotTraceable.
    """
    return _run(rule, ("b", "h", "q", "k"), "mask_mod")


def trace_score_mod(rule: Traceable) -> tuple[E.Expr, tuple[Node, ...]]:
    """Trace `score_mod(score, b, h, q_idx, kv_idx)` to an expression and the tables it reads.

    Raises: ControlFlowOnData, NotTraceable.
    """
    return _run(rule, ("score", "b", "h", "q", "k"), "score_mod")


def show(expr: E.Expr) -> str:
    """Print an expression the way the user wrote it, for messages and `spcomp show`."""
    if isinstance(expr, E.Sym):
        return {"q": "q_idx", "k": "kv_idx"}.get(expr.name, expr.name)
    if isinstance(expr, E.Lit):
        return repr(expr.value)
    if isinstance(expr, E.Load):
        return f"{expr.tensor}[{', '.join(show(i) for i in expr.index)}]"
    assert isinstance(expr, E.Op)
    parts = [show(a) for a in expr.args]
    sign = {**E.COMPARISONS, **E.ARITHMETIC, **E.CONNECTIVES}.get(expr.name)
    return f"({f' {sign} '.join(parts)})" if sign else f"{expr.name}({', '.join(parts)})"
