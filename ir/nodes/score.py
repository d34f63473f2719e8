"""How well a unit of keys fits a query row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spcomp.ir.nodes.base import Node

HeadSharing = Literal["query", "group", "all"]
Reduction = Literal["mean", "sum", "max"]
SHARINGS: tuple[HeadSharing, ...] = ("query", "group", "all")
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "max")


@dataclass(frozen=True, slots=True)
class Score(Node):
    """Score each unit of keys for each query row, in float32.

    q side [B,Hq,Nq,D] (tokens, or a Downsample of them), k side [B,Hkv,Nk,D] or a minmax pair
    -> scores [B,Hs,Nq,Nk] f32, Hs = Hq, Hkv or 1 by `heads`.

    A k side that is a minmax pair gives the upper bound sum_d max(q_d*max_d, q_d*min_d) (Quest,
    arXiv:2406.10774), otherwise the dot product. Scores of the heads that share a list are joined
    by `reduce`, then multiplied by `scale`. With `causal`, a unit is a candidate of a row iff the
    last token of the unit is not later than the row's last query (position row + Skv - Sq)."""

    q: Node
    k: Node
    scale: float = 1.0
    causal: bool = True
    heads: HeadSharing = "query"
    reduce: Reduction = "mean"
