"""Argument checks the verbs share; each raises a sentence with the figure and the user's line."""

from __future__ import annotations

from typing import Any

from spcomp.dsl.recording import user_line
from spcomp.errors import NegativeCount, NotANumber, UnknownChoice, WrongStage
from spcomp.ir.nodes import Node


def count(verb: str, name: str, value: Any, *, least: int, counts: str) -> int:
    """Check an integer of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        kind = type(value).__name__
        raise NotANumber(
            where=user_line(), verb=verb, name=name, value=value, kind=kind, wanted="an integer"
        )
    number = int(value.__index__())
    if number < least:
        raise NegativeCount(
            where=user_line(), verb=verb, name=name, value=number, least=least, counts=counts
        )
    return number


def number(verb: str, name: str, value: Any) -> float:
    """Check a real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kind = type(value).__name__
        raise NotANumber(
            where=user_line(), verb=verb, name=name, value=value, kind=kind, wanted="a number"
        )
    return float(value)


def share(verb: str, name: str, value: Any) -> float:
    """Check a share of a whole."""
    held = number(verb, name, value)
    if not 0 <= held <= 1:
        raise NotANumber(
            where=user_line(),
            verb=verb,
            name=name,
            value=held,
            kind="float",
            wanted="a share from 0 to 1",
        )
    return held


def pair(verb: str, name: str, value: Any, wanted: str) -> None:
    """Check that a value is a pair."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise NotANumber(
            where=user_line(),
            verb=verb,
            name=name,
            value=value,
            kind=type(value).__name__,
            wanted=wanted,
        )


def choice(verb: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Check that a value is one of the names offered."""
    if value not in choices:
        shown = ", ".join(repr(c) for c in choices)
        raise UnknownChoice(where=user_line(), verb=verb, name=name, value=value, choices=shown)


def stage(
    verb: str, argument: str, value: Any, kinds: tuple[type, ...], wanted: str, way_out: str
) -> None:
    """Check that a value is a stage of one of some kinds."""
    if isinstance(value, kinds):
        return
    given = (
        f"the result of {type(value).__name__.lower()}"
        if isinstance(value, Node)
        else f"a {type(value).__name__}"
    )
    raise WrongStage(
        where=user_line(), verb=verb, argument=argument, wanted=wanted, given=given, way_out=way_out
    )
