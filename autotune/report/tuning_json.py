"""Tunings of one pattern, a meaning each <-> JSON text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spcomp.autotune.record import Tuning
from spcomp.autotune.report.json_form import Form

SCHEMA = 1
"""Version of the JSON form; it grows when a field of a tuning changes its meaning or goes."""


@dataclass(frozen=True, slots=True)
class _Document:
    tunings: tuple[Tuning, ...]


FORM = Form("spcomp tuning report", SCHEMA, _Document, "spcomp tune")


def to_json(tunings: Sequence[Tuning]) -> str:
    """Give tunings as JSON."""
    return FORM.write(_Document(tuple(tunings)))


def from_json(text: str, name: str = "the report") -> tuple[Tuning, ...]:
    """Read tunings back; `from_json(to_json(tunings)) == tunings`. name: what errors call the text.

    Raises: ReportUnreadable.
    """
    found: _Document = FORM.read(text, name)
    if not found.tunings:
        raise FORM.refusal(name, "report.tunings", "is empty")
    return found.tunings
