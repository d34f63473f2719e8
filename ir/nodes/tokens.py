"""Stages that give tokens for tokens, and the judgement of how alike the tokens of a block are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spcomp.ir.nodes.base import Node
from spcomp.ir.nodes.select import Selection


@dataclass(frozen=True, slots=True)
class Permute(Node):
    """The tokens of x in the order of a table: token i of the result is token order[i] of x.

    x [B,H,S,D], order [S] int32 or int64, each number below S once -> [B,H,S,D]. All that reads the
    result numbers its tokens by their new place. An Attend gives its rows back in the order of the
    q that was permuted, so its result is that of the tokens as they came."""

    x: Node
    order: Node


@dataclass(frozen=True, slots=True)
class Centre(Node):
    """The keys of each head less their mean over all tokens, stored in the dtype of x.

    x [B,Hkv,Skv,D] -> [B,Hkv,Skv,D]; the mean is summed in float32 (float64 inputs: in float64).
    Every score of a row moves by the same amount, so softmax is unchanged but for rounding. An
    Attend adds q·mean back, so that its LSE and what its score hook reads are those of x. Source:
    SageAttention, arXiv:2410.02367, section 4.2."""

    x: Node


@dataclass(frozen=True, slots=True)
class Similar(Selection):
    """Pairs whose token of x lies in a block of tokens that are alike (`negated`: that are not).

    x: q, or k, as they are, permuted or centred, [B,H,S,D]; the query, or the key, of a pair is
    judged. Block u covers the tokens u*block …; it is alike iff the mean cosine over all pairs of
    its tokens, each with itself too, |sum x/|x||^2 / block^2, is above `least`. A short last block
    never is, nor one with a token of zeros or with a NaN. least is a number or a captured tensor
    [Hq] or [Hkv] f32, one a head. Computed in float32 (float64 inputs: in float64). Source:
    SpargeAttn, arXiv:2502.18137, section 3.2, with the cosine of its code."""

    x: Node
    block: int
    least: float | None
    least_by_head: Node | None = None
    negated: bool = False

    def __invert__(self) -> Similar:
        return replace(self, negated=not self.negated)
