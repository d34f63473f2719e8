"""Contexts of the kernels that score units and choose the best: select, score, topk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spcomp.backends.triton.contexts.base import CapturedArg, padded_dim
from spcomp.backends.triton.expr_text import Helpers, helpers_of
from spcomp.ir.expr import FALSE, TRUE, Expr

HeadReduction = Literal["none", "sum", "mean", "max"]


@dataclass(frozen=True, slots=True)
class SelectContext:
    """Variables of `triton/kernels/select.py.jinja`.

    has_low: the score is the upper bound from each unit's largest and smallest values; is_shared:
    several heads share a list, and their scores are summed, or is_mean, or is_max.
    """

    header: tuple[str, ...]
    head_dim: int
    block_d: int
    has_d_tail: bool
    block_r: int
    block_u: int
    granule: int
    dot_precision: str
    has_low: bool
    is_shared: bool
    is_mean: bool
    is_max: bool
    visible: Expr
    has_visible: bool
    forced: Expr
    has_forced: bool
    inputs: tuple[CapturedArg, ...]
    helpers: Helpers
    is_interpreted: bool


def select_context(
    *,
    header: tuple[str, ...],
    head_dim: int,
    block_r: int,
    block_u: int,
    granule: int,
    is_bound: bool = False,
    reduction: HeadReduction = "none",
    visible: Expr = TRUE,
    forced: Expr = FALSE,
    inputs: tuple[CapturedArg, ...] = (),
    is_float32: bool = False,
    is_interpreted: bool = False,
) -> SelectContext:
    """Make the context of the select kernel.

    block_r, block_u: rows per program and units per step, powers of two >= 16.
    granule: query tokens that a row stands for.
    is_bound: score by the largest and smallest values of a unit instead of by one row.
    reduction: over the heads that share a list; "none" where each head has its own.
    visible, forced: over q_lo, q_hi, k (the unit), Sq, Skv, b and h (the list head).
    """
    block_d = padded_dim(head_dim)
    return SelectContext(
        header=header,
        head_dim=head_dim,
        block_d=block_d,
        has_d_tail=block_d != head_dim,
        block_r=block_r,
        block_u=block_u,
        granule=granule,
        dot_precision="ieee" if is_float32 else "tf32",
        has_low=is_bound,
        is_shared=reduction != "none",
        is_mean=reduction == "mean",
        is_max=reduction == "max",
        visible=visible,
        has_visible=visible != TRUE,
        forced=forced,
        has_forced=forced != FALSE,
        inputs=inputs,
        helpers=helpers_of(visible, forced),
        is_interpreted=is_interpreted,
    )


@dataclass(frozen=True, slots=True)
class ScoreContext:
    """Variables of `triton/kernels/score.py.jinja`, which mean what they do in SelectContext."""

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
    visible: Expr
    has_visible: bool
    forced: Expr
    has_forced: bool
    inputs: tuple[CapturedArg, ...]
    helpers: Helpers


def score_context(
    *,
    header: tuple[str, ...],
    head_dim: int,
    block_u: int,
    granule: int,
    is_bound: bool = False,
    reduction: HeadReduction = "none",
    visible: Expr = TRUE,
    forced: Expr = FALSE,
    inputs: tuple[CapturedArg, ...] = (),
) -> ScoreContext:
    """Make the context of the score kernel; the arguments mean what they do for `select_context`.

    block_u: units per program, a power of two.
    """
    block_d = padded_dim(head_dim)
    return ScoreContext(
        header=header,
        head_dim=head_dim,
        block_d=block_d,
        has_d_tail=block_d != head_dim,
        block_u=block_u,
        granule=granule,
        has_low=is_bound,
        is_shared=reduction != "none",
        is_mean=reduction == "mean",
        is_max=reduction == "max",
        visible=visible,
        has_visible=visible != TRUE,
        forced=forced,
        has_forced=forced != FALSE,
        inputs=inputs,
        helpers=helpers_of(visible, forced),
    )


@dataclass(frozen=True, slots=True)
class TopKContext:
    """Variables of `triton/kernels/topk.py.jinja`."""

    header: tuple[str, ...]
    block_u: int
