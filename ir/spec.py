"""The rules of both IR levels: functions from a program or a plan to what is wrong with it.

`check` runs the rules of a level after a step, in tests and under SPCOMP_CHECK=1; `AFTER` names the
rules that hold only from a pass on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from spcomp.errors import RuleBroken, SpcompError
from spcomp.ir import dims
from spcomp.ir.expr import Expr, Load, Sym, kind_of, walk
from spcomp.ir.nodes import (
    Alike,
    Argument,
    Attend,
    Captured,
    Centre,
    Covered,
    Diagonals,
    Downsample,
    Fold,
    Gather,
    Given,
    Input,
    Intersect,
    Local,
    MaskMod,
    Merge,
    Needed,
    Node,
    Permute,
    Probe,
    Region,
    Regroup,
    Score,
    Selection,
    Similar,
    Sink,
    Softmax,
    State,
    Stream,
    Sums,
    Switch,
    TopK,
    TopP,
    Union,
)
from spcomp.ir.nodes.base import operands
from spcomp.ir.nodes.inputs import ARGUMENT_DTYPES
from spcomp.ir.plan import Plan
from spcomp.ir.plan_rules import RULES_PLAN
from spcomp.ir.program import Program
from spcomp.ir.types import types_of

ProgramRule = Callable[[Program], list[str]]

_TOKENS: tuple[type[Node], ...] = (Input, Permute, Centre)
_TENSORS: tuple[type[Node], ...] = (*_TOKENS, Downsample, Fold, State)
_SCORES: tuple[type[Node], ...] = (Score, Softmax, Regroup, Sums)

# What each operand of a stage may be.
OPERANDS: Mapping[tuple[type[Node], str], tuple[type[Node], ...]] = {
    (Permute, "x"): (Input,),
    (Permute, "order"): (Captured,),
    (Centre, "x"): (Input, Permute),
    (Similar, "x"): _TOKENS,
    (Similar, "least_by_head"): (Captured,),
    (Downsample, "x"): (*_TOKENS, Argument, Probe),
    (Probe, "x"): (Input,),
    (Fold, "x"): (Input,),
    (State, "value"): (Downsample,),
    (Score, "q"): (*_TENSORS, Argument, Probe),
    (Score, "k"): (*_TENSORS, Argument),
    (Score, "among"): (Similar,),
    (Score, "weights"): (Argument,),
    (Softmax, "scores"): (Score,),
    (Softmax, "over"): (Score,),
    (Regroup, "scores"): (Score, Softmax, Sums),
    (Sums, "scores"): (Score, Softmax),
    (Needed, "scores"): _SCORES,
    (Alike, "p"): _SCORES,
    (Alike, "q"): _SCORES,
    (TopK, "scores"): _SCORES,
    (TopK, "always"): (Sink, Local),
    (TopK, "k_from"): (Captured, Needed),
    (TopP, "scores"): _SCORES,
    (TopP, "always"): (Sink, Local),
    (TopP, "p_by_head"): (Captured,),
    (Diagonals, "offsets"): (TopK, TopP),
    (Covered, "columns"): (TopK, TopP),
    (Covered, "offsets"): (TopK, TopP),
    (Switch, "by"): (Captured, Alike),
    (Switch, "cases"): (Selection,),
    (Sink, "by_head"): (Captured,),
    (Local, "by_head"): (Captured,),
    (Given, "tensor"): (Captured,),
    (Given, "counts"): (Captured,),
    (MaskMod, "tables"): (Captured,),
    (Union, "parts"): (Selection,),
    (Intersect, "parts"): (Selection,),
    (Region, "lists"): (TopK, TopP, Given, Similar, Diagonals, Covered, Alike),
    (Region, "tables"): (Captured,),
    (Stream, "k"): (*_TOKENS, Downsample, State),
    (Stream, "v"): (Input, Permute, Downsample, State),
    (Gather, "stream"): (Stream,),
    (Gather, "selection"): (Selection,),
    (Attend, "q"): (Input, Permute),
    (Attend, "streams"): (Gather, Stream),
    (Attend, "tables"): (Captured,),
    (Attend, "sinks"): (Captured,),
    (Attend, "skip_by_head"): (Captured,),
    (Merge, "parts"): (Attend, Merge),
    (Merge, "gates"): (Captured, Argument),
    (Merge, "sinks"): (Captured,),
}

# Integer fields and the least value each may have.
_LEAST: Mapping[tuple[type[Node], str], int] = {
    (Downsample, "block"): 1,
    (Downsample, "stride"): 1,
    (Fold, "size"): 1,
    (Probe, "rows"): 1,
    (Needed, "extra"): 0,
    (Needed, "per"): 1,
    (Needed, "least"): 0,
    (Similar, "block"): 1,
    (Regroup, "rows"): 1,
    (Regroup, "block"): 1,
    (TopK, "k"): 0,
    (TopP, "least"): 0,
    (Given, "block_q"): 1,
    (Given, "block_k"): 1,
    (Covered, "block"): 1,
    (Sink, "count"): 0,
    (Sink, "unit"): 1,
    (Local, "count"): 1,
    (Local, "unit"): 1,
}

RESERVED = frozenset({"q", "k", "v", "out", "lse", "scale", "return_lse", "self", "kept"})
"""What a tensor of the call may not be called: arguments of a call, buffers of a plan."""

CALL_DIMS = ("B", "Hq", "Hkv", "Sq", "Skv", "D", "Dv")
"""The symbols a call's q, k and v give a size."""

