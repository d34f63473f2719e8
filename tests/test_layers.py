"""Who may import whom, read from the syntax trees: floors, siblings, third-party doors, sizes."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import io
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS: tuple[tuple[str, ...], ...] = (
    ("spcomp.errors", "spcomp.processors", "spcomp.settings", "spcomp.version"),
    ("spcomp.ir",),
    ("spcomp.dsl", "spcomp.codegen", "spcomp.cache"),
    ("spcomp.backends", "spcomp.patterns"),
    ("spcomp.compiler",),
    ("spcomp.autotune",),
    (
        "spcomp.api",
        "spcomp.budget",
        "spcomp.calibrate",
        "spcomp.capture",
        "spcomp.integrations",
        "spcomp.kvcache",
        "spcomp.arguments",
        "spcomp.call_tensors",
        "spcomp.built",
        "spcomp.explanation",
        "spcomp.handles",
        "spcomp.nn",
        "spcomp.packed",
        "spcomp.torch_op",
        "spcomp.tuning",
    ),
    ("spcomp.cli", "spcomp.__main__"),
)
FACADE = "spcomp"  # re-exports lazily: reads every floor, and only the top floor may read it
OPEN_FLOORS = frozenset({0, 6, 7})  # here one package may use another, as long as in no circle

TORCH_FLOOR = 6
DOORS: Mapping[str, tuple[str, ...]] = {
    "sympy": ("spcomp.ir", "spcomp.backends.ascendc.expr_text"),
    "networkx": ("spcomp.ir.graph",),
    "jinja2": ("spcomp.codegen",),
    "filelock": ("spcomp.cache", "spcomp.autotune.record_text"),
    "platformdirs": ("spcomp.settings",),
    "triton": ("spcomp.backends.triton",),
    "torch": (
        "spcomp.backends",
        "spcomp.autotune.measure",
        "spcomp.autotune.fidelity",
        *FLOORS[6],
        *FLOORS[7],
    ),
    "click": ("spcomp.cli",),
    "rich": ("spcomp.cli",),
    "plotly": ("spcomp.autotune.report",),
    "transformers": ("spcomp.integrations.transformers",),
}
LATE_DOORS: Mapping[str, tuple[str, ...]] = {"torch": ("spcomp.dsl.trace", "spcomp.dsl.tensors")}

MOST_CODE_LINES = 400  # docstrings, comments and blank lines are free
MOST_TEMPLATE_LINES = 600


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement's target; `late` inside a function, `typed` under TYPE_CHECKING."""

    target: str
    line: int
    late: bool
    typed: bool


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def unit_of(module: str) -> str | None:
    """Return the entry of FLOORS that holds the module."""
    if module == FACADE:
        return FACADE
    return next((u for floor in FLOORS for u in floor if within(module, u)), None)


def floor_of(unit: str) -> int:
    if unit == FACADE:
        return len(FLOORS) - 1
    return next(number for number, floor in enumerate(FLOORS) if unit in floor)


def child_of(module: str, package: str) -> str | None:
    """Return the first name below the package on the way to the module."""
    if module == package or not within(module, package):
        return None
    return module[len(package) + 1 :].split(".")[0]


class _Imports(ast.NodeVisitor):
    def __init__(self, modules: frozenset[str]) -> None:
        self.modules = modules
        self.found: list[Import] = []
        self.late = False
        self.typed = False

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            self._add("." * node.level + (node.module or ""), node.lineno)
            return
        for alias in node.names:
            deeper = f"{node.module}.{alias.name}"
            self._add(deeper if deeper in self.modules else str(node.module), node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else None
        name = node.func.id if isinstance(node.func, ast.Name) else name
        first = node.args[0] if node.args else None
        if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
            self._add(str(first.value), node.lineno)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer, self.late = self.late, True
        self.generic_visit(node)
        self.late = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)
            return
        outer, self.typed = self.typed, True
        for statement in node.body:
            self.visit(statement)
        self.typed = outer
        for statement in node.orelse:
            self.visit(statement)

    def _add(self, target: str, line: int) -> None:
        self.found.append(Import(target, line, self.late, self.typed))


def imports_of(source: str, modules: frozenset[str]) -> list[Import]:
    visitor = _Imports(modules)
    visitor.visit(ast.parse(source))
    return visitor.found


def floor_fault(module: str, target: str) -> str | None:
    """Say why an import inside the package points the wrong way."""
    here, there = unit_of(module), unit_of(target)
    if here is None:
        return "the importer has no floor"
    if there is None:
        return "the imported module has no floor"
    if FACADE in (here, there) and here != there:
        allowed = here == FACADE or floor_of(here) == floor_of(FACADE)
        return None if allowed else "the package's own front door is for users and the CLI"
    if here == there or floor_of(there) < floor_of(here):
        return None
    if floor_of(there) == floor_of(here) and floor_of(here) in OPEN_FLOORS:
        return None
    return (
        f"floor {floor_of(here)} may not import floor {floor_of(there)}: "
        "an import points to a lower floor or stays in its own package"
    )


