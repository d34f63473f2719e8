"""The list of backends; each is imported when asked for. Third parties join by the entry point
`spcomp.backends`."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from spcomp.backends.base import Backend
from spcomp.errors import UnknownBackend, UnknownTarget
from spcomp.ir.target import Target

SHIPPED = {
    "reference": "spcomp.backends.reference",
    "triton": "spcomp.backends.triton",
    "ascendc": "spcomp.backends.ascendc",
}


def names() -> tuple[str, ...]:
    """Name all backends."""
    return (*SHIPPED, *(e.name for e in entry_points(group="spcomp.backends")))


@cache
def backend(name: str) -> Backend:
    """Give a backend by name.

    Raises: UnknownBackend.
    """
    if name in SHIPPED:
        found: Backend = import_module(SHIPPED[name]).BACKEND
        return found
    for entry in entry_points(group="spcomp.backends"):
        if entry.name == name:
            loaded: Backend = entry.load()
            return loaded
    raise UnknownBackend(name=name, choices=", ".join(names()))


def targets() -> dict[str, Target]:
    """Give every target of every backend, by name."""
    return {k: t for name in names() for k, t in backend(name).targets().items()}


def target(name: str) -> Target:
    """Give a target by name.

    Raises: UnknownTarget.
    """
    known = targets()
    if name not in known:
        raise UnknownTarget(name=name, choices=", ".join(known))
    return known[name]
