"""The one Jinja environment: strict about missing and about empty values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"


def _refuse_none(value: object) -> object:
    if value is None:
        raise jinja2.UndefinedError("a template printed None; its context must hold a value")
    return value


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """Give the environment all templates are read with: undefined names and None are errors."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=_refuse_none,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.jinja", "html")),
    )


def register_filter(name: str, function: Callable[..., str]) -> None:
    """Add a filter, such as a backend's printer of expressions."""
    environment().filters[name] = function


def context_fields(context: Any) -> dict[str, Any]:
    """Give the fields of a frozen context as the variables of its template."""
    return {f.name: getattr(context, f.name) for f in fields(context)}


def render(template: str, context: Any) -> str:
    """Render a template (path below `templates/`) with the fields of one frozen dataclass."""
    return environment().get_template(template).render(context_fields(context))