def sibling_fault(module: str, target: str, packages: frozenset[str]) -> str | None:
    """Say why two parts that must not know of each other meet."""
    pattern = child_of(module, "spcomp.patterns")
    if pattern and not within(target, "spcomp.dsl"):
        return "a shipped pattern imports only spcomp.dsl, as a user's own would"
    a_pass = child_of(module, "spcomp.ir.passes")
    if a_pass and within(target, "spcomp.ir.passes"):
        other = child_of(target, "spcomp.ir.passes")
        return None if other == a_pass else "passes never import each other, nor their list"
    backend, other = child_of(module, "spcomp.backends"), child_of(target, "spcomp.backends")
    other_is_backend = other is not None and f"spcomp.backends.{other}" in packages
    if backend and other_is_backend and backend != other and backend != "registry":
        return "backends never import each other; the registry alone knows them"
    if within(module, "spcomp.autotune") and other_is_backend:
        return "the tuner knows no backend; it asks through spcomp.backends.base"
    if backend == "reference" and unit_of(target) == "spcomp.codegen":
        return "the reference knows no template"
    if backend == "reference" and within(target, "spcomp.ir.passes"):
        return "the reference knows no pass"
    return None


def door_fault(module: str, imported: Import) -> str | None:
    """Say why a third party is imported outside its one door."""
    top = imported.target.split(".")[0]
    if top in sys.stdlib_module_names:
        return None
    if top not in DOORS:
        return f"{top} has no door: add it to DOORS with a reason, or do without it"
    doors, late_doors = DOORS[top], LATE_DOORS.get(top, ())
    if imported.typed or module == FACADE or any(within(module, door) for door in doors):
        return None
    if any(within(module, door) for door in late_doors):
        return None if imported.late else f"{top} is imported here only inside functions"
    return f"{top} is imported only in {', '.join((*doors, *late_doors))}"


def faults(
    module: str, source: str, packages: frozenset[str], modules: frozenset[str]
) -> list[str]:
    """List every wrong import of one module, each naming both ends."""
    found = []
    for imported in imports_of(source, modules):
        target, fault = imported.target, None
        if target.startswith("."):
            fault = "imports are written with their full path"
        elif within(target, "spcomp"):
            fault = floor_fault(module, target) or sibling_fault(module, target, packages)
        else:
            fault = door_fault(module, imported)
        if fault:
            found.append(f"line {imported.line}: {module} imports {target}: {fault}")
    return found


