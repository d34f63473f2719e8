"""The lines of a tuning file: what each may hold, and what a whole file says.

| line | holds |
|---|---|
| 1 | `{"kind": "spcomp tuning", "schema": 1, "call": …}` |
| others | `{"row": …}`, `{"dense": …}`, `{"kept": …}`, `{"note": …}` or `{"session": …}` |

Of several rows of a candidate the last one holds; `best` and `ok` are decided anew on reading."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from spcomp.autotune.json_values import build, to_plain
from spcomp.autotune.record import FINAL, SCHEMA, Kept, Row, TunedCall, Tuning, settled
from spcomp.errors import SpcompError

KIND = "spcomp tuning"


class TuningUnreadable(SpcompError):
    """A file is no tuning of this version."""

    message = "the tuning {path} cannot be read: {place} {problem}."
    help = "this version reads schema {schema}; move the file away and tune again."


@dataclass(frozen=True, slots=True)
class Dense:
    """Dense causal attention of the same call: milliseconds, and what computed or predicted it."""

    ms: float
    by: str


@dataclass(frozen=True, slots=True)
class Session:
    """One search that came to its end. created: when it ended, ISO 8601 in UTC."""

    seed: int
    elapsed_s: float
    is_partial: bool
    created: str


Event: TypeAlias = Row | Dense | Kept | Session | str
"""A str is a note."""

EVENTS: Mapping[str, type] = {
    "row": Row,
    "dense": Dense,
    "kept": Kept,
    "note": str,
    "session": Session,
}


def digest_of(call: TunedCall) -> str:
    """Give the key of a call: SHA-256 of its canonical JSON and the schema, 32 hex digits.

    Every field counts: no length, dtype, head count, device or version is put together with
    another.
    """
    document = {"schema": SCHEMA, "call": to_plain(TunedCall, call)}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tuning_of(call: TunedCall, events: Iterable[Event]) -> Tuning:
    """Put events together, the oldest first.

    A later row of a candidate replaces an earlier one, unless only the earlier one is final.
    Skipped rows hold until the next session ends, which has its own.
    """
    rows: list[Row] = []
    recent: list[Row] = []  # of the session under way
    dense: Dense | None = None
    kept: Kept | None = None
    notes: dict[str, None] = {}
    last: Session | None = None
    elapsed_s = 0.0
    for event in events:
        if isinstance(event, Row):
            recent.append(event)
        elif isinstance(event, Dense):
            dense = event
        elif isinstance(event, Kept):
            kept = event
        elif isinstance(event, str):
            notes[event] = None
        else:
            rows = [row for row in rows if row.status != "skipped"] + recent
            recent, last = [], event
            elapsed_s += event.elapsed_s
    return Tuning(
        call=call,
        rows=settled(_final_before_others([*rows, *recent])),
        is_partial=last is None or last.is_partial or bool(recent),
        seed=0 if last is None else last.seed,
        elapsed_s=elapsed_s,
        dense_ms=None if dense is None else dense.ms,
        dense_by="" if dense is None else dense.by,
        kept=kept,
        notes=tuple(notes),
        created="" if last is None else last.created,
    )


def _final_before_others(rows: list[Row]) -> list[Row]:
    known = {row.candidate for row in rows if row.status in FINAL}
    return [row for row in rows if row.status in FINAL or row.candidate not in known]


def header_of(call: TunedCall) -> bytes:
    """Give the first line of a file."""
    return _line({"kind": KIND, "schema": SCHEMA, "call": to_plain(TunedCall, call)})


def line_of(event: Event) -> bytes:
    """Give the line of an event."""
    name = next(name for name, kind in EVENTS.items() if isinstance(event, kind))
    return _line({name: to_plain(EVENTS[name], event)})


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False).encode() + b"\n"


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parsed:
    """The content of a file; `whole_bytes` is its length without a cut line at the end."""

    call: TunedCall
    events: list[Event]
    whole_bytes: int


def parse(data: bytes, path: Path) -> Parsed:
    """Read the bytes of a file; a cut line is left out with one warning that names it.

    Raises: TuningUnreadable.
    """
    lines = data.split(b"\n")
    cut = lines.pop()  # what follows the last line break
    if not lines:
        _refuse(path, "line 1", "is cut")
    call = _call(lines[0], path)
    events: list[Event] = []
    for number, line in enumerate(lines[1:], start=2):
        document = _document(line)
        if document is None:
            warn(f"line {number} of {path} is cut; it is left out.")
        else:
            events.append(_event(document, number, path))
    if cut:
        warn(f"the last line of {path} is cut; it is left out.")
    return Parsed(call, events, len(data) - len(cut))


def _call(line: bytes, path: Path) -> TunedCall:
    document = _document(line)
    if not isinstance(document, dict) or document.pop("kind", None) != KIND:
        _refuse(path, "line 1", f"has no kind '{KIND}'")
    schema = document.pop("schema", None)
    if schema != SCHEMA:
        _refuse(path, "its schema", f"is {schema!r}")
    header: _Header = build(_Header, document, "line 1", _refusal(path))
    return header.call


@dataclass(frozen=True, slots=True)
class _Header:
    call: TunedCall


def _event(document: Any, number: int, path: Path) -> Event:
    place = f"line {number}"
    if not isinstance(document, dict) or len(document) != 1:
        _refuse(path, place, "does not hold one event")
    ((name, value),) = document.items()
    if name not in EVENTS:
        _refuse(path, f"{place}, {name}", f"is not one of {', '.join(EVENTS)}")
    event: Event = build(EVENTS[name], value, f"{place}, {name}", _refusal(path))
    return event


def _document(line: bytes) -> Any:
    """Give the JSON value of a line, or None where it is cut."""
    try:
        return json.loads(line.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refusal(path: Path) -> Callable[[str, str], TuningUnreadable]:
    return lambda place, problem: TuningUnreadable(
        path=path, place=place, problem=problem, schema=SCHEMA
    )


def _refuse(path: Path, place: str, problem: str) -> NoReturn:
    raise _refusal(path)(place, problem)


def warn(text: str) -> None:
    """Warn in the name of spcomp."""
    warnings.warn(f"spcomp: {text}", stacklevel=2)
