"""Element expressions: what a mask predicate or a score hook says about one (query, key) pair.

An expression is a value over the symbols of one attention score

    b  batch item     h  query head     q  query row, 0-based     k  key index, 0-based
    Sq Skv            the lengths       chosen0, chosen1, …       "list leaf n chose this tile"
    score             the scaled logit, in a score hook only

and over captured tensors (`Load`). Expressions are made by tracing a user's callable
(`dsl/trace.py`) or by `infer_masks`; a backend prints them, the reference evaluates them.

`bounds` is interval arithmetic over a tile of queries and keys. For a boolean it gives the pair
(true everywhere, true somewhere), which is how tiles become full, partial or empty without looking
at their elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind = Literal["bool", "int", "float"]
Number: TypeAlias = "bool | int | float"

COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "div": "/"}
CONNECTIVES = {"and": "&", "or": "|"}
FUNCTIONS = {"neg", "not", "min", "max", "abs", "where", "exp", "log", "tanh", "float"}
OPERATORS = frozenset({*COMPARISONS, *ARITHMETIC, *CONNECTIVES, *FUNCTIONS})
_FLOAT_ONLY = frozenset({"div", "exp", "log", "tanh", "float"})


class Expr:
    """Base of all expression nodes; immutable and compared by content."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Sym(Expr):
    """A symbol of the score: `b h q k Sq Skv`, a bound such as `q_lo`, or a flag `chosen0`."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Lit(Expr):
    """A literal number or truth value; 1, 1.0 and True are three literals."""

    value: Number

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Lit) and type(self.value) is type(other.value)
        return same and self.value == other.value  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


@dataclass(frozen=True, slots=True)
class Op(Expr):
    """An operator of `OPERATORS` applied to its arguments."""

    name: str
    args: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Load(Expr):
    """One element of a captured tensor. `kind` is the kind of its elements."""

    tensor: str
    index: tuple[Expr, ...]
    kind: Kind


TRUE, FALSE = Lit(True), Lit(False)
Bounds = tuple[Expr, Expr]


def kind_of(expr: Expr) -> Kind:
    """Give the kind of an expression: truth value, integer or float."""
    if isinstance(expr, Sym):
        if expr.name == "score":
            return "float"
        return "bool" if expr.name.startswith("chosen") else "int"
    if isinstance(expr, Lit):
        return (
            "bool"
            if isinstance(expr.value, bool)
            else "int"
            if isinstance(expr.value, int)
            else "float"
        )
    if isinstance(expr, Load):
        return expr.kind
    assert isinstance(expr, Op)
    if expr.name in COMPARISONS or expr.name in ("and", "or", "not"):
        return "bool"
    if expr.name in _FLOAT_ONLY:
        return "float"
    operands = expr.args[1:] if expr.name == "where" else expr.args
    kinds = {kind_of(a) for a in operands}
    return "float" if "float" in kinds else "int" if "int" in kinds else "bool"


def walk(expr: Expr) -> Iterator[Expr]:
    """Yield every node of an expression, the root first."""
    yield expr
    children = expr.args if isinstance(expr, Op) else expr.index if isinstance(expr, Load) else ()
    for child in children:
        yield from walk(child)


def symbols(expr: Expr) -> frozenset[str]:
    """Name the symbols an expression reads."""
    return frozenset(e.name for e in walk(expr) if isinstance(e, Sym))


def loads(expr: Expr) -> tuple[str, ...]:
    """Name the captured tensors an expression reads, each once, in order of first use."""
    return tuple(dict.fromkeys(e.tensor for e in walk(expr) if isinstance(e, Load)))


def substitute(expr: Expr, values: Mapping[str, Expr]) -> Expr:
    """Replace symbols by expressions and fold the constants this makes."""
    if isinstance(expr, Sym):
        return values.get(expr.name, expr)
    if isinstance(expr, Load):
        return Load(expr.tensor, tuple(substitute(i, values) for i in expr.index), expr.kind)
    if isinstance(expr, Op):
        return op(expr.name, *(substitute(a, values) for a in expr.args))
    return expr


def op(name: str, *args: Expr) -> Expr:
    """Apply an operator, folding literals and the neutral elements of `and`, `or`, `add`, `mul`."""
    assert name in OPERATORS, name
    if all(isinstance(a, Lit) for a in args):
        return Lit(_fold(name, [a.value for a in args if isinstance(a, Lit)]))
    if name in ("and", "or"):
        return _connect(name, args)
    if name == "not" and isinstance(args[0], Op) and args[0].name == "not":
        return args[0].args[0]
    if name in ("add", "sub") and args[1] == Lit(0):
        return args[0]
    if name == "add" and args[0] == Lit(0):
        return args[1]
    if name in ("mul", "floordiv") and args[1] == Lit(1):
        return args[0]
    return Op(name, args)


def conjunction(*parts: Expr) -> Expr:
    """Join predicates by `and`."""
    result: Expr = TRUE
    for part in parts:
        result = op("and", result, part)
    return result


def conjuncts(expr: Expr) -> tuple[Expr, ...]:
    """Split a predicate at its top-level `and`s."""
    if isinstance(expr, Op) and expr.name == "and":
        return tuple(c for a in expr.args for c in conjuncts(a))
    return () if expr == TRUE else (expr,)


def _connect(name: str, args: tuple[Expr, ...]) -> Expr:
    neutral, absorbing = (TRUE, FALSE) if name == "and" else (FALSE, TRUE)
    if absorbing in args:
        return absorbing
    left = tuple(dict.fromkeys(a for a in args if a != neutral))
    if not left:
        return neutral
    return left[0] if len(left) == 1 else Op(name, left)


def _fold(name: str, v: list[Number]) -> Number:
    table: dict[str, Callable[[], Number]] = {
        "add": lambda: v[0] + v[1],
        "sub": lambda: v[0] - v[1],
        "mul": lambda: v[0] * v[1],
        "floordiv": lambda: v[0] // v[1],
        "mod": lambda: v[0] % v[1],
        "div": lambda: v[0] / v[1],
        "lt": lambda: v[0] < v[1],
        "le": lambda: v[0] <= v[1],
        "gt": lambda: v[0] > v[1],
        "ge": lambda: v[0] >= v[1],
        "eq": lambda: v[0] == v[1],
        "ne": lambda: v[0] != v[1],
        "and": lambda: bool(v[0] and v[1]),
        "or": lambda: bool(v[0] or v[1]),
        "not": lambda: not v[0],
        "neg": lambda: -v[0],
        "min": lambda: min(v),
        "max": lambda: max(v),
        "abs": lambda: abs(v[0]),
        "where": lambda: v[1] if v[0] else v[2],
        "exp": lambda: math.exp(v[0]),
        "log": lambda: math.log(v[0]),
        "tanh": lambda: math.tanh(v[0]),
        "float": lambda: float(v[0]),
    }
    return table[name]()


# ---- intervals ---------------------------------------------------------------------------------


def tile_bounds(predicate: Expr) -> tuple[Expr, Expr, bool]:
    """Bound a predicate over the tile q_lo..q_hi (inclusive) x k_lo..k_hi (inclusive).

    Returns: (true for every pair, true for some pair, exact enough). The first may be false and the
    second true more often than is so, never the other way. The third is False where a captured
    tensor or an operator without bounds hides the answer, so that elements must be looked at.
    """
    ranges = {
        "q": (Sym("q_lo"), Sym("q_hi")),
        "k": (Sym("k_lo"), Sym("k_hi")),
    }
    everywhere, somewhere = _truth(predicate, ranges)
    return everywhere, somewhere, not any(_opaque(e) for e in walk(predicate))


def _opaque(expr: Expr) -> bool:
    if isinstance(expr, Load):
        return True
    return isinstance(expr, Op) and expr.name in (*_FLOAT_ONLY, "where")


def _truth(expr: Expr, ranges: Mapping[str, Bounds]) -> Bounds:
    bound = bounds_of(expr, ranges)
    return bound if bound is not None else (FALSE, TRUE)


def bounds_of(expr: Expr, ranges: Mapping[str, Bounds]) -> Bounds | None:
    """Bound an expression (inclusive) when its symbols lie in ranges; None when nothing is
    known."""
    if isinstance(expr, Lit):
        return expr, expr
    if isinstance(expr, Sym):
        return ranges.get(expr.name, (expr, expr))
    if isinstance(expr, Load):
        return None
    assert isinstance(expr, Op)
    if expr.name in ("and", "or"):
        pairs = [_truth(a, ranges) for a in expr.args]
        lows, highs = [p[0] for p in pairs], [p[1] for p in pairs]
        return op(expr.name, *lows), op(expr.name, *highs)
    if expr.name == "not":
        low, high = _truth(expr.args[0], ranges)
        return op("not", high), op("not", low)
    sides = [bounds_of(a, ranges) for a in expr.args]
    known = [s for s in sides if s is not None]
    if len(known) < len(sides):
        return None
    if expr.name in COMPARISONS:
        return _compare(expr.name, known[0], known[1])
    return _arithmetic(expr.name, known)


def _compare(name: str, a: Bounds, b: Bounds) -> Bounds:
    if name in ("gt", "ge"):
        return _compare({"gt": "lt", "ge": "le"}[name], b, a)
    if name in ("lt", "le"):
        return op(name, a[1], b[0]), op(name, a[0], b[1])
    same = conjunction(op("eq", a[0], a[1]), op("eq", b[0], b[1]), op("eq", a[0], b[0]))
    meet = conjunction(op("le", a[0], b[1]), op("le", b[0], a[1]))
    return (same, meet) if name == "eq" else (op("not", meet), op("not", same))


def _arithmetic(name: str, sides: list[Bounds]) -> Bounds | None:
    a = sides[0]
    b = sides[1] if len(sides) > 1 else a
    if name in ("add", "min", "max"):
        return op(name, a[0], b[0]), op(name, a[1], b[1])
    if name == "sub":
        return op("sub", a[0], b[1]), op("sub", a[1], b[0])
    if name == "neg":
        return op("neg", a[1]), op("neg", a[0])
    if name == "abs":
        low = op("max", op("max", a[0], op("neg", a[1])), Lit(0))
        return low, op("max", op("neg", a[0]), a[1])
    positive = isinstance(b[0], Lit) and b[0] == b[1] and b[0].value > 0
    if name in ("mul", "floordiv") and positive:
        return op(name, a[0], b[0]), op(name, a[1], b[0])
    if name == "mod" and positive:
        return _modulo(a, b[0])
    return None


def _modulo(a: Bounds, m: Expr) -> Bounds:
    one_period = op("eq", op("floordiv", a[0], m), op("floordiv", a[1], m))
    low = op("where", one_period, op("mod", a[0], m), Lit(0))
    high = op("where", one_period, op("mod", a[1], m), op("sub", m, Lit(1)))
    return low, high


def is_nonnegative(expr: Expr) -> bool:
    """Tell whether an integer expression can be shown to be >= 0 (symbols are)."""
    if isinstance(expr, Sym):
        return True
    if isinstance(expr, Lit):
        return expr.value >= 0
    if isinstance(expr, Op):
        if expr.name in ("add", "mul", "floordiv", "min", "mod"):
            return all(is_nonnegative(a) for a in expr.args)
        if expr.name == "max":
            return any(is_nonnegative(a) for a in expr.args)
        return expr.name == "abs"
    return False
