"""Contexts of the attend family: attend, attend_gather, merge, attend_keys.

Each dataclass holds exactly the variables of the template its docstring names. The function beside
it derives what follows from the rest (padded widths, tails, helper functions).
"""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.backends.triton.contexts.base import CapturedArg, padded_dim
from spcomp.backends.triton.expr_text import Helpers, helpers_of
from spcomp.ir.expr import FALSE, TRUE, Expr, Sym, symbols, tile_bounds

SCORE = Sym("score")


@dataclass(frozen=True, slots=True)
class AttendContext:
    """Variables of `triton/kernels/attend.py.jinja`."""

    header: tuple[str, ...]
    head_dim: int
    value_dim: int
    block_d: int
    block_dv: int
    has_d_tail: bool
    has_dv_tail: bool
    block_q: int
    block_k: int
    num_stages: int
    dot_precision: str
    predicate: Expr
    has_predicate: bool
    flags: tuple[str, ...]
    inputs: tuple[CapturedArg, ...]
    has_inputs: bool
    score_hook: Expr
    has_score_hook: bool
    helpers: Helpers
    is_interpreted: bool


def attend_context(
    *,
    header: tuple[str, ...],
    head_dim: int,
    value_dim: int,
    block_q: int,
    block_k: int,
    num_stages: int,
    predicate: Expr = TRUE,
    flags: tuple[str, ...] = (),
    inputs: tuple[CapturedArg, ...] = (),
    score_hook: Expr = SCORE,
    has_score_hook: bool = False,
    is_float32: bool = False,
    is_interpreted: bool = False,
) -> AttendContext:
    """Make the context of the query-major kernel.

    flags: names of the flags (`chosen0`, …) at bits 24, 25, … of a tile entry, in bit order.
    has_score_hook: apply `score_hook`; with the default hook, the identity, any scale works, while
    the kernel without a hook needs a positive one.
    is_float32: the inputs are float32, whose products are then IEEE ones.
    """
    block_d, block_dv = padded_dim(head_dim), padded_dim(value_dim)
    return AttendContext(
        header=header,
        head_dim=head_dim,
        value_dim=value_dim,
        block_d=block_d,
        block_dv=block_dv,
        has_d_tail=block_d != head_dim,
        has_dv_tail=block_dv != value_dim,
        block_q=block_q,
        block_k=block_k,
        num_stages=num_stages,
        dot_precision="ieee" if is_float32 else "tf32",
        predicate=predicate,
        has_predicate=predicate != TRUE,
        flags=flags,
        inputs=inputs,
        has_inputs=bool(inputs),
        score_hook=score_hook,
        has_score_hook=has_score_hook,
        helpers=helpers_of(predicate, score_hook),
        is_interpreted=is_interpreted,
    )


@dataclass(frozen=True, slots=True)
class GatherContext:
    """Variables of `triton/kernels/attend_gather.py.jinja`."""

    header: tuple[str, ...]
    head_dim: int
    value_dim: int
    block_d: int
    block_dv: int
    has_d_tail: bool
    has_dv_tail: bool
    block_m: int
    block_k: int
    unit: int
    is_unit_tiled: bool
    num_stages: int
    dot_precision: str
    predicate: Expr
    has_predicate: bool
    flags: tuple[str, ...]
    inputs: tuple[CapturedArg, ...]
    has_inputs: bool
    score_hook: Expr
    has_score_hook: bool
    helpers: Helpers
    is_interpreted: bool


def gather_context(
    *,
    header: tuple[str, ...],
    head_dim: int,
    value_dim: int,
    block_m: int,
    block_k: int,
    unit: int,
    num_stages: int,
    predicate: Expr = TRUE,
    flags: tuple[str, ...] = (),
    inputs: tuple[CapturedArg, ...] = (),
    score_hook: Expr = SCORE,
    has_score_hook: bool = False,
    is_float32: bool = False,
    is_interpreted: bool = False,
) -> GatherContext:
    """Make the context of the kernel over gathered keys; `unit` is in key tokens, any integer."""
    block_d, block_dv = padded_dim(head_dim), padded_dim(value_dim)
    return GatherContext(
        header=header,
        head_dim=head_dim,
        value_dim=value_dim,
        block_d=block_d,
        block_dv=block_dv,
        has_d_tail=block_d != head_dim,
        has_dv_tail=block_dv != value_dim,
        block_m=block_m,
        block_k=block_k,
        unit=unit,
        is_unit_tiled=unit % block_k == 0,
        num_stages=num_stages,
        dot_precision="ieee" if is_float32 else "tf32",
        predicate=predicate,
        has_predicate=predicate != TRUE,
        flags=flags,
        inputs=inputs,
        has_inputs=bool(inputs),
        score_hook=score_hook,
        has_score_hook=has_score_hook,
        helpers=helpers_of(predicate, score_hook),
        is_interpreted=is_interpreted,
    )


