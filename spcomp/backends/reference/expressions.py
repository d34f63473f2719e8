"""Element expressions in plain torch, with the semantics of Python's own operators."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spcomp.ir.expr import Expr, Lit, Load, Op, Sym

Value: TypeAlias = "Tensor | bool | int | float"
Values: TypeAlias = Mapping[str, Value]


def evaluate(
    expr: Expr,
    values: Values,
    tables: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Value:
    """Evaluate an expression for all elements at once.

    `values` gives each symbol as a number or a tensor; tensors broadcast against one another, and
    the result has their joint shape. `tables` gives the captured tensors by name, read with torch's
    own indexing. Integers divide and take remainders as in Python (towards minus infinity); what
    has to be a float (`/`, exp, log, tanh, float) is computed in `dtype`.
    Raises: IndexError where a table is read out of its range.
    """
    if isinstance(expr, Sym):
        return values[expr.name]
    if isinstance(expr, Lit):
        return expr.value
    if isinstance(expr, Load):
        assert tables is not None, f"no tables for {expr}"
        index = [evaluate(i, values, tables, dtype) for i in expr.index]
        return _element(tables[expr.tensor], index)
    assert isinstance(expr, Op), expr
    operands = _alike([evaluate(a, values, tables, dtype) for a in expr.args], dtype)
    if expr.name in _IN_FLOAT:
        return _IN_FLOAT[expr.name](*(_as_float(a, dtype) for a in operands))
    return _OPERATORS[expr.name](*operands)


def _element(table: Tensor, index: list[Value]) -> Tensor:
    where = [torch.as_tensor(i, device=table.device).long() for i in index]
    return table[tuple(where)] if where else table


def _as_float(x: Value, dtype: torch.dtype) -> Value:
    if not isinstance(x, Tensor):
        return float(x)
    return x if x.is_floating_point() else x.to(dtype)


def _alike(operands: list[Value], dtype: torch.dtype) -> list[Value]:
    """Turn numbers beside tensors into tensors; a float gets the dtype of the computation."""
    device = next((a.device for a in operands if isinstance(a, Tensor)), None)
    if device is None:
        return operands

    def tensor(x: Value) -> Tensor:
        if isinstance(x, Tensor):
            return x
        return torch.tensor(x, device=device, dtype=dtype if isinstance(x, float) else None)

    return [tensor(a) for a in operands]


def _pick(tensors: Callable[..., Tensor], numbers: Callable[..., Any]) -> Callable[..., Value]:
    """Join a torch function and its counterpart on plain numbers."""

    def apply(*args: Value) -> Value:
        function = tensors if isinstance(args[0], Tensor) else numbers
        result: Value = function(*args)
        return result

    return apply


def _where(condition: Value, yes: Value, no: Value) -> Value:
    if not isinstance(condition, Tensor):
        return yes if condition else no
    assert isinstance(yes, Tensor)
    assert isinstance(no, Tensor)
    return torch.where(condition.bool(), yes, no)


def _invert(x: Value) -> Value:
    if isinstance(x, bool):
        return not x
    assert not isinstance(x, float)
    return ~x


def _folded(step: Callable[[Any, Any], Any]) -> Callable[..., Value]:
    return lambda *args: reduce(step, args)


_IN_FLOAT: Mapping[str, Callable[..., Value]] = {
    "div": operator.truediv,
    "exp": _pick(torch.exp, math.exp),
    "log": _pick(torch.log, math.log),
    "tanh": _pick(torch.tanh, math.tanh),
    "float": lambda x: x,
}

_OPERATORS: Mapping[str, Callable[..., Value]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": _folded(operator.and_),
    "or": _folded(operator.or_),
    "not": _invert,
    "neg": operator.neg,
    "abs": abs,
    "min": _folded(_pick(torch.minimum, min)),
    "max": _folded(_pick(torch.maximum, max)),
    "where": _where,
}
