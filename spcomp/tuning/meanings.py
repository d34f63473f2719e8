"""Which patterns a tuning looks at: a made one, or a function with hyper-parameters left open."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from spcomp.dsl.pattern import Pattern, PatternFunction
from spcomp.errors import NothingToTune, WrongArguments


def meanings(pattern: Pattern | PatternFunction, hyper: Mapping[str, Any]) -> tuple[Pattern, ...]:
    """Give every pattern to tune, the default meaning first.

    hyper: values by name; a list or tuple is tried value by value, anything else is fixed. What the
    function leaves open (`@pattern(open=...)`) and hyper does not name is tried as it says there.
    Raises: WrongArguments, NothingToTune, and what making the pattern raises.
    """
    if isinstance(pattern, Pattern):
        if hyper:
            raise WrongArguments(
                pattern=pattern.name,
                problem=f"is made already, and {', '.join(hyper)} was given",
                signature="tune(function, name=(value, value)) for a function under @pattern",
            )
        return (pattern,)
    if not isinstance(pattern, PatternFunction):
        raise WrongArguments(
            pattern=str(getattr(pattern, "__name__", type(pattern).__name__)),
            problem=f"is a {type(pattern).__name__}, not a pattern",
            signature="a function under @spcomp.pattern, or the result of calling one",
        )
    swept: dict[str, tuple[Any, ...]] = {}
    for name, value in {**pattern.open, **hyper}.items():
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not values:
            raise NothingToTune(
                pattern=pattern.name, why=f"{name} has no value", way_out="give one or more."
            )
        swept[name] = _default_first(values, pattern.defaults.get(name))
    made = [
        pattern(**dict(zip(swept, chosen, strict=True)))
        for chosen in itertools.product(*swept.values())
    ]
    return tuple(made)


def _default_first(values: tuple[Any, ...], default: Any) -> tuple[Any, ...]:
    unique = list(dict.fromkeys(values))
    if default in unique:
        unique.remove(default)
        unique.insert(0, default)
    return tuple(unique)
