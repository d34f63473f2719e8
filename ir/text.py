"""IR as text and back: to the same IR, parsed with `ast` and walked, never evaluated.

A program, one stage after those it reads; what stands behind # is for people and not read:

    pattern moba(block=512, k_blocks=8)
    %0 = Input(name="q", role="query")  # data[B, Hq, Sq, D]
    ...
    return %8

A plan: its buffers, then its launches; launches below `slabs` run once for each slab of rows:

    plan "moba(block=512, k_blocks=8)" prefill key_major
    buffer q data[B, Hq, Sq, D] input
    pool: PoolLaunch(axes={warps: 4}, x_buf="k", out_buf="k_mean", block=512, stride=512, by="mean")
    slabs align=1:
        select: SelectLaunch(...)
    return out, lse

Fields equal to their default are left out. A bracket that is open at the end of a line goes on in
the next.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, get_args

from spcomp.errors import IRText, SpcompError, Where
from spcomp.ir import dims
from spcomp.ir.launches import LAUNCHES
from spcomp.ir.nodes import NODES, Node
from spcomp.ir.plan import Buffer, BufferKind, Launch, LoopOrder, Phase, Plan, Slabs, Step
from spcomp.ir.program import Program
from spcomp.ir.spec import operand_fault
from spcomp.ir.text_exprs import Fault, parse_dim, print_dim
from spcomp.ir.text_values import Reader, keywords_of, layout, literal, print_fields
from spcomp.ir.types import types_of

_STRING = r'"(?:[^"\\]|\\.)*"|' + r"'(?:[^'\\]|\\.)*'"
_TOKENS = re.compile(rf"({_STRING})|(#.*)|%(\d+)|([(\[{{])|([)\]}}])")
_BUFFER = re.compile(r'buffer (\S+) (\w+)(\[.*\]) (\w+)(?: state=("(?:[^"\\]|\\.)*"))?')
_PLAN = re.compile(r'plan ("(?:[^"\\]|\\.)*") (\w+) (\w+)')
_SLABS = re.compile(r"slabs align=(\d+):")


# ---- printing ------------------------------------------------------------------------------------


def print_program(program: Program, *, comments: bool = True) -> str:
    """Print a pattern-level program; comments carry each stage's type and the user's line."""
    stages = program.stages()
    numbers = {node: f"%{i}" for i, node in enumerate(stages)}
    notes = _notes(program) if comments else {}
    arguments = [f"{name}={_parameter(value)}" for name, value in program.parameters]
    lines = [layout(f"pattern {program.name}", arguments, "", "")]
    for node in stages:
        head = f"{numbers[node]} = {type(node).__name__}"
        lines.append(layout(head, print_fields(node, numbers.__getitem__), "", ""))
        lines[-1] += notes.get(node, "")
    return "\n".join([*lines, f"return {numbers[program.result]}", ""])


def _parameter(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _notes(program: Program) -> dict[Node, str]:
    """Give each stage's comment; a program that cannot be typed is printed with the lines alone."""
    try:
        kinds = {node: str(kind) for node, kind in types_of(program).items()}
    except SpcompError:
        kinds = {}
    notes = {}
    for node in program.stages():
        parts = [kinds.get(node, "")]
        if node.where is not None:
            parts.append(f"{PurePath(node.where.file).name}:{node.where.line}")
        text = "  ".join(p for p in parts if p)
        notes[node] = f"  # {text}" if text else ""
    return notes


def print_plan(plan: Plan, *, comments: bool = True) -> str:
    """Print a plan; comments carry the reasons for its loop orders."""
    lines = [f"plan {json.dumps(plan.pattern, ensure_ascii=False)} {plan.phase} {plan.order}"]
    lines += [f"# {note}" for note in plan.notes if comments]
    lines += [_buffer_line(b) for b in plan.buffers]
    for step in plan.steps:
        if isinstance(step, Slabs):
            lines.append(f"slabs align={step.align}:")
            lines += [_launch_line(launch, "    ") for launch in step.launches]
        else:
            lines.append(_launch_line(step, ""))
    return "\n".join([*lines, f"return {plan.out}, {plan.lse}", ""])


def _buffer_line(b: Buffer) -> str:
    state = f" state={json.dumps(b.state)}" if b.state else ""
    inner = ", ".join(print_dim(d) for d in b.dims)
    return f"buffer {b.name} {b.dtype}[{inner}] {b.kind}{state}"