@dataclass(frozen=True, slots=True)
class MergeContext:
    """Variables of `triton/kernels/merge.py.jinja`."""

    header: tuple[str, ...]
    value_dim: int
    block_dv: int
    has_dv_tail: bool
    block_r: int
    block_p: int
    has_counts: bool
    is_interpreted: bool


def merge_context(
    *,
    header: tuple[str, ...],
    value_dim: int,
    block_r: int,
    block_p: int,
    has_counts: bool,
    is_interpreted: bool = False,
) -> MergeContext:
    """Make the context of the merge; `block_r` rows x `block_p` parts (powers of two) a step."""
    block_dv = padded_dim(value_dim)
    return MergeContext(
        header=header,
        value_dim=value_dim,
        block_dv=block_dv,
        has_dv_tail=block_dv != value_dim,
        block_r=block_r,
        block_p=block_p,
        has_counts=has_counts,
        is_interpreted=is_interpreted,
    )


@dataclass(frozen=True, slots=True)
class KeysContext:
    """Variables of `triton/kernels/attend_keys.py.jinja`."""

    header: tuple[str, ...]
    head_dim: int
    value_dim: int
    block_d: int
    block_dv: int
    has_d_tail: bool
    has_dv_tail: bool
    block_m: int
    block_k: int
    unit: int
    unit_tiles: int
    num_stages: int
    dot_precision: str
    predicate: Expr
    has_predicate: bool
    everywhere: Expr
    somewhere: Expr
    inputs: tuple[CapturedArg, ...]
    has_inputs: bool
    has_shared_lists: bool
    score_hook: Expr
    has_score_hook: bool
    helpers: Helpers
    is_interpreted: bool


def keys_context(
    *,
    header: tuple[str, ...],
    head_dim: int,
    value_dim: int,
    block_m: int,
    block_k: int,
    unit: int,
    num_stages: int,
    predicate: Expr = TRUE,
    inputs: tuple[CapturedArg, ...] = (),
    score_hook: Expr = SCORE,
    has_score_hook: bool = False,
    has_shared_lists: bool = True,
    is_float32: bool = False,
    is_interpreted: bool = False,
) -> KeysContext:
    """Make the context of the key-major kernel; `unit` is in key tokens, any integer.

    The bounds of the predicate over a key tile are derived here. Where it depends on the head,
    which differs inside a tile of rows, every tile keeps its mask.

    has_shared_lists: query heads may share a list; False promises one list per query head.
    """
    block_d, block_dv = padded_dim(head_dim), padded_dim(value_dim)
    everywhere, somewhere, _ = tile_bounds(predicate)
    if "h" in symbols(everywhere) | symbols(somewhere):
        everywhere, somewhere = FALSE, TRUE
    return KeysContext(
        header=header,
        head_dim=head_dim,
        value_dim=value_dim,
        block_d=block_d,
        block_dv=block_dv,
        has_d_tail=block_d != head_dim,
        has_dv_tail=block_dv != value_dim,
        block_m=block_m,
        block_k=block_k,
        unit=unit,
        unit_tiles=1 << (-(-unit // block_k) - 1).bit_length(),
        num_stages=num_stages,
        dot_precision="ieee" if is_float32 else "tf32",
        predicate=predicate,
        has_predicate=predicate != TRUE,
        everywhere=everywhere,
        somewhere=somewhere,
        inputs=inputs,
        has_inputs=bool(inputs),
        has_shared_lists=has_shared_lists,
        score_hook=score_hook,
        has_score_hook=has_score_hook,
        helpers=helpers_of(predicate, everywhere, somewhere, score_hook),
        is_interpreted=is_interpreted,
    )
