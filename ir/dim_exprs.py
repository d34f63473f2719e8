"""Dims as element expressions, for kernels that evaluate a formula with lengths of their own.

A plan's formulas over the lengths are evaluated on the host, once a call. Sequences that are packed
have lengths of their own, so there a kernel evaluates the formula for its sequence."""

from __future__ import annotations

from functools import partial, reduce

import sympy

from spcomp.ir.dims import Dim
from spcomp.ir.expr import Expr, Lit, Sym, op


def expr_of(dim: Dim) -> Expr:
    """Give a dim as an integer expression over the same symbols.

    Raises: TypeError for a formula that is no sum, product, extreme or rounded quotient.
    """
    return _expr(sympy.sympify(dim))


def _expr(e: sympy.Expr) -> Expr:
    if e.is_Integer:
        return Lit(int(e))
    if e.is_Symbol:
        return Sym(str(e))
    if isinstance(e, (sympy.ceiling, sympy.floor)):
        above, below = (_expr(x) for x in sympy.fraction(sympy.together(e.args[0])))
        if isinstance(e, sympy.ceiling):
            above = op("add", above, op("sub", below, Lit(1)))
        return op("floordiv", above, below)
    names = {sympy.Add: "add", sympy.Mul: "mul", sympy.Min: "min", sympy.Max: "max"}
    for kind, name in names.items():
        if isinstance(e, kind):
            return reduce(partial(op, name), map(_expr, e.args))
    raise TypeError(f"no expression for {e!r} of type {type(e).__name__}")
