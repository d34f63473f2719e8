"""Predicates over keys as ranges: what a vector core can mask without looking at single elements.

A predicate that compares an expression growing with k against scalars of the row is a union of
ranges lo <= k < hi. Masks of this field (causal, sinks, windows, whole units) all are; one that is
not (a table, a remainder of k) is refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from spcomp.ir.expr import COMPARISONS, Expr, Lit, Op, Sym, op, symbols

KEY = "k"
FAR = 1 << 30
"""Beyond every key: lengths are below it."""

OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


class NotRanges(Exception):
    """A predicate is no union of ranges; the text is the part that is none."""


@dataclass(frozen=True, slots=True)
class Range:
    """Keys lo <= k < hi; lo and hi do not depend on k."""

    lo: Expr
    hi: Expr


Ranges = tuple[Range, ...]
EVERY: Ranges = (Range(Lit(0), Lit(FAR)),)


def ranges_of(predicate: Expr) -> Ranges:
    """Give the keys k >= 0 that a predicate admits.

    Raises: NotRanges.
    """
    if KEY not in symbols(predicate):
        return _where(predicate)
    if not isinstance(predicate, Op):
        raise NotRanges(str(predicate))
    if predicate.name == "and":
        return _both(*map(ranges_of, predicate.args))
    if predicate.name == "or":
        return _either(map(ranges_of, predicate.args))
    if predicate.name == "not":
        return _not(predicate.args[0])
    if predicate.name in COMPARISONS:
        return _compared(predicate.name, *predicate.args)
    raise NotRanges(predicate.name)


def _where(condition: Expr) -> Ranges:
    """Give all keys where a condition of the row holds."""
    if condition == Lit(True):
        return EVERY
    if condition == Lit(False):
        return ()
    return (Range(Lit(0), op("where", condition, Lit(FAR), Lit(0))),)


def _both(*sides: Ranges) -> Ranges:
    """Intersect unions."""
    found = EVERY
    for side in sides:
        found = tuple(
            Range(_largest(a.lo, b.lo), _least(a.hi, b.hi)) for a, b in product(found, side)
        )
    return found


def _either(sides: Iterable[Ranges]) -> Ranges:
    return tuple(dict.fromkeys(one for side in sides for one in side))


def _not(inner: Expr) -> Ranges:
    if isinstance(inner, Op):
        if inner.name == "not":
            return ranges_of(inner.args[0])
        if inner.name in ("and", "or"):
            turned = [op("not", a) for a in inner.args]
            return ranges_of(op("or" if inner.name == "and" else "and", *turned))
        if inner.name in OPPOSITE:
            return ranges_of(op(OPPOSITE[inner.name], *inner.args))
    raise NotRanges(f"not {inner}")


def _largest(a: Expr, b: Expr) -> Expr:
    return b if a in (b, Lit(0)) else a if b == Lit(0) else op("max", a, b)


def _least(a: Expr, b: Expr) -> Expr:
    return b if a in (b, Lit(FAR)) else a if b == Lit(FAR) else op("min", a, b)


# ---- comparisons ---------------------------------------------------------------------------------


def _compared(name: str, left: Expr, right: Expr) -> Ranges:
    if KEY in symbols(right):
        if KEY in symbols(left):
            raise NotRanges("a comparison with k on both sides")
        return _solved(MIRRORED[name], right, left)
    return _solved(name, left, right)


def _solved(name: str, side: Expr, bound: Expr) -> Ranges:
    """Solve `side name bound` for k, which only `side` holds."""
    if side == Sym(KEY):
        return _of_key(name, bound)
    if name == "eq":
        return _both(_solved("le", side, bound), _solved("ge", side, bound))
    if name == "ne":
        return _either((_solved("lt", side, bound), _solved("gt", side, bound)))
    if not isinstance(side, Op):
        raise NotRanges(str(side))
    if side.name in ("min", "max"):
        return _of_extreme(name, side, bound)
    solve = {"add": _of_sum, "sub": _of_difference, "mul": _of_product, "floordiv": _of_quotient}
    if side.name not in solve:
        raise NotRanges(side.name)
    return solve[side.name](name, side.args[0], side.args[1], bound)


def _of_key(name: str, bound: Expr) -> Ranges:
    after = op("add", bound, Lit(1))
    return {
        "lt": (Range(Lit(0), bound),),
        "le": (Range(Lit(0), after),),
        "ge": (Range(bound, Lit(FAR)),),
        "gt": (Range(after, Lit(FAR)),),
        "eq": (Range(bound, after),),
        "ne": (Range(Lit(0), bound), Range(after, Lit(FAR))),
    }[name]


def _of_extreme(name: str, side: Op, bound: Expr) -> Ranges:
    """min(a, b) <= c where one of them is; min(a, b) >= c where both are."""
    parts = [ranges_of(op(name, a, bound)) for a in side.args]
    is_any = (side.name == "min") == (name in ("lt", "le"))
    return _either(parts) if is_any else _both(*parts)


def _of_sum(name: str, a: Expr, b: Expr, bound: Expr) -> Ranges:
    if KEY in symbols(a) and KEY in symbols(b):
        raise NotRanges("a sum with k in both terms")
    if KEY in symbols(a):
        return _solved(name, a, op("sub", bound, b))
    return _solved(name, b, op("sub", bound, a))


def _of_difference(name: str, a: Expr, b: Expr, bound: Expr) -> Ranges:
    if KEY in symbols(a) and KEY in symbols(b):
        raise NotRanges("a difference with k in both terms")
    if KEY in symbols(a):
        return _solved(name, a, op("add", bound, b))
    return _solved(MIRRORED[name], b, op("sub", a, bound))


def _of_product(name: str, a: Expr, b: Expr, bound: Expr) -> Ranges:
    if isinstance(a, Lit):
        a, b = b, a
    factor = _positive(b, "a product of k")
    down = op("floordiv", bound, Lit(factor))
    up = op("floordiv", op("add", bound, Lit(factor - 1)), Lit(factor))
    return _solved(name, a, up if name in ("lt", "ge") else down)


def _of_quotient(name: str, a: Expr, b: Expr, bound: Expr) -> Ranges:
    divisor = _positive(b, "a quotient of k")
    first = op("mul", bound, Lit(divisor))
    after = op("mul", op("add", bound, Lit(1)), Lit(divisor))
    return _solved(
        "lt" if name in ("lt", "le") else "ge", a, first if name in ("lt", "ge") else after
    )


def _positive(number: Expr, what: str) -> int:
    if isinstance(number, Lit) and type(number.value) is int and number.value > 0:
        return number.value
    raise NotRanges(f"{what} by what is no positive number")
