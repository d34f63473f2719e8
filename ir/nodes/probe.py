"""What the last query rows tell about all of them: their maps summed along lines, how many units
hold a share, and whether two estimates agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spcomp.ir.nodes.base import Node

Lines = Literal["columns", "diagonals"]
Crossing = Literal["keep", "drop"]
LINES: tuple[Lines, ...] = ("columns", "diagonals")


@dataclass(frozen=True, slots=True)
class Probe(Node):
    """The last `rows` query rows, all of them where there are fewer.

    q [B,Hq,Sq,D] -> [B,Hq,min(rows,Sq),D], a view that no kernel stores. A row keeps its position,
    so the last one meets the last key. Scores of a probe rank nothing for the other rows until they
    are summed (`Sums`)."""

    x: Node
    rows: int


@dataclass(frozen=True, slots=True)
class Sums(Node):
    """Add a map of scores along its columns or along its diagonals, over all its rows.

    scores [B,Hs,Nq,Nk] f32 -> [B,Hs,1,N] f32. Along "columns" N = Nk, the units of keys; along
    "diagonals" (rows and units being tokens, the score causal) N = Skv, the offsets o = t - u of a
    key u from a query at t. Plain sums: an offset that few rows have has few terms. A unit that is
    no candidate of its row counts 0. The one row stands for all query rows: a list chosen from
    columns holds its keys for every query, one chosen from diagonals becomes a selection by
    `Diagonals`. (MInference, arXiv:2407.02490, algorithm 2.)"""

    scores: Node
    along: Lines = "columns"


@dataclass(frozen=True, slots=True)
class Needed(Node):
    """Count the entries that a share of each row needs, as a number of units to keep.

    scores [B,Hs,Nq,N] f32, none below 0 -> counts [B,Hs,Nq] i32: n = ceil((x + extra) / per), then
    n = min(max(n, least), most). x is how many of the row's entries `TopP` keeps of its share p by
    the same `crossing`; `per` turns entries into units of so many."""

    scores: Node
    p: float
    crossing: Crossing = "keep"
    extra: int = 0
    per: int = 1
    least: int = 0
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Alike(Node):
    """Tell, for each head, whether two estimates of one distribution agree.

    p, q: maps of one row over the same units, [B,Hs,1,N] f32 -> bool [B,Hs]: true iff
    sqrt(JS(p, q)) < below, JS the Jensen-Shannon divergence in natural logarithms, of both divided
    by their sums; 0 log 0 is 0. A row that sums to 0 or holds NaN is like nothing. The distance is
    at most sqrt(ln 2) = 0.8326. (FlexPrefill, arXiv:2502.20766, equation 6.)"""

    p: Node
    q: Node
    below: float
