"""What must agree where a map is summed along lines, and where its rows stand for all queries."""

from __future__ import annotations

from spcomp.errors import CannotLower
from spcomp.ir.nodes import (
    Covered,
    Diagonals,
    Gather,
    Intersect,
    Local,
    Node,
    Switch,
    TopK,
    TopP,
    Union,
    children,
)
from spcomp.ir.units import TOKENS, probe_below, score_below, sums_below, units_ranked


def check_tiling(node: Node, scores: Node) -> None:
    """Refuse rows of a probe where each query row needs its own.

    Raises: CannotLower, at the stage's line.
    """
    if probe_below(score_below(scores).q) is not None:
        raise CannotLower(
            where=node.where,
            what="a list for each row of a probe",
            why="the last rows of q do not tile the queries, so the other queries have no list",
            way_out="sum the map first: column_sums() or diagonal_sums().",
        )


def check_ranked(node: TopK | TopP) -> None:
    """Refuse a list that its map cannot give to each query.

    Raises: CannotLower, at the stage's line.
    """
    sums = sums_below(node.scores)
    if sums is None:
        check_tiling(node, node.scores)
    elif any(isinstance(a, Local) for a in node.always):
        raise CannotLower(
            where=node.where,
            what="local units in a list for all rows",
            why="each query has its own unit, and this list is the same for all of them",
            way_out="force sink(n) here, and join the window: topk(...) | window(n).",
        )


def check_offsets(node: Node) -> None:
    """Refuse a list of keys taken for offsets, and one of offsets taken for keys.

    Raises: CannotLower, at the line of the stage or of the list.
    """
    if isinstance(node, Covered):
        _check_cover(node)
    if isinstance(node, Diagonals) and not _is_of_offsets(node.offsets):
        raise CannotLower(
            where=node.where,
            what="diagonals named by a list of keys",
            why="its entries are units of keys, not offsets",
            way_out="choose from diagonal_sums().",
        )
    if isinstance(node, (Gather, Union, Intersect, Switch)):
        for part in children(node):
            if _is_of_offsets(part):
                raise CannotLower(
                    where=part.where,
                    what="a list of offsets taken as keys",
                    why="its entries say how far a key is from the query",
                    way_out="write diagonals(topk(diagonal_sums(...), ...)).",
                )


def _check_cover(node: Covered) -> None:
    """Refuse to cover lines that are not one token wide, or not the same for all rows."""
    for name, part, along in (
        ("columns", node.columns, "columns"),
        ("offsets", node.offsets, "diagonals"),
    ):
        assert isinstance(part, (TopK, TopP))
        sums = sums_below(part.scores)
        if sums is None or sums.along != along or units_ranked(part.scores) != TOKENS:
            raise CannotLower(
                where=node.where,
                what=f"covering {name} that are no list of tokens summed along {along}",
                why="the cover is made of lines one token wide",
                way_out=f"choose them from {along.removesuffix('s')}_sums(), not regrouped.",
            )


def _is_of_offsets(node: Node) -> bool:
    sums = sums_below(node.scores) if isinstance(node, (TopK, TopP)) else None
    return sums is not None and sums.along == "diagonals"
