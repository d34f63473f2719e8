"""Report record <-> JSON text: strict both ways, so that an old file is refused and not guessed."""

from __future__ import annotations

import json
import types
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from spcomp.autotune.report.record import SCHEMA, ReportRecord, check
from spcomp.errors import SpcompError

KIND = "spcomp report"


class ReportUnreadable(SpcompError):
    """A JSON text is no report of this version."""

    message = "the report cannot be read: {place} {problem}."
    help = "this version writes and reads schema {schema}; make the report anew with `make demo`."


def to_json(record: ReportRecord) -> str:
    """Give the record as indented JSON with its schema version; no NaN, keys in field order.

    Raises: ReportContradiction.
    """
    check(record)
    document = {"kind": KIND, "schema": SCHEMA, **asdict(record)}
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str) -> ReportRecord:
    """Read a record back; `from_json(to_json(record)) == record`.

    Raises: ReportUnreadable (not JSON, another schema, a field too many or too few, a wrong type),
        ReportContradiction.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise _unreadable("the text", f"is no JSON ({error})") from None
    if not isinstance(document, dict) or document.pop("kind", None) != KIND:
        raise _unreadable("the document", f"has no kind '{KIND}'")
    schema = document.pop("schema", None)
    if schema != SCHEMA:
        raise _unreadable("its schema", f"is {schema!r}")
    record: ReportRecord = _build(ReportRecord, document, "report")
    check(record)
    return record


def _build(wanted: Any, value: Any, place: str) -> Any:
    if is_dataclass(wanted):
        return _build_fields(wanted, value, place)
    origin = get_origin(wanted)
    if origin is tuple:
        if not isinstance(value, list):
            raise _unreadable(place, f"is {type(value).__name__}, not a list")
        item = get_args(wanted)[0]
        return tuple(_build(item, entry, f"{place}[{n}]") for n, entry in enumerate(value))
    if origin in (Union, types.UnionType):
        inner = next(choice for choice in get_args(wanted) if choice is not type(None))
        return None if value is None else _build(inner, value, place)
    if origin is Literal:
        if value not in get_args(wanted):
            raise _unreadable(place, f"is {value!r}, not one of {', '.join(get_args(wanted))}")
        return value
    return _build_plain(wanted, value, place)


def _build_plain(wanted: type, value: Any, place: str) -> Any:
    accepted = (int, float) if wanted is float else (wanted,)
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise _unreadable(place, f"is {type(value).__name__}, not {wanted.__name__}")
    return wanted(value)


def _build_fields(wanted: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise _unreadable(place, f"is {type(value).__name__}, not an object")
    hints = get_type_hints(wanted)
    known = {field.name: field for field in fields(wanted)}
    for name in value:
        if name not in known:
            raise _unreadable(f"{place}.{name}", "is not a field of this version")
    for name, field in known.items():
        if name not in value and field.default is MISSING:
            raise _unreadable(f"{place}.{name}", "is missing")
    return wanted(**{n: _build(hints[n], value[n], f"{place}.{n}") for n in value})


def _unreadable(place: str, problem: str) -> ReportUnreadable:
    return ReportUnreadable(place=place, problem=problem, schema=SCHEMA)
