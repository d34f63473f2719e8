"""Contexts of the attend family: attend, attend_gather, merge, attend_keys.

Each dataclass holds exactly the variables of the template its docstring names. The function beside
it derives what follows from the rest (padded widths, tails, helper functions).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spcomp.backends.triton.contexts.base import CapturedArg, padded_dim
from spcomp.backends.triton.expr_text import Helpers, helpers_of
from spcomp.ir.expr import FALSE, TRUE, Expr, Sym, symbols, tile_bounds
from spcomp.ir.passes.fit_target import tile_widths

SCORE = Sym("score")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendingContext:
    """What the templates that attend share: the widths, the pair rule, the score hook."""

    header: tuple[str, ...]
    head_dim: int
    value_dim: int
    block_d: int
    block_dv: int
    has_d_tail: bool
    has_dv_tail: bool
    block_k: int
    num_stages: int
    dot_precision: str
    predicate: Expr
    has_predicate: bool
    inputs: tuple[CapturedArg, ...]
    has_inputs: bool
    score_hook: Expr
    has_score_hook: bool
    helpers: Helpers
    is_pooled: bool
    is_packed: bool
    is_interpreted: bool


def _attending(
    *bounds: Expr,
    header: tuple[str, ...],
    head_dim: int,
    value_dim: int,
    block_k: int,
    num_stages: int,
    predicate: Expr = TRUE,
    inputs: tuple[CapturedArg, ...] = (),
    score_hook: Expr = SCORE,
    has_score_hook: bool = False,
    is_float32: bool = False,
    is_pooled: bool = False,
    is_packed: bool = False,
    is_interpreted: bool = False,
) -> dict[str, Any]:
    """Derive the fields of `AttendingContext`; bounds: other expressions the template prints.

    has_score_hook: apply `score_hook`; with the default hook, the identity, any scale works, while
    the kernel without a hook needs a positive one.
    is_float32: the inputs are float32, whose products are then IEEE ones.
    is_pooled: k and v hold units, which the rule's k numbers.
    """
    block_d, block_dv = padded_dim(head_dim), padded_dim(value_dim)
    return {
        "header": header,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "block_d": block_d,
        "block_dv": block_dv,
        "has_d_tail": block_d != head_dim,
        "has_dv_tail": block_dv != value_dim,
        "block_k": block_k,
        "num_stages": num_stages,
        "dot_precision": "ieee" if is_float32 else "tf32",
        "predicate": predicate,
        "has_predicate": predicate != TRUE,
        "inputs": inputs,
        "has_inputs": bool(inputs),
        "score_hook": score_hook,
        "has_score_hook": has_score_hook,
        "helpers": helpers_of(predicate, *bounds, score_hook),
        "is_pooled": is_pooled,
        "is_packed": is_packed,
        "is_interpreted": is_interpreted,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendContext(AttendingContext):
    """Variables of `triton/kernels/attend.py.jinja`."""

    block_q: int
    flags: tuple[str, ...]
    has_sinks: bool
    has_packed_out: bool


def attend_context(
    *,
    block_q: int,
    flags: tuple[str, ...] = (),
    has_sinks: bool = False,
    has_packed_out: bool = False,
    **shared: Any,
) -> AttendContext:
    """Make the context of the query-major kernel; shared: the arguments of `_attending`.

    flags: names of the flags (`chosen0`, …) at bits 24, 25, … of a tile entry, in bit order.
    has_packed_out: out and lse are packed like q, and no parts with a batch axis.
    """
    return AttendContext(
        block_q=block_q,
        flags=flags,
        has_sinks=has_sinks,
        has_packed_out=has_packed_out,
        **_attending(**shared),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherContext(AttendingContext):
    """Variables of `triton/kernels/attend_gather.py.jinja`.

    has_rest: queries and keys lie in two tiles, the second of `block_rest` channels, of which there
    are rest_dim.
    """

    block_m: int
    unit: int
    has_rest: bool
    rest_dim: int
    block_rest: int
    has_rest_tail: bool
    is_unit_tiled: bool
    flags: tuple[str, ...]
    has_sinks: bool
    has_packed_out: bool


def gather_context(
    *,
    block_m: int,
    block_k: int,
    unit: int,
    flags: tuple[str, ...] = (),
    has_sinks: bool = False,
    has_packed_out: bool = False,
    **shared: Any,
) -> GatherContext:
    """Make the context of the kernel over gathered keys; `unit` is in key tokens, any integer."""
    attending = _attending(block_k=block_k, **shared)
    first, second = tile_widths(attending["head_dim"])
    rest = attending["head_dim"] - first if second else 0
    if second:
        attending |= {"block_d": first, "has_d_tail": False}
    return GatherContext(
        block_m=block_m,
        unit=unit,
        has_rest=second > 0,
        rest_dim=rest,
        block_rest=second,
        has_rest_tail=rest != second,
        is_unit_tiled=unit % block_k == 0,
        flags=flags,
        has_sinks=has_sinks,
        has_packed_out=has_packed_out,
        **attending,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysContext(AttendingContext):
    """Variables of `triton/kernels/attend_keys.py.jinja`."""

    block_m: int
    unit: int
    unit_tiles: int
    everywhere: Expr
    somewhere: Expr
    has_shared_lists: bool


def keys_context(
    *,
    block_m: int,
    block_k: int,
    unit: int,
    predicate: Expr = TRUE,
    has_shared_lists: bool = True,
    **shared: Any,
) -> KeysContext:
    """Make the context of the key-major kernel; `unit` is in key tokens, any integer.

    The bounds of the predicate over a key tile are derived here. Where it depends on the head,
    which differs inside a tile of rows, every tile keeps its mask.

    has_shared_lists: query heads may share a list; False promises one list per query head.
    """
    everywhere, somewhere, _ = tile_bounds(predicate)
    if "h" in symbols(everywhere) | symbols(somewhere):
        everywhere, somewhere = FALSE, TRUE
    return KeysContext(
        block_m=block_m,
        unit=unit,
        unit_tiles=1 << (-(-unit // block_k) - 1).bit_length(),
        everywhere=everywhere,
        somewhere=somewhere,
        has_shared_lists=has_shared_lists,
        **_attending(everywhere, somewhere, block_k=block_k, predicate=predicate, **shared),
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
    has_sinks: bool
    has_gates: bool
    is_interpreted: bool
    is_packed: bool
    has_packed_out: bool


def merge_context(
    *,
    header: tuple[str, ...],
    value_dim: int,
    block_r: int,
    block_p: int,
    has_counts: bool,
    has_sinks: bool = False,
    has_gates: bool = False,
    is_interpreted: bool = False,
    is_packed: bool = False,
    has_packed_out: bool = False,
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
        has_sinks=has_sinks,
        has_gates=has_gates,
        is_interpreted=is_interpreted,
        is_packed=is_packed,
        has_packed_out=has_packed_out,
    )
