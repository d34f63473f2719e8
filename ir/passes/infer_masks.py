"""Pass: selections become one predicate and a few lists."""

from __future__ import annotations

from dataclasses import replace

from spcomp.errors import CannotLower
from spcomp.ir.expr import FALSE, TRUE, Expr, Lit, Load, Sym, conjunction, op
from spcomp.ir.nodes import (
    Alike,
    Attend,
    Captured,
    Causal,
    Covered,
    Diagonals,
    Everything,
    Gather,
    Given,
    Intersect,
    Local,
    MaskMod,
    Merge,
    Node,
    Region,
    Similar,
    Sink,
    Stream,
    Switch,
    TopK,
    TopP,
    Union,
)
from spcomp.ir.nodes.base import rebuild
from spcomp.ir.program import Program
from spcomp.ir.types import role_of
from spcomp.ir.units import TOKENS, Units, position, units_of, units_ranked


def infer_masks(program: Program) -> Program:
    """Give every attended stream a region: a predicate over (b, h, q, k) and the lists it reads.

    Rewrite: attend(q, gather(s, topk | window(w)), causal) -> attend(q, gather(s, region(p,
             lists)))
             where p = (chosen0 | t - w < k <= t) & k <= t
    Needs:   infer_types.
    Gives:   every Gather holds a Region; no Attend has a causal flag left.
    Raises:  CannotLower for a list whose units do not fit the stream.
    """
    return Program(
        program.name, program.parameters, _rewritten(program.result), where=program.where
    )


def _rewritten(node: Node) -> Node:
    if isinstance(node, Merge):
        return rebuild(
            node, lambda part: _rewritten(part) if isinstance(part, (Attend, Merge)) else part
        )
    assert isinstance(node, Attend)
    streams = tuple(_region(part, node.causal) for part in node.streams)
    return replace(node, streams=streams, causal=False)


def _region(part: Node, causal: bool) -> Gather:
    stream = part.stream if isinstance(part, Gather) else part
    selection = part.selection if isinstance(part, Gather) else Everything()
    assert isinstance(stream, Stream)
    builder = _Builder(units_of(stream.k))
    predicate = builder.predicate(selection)
    if causal:
        predicate = conjunction(predicate, builder.predicate(Causal()))
    region = Region(
        predicate, tuple(builder.lists), tuple(builder.tables), where=selection.where or part.where
    )
    return Gather(stream, region, where=part.where)


class _Builder:
    """Turns one selection into a predicate, collecting the lists and tables it reads."""

    def __init__(self, entries: Units) -> None:
        self.entries = entries
        self.lists: dict[Node, str] = {}
        self.tables: dict[Node, None] = {}

    def predicate(self, selection: Node) -> Expr:
        if isinstance(selection, (Union, Intersect)):
            name = "or" if isinstance(selection, Union) else "and"
            parts = [self.predicate(p) for p in selection.parts]
            result = parts[0]
            for part in parts[1:]:
                result = op(name, result, part)
            return result
        if isinstance(selection, (TopK, TopP, Given, Similar)):
            if not (isinstance(selection, Similar) and role_of(selection.x) == "query"):
                self._check_units(selection)
            return self._flag(selection)
        if isinstance(selection, Switch):
            return self._switch(selection)
        if isinstance(selection, (Diagonals, Covered)):
            self._check_tokens(selection)
            return self._flag(selection)
        if isinstance(selection, MaskMod):
            self.tables.update(dict.fromkeys(selection.tables))
            return selection.predicate
        return self._rule(selection)

    def _flag(self, node: Node) -> Expr:
        """Give the symbol that says whether a list, or a test of the head, holds."""
        return Sym(self.lists.setdefault(node, f"chosen{len(self.lists)}"))

    def _switch(self, selection: Switch) -> Expr:
        cases = [self.predicate(case) for case in selection.cases]
        if isinstance(selection.by, Alike):
            flag = self._flag(selection.by)
            tests = [op("not", flag), flag]
        else:
            case = self._of_head(selection.by)
            tests = [op("eq", case, Lit(number)) for number in range(len(cases))]
        result: Expr = FALSE
        for test, held in zip(tests, cases, strict=True):
            result = op("or", result, conjunction(test, held))
        return result

    def _of_head(self, table: Node) -> Expr:
        """Read a table of one integer a query head."""
        assert isinstance(table, Captured)
        self.tables[table] = None
        return Load(table.name, (Sym("h"),), "int")

    def _count(self, selection: Sink | Local) -> Expr:
        table = selection.by_head
        return Lit(selection.count) if table is None else self._of_head(table)

    def _rule(self, selection: Node) -> Expr:
        key, here = Sym("k"), position("q")
        last = self.entries.last(key)
        if isinstance(selection, Causal):
            return op("le", last, here)
        if isinstance(selection, Sink):
            reach = op("mul", self._count(selection), Lit(selection.unit))
            return op("lt", self.entries.first(key), reach)
        if isinstance(selection, Local):
            unit = Lit(selection.unit)
            oldest = op("sub", op("floordiv", here, unit), self._count(selection))
            recent = op("gt", op("floordiv", last, unit), oldest)
            return conjunction(recent, op("le", last, here))
        assert isinstance(selection, Everything), selection
        return TRUE

    def _check_tokens(self, selection: Diagonals | Covered) -> None:
        if self.entries != TOKENS:
            raise CannotLower(
                where=selection.where,
                what=f"diagonals of a stream of units of {self.entries.block} tokens",
                why="an offset is counted in tokens",
                way_out="gather them from k and v themselves.",
            )

    def _check_units(self, selection: TopK | TopP | Given | Similar) -> None:
        unit = list_unit(selection)
        if unit.block != unit.stride:
            raise CannotLower(
                where=selection.where,
                what=f"a selection of units of {unit.block} tokens every {unit.stride}",
                why="its units overlap, so an index does not name tokens of its own",
                way_out="regroup the scores onto blocks that tile the sequence first.",
            )
        if unit.stride % self.entries.stride or self.entries.block != self.entries.stride:
            raise CannotLower(
                where=selection.where,
                what=(
                    f"gathering units of {unit.stride} tokens from a stream of units of "
                    f"{self.entries.block}"
                ),
                why="a selected unit is not a whole number of the stream's entries",
                way_out="select units that are a multiple of the stream's units.",
            )


def list_unit(selection: Node) -> Units:
    """Give the units a list's indices stand for, in tokens."""
    if isinstance(selection, Given):
        return Units(selection.block_k, selection.block_k)
    if isinstance(selection, Similar):
        return Units(selection.block, selection.block)
    assert isinstance(selection, (TopK, TopP))
    return units_ranked(selection.scores)
