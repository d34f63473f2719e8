"""How well a unit of keys fits a query row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spcomp.ir.nodes.base import Node

HeadSharing = Literal["query", "group", "all"]
Reduction = Literal["mean", "sum", "max"]
Joining = Literal["sum", "max"]
Activation = Literal["none", "relu"]
SHARINGS: tuple[HeadSharing, ...] = ("query", "group", "all")
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "max")
JOININGS: tuple[Joining, ...] = ("sum", "max")
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu")


@dataclass(frozen=True, slots=True)
class Score(Node):
    """Score each unit of keys for each query row, in float32.

    q side [B,Hq,Nq,D] (tokens, or a Downsample of them), k side [B,Hkv,Nk,D] or a minmax pair
    -> scores [B,Hs,Nq,Nk] f32, Hs = Hq, Hkv or 1 by `heads`.

    A k side that is a minmax pair gives the upper bound sum_d max(q_d*max_d, q_d*min_d) (Quest,
    arXiv:2406.10774), otherwise the dot product. `activation` "relu" then sets what is below 0 to
    0, and `weights` [B,heads of q,Sq], of either sign, multiply the scores of a head and row of
    tokens: both before heads are joined (the lightning indexer of DSA, arXiv:2512.02556). Scores of
    the heads that share a list are joined by `reduce`, then multiplied by `scale`. With `causal`, a
    unit is a candidate of a row iff the last token of the unit is not later than the row's last
    query (position row + Skv - Sq); with `begun`, iff its first token is not. `among` narrows the
    candidates to the units whose tokens are alike (a `Similar` of keys in the units of the k side);
    scores that are regrouped, or summed along lines, count the units left out as no candidates, and
    all they make of them are."""

    q: Node
    k: Node
    scale: float = 1.0
    causal: bool = True
    heads: HeadSharing = "query"
    reduce: Reduction = "mean"
    activation: Activation = "none"
    weights: Node | None = None
    begun: bool = False
    among: Node | None = None


@dataclass(frozen=True, slots=True)
class Softmax(Node):
    """Turn the scores of each row into probabilities over its candidates, in float32.

    scores [B,Hs,Nq,Nk] f32 -> [B,Hs',Nq,Nk] f32. The logits are scores * scale, scale None being
    1/sqrt(D) with the head dimension D of q, whatever it was folded to. A unit that is no candidate
    has probability 0, and so has every unit of a row without candidates. `over` names scores of the
    same rows and heads whose log-sum-exp divides instead of the row's own: p = exp(s - lse(over)),
    which need not sum to 1 (InfLLM-V2, arXiv:2509.24663). Then the heads that share a list are
    joined by `reduce`; heads None keeps those of the scores."""

    scores: Node
    scale: float | None = None
    over: Node | None = None
    heads: HeadSharing | None = None
    reduce: Reduction = "sum"


@dataclass(frozen=True, slots=True)
class Regroup(Node):
    """Carry scores from one grid of rows and units to a coarser one that tiles the sequence.

    scores [B,Hs,Nq,Nk] f32 -> [B,Hs,ceil(Sq/rows),ceil(Skv/block)] f32. A unit counts for every
    block that holds one of its tokens: by "sum" its scores are added, each times (tokens in the
    block) / (tokens between units), which is NSA's overlap (arXiv:2502.11089, equation 9) and a
    plain sum where units tile (a short last unit counts as a whole one); by "max" the highest
    counts. Scores of the rows joined are joined the same way. A unit that is no candidate of its
    row counts as 0 by "sum" and where the scores are probabilities, and as -inf by "max" of plain
    scores; so does a block without units.

    rows, block: query rows and key tokens of a block, multiples of the grid they come from. Of sums
    along lines (`Sums`) the one row stays one. With `from_end`, for offsets alone, blocks are
    counted from the other end: the last one is whole and the first may be short."""

    scores: Node
    rows: int
    block: int
    by: Joining = "sum"
    from_end: bool = False