def _launch_line(launch: Launch, indent: str) -> str:
    def no_stage(node: Node) -> str:
        raise AssertionError(f"a launch holds no stage, but here is {type(node).__name__}")

    head = f"{launch.kernel}: {type(launch).__name__}"
    return layout(head, print_fields(launch, no_stage), "", indent)


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of text, joined with those its open brackets reach; comments gone, %3 written _3."""

    number: int
    raw: str
    code: str
    source: str

    def error(self, problem: str) -> IRText:
        where = Where(self.source, self.number) if self.source else None
        return IRText(where=where, line=self.number, problem=problem, text=self.raw.strip())

    @property
    def indented(self) -> bool:
        return self.raw[:1].isspace()


def _lines(text: str, source: str) -> Iterator[_Line]:
    """Yield the lines that hold something, with brackets closed."""
    first, raw, code, depth = 0, "", "", 0
    for number, physical in enumerate(text.split("\n"), 1):
        piece, change = _clean(physical)
        if not depth and not piece.strip():
            continue
        if not depth:
            first, raw, code = number, physical, ""
        code = f"{code} {piece.strip()}".strip()
        depth += change
        if depth <= 0:
            yield _Line(first, raw, code, source)
            depth = 0
    if depth:
        raise _Line(first, raw, code, source).error("opens a bracket that is never closed")


def _clean(line: str) -> tuple[str, int]:
    """Drop the comment, write %3 as _3, and count the brackets left open."""
    depth = 0

    def change(found: re.Match[str]) -> str:
        nonlocal depth
        string, comment, number, opened, closed = found.groups()
        depth += bool(opened) - bool(closed)
        return "" if comment else f"_{number}" if number else string or opened or closed

    return _TOKENS.sub(change, line), depth


def _statement(line: _Line) -> ast.stmt:
    try:
        (statement,) = ast.parse(line.code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "not one plain statement"
        raise line.error(f"cannot be read ({reason})") from None
    return statement


def parse_program(text: str, source: str = "") -> Program:
    """Read a program back. `source` names the file in errors.

    Raises: IRText, naming the line and what is wrong with it.
    """
    lines = list(_lines(text, source))
    if not lines:
        raise _Line(1, "", "", source).error("holds no program")
    name, parameters = _header(lines[0])
    nodes: dict[str, Node] = {}
    result: Node | None = None
    for line in lines[1:]:
        if result is not None:
            raise line.error("stands after the return")
        try:
            result = _stage_or_return(line, nodes)
        except Fault as fault:
            raise line.error(str(fault)) from None
    if result is None:
        raise lines[-1].error("is the last, and no line returns a stage")
    where = Where(source, lines[0].number) if source else None
    return Program(name, parameters, result, where=where)


def _header(line: _Line) -> tuple[str, tuple[Any, ...]]:
    word, _, rest = line.code.partition(" ")
    if word != "pattern":
        raise line.error("does not begin with 'pattern name(...)'")
    statement = _statement(_Line(line.number, line.raw, rest, line.source))
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise line.error("does not begin with 'pattern name(...)'")
    try:
        parameters = tuple((key, literal(value)) for key, value in keywords_of(call).items())
    except Fault as fault:
        raise line.error(str(fault)) from None
    return call.func.id, parameters


def _stage_or_return(line: _Line, nodes: dict[str, Node]) -> Node | None:
    """Add the stage a line defines, or give the one it returns."""
    if line.code.startswith("return"):
        name = line.code.removeprefix("return").strip()
        if name not in nodes:
            raise Fault(f"returns {name.replace('_', '%') or 'nothing'}, which no line defines")
        return nodes[name]
    statement = _statement(line)
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    call = statement.value if isinstance(statement, ast.Assign) else None
    if not (isinstance(target, ast.Name) and re.fullmatch(r"_\d+", target.id)):
        raise Fault("is neither '%n = Stage(...)' nor 'return %n'")
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise Fault("is neither '%n = Stage(...)' nor 'return %n'")
    if call.func.id not in NODES:
        raise Fault(f"names the unknown stage '{call.func.id}' (known: {', '.join(NODES)})")
    if target.id in nodes:
        raise Fault(f"defines %{target.id[1:]} a second time")
    where = Where(line.source, line.number) if line.source else None
    node: Node = Reader(nodes).build(NODES[call.func.id], keywords_of(call))
    problem = operand_fault(node)
    if problem:
        raise Fault(problem)
    nodes[target.id] = replace(node, where=where)
    return None


def parse_plan(text: str, source: str = "") -> Plan:
    """Read a plan back. `source` names the file in errors.

    Raises: IRText, naming the line and what is wrong with it.
    """
    lines = list(_lines(text, source))
    head = _PLAN.fullmatch(lines[0].code) if lines else None
    if head is None:
        first = lines[0] if lines else _Line(1, "", "", source)
        raise first.error("does not begin with 'plan \"pattern\" phase order'")
    phase = _one_of(lines[0], head[2], get_args(Phase), "phase")
    order = _one_of(lines[0], head[3], get_args(LoopOrder), "order")
    body = _PlanBody()
    for line in lines[1:]:
        try:
            body.read(line)
        except Fault as fault:
            raise line.error(str(fault)) from None
    if body.results is None:
        raise lines[-1].error("is the last, and no line returns the results")
    buffers, steps = tuple(body.buffers.values()), body.finished()
    return Plan(json.loads(head[1]), phase, order, buffers, steps, *body.results)


def _one_of(line: _Line, value: str, choices: tuple[str, ...], what: str) -> Any:
    if value not in choices:
        raise line.error(f"names the unknown {what} '{value}' (known: {', '.join(choices)})")
    return value


class _PlanBody:
    """The lines of a plan after the first, read one by one."""

    def __init__(self) -> None:
        self.buffers: dict[str, Buffer] = {}
        self.named: set[str] = set()  # dims of the pattern's own, as its inputs have them
        self.steps: list[Step] = []
        self.slab: tuple[int, list[Launch]] | None = None
        self.results: tuple[str, str] | None = None

    def read(self, line: _Line) -> None:
        if self.results is not None:
            raise Fault("stands after the return")
        if self.slab is not None and not line.indented:
            self._close()
        if line.code.startswith("buffer "):
            self._buffer(line)
        elif line.code.startswith("slabs"):
            found = _SLABS.fullmatch(line.code)
            if found is None:
                raise Fault("does not read 'slabs align=n:'")
            self.slab = (int(found[1]), [])
        elif line.code.startswith("return"):
            names = [n.strip() for n in line.code.removeprefix("return").split(",")]
            if len(names) != 2 or any(n not in self.buffers for n in names):
                raise Fault("does not return two buffers of the plan")
            self.results = (names[0], names[1])
        else:
            self._launch(line)

    def finished(self) -> tuple[Step, ...]:
        if self.slab is not None:
            self._close()
        return tuple(self.steps)

    def _close(self) -> None:
        assert self.slab is not None
        self.steps.append(Slabs(tuple(self.slab[1]), self.slab[0]))
        self.slab = None

    def _buffer(self, line: _Line) -> None:
        found = _BUFFER.fullmatch(line.code)
        if found is None:
            raise Fault("does not read 'buffer name dtype[dims] kind'")
        name, dtype, inner, kind, state = found.groups()
        if kind not in get_args(BufferKind):
            raise Fault(
                f"names the unknown kind '{kind}' (known: {', '.join(get_args(BufferKind))})"
            )
        if name in self.buffers:
            raise Fault(f"declares the buffer '{name}' a second time")
        try:
            tree = ast.parse(inner, mode="eval").body
        except SyntaxError as error:
            raise Fault(f"cannot be read ({error.msg})") from None
        assert isinstance(tree, ast.List)
        is_name = dims.is_name if kind == "input" else self.named.__contains__
        sizes = tuple(parse_dim(t, is_name) for t in tree.elts)
        self.named.update(dims.names_of(sizes))
        held = json.loads(state) if state else ""
        self.buffers[name] = Buffer(name, sizes, dtype, kind, held)  # type: ignore[arg-type]

    def _launch(self, line: _Line) -> None:
        if line.indented and self.slab is None:
            raise Fault("is indented outside slabs")
        statement = _statement(line)
        call = statement.annotation if isinstance(statement, ast.AnnAssign) else None
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise Fault("does not read 'kernel: Launch(...)'")
        assert isinstance(statement, ast.AnnAssign)
        if call.func.id not in LAUNCHES:
            raise Fault(f"names the unknown launch '{call.func.id}' (known: {', '.join(LAUNCHES)})")
        launch: Launch = Reader({}).build(LAUNCHES[call.func.id], keywords_of(call))
        if ast.unparse(statement.target) != launch.kernel:
            raise Fault(
                f"calls the kernel '{ast.unparse(statement.target)}', where this "
                f"{call.func.id} is '{launch.kernel}'"
            )
        for name in launch.buffers():
            if name.partition("#")[0] not in self.buffers:
                raise Fault(f"touches the buffer '{name}', which no line declares")
        (self.slab[1] if self.slab is not None else self.steps).append(launch)
