"""Values of the fields of nodes and launches as text and back, directed by the fields' types."""

from __future__ import annotations

import ast
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, Union

import sympy

from spcomp.ir import dims
from spcomp.ir.expr import Expr
from spcomp.ir.nodes import Node
from spcomp.ir.plan import Axes
from spcomp.ir.text_exprs import Fault, parse_dim, parse_expr, print_dim, print_expr

NameOf = Callable[[Node], str]
LINE_WIDTH = 100


_field_types: dict[type, dict[str, Any]] = {}


def field_types(cls: type) -> dict[str, Any]:
    """Give the types of a class's fields, aliases resolved."""
    if cls not in _field_types:
        _field_types[cls] = typing.get_type_hints(cls, localns={"sympy": sympy})
    return _field_types[cls]


def shown_fields(cls: type) -> tuple[Field[Any], ...]:
    """Give the fields that text shows: all but the place, which is not part of the value."""
    return tuple(f for f in fields(cls) if f.name != "where")


# ---- printing ------------------------------------------------------------------------------------


def print_fields(value: Any, name_of: NameOf) -> list[str]:
    """Print the fields of a dataclass that differ from their default, each as `name=value`."""
    kinds = field_types(type(value))
    shown = []
    for f in shown_fields(type(value)):
        held = getattr(value, f.name)
        if f.default is MISSING or not _same(held, f.default):
            shown.append(f"{f.name}={_print(held, kinds[f.name], name_of)}")
    return shown


def _same(held: Any, default: Any) -> bool:
    """Compare without taking True for 1 or 1 for 1.0, so that text keeps the type."""
    return type(held) is type(default) and bool(held == default)