_NOT_EMPTY = {
    (Attend, "streams"),
    (Merge, "parts"),
    (Union, "parts"),
    (Intersect, "parts"),
    (Switch, "cases"),
}
PAIR_SYMBOLS = frozenset({"b", "h", "q", "k", "Sq", "Skv"})
_FLAG = re.compile(r"chosen(\d+)")


def operand_fault(node: Node) -> str | None:
    """Say what is wrong with a stage by itself: an operand of another kind, a number too small."""
    kind = type(node)
    if isinstance(node, Argument):
        return _argument_fault(node)
    if isinstance(node, Merge) and node.by == "lse" and node.gates is not None:
        return "gives Merge.gates a tensor, where it joins by 'lse'"
    for name, value in operands(node):
        allowed = OPERANDS.get((kind, name))
        parts = value if isinstance(value, tuple) else (value,)
        for part in parts:
            if isinstance(part, Node) and allowed and not isinstance(part, allowed):
                wanted = " or ".join(a.__name__ for a in allowed)
                return (
                    f"gives {kind.__name__}.{name} a {type(part).__name__}, "
                    f"where a {wanted} is needed"
                )
        if (kind, name) in _NOT_EMPTY and not value:
            return f"gives {kind.__name__}.{name} nothing, where at least one is needed"
        least = _LEAST.get((kind, name))
        if least is not None and isinstance(value, int) and value < least:
            return f"gives {kind.__name__}.{name} the value {value}, which is below {least}"
    return _sinks_fault(node) if isinstance(node, Merge) else None


def _sinks_fault(node: Merge) -> str | None:
    """Say where sinks stand that do not end a softmax of their own."""
    if node.by == "gates":
        return None if node.sinks is None else "gives a Merge by gates sinks, which has no softmax"
    if any(isinstance(p, (Attend, Merge)) and p.sinks is not None for p in node.parts):
        return "gives Merge.parts a result with sinks, where the Merge itself would have them"
    return None


