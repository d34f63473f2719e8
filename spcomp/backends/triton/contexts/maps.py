"""Contexts of the kernels that make maps of scores and keep a share of them: part_lse, row_lse,
block_sums, block_scores, topp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spcomp.backends.triton.contexts.base import CapturedArg, padded_dim
from spcomp.backends.triton.contexts.select import HeadReduction
from spcomp.backends.triton.expr_text import Helpers, helpers_of
from spcomp.backends.triton.formulas import wide_of
from spcomp.ir.expr import FALSE, TRUE, Expr, Load, Sym


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsContext:
    """What the kernels that multiply share.

    has_low: a logit is the upper bound from each unit's largest and smallest values; is_folded: it
    sums the products of `size` pairs of tokens, is_crossed the first query with the last key.
    """

    header: tuple[str, ...]
    head_dim: int
    block_d: int
    has_d_tail: bool
    block_r: int
    size: int
    granule: int
    is_folded: bool
    is_crossed: bool
    has_low: bool
    num_stages: int
    helpers: Helpers
    dot_precision: str
    is_interpreted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsContext(LogitsContext):
    """Variables of `triton/kernels/part_lse.py.jinja`."""

    block_u: int
    block_n: int
    part: int
    wide: int
    tiles: int
    visible: Expr
    has_visible: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScoresContext(LogitsContext):
    """Variables of `triton/kernels/block_scores.py.jinja`.

    has_joined: the heads of a list are joined before the units of a block, since one of the two
    takes a maximum. has_weights: units do not tile the sequence. is_max is of heads, is_highest of
    units and rows."""

    block_n: int
    fine: int
    ratio: int
    reach: int
    lead: int
    per_block: int
    span: int
    stride: int
    has_weights: bool
    has_lse: bool
    has_joined: bool
    is_mean: bool
    is_max: bool
    is_highest: bool
    candidate: Expr
    has_candidate: bool
    visible: Expr
    has_visible: bool
    forced: Expr
    has_forced: bool


@dataclass(frozen=True, slots=True)
class RowLseContext:
    """Variables of `triton/kernels/row_lse.py.jinja`."""

    header: tuple[str, ...]
    block_r: int
    block_n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSumsContext:
    """Variables of `triton/kernels/block_sums.py.jinja`."""

    header: tuple[str, ...]
    block_r: int
    block_n: int
    ratio: int
    granule: int
    is_mean: bool
    visible: Expr
    has_visible: bool
    forced: Expr
    has_forced: bool
    helpers: Helpers


@dataclass(frozen=True, slots=True, kw_only=True)
class TopPContext:
    """Variables of `triton/kernels/topp.py.jinja`; has_number: the share is an argument, else an
    element of a table."""

    header: tuple[str, ...]
    block_u: int
    granule: int
    least: int
    is_dropped: bool
    share: Expr
    has_number: bool
    inputs: tuple[CapturedArg, ...]
    forced: Expr
    has_forced: bool
    helpers: Helpers


def _logits(
    *,
    header: tuple[str, ...],
    head_dim: int,
    block_r: int,
    num_stages: int = 2,
    size: int = 1,
    granule: int = 1,
    is_crossed: bool = False,
    is_bound: bool = False,
    is_float32: bool = False,
    is_interpreted: bool = False,
) -> dict[str, Any]:
    """Derive the fields of `LogitsContext`, helpers left out.

    block_r: rows of a program, a power of two of at least 16. granule: query tokens that a row
    stands for. is_bound: the units are pairs.
    """
    block_d = padded_dim(head_dim)
    return {
        "header": header,
        "head_dim": head_dim,
        "block_d": block_d,
        "has_d_tail": block_d != head_dim,
        "block_r": block_r,
        "size": size,
        "granule": granule,
        "is_folded": size > 1,
        "is_crossed": is_crossed,
        "has_low": is_bound,
        "num_stages": num_stages,
        "dot_precision": "ieee" if is_float32 else "tf32",
        "is_interpreted": is_interpreted,
    }


def parts_context(
    *, block_u: int, part: int, tiles: int = 1, visible: Expr = TRUE, **shared: Any
) -> PartsContext:
    """Make the context of the part_lse kernel; shared: the arguments of `_logits`.

    block_u: units of a step, a power of two of at least 16. part: units of a part. tiles: of parts,
    that a program walks. visible: over q_lo, q_hi, k (the unit), Sq and Skv.
    """
    wide = wide_of(part, block_u)
    return PartsContext(
        block_u=block_u,
        block_n=block_u // wide,
        part=part,
        wide=wide,
        tiles=tiles,
        visible=visible,
        has_visible=visible != TRUE,
        helpers=helpers_of(visible),
        **_logits(**shared),
    )


def block_scores_context(
    *,
    block_n: int,
    fine: int,
    span: int,
    stride: int,
    block: int,
    has_lse: bool = True,
    reduction: HeadReduction = "none",
    is_highest: bool = False,
    candidate: Expr = TRUE,
    visible: Expr = TRUE,
    forced: Expr = FALSE,
    **shared: Any,
) -> BlockScoresContext:
    """Make the context of the block_scores kernel; shared: the arguments of `_logits`, whose
    granule is that of a row.

    block_n: blocks of a program, as block_r. fine: query tokens of a fine row. span, stride, block:
    tokens of a unit, from one to the next, of a block. reduction: over the heads of a list.
    candidate: which units a fine row sees; visible, forced: which blocks a row may and must take.
    """
    made = _logits(**shared)
    lead = -(-span // stride) - 1
    per_block = block // stride
    return BlockScoresContext(
        block_n=block_n,
        fine=fine,
        ratio=made["granule"] // fine,
        reach=per_block + lead,
        lead=lead,
        per_block=per_block,
        span=span,
        stride=stride,
        has_weights=span != stride and not is_highest,
        has_lse=has_lse,
        has_joined=reduction != "none" and (is_highest or reduction == "max"),
        is_mean=reduction == "mean",
        is_max=reduction == "max",
        is_highest=is_highest,
        candidate=candidate,
        has_candidate=candidate != TRUE,
        visible=visible,
        has_visible=visible != TRUE,
        forced=forced,
        has_forced=forced != FALSE,
        helpers=helpers_of(candidate, visible, forced),
        **made,
    )


def block_sums_context(
    *,
    header: tuple[str, ...],
    block_r: int,
    block_n: int,
    ratio: int,
    granule: int,
    is_mean: bool = False,
    visible: Expr = TRUE,
    forced: Expr = FALSE,
) -> BlockSumsContext:
    """Make the context of the block_sums kernel.

    ratio: fine rows of a row of `granule` queries. visible, forced: as in `block_scores_context`.
    """
    return BlockSumsContext(
        header=header,
        block_r=block_r,
        block_n=block_n,
        ratio=ratio,
        granule=granule,
        is_mean=is_mean,
        visible=visible,
        has_visible=visible != TRUE,
        forced=forced,
        has_forced=forced != FALSE,
        helpers=helpers_of(visible, forced),
    )


def topp_context(
    *,
    header: tuple[str, ...],
    block_u: int,
    granule: int,
    least: int = 0,
    is_dropped: bool = False,
    table: str = "",
    forced: Expr = FALSE,
) -> TopPContext:
    """Make the context of the topp kernel; table: the name of a tensor with a share a head, empty
    where the share is a number."""
    return TopPContext(
        header=header,
        block_u=block_u,
        granule=granule,
        least=least,
        is_dropped=is_dropped,
        share=Load(table, (Sym("h"),), "float") if table else Sym("share"),
        has_number=not table,
        inputs=(CapturedArg(table, 1),) if table else (),
        forced=forced,
        has_forced=forced != FALSE,
        helpers=helpers_of(forced),
    )
