"""Finding the pattern a command names: a shipped one, a function of a file, or IR text."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from spcomp.dsl import Pattern, PatternFunction
from spcomp.errors import UnknownPattern, WrongArguments
from spcomp.ir.text import parse_program
from spcomp.patterns import SHIPPED

Value = bool | int | float | str | None


def load_pattern(name: str, values: Mapping[str, Value]) -> Pattern:
    """Give the pattern a user named, with some of its hyper-parameters set.

    Raises: UnknownPattern, IRText, WrongArguments, and what the pattern's verbs raise.
    """
    if name.endswith(".ir"):
        return _from_text(Path(name), values)
    return find_function(name)(**values)  # type: ignore[no-any-return]


def function_or_pattern(name: str) -> PatternFunction | Pattern:
    """Give the function a user named, or the pattern of a file of IR text, as a tuning takes them.

    Raises: UnknownPattern, IRText.
    """
    return _from_text(Path(name), {}) if name.endswith(".ir") else find_function(name)


def find_function(name: str) -> PatternFunction:
    """Give the pattern function a user named.

    Raises: UnknownPattern, with near names.
    """
    file, separator, function = name.rpartition(":")
    if separator or name.endswith(".py"):
        return _from_file(Path(file or name), function if separator else "")
    if name not in SHIPPED:
        raise UnknownPattern(name=name, place="", choices=_choices(name, tuple(SHIPPED)))
    return SHIPPED[name]


def _choices(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}choose one of {', '.join(known)}; or name a function: ./mine.py:my_pattern."


def _from_text(path: Path, values: Mapping[str, Value]) -> Pattern:
    if not path.is_file():
        raise UnknownPattern(name=path, place="", choices="the file does not exist.")
    if values:
        raise WrongArguments(
            pattern=path.name,
            problem="is IR text, whose hyper-parameters are fixed",
            signature=f"{path.name} without --set; change the numbers in the text instead",
        )
    program = parse_program(path.read_text(), str(path))
    if program.captured():
        names = ", ".join(c.name for c in program.captured())
        raise UnknownPattern(
            name=path,
            place=" that can run",
            choices=f"it reads tensors that text cannot hold: {names}.",
        )
    return Pattern(program)


def _from_file(path: Path, function: str) -> PatternFunction:
    if not path.is_file():
        raise UnknownPattern(
            name=function or path, place=f" in {path}", choices="the file does not exist."
        )
    found = {n: v for n, v in vars(_module(path)).items() if isinstance(v, PatternFunction)}
    own = {n: v for n, v in found.items() if v.function.__module__ == _module_name(path)}
    if not function and len(own) == 1:
        return next(iter(own.values()))
    if function not in found:
        known = ", ".join(own or found) or "none"
        raise UnknownPattern(
            name=function or "?",
            place=f" in {path}",
            choices=f"functions under @pattern there: {known}.",
        )
    return found[function]


def _module_name(path: Path) -> str:
    return f"spcomp_user_{path.stem}"


def _module(path: Path) -> ModuleType:
    """Run the user's file as a module; it may import its neighbours, as a script may."""
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UnknownPattern(name=path, place="", choices="give a Python file ending in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UnknownPattern(
            name=path,
            place=" that can be loaded",
            choices=f"running the file raised {type(error).__name__}: {error}.",
        ) from error
    finally:
        sys.path.pop(0)
    return module
