"""Integer expressions and dims as C++: scalars of a kernel, formulas of the host's tiling.

Both call CeilDiv, FloorDiv, FloorMod, Least and Most, which `macros/integers.jinja` defines."""

from __future__ import annotations

import math
from collections.abc import Mapping

import sympy

from spcomp.backends.ascendc.contexts.base import Span
from spcomp.backends.ascendc.spans import Ranges
from spcomp.ir.dims import Dim
from spcomp.ir.expr import COMPARISONS, Expr, Lit, Op, Sym, is_nonnegative

_BINARY = {"add": "+", "sub": "-", "mul": "*", "and": "&&", "or": "||", **COMPARISONS}
_CALLS = {"min": "Least", "max": "Most"}


class NotInteger(Exception):
    """An expression that no scalar of a kernel can be; the text is the operator."""


def spans_text(ranges: Ranges, **names: str) -> tuple[Span, ...]:
    """Give ranges as the C++ that a template places; names: as for `scalar_text`."""
    return tuple(Span(scalar_text(r.lo, **names), scalar_text(r.hi, **names)) for r in ranges)


def scalar_text(expr: Expr, **names: str) -> str:
    """Print an integer expression over the scalars of a row; `names` maps a symbol to its text.

    Raises: NotInteger for floats, functions of floats and loads of a tensor.
    """
    if isinstance(expr, Sym):
        return names.get(expr.name, expr.name)
    if isinstance(expr, Lit):
        if isinstance(expr.value, float):
            raise NotInteger(repr(expr.value))
        return str(int(expr.value)) if expr.value >= 0 else f"({expr.value})"
    if not isinstance(expr, Op):
        raise NotInteger(str(expr))
    parts = [scalar_text(a, **names) for a in expr.args]
    if expr.name in _BINARY:
        return "(" + f" {_BINARY[expr.name]} ".join(parts) + ")"
    if expr.name in _CALLS:
        return f"{_CALLS[expr.name]}({', '.join(parts)})"
    if expr.name in ("floordiv", "mod"):
        return _division(expr, parts)
    if expr.name == "where":
        return "({} ? {} : {})".format(*parts)
    if expr.name in ("not", "neg"):
        return f"{'!' if expr.name == 'not' else '-'}{parts[0]}"
    raise NotInteger(expr.name)


def _division(expr: Op, parts: list[str]) -> str:
    """C++ truncates, which is the same where both sides are known not to be negative."""
    is_plain = all(is_nonnegative(a) for a in expr.args)
    if is_plain:
        return f"({parts[0]} {'/' if expr.name == 'floordiv' else '%'} {parts[1]})"
    return f"{'FloorDiv' if expr.name == 'floordiv' else 'FloorMod'}({', '.join(parts)})"


# ---- dims ----------------------------------------------------------------------------------------


def dim_text(dim: Dim, names: Mapping[str, str]) -> str:
    """Print a dim as an int64 formula; names: the text of each symbol."""
    return _dim(sympy.sympify(dim), names)


def _dim(e: sympy.Expr, names: Mapping[str, str]) -> str:
    if e.is_Integer:
        return str(int(e))
    if e.is_Symbol:
        return names[str(e)]
    if isinstance(e, (sympy.ceiling, sympy.floor)):
        return _rounded(e, names)
    for kind, function in ((sympy.Min, "Least"), (sympy.Max, "Most")):
        if isinstance(e, kind):
            return _nested(function, [_dim(a, names) for a in e.args])
    parts = [_dim(a, names) for a in e.args]
    if e.is_Add:
        return "(" + " + ".join(parts) + ")"
    if e.is_Mul and all(a.is_integer for a in e.args):
        return "(" + " * ".join(parts) + ")"
    if e.is_Mul:
        return _quotient("", e, names)
    raise TypeError(f"no C++ for {e!r} of type {type(e).__name__}")


def _rounded(e: sympy.Expr, names: Mapping[str, str]) -> str:
    return _quotient("CeilDiv" if isinstance(e, sympy.ceiling) else "FloorDiv", e.args[0], names)


def _quotient(function: str, e: sympy.Expr, names: Mapping[str, str]) -> str:
    top, bottom = (_dim(part, names) for part in sympy.fraction(sympy.together(e)))
    return f"{function}({top}, {bottom})" if function else f"({top} / {bottom})"


def _nested(function: str, parts: list[str]) -> str:
    """Chain a function of two arguments; constants come first in sympy, and read better last."""
    text = parts[-1]
    for part in reversed(parts[:-1]):
        text = f"{function}({text}, {part})"
    return text


def float_text(value: float) -> str:
    """Print a float as a C++ literal that reads back to the same float."""
    if not math.isfinite(value):
        raise NotInteger(repr(value))
    return f"{value!r}f" if "e" in repr(value) or "." in repr(value) else f"{value!r}.0f"
