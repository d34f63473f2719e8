"""A model's report <-> JSON text."""

from __future__ import annotations

from spcomp.autotune.report.json_form import Form
from spcomp.autotune.report.record import SCHEMA, ReportRecord, check

FORM = Form("spcomp report", SCHEMA, ReportRecord, "make demo")


def to_json(record: ReportRecord) -> str:
    """Give the record as JSON.

    Raises: ReportContradiction.
    """
    check(record)
    return FORM.write(record)


def from_json(text: str, name: str = "the report") -> ReportRecord:
    """Read a record back; `from_json(to_json(record)) == record`. name: what errors call the text.

    Raises: ReportUnreadable, ReportContradiction.
    """
    record: ReportRecord = FORM.read(text, name)
    check(record)
    return record
