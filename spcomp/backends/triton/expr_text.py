"""Print element expressions (`ir/expr.py`) as Triton source.

The text means the same whether its operands are tensors or scalars, compiled or interpreted:

- truth values stay int1 and numbers stay numbers: a truth value among numbers is written as 0 or 1;
- `//` and `%` round towards minus infinity as Python's do. Triton's truncate, so an operand that is
  not provably non-negative goes through `floor_div` and `floor_mod`, which
  `macros/expression.jinja` defines where `helpers_of` says that an expression calls them;
- a captured tensor is read at 64-bit offsets from `{name}_ptr` with strides `{name}_stride_0`, ….
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from spcomp.ir.expr import (
    COMPARISONS,
    Expr,
    Kind,
    Lit,
    Load,
    Number,
    Op,
    Sym,
    is_nonnegative,
    kind_of,
    walk,
)

# How tightly Python binds what was printed; an operand that binds looser gets parentheses.
_COMPARE, _OR, _AND, _SUM, _PRODUCT, _UNARY, _ATOM = range(7)
_NAME = re.compile(r"[A-Za-z_]\w*(\[[^\[\]]*\])?")
_BINARY = {"add": ("+", _SUM), "sub": ("-", _SUM), "mul": ("*", _PRODUCT)}
_CALLS = {"min": "tl.minimum", "max": "tl.maximum"}
_FLOAT_CALLS = {"exp": "tl.exp", "log": "tl.log", "tanh": "tanh"}
_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_AS_TRUTH = {"add": "or", "max": "or", "mul": "and", "min": "and"}


@dataclass(frozen=True, slots=True)
class Helpers:
    """Which helper functions of `macros/expression.jinja` a kernel's expressions call."""

    has_floor_division: bool = False
    has_tanh: bool = False


class _Text(NamedTuple):
    code: str
    binds: int


def helpers_of(*exprs: Expr) -> Helpers:
    """Tell which helper functions the text of these expressions calls."""
    nodes = [e for expr in exprs for e in walk(expr) if isinstance(e, Op)]
    return Helpers(
        has_floor_division=any(_rounds(e) for e in nodes),
        has_tanh=any(e.name == "tanh" for e in nodes),
    )


def to_triton(expr: Expr, **names: str) -> str:
    """Print an expression as Triton source.

    `names` maps a symbol to the text that stands for it, such as q="rows[:, None]"; a symbol
    without one prints as its own name in lower case (Sq as sq). Rows and columns that an expression
    with loads is given must lie inside the tensors: the text reads where it is told to. A captured
    integer is used in the width it is stored in.
    """
    return _print(expr, names).code


def gluon_text(text: str) -> str:
    """Turn Triton source into Gluon, whose functions have the same names."""
    return re.sub(r"\btl\.", "gl.", text).replace("@triton.jit", "@gluon.jit")


def _print(expr: Expr, names: Mapping[str, str]) -> _Text:
    if isinstance(expr, Sym):
        text = names.get(expr.name, expr.name.lower())
        return _Text(text, _ATOM) if _NAME.fullmatch(text) else _Text(f"({text})", _ATOM)
    if isinstance(expr, Lit):
        return _literal(expr.value)
    if isinstance(expr, Load):
        return _load(expr, names)
    assert isinstance(expr, Op)
    return _operator(expr, names)


def _literal(value: Number) -> _Text:
    if isinstance(value, float) and not math.isfinite(value):
        return _Text(f'float("{value}")', _ATOM)
    text = repr(value)
    return _Text(f"({text})", _ATOM) if text.startswith("-") else _Text(text, _ATOM)


def _load(expr: Load, names: Mapping[str, str]) -> _Text:
    terms = [f"{expr.tensor}_ptr"]
    for axis, index in enumerate(expr.index):
        position = _print(_as_number(index), names).code
        terms.append(f"tl.cast({position}, tl.int64) * {expr.tensor}_stride_{axis}")
    value = f"tl.load({' + '.join(terms)})"
    if expr.kind == "bool":
        return _Text(f"{value} != 0", _COMPARE)
    return _Text(f"tl.cast({value}, tl.float32)" if expr.kind == "float" else value, _ATOM)


def _operator(expr: Op, names: Mapping[str, str]) -> _Text:
    name, args = expr.name, expr.args
    if name in ("and", "or"):
        sign, binds = ("&", _AND) if name == "and" else ("|", _OR)
        return _chain([_print(a, names) for a in args], sign, binds)
    if name == "not":
        return _negation(args[0], names)
    if name in COMPARISONS:
        return _comparison(name, args, names)
    if name == "where":
        return _choice(args, kind_of(expr), names)
    if kind_of(expr) == "bool":
        return _arithmetic_of_truth(expr, names)
    return _arithmetic(expr, names)


def _chain(parts: list[_Text], sign: str, binds: int) -> _Text:
    """Join by an associative operator; a looser operand, and any comparison, gets parentheses."""
    return _Text(f" {sign} ".join(_inside(p, binds) for p in parts), binds)


