"""What the sides of a score must have in common, and the weights that multiply its heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spcomp.errors import CannotLower, WrongStage
from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.nodes import Score

if TYPE_CHECKING:
    from spcomp.ir.types import TensorType


def check_product(node: Score, q: TensorType, k: TensorType, lists: Dim) -> None:
    """Check widths, dtypes and heads where a side is a tensor the call brings beside q and k.

    q, k: the types of both sides. lists: the heads of the lists that are ranked.
    Raises: CannotLower.
    """
    if q.dims[3] != k.dims[3] or q.dtype != k.dtype:
        raise CannotLower(
            where=node.where,
            what=(
                f"a score of {q.dtype} rows of width {q.dims[3]} by {k.dtype} units of width "
                f"{k.dims[3]}"
            ),
            why="their product needs one width and one dtype",
            way_out="declare both sides with the same last dim and dtype.",
        )
    if q.dtype != "data" and "float" not in q.dtype:
        raise CannotLower(
            where=node.where,
            what=f"a score of {q.dtype} rows",
            why="scores are products in floating point",
            way_out="declare both sides as 'data' or a float dtype.",
        )
    heads, groups = q.dims[1], k.dims[1]
    whole = isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0
    if not (whole or groups in (1, heads) or (heads, groups) == (dims.Hq, dims.Hkv)):
        raise CannotLower(
            where=node.where,
            what=f"a score of {heads} heads of rows by {groups} heads of units",
            why="each head of the units must serve as many heads of the rows",
            way_out="give the units 1 head, or as many as the rows have.",
        )
    if lists not in (1, dims.Hkv, dims.Hq):
        raise CannotLower(
            where=node.where,
            what=f"a score with a list for each of {lists} heads",
            why="attention reads one list for all heads, for each KV head or for each query head",
            way_out='join the heads: score(..., heads="all", reduce="sum").',
        )


def check_weights(node: Score, q: TensorType, weights: TensorType) -> None:
    """Check that there is one weight for each head and row that is scored, and rows are tokens.

    q, weights: their types. Raises: CannotLower, WrongStage.
    """
    is_float = weights.dtype == "data" or "float" in weights.dtype
    if weights.dims == (dims.B, q.dims[1], dims.Sq) and q.dims[2] == dims.Sq and is_float:
        return
    if q.dims[2] != dims.Sq:
        raise CannotLower(
            where=node.where,
            what=f"weights of queries for rows of {q.dims[2]}",
            why="a weight belongs to one query of a head, and these rows are not all queries",
            way_out="score q itself, or leave weights out.",
        )
    raise WrongStage(
        where=node.where,
        verb="score",
        argument="weights",
        wanted=f"a float tensor [B, {q.dims[1]}, Sq], one value for each head and query scored,",
        given=f"a tensor of {weights}",
        way_out=f"declare it with tensor('B {q.dims[1]} Sq').",
    )