def _argument_fault(node: Argument) -> str | None:
    """Say what is wrong with the declaration of a tensor of the call."""
    if node.name in RESERVED or not node.name.isidentifier():
        return f"names an Argument '{node.name}', which is taken or no name"
    if node.dtype not in ARGUMENT_DTYPES:
        known = ", ".join(ARGUMENT_DTYPES)
        return f"gives Argument.dtype the value '{node.dtype}', where one of {known} is needed"
    if not node.dims:
        return "gives Argument.dims nothing, where at least one is needed"
    for dim in node.dims:
        is_fine = dim >= 1 if isinstance(dim, int) else _is_plain(str(dim))
        if not is_fine:
            return f"gives Argument.dims the value {dim}, where a number of 1 or more or a name is"
    return None


def _is_plain(dim: str) -> bool:
    return dims.is_name(dim) or dim in CALL_DIMS


# ---- rules of every program ----------------------------------------------------------------------


def one_result(program: Program) -> list[str]:
    """Hold when the result is attention."""
    if isinstance(program.result, (Attend, Merge)):
        return []
    return [f"the result is a {type(program.result).__name__}, not an Attend or a Merge"]


def operands_fit(program: Program) -> list[str]:
    """Hold when each operand is of a kind its stage takes and each number is large enough."""
    return [f"a stage {p}" for p in map(operand_fault, program.stages()) if p]


def types_agree(program: Program) -> list[str]:
    """Hold when every stage can be typed: roles, contracted dims, f32 scores, i32 indices."""
    if operands_fit(program):
        return []
    try:
        types_of(program)
    except SpcompError as error:
        return [str(error).splitlines()[0]]
    return []


def names_are_unique(program: Program) -> list[str]:
    """Hold when no two inputs or captured tensors share a name, and no two states do."""
    problems = []
    for group in ((Input, Captured, Argument), (State,)):
        seen: dict[str, Node] = {}
        for node in program.stages():
            if isinstance(node, group):
                name = getattr(node, "name")  # noqa: B009 - the classes have no common base with it
                if seen.setdefault(name, node) != node:
                    problems.append(f"'{name}' names two different stages")
    return problems


def expressions_are_closed(program: Program) -> list[str]:
    """Hold when predicates are truth values over the pair, their lists and their tables."""
    problems = []
    for node in program.stages():
        if isinstance(node, (MaskMod, Region)):
            lists = len(node.lists) if isinstance(node, Region) else 0
            problems += _predicate_faults(type(node).__name__, node.predicate, lists, node.tables)
        if isinstance(node, Attend) and node.score_mod is not None:
            allowed = PAIR_SYMBOLS | {"score"}
            problems += _symbol_faults("Attend.score_mod", node.score_mod, allowed)
            problems += _table_faults("Attend.score_mod", node.score_mod, node.tables)
    return problems


def _predicate_faults(
    owner: str, predicate: Expr, lists: int, tables: tuple[Node, ...]
) -> list[str]:
    place = f"{owner}.predicate"
    flags = frozenset(f"chosen{n}" for n in range(lists))
    problems = _symbol_faults(place, predicate, PAIR_SYMBOLS | flags)
    problems += _table_faults(place, predicate, tables)
    if kind_of(predicate) != "bool":
        problems.append(f"{place} is of kind {kind_of(predicate)}, not bool")
    return problems


def _symbol_faults(place: str, expr: Expr, allowed: frozenset[str]) -> list[str]:
    read = {e.name for e in walk(expr) if isinstance(e, Sym)}
    return [f"{place} reads '{name}', which it may not" for name in sorted(read - allowed)]


def _table_faults(place: str, expr: Expr, tables: tuple[Node, ...]) -> list[str]:
    ranks = {t.name: len(t.dims) for t in tables if isinstance(t, Captured)}
    problems = []
    for load in (e for e in walk(expr) if isinstance(e, Load)):
        if load.tensor not in ranks:
            problems.append(f"{place} reads the table '{load.tensor}', which is not among its own")
        elif len(load.index) != ranks[load.tensor]:
            problems.append(
                f"{place} reads '{load.tensor}' with {len(load.index)} indices, "
                f"and it has {ranks[load.tensor]} dimensions"
            )
    return list(dict.fromkeys(problems))