def _print(value: Any, kind: Any, name_of: NameOf) -> str:
    if value is None:
        return "None"
    if kind == Axes:
        return "{" + ", ".join(f"{name}: {number}" for name, number in value) + "}"
    if isinstance(value, Node):
        return name_of(value)
    if isinstance(value, Expr):
        return print_expr(value)
    if isinstance(value, sympy.Expr):
        return print_dim(value)
    if isinstance(value, tuple):
        inner = _element(kind)
        return "[" + ", ".join(_print(v, inner, name_of) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if is_dataclass(value):
        return f"{type(value).__name__}({', '.join(print_fields(value, name_of))})"
    return repr(value)


def layout(head: str, parts: list[str], tail: str, indent: str) -> str:
    """Join a call, over several lines when it is too wide for one."""
    line = f"{indent}{head}({', '.join(parts)}){tail}"
    if len(line) <= LINE_WIDTH or len(parts) < 2:
        return line
    inner = indent + "    "
    lines, current = [], ""
    for part in parts:
        longer = f"{current} {part}," if current else f"{part},"
        if current and len(inner) + len(longer) > LINE_WIDTH:
            lines.append(inner + current)
            longer = f"{part},"
        current = longer
    return "\n".join([f"{indent}{head}(", *lines, inner + current, f"{indent}){tail}"])


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads field values; `nodes` are the stages defined so far, by their identifier."""

    nodes: Mapping[str, Node]

    def build(self, cls: type, keywords: Mapping[str, ast.expr]) -> Any:
        """Make a value of a dataclass from its fields' syntax trees.

        Raises: Fault, for an unknown field, a missing one, or a value of another kind.
        """
        kinds, known = field_types(cls), shown_fields(cls)
        names = [f.name for f in known]
        for name in keywords:
            if name not in names:
                raise Fault(
                    f"gives {cls.__name__} the unknown field '{name}' (it has {', '.join(names)})"
                )
        for f in known:
            if f.name not in keywords and f.default is MISSING:
                raise Fault(f"gives {cls.__name__} no '{f.name}'")
        values = {
            name: self._value(f"{cls.__name__}.{name}", tree, kinds[name])
            for name, tree in keywords.items()
        }
        return cls(**values)

    def _value(self, place: str, tree: ast.expr, kind: Any) -> Any:
        if kind == Axes:
            return self._axes(place, tree)
        origin = typing.get_origin(kind)
        if origin in (Union, types.UnionType):
            return self._optional(place, tree, typing.get_args(kind))
        if origin is tuple:
            return self._tuple(place, tree, kind)
        if origin is Literal:
            return self._choice(place, tree, typing.get_args(kind))
        if isinstance(kind, type):
            if issubclass(kind, Expr):
                return parse_expr(tree)
            if issubclass(kind, Node):
                return self._node(place, tree, kind)
            if is_dataclass(kind):
                return self._nested(place, tree, kind)
        return self._plain(place, tree, kind)

    def _optional(self, place: str, tree: ast.expr, kinds: tuple[Any, ...]) -> Any:
        if sympy.Expr in kinds:
            return parse_dim(tree, dims.is_name if place == "Argument.dims" else lambda _: False)
        if isinstance(tree, ast.Constant) and tree.value is None and type(None) in kinds:
            return None
        rest = [k for k in kinds if k is not type(None)]
        if len(rest) == 1:
            return self._value(place, tree, rest[0])
        value = literal(tree)
        if type(value) not in rest:
            raise wrong_kind(place, tree, " or ".join(_described(k) for k in rest))
        return value

    def _tuple(self, place: str, tree: ast.expr, kind: Any) -> tuple[Any, ...]:
        inner = typing.get_args(kind)
        repeated = inner[-1] is Ellipsis
        if not isinstance(tree, ast.List) or not (repeated or len(tree.elts) == len(inner)):
            raise wrong_kind(place, tree, "a list" if repeated else f"a list of {len(inner)}")
        kinds = [inner[0]] * len(tree.elts) if repeated else inner
        return tuple(self._value(place, t, k) for t, k in zip(tree.elts, kinds, strict=True))

    def _axes(self, place: str, tree: ast.expr) -> Axes:
        if not isinstance(tree, ast.Dict):
            raise wrong_kind(place, tree, "axes such as {block_k: 64}")
        found = []
        for key, value in zip(tree.keys, tree.values, strict=True):
            number = literal(value)
            if not isinstance(key, ast.Name) or type(number) is not int:
                raise wrong_kind(place, tree, "axes such as {block_k: 64}")
            found.append((key.id, number))
        return tuple(found)

    def _choice(self, place: str, tree: ast.expr, choices: tuple[Any, ...]) -> Any:
        value = literal(tree)
        if value not in choices or isinstance(value, bool):
            raise wrong_kind(place, tree, "one of " + ", ".join(map(_quoted, choices)))
        return value

    def _node(self, place: str, tree: ast.expr, kind: type) -> Node:
        if not isinstance(tree, ast.Name) or not tree.id.startswith("_"):
            raise wrong_kind(place, tree, "a stage such as %0")
        if tree.id not in self.nodes:
            raise Fault(f"reads %{tree.id[1:]} before it is defined")
        node = self.nodes[tree.id]
        if not isinstance(node, kind):
            raise Fault(f"gives {place} a {type(node).__name__}, where a {kind.__name__} is needed")
        return node

    def _nested(self, place: str, tree: ast.expr, kind: type) -> Any:
        wanted = f"{kind.__name__}(...)"
        if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)):
            raise wrong_kind(place, tree, wanted)
        if tree.func.id != kind.__name__ or tree.args:
            raise wrong_kind(place, tree, wanted)
        return self.build(kind, keywords_of(tree))

    def _plain(self, place: str, tree: ast.expr, kind: Any) -> Any:
        value = literal(tree)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise wrong_kind(place, tree, _described(kind))
        return value


def _element(kind: Any) -> Any:
    """Give the type of the elements of a tuple type; `tuple | None` counts as the tuple."""
    for part in (kind, *typing.get_args(kind)):
        if typing.get_origin(part) is tuple:
            return typing.get_args(part)[0]
    return kind


def keywords_of(call: ast.Call) -> dict[str, ast.expr]:
    """Give the keyword arguments of a call.

    Raises: Fault, for a positional, repeated or starred one.
    """
    if call.args:
        raise Fault(f"gives {ast.unparse(call.func)} a value without its field's name")
    found: dict[str, ast.expr] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise Fault("unpacks fields with **, which the text does not know")
        found[keyword.arg] = keyword.value
    return found


def literal(tree: ast.expr) -> Any:
    """Read a number, string, truth value or None.

    Raises: Fault.
    """
    if isinstance(tree, ast.Constant):
        return tree.value
    if isinstance(tree, ast.Name) and tree.id in ("inf", "nan"):
        return float(tree.id)
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        value = literal(tree.operand)
        if type(value) in (int, float):
            return -value
    raise Fault(f"holds {ast.unparse(tree)!r} where a plain value is needed")


def wrong_kind(place: str, tree: ast.expr, wanted: str) -> Fault:
    """Make the fault of a value of another kind."""
    shown = ast.unparse(tree)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    return Fault(f"gives {place} the value {_percented(shown)}, where {wanted} is needed")


def _percented(text: str) -> str:
    return f"%{text[1:]}" if text.startswith("_") and text[1:].isdigit() else text


def _described(kind: Any) -> str:
    names = {int: "an integer", float: "a float", str: "a string", bool: "True or False"}
    return names.get(kind, str(kind))


def _quoted(value: Any) -> str:
    return json.dumps(value)
