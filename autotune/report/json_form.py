"""The file form all reports share: a JSON object with a kind and a schema, read back strictly, so
that an old file is refused and not guessed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from spcomp.autotune import json_values
from spcomp.errors import SpcompError


class ReportUnreadable(SpcompError):
    """A JSON text is no report of this version."""

    message = "{name} cannot be read: {place} {problem}."
    help = "this version reads schema {schema}; make the report anew with `{command}`."


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of report: its name and schema in the file, the dataclass of all its other fields, and
    the command that makes one."""

    kind: str
    schema: int
    fields: type
    command: str

    def write(self, value: Any) -> str:
        """Give a value of `fields` as indented JSON: no NaN, keys in the order of the fields."""
        plain = json_values.to_plain(self.fields, value)
        document = {"kind": self.kind, "schema": self.schema, **plain}
        return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def read(self, text: str, name: str) -> Any:
        """Read back what `write` wrote; name: what errors call the text, such as its path.

        Raises: ReportUnreadable (not JSON, another kind or schema, a field too many or too few, a
            wrong type).
        """
        try:
            document = _document(text)
        except ValueError as error:
            raise self.refusal(name, "the text", f"is no JSON ({error})") from None
        if not isinstance(document, dict) or document.pop("kind", None) != self.kind:
            raise self.refusal(name, "the document", f"has no kind '{self.kind}'")
        schema = document.pop("schema", None)
        if schema != self.schema:
            raise self.refusal(name, "its schema", f"is {schema!r}")
        return json_values.build(
            self.fields, document, "report", lambda *problem: self.refusal(name, *problem)
        )

    def refusal(self, name: str, place: str, problem: str) -> ReportUnreadable:
        """Make the error of a text that is no report of this form."""
        return ReportUnreadable(
            name=name, place=place, problem=problem, schema=self.schema, command=self.command
        )


def kind_of(text: str) -> str | None:
    """Give the kind that a JSON text names, or None where it names none.

    Raises: ValueError, where the text is no JSON.
    """
    document = _document(text)
    kind = document.get("kind") if isinstance(document, dict) else None
    return kind if isinstance(kind, str) else None


def _document(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
