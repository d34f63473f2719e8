"""Context of the warp-specialised attend kernel."""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.backends.triton.contexts.attend import SCORE
from spcomp.backends.triton.contexts.base import CapturedArg, padded_dim
from spcomp.backends.triton.expr_text import Helpers, helpers_of
from spcomp.ir.expr import TRUE, Expr

ROWS = 64
"""Rows that the four warps of a consumer multiply."""

CONSUMER_REGISTERS, COPY_REGISTERS = 240, 24
"""Registers a thread of a second consumer has, and one of the copying warp and of the three that
fill its group of four. What they leave of three times WHOLE_REGISTERS is the first consumer's,
which must not be less than the second's."""

SHARED_REGISTERS, WHOLE_REGISTERS = 128, 168
"""Registers a thread has on average where two programs share a processor, and where one fills it;
what one multiplication takes must fit into them too."""

WIDEST_SHARED = 128
"""Widest head dimension with which two programs fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarpsContext:
    """Variables of `triton/kernels/attend_ws.py.jinja`."""

    header: tuple[str, ...]
    head_dim: int
    value_dim: int
    block_d: int
    block_dv: int
    block_q: int
    heads: int
    consumers: int
    consumer_numbers: tuple[int, ...]
    max_registers: int
    worker_warps: tuple[int, ...]
    worker_registers: tuple[int, ...]
    block_k: int
    entries: int
    step: int
    stages: int
    dtype: str
    query_bytes: int
    key_bytes: int
    value_bytes: int
    has_pieces: bool
    has_shared_lists: bool
    is_copied_out: bool
    has_sinks: bool
    predicate: Expr
    has_predicate: bool
    flags: tuple[str, ...]
    inputs: tuple[CapturedArg, ...]
    has_inputs: bool
    score_hook: Expr
    has_score_hook: bool
    is_pooled: bool
    helpers: Helpers


def warps_context(
    *,
    header: tuple[str, ...],
    head_dim: int,
    value_dim: int,
    block_q: int,
    heads: int,
    block_k: int,
    entries: int,
    stages: int,
    dtype: str,
    is_copied_out: bool,
    has_sinks: bool = False,
    predicate: Expr = TRUE,
    flags: tuple[str, ...] = (),
    inputs: tuple[CapturedArg, ...] = (),
    score_hook: Expr = SCORE,
    has_score_hook: bool = False,
    is_pooled: bool = False,
) -> WarpsContext:
    """Make the context; dtype: of q, k and v, two bytes wide.

    is_copied_out: out has that dtype too, and leaves by the copy engine through the tile of Q.
    is_pooled: k and v hold units, which the rule's k numbers."""
    consumers = heads * block_q // ROWS
    block_d, block_dv, step = padded_dim(head_dim), padded_dim(value_dim), block_k * entries
    workers = consumers - 1
    is_shared = consumers == 1 and max(block_d, block_dv) <= WIDEST_SHARED
    return WarpsContext(
        header=header,
        head_dim=head_dim,
        value_dim=value_dim,
        block_d=block_d,
        block_dv=block_dv,
        block_q=block_q,
        heads=heads,
        consumers=consumers,
        consumer_numbers=tuple(range(consumers)),
        max_registers=SHARED_REGISTERS if is_shared else WHOLE_REGISTERS,
        worker_warps=(*[4] * workers, 1),
        worker_registers=(*[CONSUMER_REGISTERS] * workers, COPY_REGISTERS),
        block_k=block_k,
        entries=entries,
        step=step,
        stages=stages,
        dtype=dtype,
        query_bytes=2 * ROWS * block_d,
        key_bytes=2 * step * block_d,
        value_bytes=2 * step * block_dv,
        has_pieces=entries > 1,
        has_shared_lists=heads > 1,
        is_copied_out=is_copied_out and block_d == block_dv,
        has_sinks=has_sinks,
        predicate=predicate,
        has_predicate=predicate != TRUE,
        flags=flags,
        inputs=inputs,
        has_inputs=bool(inputs),
        score_hook=score_hook,
        has_score_hook=has_score_hook,
        is_pooled=is_pooled,
        helpers=helpers_of(predicate, score_hook),
    )
