"""What the language and the reference have and no kernel does yet, refused by name."""

from __future__ import annotations

from spcomp.errors import CannotLower
from spcomp.ir.nodes import (
    Alike,
    Attend,
    Centre,
    Covered,
    Diagonals,
    Node,
    Permute,
    Score,
    Similar,
    TopK,
    TopP,
)
from spcomp.ir.program import Program
from spcomp.ir.units import sums_below


def refuse_unmade_stages(program: Program) -> None:
    """Refuse the stages, and the options of stages, that have no kernel.

    Raises: CannotLower, at the line of the first.
    """
    for node in program.stages():
        _refuse(node, _stage(node))


def refuse_unmade_list(selection: Node) -> None:
    """Refuse a list that no kernel makes.

    Raises: CannotLower.
    """
    _refuse(selection, _list(selection))


def _refuse(node: Node, what: str) -> None:
    if what:
        raise CannotLower(
            where=node.where,
            what=what,
            why="no kernel makes it yet",
            way_out="use backend='reference'.",
        )


def _stage(node: Node) -> str:
    """Name what has no kernel; nothing where a stage has one."""
    if isinstance(node, Permute):
        return "a permutation of tokens"
    if isinstance(node, Centre):
        return "keys less their mean"
    if isinstance(node, Similar):
        return "the similarity of the tokens of a block"
    if isinstance(node, Score) and node.among is not None:
        return "a score among some units only"
    if isinstance(node, Score) and node.causal and node.begun:
        return "a score of units that have only begun"
    if isinstance(node, Attend) and node.quantise:
        return f"attention with products in {node.quantise}"
    if isinstance(node, Attend) and node.skips:
        return "attention that skips tiles"
    return ""


def _list(selection: Node) -> str:
    """Name a list that no kernel makes; nothing where there may be one."""
    if isinstance(selection, Alike):
        return "a choice between selections by what two estimates say"
    if isinstance(selection, Diagonals):
        return "a selection of diagonals"
    if isinstance(selection, Covered):
        return "a cover of diagonals by blocks of keys"
    if not isinstance(selection, (TopK, TopP)):
        return ""
    if sums_below(selection.scores) is not None:
        return "a list for all queries, chosen by sums along lines of a map"
    if isinstance(selection, TopK) and selection.k_from is not None:
        return "a list whose length is not the same for every head"
    if isinstance(selection, TopP) and selection.over == "map":
        return "a list that holds a share of a whole map"
    return ""