def _inside(text: _Text, binds: int) -> str:
    return text.code if text.binds >= binds else f"({text.code})"


def _negation(arg: Expr, names: Mapping[str, str]) -> _Text:
    """Negate by the opposite comparison; NaN has none among floats, so they compare with 0."""
    if isinstance(arg, Op) and arg.name in COMPARISONS:
        exact = arg.name in ("eq", "ne")
        if exact or all(kind_of(a) != "float" for a in arg.args):
            return _comparison(_OPPOSITE[arg.name], arg.args, names)
    return _Text(f"{_inside(_print(arg, names), _OR)} == 0", _COMPARE)


def _comparison(name: str, args: tuple[Expr, ...], names: Mapping[str, str]) -> _Text:
    left, right = args
    if {kind_of(left), kind_of(right)} != {"bool"} or name not in ("eq", "ne"):
        left, right = _as_number(left), _as_number(right)
    sides = [_inside(_print(side, names), _OR) for side in (left, right)]
    return _Text(f" {COMPARISONS[name]} ".join(sides), _COMPARE)


def _choice(args: tuple[Expr, ...], kind: Kind, names: Mapping[str, str]) -> _Text:
    condition = args[0] if kind_of(args[0]) == "bool" else Op("ne", (args[0], Lit(0)))
    branches = args[1:] if kind == "bool" else tuple(_as_number(a) for a in args[1:])
    codes = [_print(a, names).code for a in (condition, *branches)]
    return _Text(f"tl.where({', '.join(codes)})", _ATOM)


def _arithmetic_of_truth(expr: Op, names: Mapping[str, str]) -> _Text:
    """Arithmetic on truth values alone gives a truth value, as in torch: + is or, * is and."""
    if expr.name in _AS_TRUTH:
        return _operator(Op(_AS_TRUTH[expr.name], expr.args), names)
    number = Op(expr.name, tuple(_as_number(a) for a in expr.args))
    return _comparison("ne", (number, Lit(0)), names)


def _arithmetic(expr: Op, names: Mapping[str, str]) -> _Text:
    name = expr.name
    args = [_as_number(a) for a in expr.args]
    texts = [_print(a, names) for a in args]
    if name in _BINARY:
        sign, binds = _BINARY[name]
        return _Text(f"{_inside(texts[0], binds)} {sign} {_inside(texts[1], binds + 1)}", binds)
    if name in _CALLS:
        return reduce(lambda a, b: _Text(f"{_CALLS[name]}({a.code}, {b.code})", _ATOM), texts)
    if name in _FLOAT_CALLS:
        return _Text(f"{_FLOAT_CALLS[name]}({_float(args[0], texts[0]).code})", _ATOM)
    if name in ("floordiv", "mod"):
        return _rounding(expr, texts)
    table: dict[str, Callable[[], _Text]] = {
        "div": lambda: _quotient(texts),
        "neg": lambda: _Text(f"-{_inside(texts[0], _UNARY)}", _UNARY),
        "abs": lambda: _Text(f"tl.abs({texts[0].code})", _ATOM),
        "float": lambda: _float(args[0], texts[0]),
    }
    return table[name]()


def _float(expr: Expr, text: _Text) -> _Text:
    if kind_of(expr) == "float":
        return text
    return _Text(f"tl.cast({text.code}, tl.float32)", _ATOM)


def _quotient(texts: list[_Text]) -> _Text:
    return _Text(f"{_inside(texts[0], _PRODUCT)} / {_inside(texts[1], _UNARY)}", _PRODUCT)


def _rounding(expr: Op, texts: list[_Text]) -> _Text:
    """Divide or take the remainder, rounding the quotient towards minus infinity."""
    left, right = texts
    if kind_of(expr) == "float":
        quotient = f"tl.floor({_quotient(texts).code})"
        if expr.name == "floordiv":
            return _Text(quotient, _ATOM)
        return _Text(f"{_inside(left, _SUM)} - {quotient} * {_inside(right, _UNARY)}", _SUM)
    if _rounds(expr):
        function = "floor_div" if expr.name == "floordiv" else "floor_mod"
        return _Text(f"{function}({left.code}, {right.code})", _ATOM)
    sign = "//" if expr.name == "floordiv" else "%"
    return _Text(f"{_inside(left, _PRODUCT)} {sign} {_inside(right, _UNARY)}", _PRODUCT)


def _rounds(expr: Op) -> bool:
    """Tell whether an integer division may meet a negative operand."""
    if expr.name not in ("floordiv", "mod") or kind_of(expr) == "float":
        return False
    return not all(is_nonnegative(a) for a in expr.args)


def _as_number(expr: Expr) -> Expr:
    """Read a truth value as 0 or 1 where a number is needed."""
    if kind_of(expr) != "bool":
        return expr
    if isinstance(expr, Lit):
        return Lit(int(expr.value))
    return Op("where", (expr, Lit(1), Lit(0)))
