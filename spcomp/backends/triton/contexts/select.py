"""Contexts of the kernels that score units and choose the best: select, score, topk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from spcomp.backends.triton.contexts.base import CapturedArg, padded_dim
from spcomp.backends.triton.expr_text import Helpers, helpers_of
from spcomp.ir.expr import FALSE, TRUE, Expr

HeadReduction = Literal["none", "sum", "mean", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreContext:
    """Variables of `triton/kernels/score.py.jinja`.

    has_low: the score is the upper bound from each unit's largest and smallest values; is_shared:
    several heads share a list, and their scores are summed, or is_mean, or is_max.
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
    visible: Expr
    has_visible: bool
    forced: Expr
    has_forced: bool
    inputs: tuple[CapturedArg, ...]
    helpers: Helpers


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectContext(ScoreContext):
    """Variables of `triton/kernels/select.py.jinja`: those of the score kernel and these."""

    block_r: int
    dot_precision: str
    is_interpreted: bool


def _scoring(
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
) -> dict[str, Any]:
    """Derive the fields of `ScoreContext`.

    block_u: units per step, a power of two. granule: query tokens that a row stands for.
    is_bound: score by the largest and smallest values of a unit instead of by one row.
    reduction: over the heads that share a list; "none" where each head has its own.
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
        "visible": visible,
        "has_visible": visible != TRUE,
        "forced": forced,
        "has_forced": forced != FALSE,
        "inputs": inputs,
        "helpers": helpers_of(visible, forced),
    }


def score_context(**shared: Any) -> ScoreContext:
    """Make the context of the score kernel; shared: the arguments of `_scoring`."""
    return ScoreContext(**_scoring(**shared))


def select_context(
    *, block_r: int, is_float32: bool = False, is_interpreted: bool = False, **shared: Any
) -> SelectContext:
    """Make the context of the select kernel; shared: the arguments of `_scoring`.

    block_r: rows per program, a power of two >= 16.
    """
    return SelectContext(
        block_r=block_r,
        dot_precision="ieee" if is_float32 else "tf32",
        is_interpreted=is_interpreted,
        **_scoring(**shared),
    )


@dataclass(frozen=True, slots=True)
class TopKContext:
    """Variables of `triton/kernels/topk.py.jinja`."""

    header: tuple[str, ...]
    block_u: int
