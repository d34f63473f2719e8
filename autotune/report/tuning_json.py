"""Tunings <-> JSON text: strict both ways, like the report of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from spcomp.autotune import json_values
from spcomp.autotune.record import Tuning
from spcomp.autotune.report.json_text import ReportUnreadable

KIND = "spcomp tuning report"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class _Document:
    tunings: tuple[Tuning, ...]


def to_json(tunings: Sequence[Tuning]) -> str:
    """Give tunings as indented JSON with a kind and a schema."""
    document = json_values.to_plain(_Document, _Document(tuple(tunings)))
    whole = {"kind": KIND, "schema": SCHEMA, **document}
    return json.dumps(whole, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str) -> tuple[Tuning, ...]:
    """Read tunings back; `from_json(to_json(tunings)) == tunings`.

    Raises: ReportUnreadable (not JSON, another schema, a field too many or too few, a wrong type).
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
    found: _Document = json_values.build(_Document, document, "report", _unreadable)
    if not found.tunings:
        raise _unreadable("report.tunings", "is empty")
    return found.tunings


def _unreadable(place: str, problem: str) -> ReportUnreadable:
    return ReportUnreadable(place=place, problem=problem, schema=SCHEMA)
