"""How many keys a predicate lets a query row see: an upper bound read off its shape.

A predicate that says `k > t - w` and `k <= t`, t being the row's position, has width w; a list has
the width of its rows. What cannot be read off, such as a document mask, has no bound of its own and
counts as all keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.expr import COMPARISONS, Expr, Lit, Op, Sym, kind_of

Linear = dict[str, Fraction]  # coefficient by symbol; "" is the constant


@dataclass(frozen=True, slots=True)
class Bound:
    """k <= or >= origin + offset; the origin is "0", "q" (the row) or "t" (its position)."""

    origin: str
    offset: int


@dataclass(frozen=True, slots=True)
class Reach:
    """The keys of a row: at most `width` (None: no bound), between two bounds when known."""

    width: Dim | None = None
    upper: Bound | None = None
    lower: Bound | None = None

    @property
    def is_causal(self) -> bool:
        """Whether no key is later than the row."""
        return self.upper is not None and self.upper.origin in ("q", "t") and self.upper.offset <= 0


ALL = Reach()


def reach_of(predicate: Expr, lists: Mapping[str, Dim]) -> Reach:
    """Bound the keys a row sees. lists: keys of a row of each list, by flag (chosen0, …)."""
    if isinstance(predicate, Lit):
        return ALL if predicate.value else Reach(0)
    if isinstance(predicate, Sym):
        return Reach(lists.get(predicate.name))
    if isinstance(predicate, Op):
        if predicate.name == "and":
            return _both([reach_of(a, lists) for a in predicate.args])
        if predicate.name == "or":
            return _either([reach_of(a, lists) for a in predicate.args])
        if predicate.name in ("lt", "le", "gt", "ge", "eq"):
            return _compared(predicate)
    return ALL


def _both(parts: list[Reach]) -> Reach:
    widths = [p.width for p in parts if p.width is not None]
    upper = _tightest([p.upper for p in parts], least=True)
    lower = _tightest([p.lower for p in parts], least=False)
    start = lower or Bound("0", 0)
    if upper is not None and upper.origin == start.origin:
        widths.append(max(0, upper.offset - start.offset + 1))
    return Reach(dims.least(*widths) if widths else None, upper, lower)


def _tightest(bounds: list[Bound | None], *, least: bool) -> Bound | None:
    """Choose the bound to keep: one that moves with the row, then the tighter one."""
    known = [b for b in bounds if b is not None]
    moving = [b for b in known if b.origin != "0"] or known
    if not moving:
        return None
    first = moving[0].origin
    same = [b for b in moving if b.origin == first]
    return (min if least else max)(same, key=lambda b: b.offset)


def _either(parts: list[Reach]) -> Reach:
    widths = [p.width for p in parts]
    total: Dim | None = 0
    for width in widths:
        total = None if width is None or total is None else dims.plain(total + width)
    causal = all(p.is_causal for p in parts)
    return Reach(total, Bound("t", 0) if causal else None)


def _compared(predicate: Op) -> Reach:
    """Read a bound off a linear comparison of k with the row or with a constant."""
    name, (left, right) = predicate.name, predicate.args
    if "bool" in (kind_of(left), kind_of(right)):
        return ALL
    a, b = _linear(left), _linear(right)
    if a is None or b is None:
        return ALL
    if name == "eq":
        return _both([_at_most(_minus(a, b), False), _at_most(_minus(b, a), False)])
    if name in ("gt", "ge"):
        a, b = b, a
    return _at_most(_minus(a, b), name in ("lt", "gt"))


def _at_most(difference: Linear, strict: bool) -> Reach:
    """Turn `difference <= 0`, or `< 0`, into a bound on k."""
    slope = difference.get("k", Fraction(0))
    if slope == 0:
        return ALL
    scaled = {n: c / abs(slope) for n, c in difference.items() if n != "k" and c != 0}
    constant = scaled.pop("", Fraction(0))
    # A quotient k // u rounds down: the bound moves by less than one unit. A multiple k * u, the
    # first token of a unit, moves nothing.
    slack = int(1 / abs(slope)) - 1 if abs(slope) < 1 else 0
    shift = (int(1 / abs(slope)) if abs(slope) <= 1 else 1 / abs(slope)) if strict else 0
    origin = _origin(scaled, positive=slope < 0)
    if origin is None:
        return ALL
    if slope > 0:
        offset = -(constant + shift) + slack
        bound = Bound(origin, _floor(offset))
        width = max(0, bound.offset + 1) if origin == "0" else None
        return Reach(width, bound)
    return Reach(None, None, Bound(origin, -_floor(-(constant + shift - slack))))


def _floor(value: Fraction) -> int:
    return value.numerator // value.denominator


def _origin(rest: Linear, *, positive: bool) -> str | None:
    """Name what k is compared with: 0, the row q, or its position q + Skv - Sq."""
    sign = 1 if positive else -1
    forms = {
        "0": {},
        "q": {"q": Fraction(sign)},
        "t": {"q": Fraction(sign), "Skv": Fraction(sign), "Sq": Fraction(-sign)},
    }
    return next((name for name, form in forms.items() if rest == form), None)


def _linear(expr: Expr) -> Linear | None:
    """Give an integer expression as a sum of symbols, quotients by a constant taken as exact."""
    if isinstance(expr, Sym):
        return {expr.name: Fraction(1)}
    if isinstance(expr, Lit):
        number = expr.value
        return {"": Fraction(number)} if isinstance(number, int) else None
    if not isinstance(expr, Op) or expr.name in COMPARISONS:
        return None
    parts = [_linear(a) for a in expr.args]
    if any(p is None for p in parts):
        return None
    known = [p for p in parts if p is not None]
    if expr.name == "neg":
        return _times(known[0], Fraction(-1))
    if expr.name == "add":
        return _minus(known[0], _times(known[1], Fraction(-1)))
    if expr.name == "sub":
        return _minus(known[0], known[1])
    return _scaled(expr.name, known)


def _scaled(name: str, parts: list[Linear]) -> Linear | None:
    if name == "mul":
        for factor, other in (parts, parts[::-1]):
            if set(factor) == {""}:
                return _times(other, factor[""])
    if name == "floordiv" and set(parts[1]) == {""} and parts[1][""] > 0:
        return _times(parts[0], 1 / parts[1][""])
    return None


def _times(form: Linear, factor: Fraction) -> Linear:
    return {n: c * factor for n, c in form.items()}


def _minus(a: Linear, b: Linear) -> Linear:
    names = dict.fromkeys((*a, *b))
    return {n: a.get(n, Fraction(0)) - b.get(n, Fraction(0)) for n in names}
