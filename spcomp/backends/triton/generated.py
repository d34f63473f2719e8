"""Generated kernels: their text, what their arguments are called, and their import from memory.

What a launch must know of a kernel stands in its text, so a kernel whose binary is in the cache is
never imported. Where Triton needs the function, it reads the text from `linecache`: nothing has to
lie on disk, and line numbers point at the file the text has or will have in its cache entry."""

from __future__ import annotations

import ast
import hashlib
import linecache
import sys
import threading
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from spcomp.codegen.header import without_header

_IMPORTING = threading.Lock()
_PARSING = threading.Lock()  # Python 3.11 counts the depth of a tree for all threads together


@dataclass(frozen=True, slots=True)
class Generated:
    """A generated file and its entry, `<kernel>_kernel`.

    arg_names: in order; unspecialised: those that Triton is told not to specialise on; is_gluon: it
    is written in Gluon, Triton's language with layouts and barriers; max_registers: the file's
    constant MAX_REGISTERS, what a thread may have where warps share unevenly, else 0."""

    kernel: str
    text: str
    arg_names: tuple[str, ...]
    unspecialised: frozenset[str]
    is_gluon: bool
    max_registers: int = 0

    @property
    def source_sha256(self) -> str:
        """Give the hash of the text without its header, which names versions and commands."""
        return hashlib.sha256(without_header(self.text).encode()).hexdigest()

    def function(self, path: str = "") -> Any:
        """Import the text as the file `path`, which need not exist; gives the function that Triton
        compiles."""
        digest = hashlib.sha256(f"{path}\n{self.text}".encode()).hexdigest()[:16]
        path = path or f"spcomp-generated/{digest}/{self.kernel}.py"
        name = f"spcomp_generated_{digest}"
        with _IMPORTING:
            if name not in sys.modules:
                linecache.cache[path] = (len(self.text), None, self.text.splitlines(True), path)
                module = ModuleType(name)
                module.__file__ = path
                exec(compile(self.text, path, "exec"), module.__dict__)
                sys.modules[name] = module
        return getattr(sys.modules[name], f"{self.kernel}_kernel")


@cache
def read(kernel: str, text: str) -> Generated:
    """Read a generated file's entry without importing it."""
    max_registers = 0
    with _PARSING:
        body = ast.parse(text).body
    for node in body:
        match node:
            case ast.Assign([ast.Name("MAX_REGISTERS")], ast.Constant(int(value))):
                max_registers = value
        if isinstance(node, ast.FunctionDef) and node.name == f"{kernel}_kernel":
            names = tuple(argument.arg for argument in node.args.args)
            unspecialised = frozenset(_unspecialised(node))
            return Generated(kernel, text, names, unspecialised, _is_gluon(node), max_registers)
    raise AssertionError(f"the template of {kernel} has no {kernel}_kernel")


def _is_gluon(entry: ast.FunctionDef) -> bool:
    return any("gluon" in ast.dump(decorator) for decorator in entry.decorator_list)


def _unspecialised(entry: ast.FunctionDef) -> list[str]:
    for decorator in entry.decorator_list:
        for keyword in getattr(decorator, "keywords", ()):
            if keyword.arg == "do_not_specialize":
                return list(ast.literal_eval(keyword.value))
    return []
