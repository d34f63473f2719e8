"""Element expressions and dims as text, and back from a syntax tree; nothing is ever evaluated.

An element expression reads as Python with every inner operator in parentheses, such as `chosen0 &
(k <= (q + (Skv - Sq)))`. An element of a captured tensor names the kind of its elements:
`table0.int[b, q]`.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable

import sympy

from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.expr import (
    ARITHMETIC,
    COMPARISONS,
    CONNECTIVES,
    Expr,
    Kind,
    Lit,
    Load,
    Number,
    Op,
    Sym,
)


class Fault(Exception):
    """What is wrong with a piece of text; `ir/text.py` adds the line to it."""


SYMBOLS = frozenset({"b", "h", "q", "k", "q_lo", "q_hi", "k_lo", "k_hi", "Sq", "Skv", "score"})
_FLAG = re.compile(r"chosen\d+")
_INFIX = {**COMPARISONS, **ARITHMETIC, **CONNECTIVES}
_ARITY = {**dict.fromkeys(_INFIX, 2), "min": 2, "max": 2, "where": 3}
_CALLS = ("min", "max", "abs", "where", "exp", "log", "tanh", "float", "neg", "inverse")
_MANY = {"and": "every", "or": "some"}
_KINDS: dict[str, Kind] = {"bool": "bool", "int": "int", "float": "float"}


def is_symbol(name: str) -> bool:
    """Tell whether a name is a symbol of an element expression."""
    return name in SYMBOLS or _FLAG.fullmatch(name) is not None


# ---- element expressions -------------------------------------------------------------------------


def print_expr(expr: Expr) -> str:
    """Print an element expression."""
    if isinstance(expr, Sym):
        return expr.name
    if isinstance(expr, Lit):
        return repr(expr.value)
    if isinstance(expr, Load):
        inner = ", ".join(print_expr(i) for i in expr.index)
        return f"{expr.tensor}.{expr.kind}[{inner or '()'}]"
    assert isinstance(expr, Op), expr
    if expr.name in _INFIX and len(expr.args) == 2:
        left, right = (_operand(a) for a in expr.args)
        return f"{left} {_INFIX[expr.name]} {right}"
    if expr.name in ("neg", "not") and not isinstance(expr.args[0], Lit):
        return f"{'-' if expr.name == 'neg' else '~'}{_operand(expr.args[0])}"
    name = {**_MANY, "not": "inverse"}.get(expr.name, expr.name)
    return f"{name}({', '.join(print_expr(a) for a in expr.args)})"


def _operand(expr: Expr) -> str:
    text = print_expr(expr)
    infix = isinstance(expr, Op) and (expr.name in ("neg", "not") or expr.name in _INFIX)
    return f"({text})" if infix or text.startswith("-") else text


def parse_expr(tree: ast.expr) -> Expr:
    """Read an element expression from a syntax tree.

    Raises: Fault.
    """
    if isinstance(tree, ast.Name):
        return _name(tree.id)
    if isinstance(tree, ast.Constant):
        return Lit(_number(tree.value))
    if isinstance(tree, ast.UnaryOp):
        return _unary(tree)
    if isinstance(tree, ast.BinOp):
        sign = _sign(tree.op)
        return Op(sign, (parse_expr(tree.left), parse_expr(tree.right)))
    if isinstance(tree, ast.Compare) and len(tree.ops) == 1:
        sign = _sign(tree.ops[0])
        return Op(sign, (parse_expr(tree.left), parse_expr(tree.comparators[0])))
    if isinstance(tree, ast.Subscript):
        return _load(tree)
    if isinstance(tree, ast.Call):
        return _call(tree)
    raise Fault(f"holds {ast.unparse(tree)!r}, which is no element expression")


_SIGNS: dict[type[ast.AST], str] = {
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Div: "div",
    ast.BitAnd: "and",
    ast.BitOr: "or",
}


def _sign(operator: ast.AST) -> str:
    if type(operator) not in _SIGNS:
        raise Fault(f"uses the operator {type(operator).__name__}, which element expressions lack")
    return _SIGNS[type(operator)]


def _name(name: str) -> Expr:
    if name in ("inf", "nan"):
        return Lit(math.inf if name == "inf" else math.nan)
    if not is_symbol(name):
        raise Fault(f"uses the unknown symbol '{name}'")
    return Sym(name)


def _number(value: object) -> Number:
    if isinstance(value, (bool, int, float)):
        return value
    raise Fault(f"holds {value!r} where a number is needed")


def _unary(tree: ast.UnaryOp) -> Expr:
    inner = parse_expr(tree.operand)
    if isinstance(tree.op, ast.Invert):
        return Op("not", (inner,))
    if not isinstance(tree.op, ast.USub):
        raise Fault(f"uses the operator {type(tree.op).__name__}, which element expressions lack")
    return Lit(-inner.value) if isinstance(inner, Lit) else Op("neg", (inner,))


def _load(tree: ast.Subscript) -> Expr:
    head = tree.value
    if not (isinstance(head, ast.Attribute) and isinstance(head.value, ast.Name)):
        raise Fault(f"reads {ast.unparse(tree)!r}; an element is written table.kind[index]")
    if head.attr not in _KINDS:
        raise Fault(f"reads elements of the unknown kind '{head.attr}'")
    parts = tree.slice.elts if isinstance(tree.slice, ast.Tuple) else [tree.slice]
    return Load(head.value.id, tuple(parse_expr(p) for p in parts), _KINDS[head.attr])


def _call(tree: ast.Call) -> Expr:
    name = tree.func.id if isinstance(tree.func, ast.Name) else ast.unparse(tree.func)
    args = tuple(parse_expr(a) for a in tree.args)
    for connective, written in _MANY.items():
        if name == written:
            return Op(connective, args)
    if name not in _CALLS or tree.keywords:
        raise Fault(f"calls '{name}', which element expressions lack")
    name = "not" if name == "inverse" else name
    wanted = _ARITY.get(name, 1)
    if len(args) != wanted:
        raise Fault(f"gives {name}() {len(args)} arguments, where it takes {wanted}")
    return Op(name, args)


# ---- dims ----------------------------------------------------------------------------------------


def print_dim(dim: Dim) -> str:
    """Print a dim as a Python expression over the symbols of `ir/dims.py`."""
    return str(dim)


def parse_dim(tree: ast.expr, is_name: Callable[[str], bool] = lambda _: False) -> Dim:
    """Read a dim from a syntax tree. is_name: tells names of a pattern's own, which stand alone.

    Raises: Fault.
    """
    if isinstance(tree, ast.Name) and is_name(tree.id):
        return dims.named(tree.id)
    return dims.plain(_dim(tree))


def _dim(tree: ast.expr) -> sympy.Expr:
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return sympy.Integer(tree.value)
    if isinstance(tree, ast.Name):
        if tree.id not in dims.SYMBOLS:
            raise Fault(f"uses the unknown dim '{tree.id}'")
        return dims.SYMBOLS[tree.id]
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return sympy.Mul(sympy.Integer(-1), _dim(tree.operand))
    if isinstance(tree, ast.BinOp):
        return _binary(tree)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.keywords:
        return _dim_call(tree.func.id, [_dim(a) for a in tree.args])
    raise Fault(f"holds {ast.unparse(tree)!r}, which is no dim")


def _binary(tree: ast.BinOp) -> sympy.Expr:
    if isinstance(tree.op, (ast.Mult, ast.Div)):
        # All factors at once: sympy multiplies a number into a sum when it meets the two alone.
        return sympy.Mul(*_factors(tree))
    left, right = _dim(tree.left), _dim(tree.right)
    if isinstance(tree.op, ast.Add):
        return sympy.Add(left, right)
    if isinstance(tree.op, ast.Sub):
        return sympy.Add(left, sympy.Mul(sympy.Integer(-1), right))
    if isinstance(tree.op, ast.Pow):
        return sympy.Pow(left, right)
    raise Fault(f"uses the operator {type(tree.op).__name__}, which dims lack")


def _factors(tree: ast.expr) -> list[sympy.Expr]:
    if not (isinstance(tree, ast.BinOp) and isinstance(tree.op, (ast.Mult, ast.Div))):
        return [_dim(tree)]
    right = _dim(tree.right)
    if isinstance(tree.op, ast.Div):
        if right == 0:
            raise Fault("divides a dim by zero")
        right = sympy.Pow(right, sympy.Integer(-1))
    return [*_factors(tree.left), right]


def _dim_call(name: str, args: list[sympy.Expr]) -> sympy.Expr:
    rounding: dict[str, Callable[[sympy.Expr], sympy.Expr]] = {
        "ceiling": sympy.ceiling,
        "floor": sympy.floor,
    }
    if name in rounding and len(args) == 1:
        return rounding[name](args[0])
    if name in ("Min", "Max") and len(args) > 1:
        # As dims.least makes it: sympy's own evaluation drops arguments it must not drop.
        return (sympy.Min if name == "Min" else sympy.Max)(*args, evaluate=False)
    raise Fault(f"calls {name}() with {len(args)} arguments, which dims lack")
