"""Integer expressions evaluated on plain numbers, written from what the operators mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from spcomp.ir.expr import Expr, Lit, Op, Sym

MEANING: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "neg": lambda a: -a,
    "min": min,
    "max": max,
    "where": lambda c, a, b: a if c else b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda *parts: all(parts),
    "or": lambda *parts: any(parts),
    "not": lambda a: not a,
}


def value_of(expr: Expr, row: Mapping[str, int]) -> int:
    """Evaluate an expression; row: its symbols."""
    if isinstance(expr, Lit):
        return int(expr.value)
    if isinstance(expr, Sym):
        return row[expr.name]
    assert isinstance(expr, Op)
    return int(MEANING[expr.name](*(value_of(a, row) for a in expr.args)))
