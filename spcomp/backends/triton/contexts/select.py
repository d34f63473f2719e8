"""Contexts of the kernels that score units and choose the best: select, score, topk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from spcomp.backends.triton.contexts.base import CapturedArg, padded_dim
from spcomp.backends.triton.expr_text import Helpers, helpers_of
from spcomp.ir.expr import FALSE, TRUE, Expr, Lit

NONE = Lit(0)  # a count that the kernel does not make
NO_HELPERS = Helpers()
HeadReduction = Literal["none", "sum", "mean", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingContext:
    """What the score and the select kernel share.

    has_low: the score is the upper bound from each unit's largest and smallest values; is_shared:
    several heads share a list, and their scores are summed, or is_mean, or is_max. is_weighed: the
    scores of a head change before that, is_relu by losing what is below 0, has_weights by a factor
    for each head and row. is_packed:
    sequences have lengths of their own, and `unit_count` units (over Skv); has_packed_rows,
    has_packed_units: the rows, or units, are tokens of packed tensors.
    """

    header: tuple[str, ...]
    head_dim: int
    block_d: int
    has_d_tail: bool
    block_u: int
    granule: int
    has_low: bool
    is_shared: bool
    is_mean: bool
    is_max: bool
    is_weighed: bool
    is_relu: bool
    has_weights: bool
    visible: Expr
    has_visible: bool
    forced: Expr
    has_forced: bool
    inputs: tuple[CapturedArg, ...]
    is_packed: bool
    has_packed_rows: bool
    has_packed_units: bool
    unit_count: Expr
    helpers: Helpers
    dot_precision: str
    is_interpreted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreContext(RankingContext):
    """Variables of `triton/kernels/score.py.jinja`."""

    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectContext(RankingContext):
    """Variables of `triton/kernels/select.py.jinja`.

    has_item_k: what is kept depends on a sequence's own length, as `item_k` says.
    """

    block_r: int
    has_item_k: bool
    item_k: Expr


def _ranking(
    *,
    header: tuple[str, ...],
    head_dim: int,
    block_u: int,
    granule: int,
    is_bound: bool = False,
    reduction: HeadReduction = "none",
    is_relu: bool = False,
    has_weights: bool = False,
    visible: Expr = TRUE,
    forced: Expr = FALSE,
    inputs: tuple[CapturedArg, ...] = (),
    is_packed: bool = False,
    has_packed_rows: bool = False,
    has_packed_units: bool = False,
    unit_count: Expr = NONE,
    is_float32: bool = False,
    is_interpreted: bool = False,
) -> dict[str, Any]:
    """Derive the fields of `RankingContext`.

    block_u: units per step, a power of two. granule: query tokens that a row stands for.
    is_bound: score by the largest and smallest values of a unit instead of by one row.
    reduction: over the heads that share a list; "none" where each head has its own.
    is_relu, has_weights: what changes the scores of a head before heads are joined.
    visible, forced: over q_lo, q_hi, k (the unit), Sq, Skv, b and h (the list head).
    """
    block_d = padded_dim(head_dim)
    return {
        "header": header,
        "head_dim": head_dim,
        "block_d": block_d,
        "has_d_tail": block_d != head_dim,
        "block_u": block_u,
        "granule": granule,
        "has_low": is_bound,
        "is_shared": reduction != "none",
        "is_mean": reduction == "mean",
        "is_max": reduction == "max",
        "is_weighed": is_relu or has_weights,
        "is_relu": is_relu,
        "has_weights": has_weights,
        "visible": visible,
        "has_visible": visible != TRUE,
        "forced": forced,
        "has_forced": forced != FALSE,
        "inputs": inputs,
        "is_packed": is_packed,
        "has_packed_rows": has_packed_rows,
        "has_packed_units": has_packed_units,
        "unit_count": unit_count,
        "helpers": helpers_of(visible, forced, unit_count),
        "dot_precision": "ieee" if is_float32 else "tf32",
        "is_interpreted": is_interpreted,
    }


def score_context(*, num_stages: int = 2, **shared: Any) -> ScoreContext:
    """Make the context of the score kernel; shared: the arguments of `_ranking`."""
    return ScoreContext(num_stages=num_stages, **_ranking(**shared))


def select_context(*, block_r: int, item_k: Expr = NONE, **shared: Any) -> SelectContext:
    """Make the context of the select kernel; shared: the arguments of `_ranking`.

    block_r: rows per program, a power of two >= 16. item_k: units kept, over Skv, where they
    depend on the length of a packed sequence.
    """
    return SelectContext(
        block_r=block_r, has_item_k=item_k != NONE, item_k=item_k, **_ranking(**shared)
    )


def topk_context(
    *,
    header: tuple[str, ...],
    block_u: int,
    is_packed: bool = False,
    unit_count: Expr = NONE,
    item_k: Expr = NONE,
) -> TopKContext:
    """Make the context of the topk kernel; item_k: as for `select_context`."""
    return TopKContext(
        header, block_u, is_packed, unit_count, item_k != NONE, item_k, helpers_of(unit_count)
    )


@dataclass(frozen=True, slots=True)
class TopKContext:
    """Variables of `triton/kernels/topk.py.jinja`; for packed sequences see `SelectContext`."""

    header: tuple[str, ...]
    block_u: int
    is_packed: bool = False
    unit_count: Expr = NONE
    has_item_k: bool = False
    item_k: Expr = NONE
    helpers: Helpers = NO_HELPERS
