"""Typed values <-> plain JSON values, strict both ways: a field too many, a field too few or a
value of another type is refused by its place, and not guessed.

| type | JSON |
|---|---|
| dataclass | object, in field order |
| Mapping[str, X], tuple[tuple[str, X], ...] | object |
| tuple[X, ...] | list |
| X or None | X or null |
| float | number; "nan", "inf" and "-inf" where JSON has none |
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from spcomp.errors import SpcompError

Refuse: TypeAlias = Callable[[str, str], SpcompError]
"""Makes the error to raise from a place and what is wrong there."""


def to_plain(wanted: Any, value: Any) -> Any:
    """Give a value of a type as what `json.dumps` takes."""
    if isinstance(wanted, type) and is_dataclass(wanted):
        hints = _hints(wanted)
        return {f.name: to_plain(hints[f.name], getattr(value, f.name)) for f in fields(wanted)}
    inner = _optional(wanted)
    if inner is not None:
        return None if value is None else to_plain(inner, value)
    named = _named(wanted)
    if named is not None:
        return {name: to_plain(named, item) for name, item in dict(value).items()}
    if get_origin(wanted) is tuple:
        return [to_plain(get_args(wanted)[0], item) for item in value]
    if wanted is float and not math.isfinite(value):
        return str(float(value))
    return value


def build(wanted: Any, value: Any, place: str, refuse: Refuse) -> Any:
    """Give the value of a type that a JSON value stands for; `build(t, to_plain(t, v)) == v`.

    place: where the JSON value stands, for errors. A field with a default may be missing.
    Raises: what `refuse` makes.
    """
    if is_dataclass(wanted):
        return _build_fields(wanted, value, place, refuse)
    inner = _optional(wanted)
    if inner is not None:
        return None if value is None else build(inner, value, place, refuse)
    named = _named(wanted)
    if named is not None:
        _check(isinstance(value, dict), place, value, "an object", refuse)
        items = {n: build(named, item, f"{place}.{n}", refuse) for n, item in value.items()}
        return tuple(sorted(items.items())) if get_origin(wanted) is tuple else items
    if get_origin(wanted) is tuple:
        _check(isinstance(value, list), place, value, "a list", refuse)
        item_type = get_args(wanted)[0]
        return tuple(
            build(item_type, item, f"{place}[{n}]", refuse) for n, item in enumerate(value)
        )
    if get_origin(wanted) is Literal:
        choices = get_args(wanted)
        if value not in choices:
            raise refuse(place, f"is {value!r}, not one of {', '.join(choices)}")
        return value
    return _build_scalar(wanted, value, place, refuse)


def _build_scalar(wanted: type, value: Any, place: str, refuse: Refuse) -> Any:
    if wanted is float and value in ("nan", "inf", "-inf"):
        return float(value)
    accepted = (int, float) if wanted is float else (wanted,)
    is_number_only = isinstance(value, bool) and wanted is not bool
    _check(isinstance(value, accepted) and not is_number_only, place, value, _name(wanted), refuse)
    try:
        return wanted(value)
    except OverflowError:
        raise refuse(place, "is too large for a number") from None


def _build_fields(wanted: Any, value: Any, place: str, refuse: Refuse) -> Any:
    _check(isinstance(value, dict), place, value, "an object", refuse)
    hints = _hints(wanted)
    known = {field.name: field for field in fields(wanted)}
    for name in value:
        if name not in known:
            raise refuse(f"{place}.{name}", "is not a field of this version")
    for name, field in known.items():
        if name not in value and field.default is MISSING:
            raise refuse(f"{place}.{name}", "is missing")
    return wanted(**{n: build(hints[n], value[n], f"{place}.{n}", refuse) for n in value})


def _check(holds: bool, place: str, value: Any, wanted: str, refuse: Refuse) -> None:
    if not holds:
        raise refuse(place, f"is {_kind(value)}, not {wanted}")


def _optional(wanted: Any) -> Any:
    """Give X of `X | None`, or None for any other type."""
    if get_origin(wanted) not in (Union, types.UnionType):
        return None
    (inner,) = (choice for choice in get_args(wanted) if choice is not types.NoneType)
    return inner


def _named(wanted: Any) -> Any:
    """Give X of `Mapping[str, X]` and of `tuple[tuple[str, X], ...]`, or None."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin is Mapping:
        return inner[1]
    if origin is tuple and get_origin(inner[0]) is tuple:
        pair = get_args(inner[0])
        return pair[1] if pair[0] is str else None
    return None


@lru_cache(maxsize=64)
def _hints(wanted: Any) -> dict[str, Any]:
    return get_type_hints(wanted)


def _name(wanted: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[wanted]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return kinds.get(type(value), "a list" if isinstance(value, list) else "an object")
