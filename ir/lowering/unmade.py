"""Lists and tests that have a meaning but no kernel yet: refused by name, before anything else."""

from __future__ import annotations

from spcomp.errors import CannotLower
from spcomp.ir.nodes import Alike, Covered, Diagonals, Node, TopK, TopP
from spcomp.ir.units import sums_below


def refuse_unmade(selection: Node) -> None:
    """Refuse what only the reference computes.

    Raises: CannotLower.
    """
    what = _unmade(selection)
    if what:
        raise CannotLower(
            where=selection.where,
            what=what,
            why="no kernel makes it yet",
            way_out="use backend='reference'.",
        )


def _unmade(selection: Node) -> str:
    """Name what no kernel makes; empty where there may be one."""
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
