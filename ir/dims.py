"""Symbolic dimensions: sympy integers over the lengths and head counts of a call.

| symbol | meaning |
|---|---|
| B | batch items |
| Hq, Hkv | query heads, key/value heads; G = Hq / Hkv |
| Sq, Skv | query rows, key tokens |
| D, Dv | head dimension of q and k, of v |
| R, R0 | query rows of the slab at hand and its first row (whole call: Sq and 0) |
| Tq, Tk | rows of packed q, and of k and v, all sequences together; Sq, Skv are then the longest |

A pattern may name further dims of the tensors it takes at a call (`named`).

Nothing here calls `sympy.simplify`: lowering a pattern has to stay under 0.1 s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TypeAlias

import sympy

Dim: TypeAlias = "int | sympy.Expr"
Env: TypeAlias = Mapping[str, int]


def _symbol(name: str, least: int) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=least > 0, nonnegative=True)


B, Hq, Hkv = (_symbol(n, 1) for n in ("B", "Hq", "Hkv"))
Sq, Skv = (_symbol(n, 1) for n in ("Sq", "Skv"))
D, Dv = (_symbol(n, 1) for n in ("D", "Dv"))
R, R0 = _symbol("R", 1), _symbol("R0", 0)
Tq, Tk = _symbol("Tq", 1), _symbol("Tk", 1)
G = Hq / Hkv

SYMBOLS: dict[str, sympy.Symbol] = {s.name: s for s in (B, Hq, Hkv, Sq, Skv, D, Dv, R, R0, Tq, Tk)}


TAKEN = frozenset({"E", "G", "P", "S", "W"})  # formulas of costs and users' shapes use them
_NAME = re.compile(r"[A-Z][A-Za-z0-9_]*")


def is_name(name: str) -> bool:
    """Tell whether a pattern may call a dim of its own so."""
    return bool(_NAME.fullmatch(name)) and name not in SYMBOLS and name not in TAKEN


@lru_cache(maxsize=4096)
def named(name: str) -> sympy.Symbol:
    """Give the symbol of a dim that a pattern named, such as the heads of an indexer."""
    assert is_name(name), name
    return _symbol(name, 1)


def names_of(shape: Iterable[Dim]) -> tuple[str, ...]:
    """Name the dims in a shape that are of a pattern's own, in order."""
    read = [str(d) for d in shape if not isinstance(d, int)]
    return tuple(dict.fromkeys(n for n in read if is_name(n)))


def bind(shape: Iterable[Dim], sizes: Iterable[int], env: dict[str, int]) -> None:
    """Give each plain symbol of a shape that `env` does not hold the size it has there."""
    for dim, size in zip(shape, sizes, strict=True):
        if not isinstance(dim, int):
            env.setdefault(str(dim), int(size))


def ceildiv(a: Dim, b: Dim) -> Dim:
    """Divide and round up."""
    if isinstance(a, int) and isinstance(b, int):
        return -(-a // b)
    return _plain(sympy.ceiling(sympy.sympify(a) / b))


def least(*values: Dim) -> Dim:
    """Give the smaller of several dims."""
    return _extreme(sympy.Min, min, values)


def largest(*values: Dim) -> Dim:
    """Give the larger of several dims."""
    return _extreme(sympy.Max, max, values)


def _extreme(
    function: type[sympy.Expr], of_numbers: Callable[[list[int]], int], values: tuple[Dim, ...]
) -> Dim:
    """Build Min or Max without sympy's own evaluation.

    sympy 1.14 holds ceiling(264/(B*Hkv)) >= 64 to be true and drops the argument.
    """
    numbers = [v for v in values if isinstance(v, int)]
    symbolic = list(dict.fromkeys(v for v in values if not isinstance(v, int)))
    if not symbolic:
        return of_numbers(numbers)
    constants = [sympy.Integer(of_numbers(numbers))] if numbers else []
    arguments = [*constants, *symbolic]
    return arguments[0] if len(arguments) == 1 else function(*arguments, evaluate=False)


def _plain(value: sympy.Expr) -> Dim:
    return int(value) if value.is_Integer else value


def plain(value: Dim) -> Dim:
    """Turn a constant sympy number into an int."""
    return value if isinstance(value, int) else _plain(sympy.sympify(value))


def symbols_of(dim: Dim) -> frozenset[str]:
    """Name the symbols a dim depends on."""
    if isinstance(dim, int):
        return frozenset()
    return frozenset(s.name for s in dim.free_symbols if isinstance(s, sympy.Symbol))


# ---- fast evaluation ----------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def evaluator(dim: Dim) -> Callable[[Env], int]:
    """Compile a dim once to a closure over plain integers, for the launch path."""
    if isinstance(dim, int):
        return lambda env: dim
    inner = _closure(sympy.sympify(dim))
    return lambda env: int(inner(env))


def evaluate(dim: Dim, env: Env) -> int:
    """Evaluate a dim for one call."""
    return evaluator(dim)(env)


def _closure(e: sympy.Expr) -> Callable[[Env], float]:
    """Build the closure of an expression; ceilings and floors of quotients stay exact integers."""
    if e.is_Integer:
        number = int(e)
        return lambda env: number
    if e.is_Rational:
        ratio = int(e.p) / int(e.q)
        return lambda env: ratio
    if e.is_Symbol:
        name = str(e)
        return lambda env: env[name]
    if isinstance(e, (sympy.ceiling, sympy.floor)):
        return _rounding(e)
    parts = [_closure(a) for a in e.args]
    if e.is_Add:
        return lambda env: sum(p(env) for p in parts)
    if e.is_Mul:
        return _product(parts)
    if e.is_Pow:
        base, power = parts
        return lambda env: base(env) ** power(env)
    if isinstance(e, sympy.Min):
        return lambda env: min(p(env) for p in parts)
    if isinstance(e, sympy.Max):
        return lambda env: max(p(env) for p in parts)
    raise TypeError(f"no evaluation for {e!r} of type {type(e).__name__}")


def _product(parts: list[Callable[[Env], float]]) -> Callable[[Env], float]:
    def product(env: Env) -> float:
        result: float = 1
        for part in parts:
            result *= part(env)
        return result

    return product


def _rounding(e: sympy.Expr) -> Callable[[Env], float]:
    up = isinstance(e, sympy.ceiling)
    numerator, denominator = sympy.fraction(sympy.together(e.args[0]))
    top, bottom = _closure(numerator), _closure(denominator)

    def rounded(env: Env) -> int:
        a, b = int(top(env)), int(bottom(env))
        return -(-a // b) if up else a // b

    return rounded