# ---- rules that hold from a pass on --------------------------------------------------------------


def forced_sets_fit(program: Program) -> list[str]:
    """Hold when no forced set is larger than a constant k."""
    problems = []
    for node in program.stages():
        if isinstance(node, TopK) and isinstance(node.k, int):
            forced = sum(getattr(a, "count", 0) for a in node.always)
            if forced > node.k:
                problems.append(f"a TopK keeps {node.k} units and forces {forced}")
    return problems


def no_identity_stage(program: Program) -> list[str]:
    """Hold when no stage gives what it was given."""
    problems = []
    for node in program.stages():
        if isinstance(node, Downsample) and node.block == node.stride == 1 and node.by != "minmax":
            problems.append("a Downsample pools single tokens")
        if isinstance(node, Merge) and node.by == "lse":
            if len(node.parts) == 1 and (node.sinks is None or isinstance(node.parts[0], Attend)):
                problems.append("a Merge joins one part")
            if any(isinstance(p, Merge) and p.by == "lse" for p in node.parts):
                problems.append("a Merge joins a Merge by the same rule")
    return problems


def regions_everywhere(program: Program) -> list[str]:
    """Hold when each attended stream is a Gather of a Region and no Attend is causal by a flag."""
    problems = []
    for node in program.stages():
        if isinstance(node, Attend):
            if node.causal:
                problems.append("an Attend still has its causal flag")
            for part in node.streams:
                if not isinstance(part, Gather):
                    problems.append(f"an Attend reads a {type(part).__name__} that is not gathered")
                elif not isinstance(part.selection, Region):
                    problems.append(f"a Gather holds a {type(part.selection).__name__}, no Region")
        if isinstance(node, Region):
            read = {int(m[1]) for s in _symbols(node) if (m := _FLAG.fullmatch(s))}
            unread = set(range(len(node.lists))) - read
            problems += [f"a Region never reads its list chosen{n}" for n in sorted(unread)]
    return problems


def _symbols(region: Region) -> Iterator[str]:
    return (e.name for e in walk(region.predicate) if isinstance(e, Sym))


def _ruled(*rules: Callable[..., list[str]]) -> dict[str, Callable[..., list[str]]]:
    return {rule.__name__: rule for rule in rules}


RULES_PATTERN: dict[str, ProgramRule] = _ruled(
    one_result, operands_fit, types_agree, names_are_unique, expressions_are_closed
)

# What each pass gives; it holds after that pass and after all later ones.
AFTER: dict[str, dict[str, ProgramRule]] = {
    "infer_types": {},
    "check_selection": _ruled(forced_sets_fit),
    "simplify": _ruled(no_identity_stage),
    "infer_masks": _ruled(regions_everywhere),
}


def rules_after(step: str) -> dict[str, ProgramRule]:
    """Give the rules that hold after a pass; an unknown step has only those of every program."""
    rules = dict(RULES_PATTERN)
    if step in AFTER:
        for name, given in AFTER.items():
            rules.update(given)
            if name == step:
                break
    return rules


def faults(level: Program | Plan, step: str = "") -> dict[str, list[str]]:
    """Give what is wrong with a program or a plan, by rule; empty when all rules hold."""
    if isinstance(level, Program):
        found = {name: rule(level) for name, rule in rules_after(step).items()}
    else:
        found = {name: rule(level) for name, rule in RULES_PLAN.items()}
    return {name: problems for name, problems in found.items() if problems}


def check(level: Program | Plan, step: str) -> None:
    """Check the rules of a program or a plan after a step.

    Raises: RuleBroken, naming the step, the first rule that does not hold, and why.
    """
    for name, problems in faults(level, step).items():
        raise RuleBroken(
            where=getattr(level, "where", None), step=step, rule=name, problem="; ".join(problems)
        )