def _walk(folder: Path, suffix: str) -> Iterator[Path]:
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(
            name for name in folders if name not in ("__pycache__", "__snapshots__")
        )
        yield from (Path(where, name) for name in sorted(files) if name.endswith(suffix))


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES: Mapping[str, Path] = {_module_name(path): path for path in _walk(ROOT / "spcomp", ".py")}
MODULES = frozenset(FILES)
PACKAGES = frozenset(name for name, path in FILES.items() if path.name == "__init__.py")
OUTSIDE = [p for name in ("tests", "examples", "benchmarks") for p in _walk(ROOT / name, ".py")]
TEMPLATES = list(_walk(ROOT / "spcomp" / "templates", ".jinja"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_lines(source: str) -> int:
    """Count the lines that hold code: no docstring, comment or blank line."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    silent |= {tokenize.ENDMARKER, tokenize.ENCODING}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_stands_on_a_floor(module: str) -> None:
    assert unit_of(module) is not None, f"{module} has no floor: give it one in FLOORS"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_imports_only_what_its_floor_may(module: str) -> None:
    found = faults(module, FILES[module].read_text(encoding="utf-8"), PACKAGES, MODULES)
    assert not found, "\n".join(found)


def test_packages_of_one_floor_import_each_other_in_no_circle() -> None:
    edges: dict[str, set[str]] = {}
    for module in MODULES - {FACADE}:
        here = unit_of(module) or module
        for imported in imports_of(FILES[module].read_text(encoding="utf-8"), MODULES):
            there = unit_of(imported.target)
            if there not in (None, here, FACADE):
                edges.setdefault(here, set()).add(str(there))
    tuple(graphlib.TopologicalSorter(edges).static_order())  # raises CycleError with the circle


@pytest.mark.parametrize("path", [*FILES.values(), *OUTSIDE], ids=_name)
def test_file_has_few_enough_lines_of_code(path: Path) -> None:
    count = code_lines(path.read_text(encoding="utf-8"))
    assert count <= MOST_CODE_LINES, f"{_name(path)}: {count} lines of code > {MOST_CODE_LINES}"


@pytest.mark.parametrize("path", TEMPLATES, ids=_name)
def test_template_has_few_enough_lines(path: Path) -> None:
    count = len(path.read_text(encoding="utf-8").splitlines())
    assert count <= MOST_TEMPLATE_LINES, f"{_name(path)}: {count} lines > {MOST_TEMPLATE_LINES}"


@pytest.mark.parametrize("path", OUTSIDE, ids=_name)
def test_file_outside_the_package_reaches_its_folders_through_spcomp(path: Path) -> None:
    ours = {"spcomp", "tests"} if within(_module_name(path), "tests") else {"spcomp"}
    if path.name == "oracle.py":
        ours = set()
    for imported in imports_of(path.read_text(encoding="utf-8"), MODULES):
        top = imported.target.split(".")[0]
        assert top in ours or not (ROOT / top).exists(), (
            f"{_name(path)}:{imported.line}: imports {imported.target}, which is not among "
            f"{sorted(ours)}"
        )


def test_walk_follows_the_links_and_sees_every_floor_below_the_tuner() -> None:
    assert {"spcomp.errors", "spcomp.ir", "spcomp.backends", "spcomp.patterns"} <= MODULES
    assert TEMPLATES


def test_importing_spcomp_loads_no_heavy_library() -> None:
    spec = importlib.util.find_spec("spcomp")
    assert spec is not None
    assert spec.origin is not None
    heavy = ("torch", "triton", "transformers", "plotly", "numpy")
    code = f"import spcomp, sys; print(*[m for m in {heavy!r} if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(Path(spec.origin).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


SAMPLE_PACKAGES = frozenset({"spcomp.backends.triton", "spcomp.backends.reference"})
WRONG = [
    ("spcomp.ir.cost", "import torch", "torch is imported only in"),
    ("spcomp.ir.cost", "def f():\n    import torch", "torch is imported only in"),
    ("spcomp.ir.cost", "import networkx as nx", "networkx is imported only in spcomp.ir.graph"),
    ("spcomp.ir.cost", "from .types import Dim", "full path"),
    ("spcomp.ir.cost", "import ir.types", "ir has no door"),
    ("spcomp.ir.cost", "import numpy", "numpy has no door"),
    ("spcomp.ir.cost", "from spcomp.dsl import verbs", "floor 1 may not import floor 2"),
    ("spcomp.ir.cost", "from spcomp import compile", "front door"),
    ("spcomp.ir.passes.cut", "from spcomp.ir.passes import simplify", "passes never import"),
    ("spcomp.ir.passes.cut", "from spcomp.ir.passes.simplify import x", "passes never import"),
    ("spcomp.dsl.trace", "import torch", "torch is imported here only inside functions"),
    ("spcomp.dsl.trace", "from spcomp.codegen import render", "floor 2 may not import floor 2"),
    ("spcomp.backends.triton.build", "import jinja2", "jinja2 is imported only in spcomp.codegen"),
    ("spcomp.backends.triton.build", "import spcomp.backends.reference", "never import each other"),
    ("spcomp.backends.reference.run", "import triton", "triton is imported only in"),
    ("spcomp.backends.reference.run", "from spcomp.codegen import render", "knows no template"),
    ("spcomp.backends.reference.run", "from spcomp.ir.passes import cut", "knows no pass"),
    ("spcomp.patterns.moba", "from spcomp.ir import nodes", "imports only spcomp.dsl"),
    ("spcomp.patterns.moba", "from spcomp.patterns import quest", "imports only spcomp.dsl"),
    ("spcomp.autotune.search", "import spcomp.backends.triton", "the tuner knows no backend"),
    ("spcomp.compiler", "import importlib\nimportlib.import_module('spcomp.api')", "floor 4 may"),
    ("spcomp.stray", "import spcomp.errors", "the importer has no floor"),
    ("spcomp.api", "import rich", "rich is imported only in spcomp.cli"),
]
RIGHT = [
    ("spcomp.ir.cost", "import sympy\nfrom spcomp.errors import SpcompError"),
    ("spcomp.ir.passes", "from spcomp.ir.passes import cut, simplify"),
    ("spcomp.dsl.trace", "def f():\n    import torch"),
    ("spcomp.ir.cost", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ("spcomp.backends.triton.build", "import torch, triton\nimport spcomp.backends.base"),
    ("spcomp.backends.registry", "import spcomp.backends.triton"),
    ("spcomp.api", "import torch\nfrom spcomp.kvcache import Cache"),
    ("spcomp.cli.show", "import click, rich\nimport spcomp"),
    ("spcomp", "from spcomp.api import compile"),
]


@pytest.mark.parametrize(("module", "source", "reason"), WRONG)
def test_wrong_import_is_named_at_both_ends(module: str, source: str, reason: str) -> None:
    tree = frozenset({"spcomp.ir.passes.simplify", "spcomp.ir.passes.cut", "spcomp.patterns.quest"})
    found = faults(module, source, SAMPLE_PACKAGES, tree | {"spcomp.codegen.render"})
    assert len(found) == 1
    target = imports_of(source, tree)[-1].target
    assert module in found[0]
    assert target.split(".")[0] in found[0]
    assert reason in found[0]


@pytest.mark.parametrize(("module", "source"), RIGHT)
def test_right_import_passes(module: str, source: str) -> None:
    assert faults(module, source, SAMPLE_PACKAGES, frozenset({"spcomp.ir.passes.cut"})) == []


def test_code_lines_leave_out_docstrings_comments_and_blanks() -> None:
    source = '"""One.\n\nTwo.\n"""\n\n# why\nX = """a\nb"""\n\n\n'
    source += 'def f():\n    """Doc."""\n    return X\n'
    assert code_lines(source) == 4
