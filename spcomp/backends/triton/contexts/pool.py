"""Context of the pool kernel: how the tokens of a unit become one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spcomp.backends.triton.contexts.base import padded_dim

PoolKind = Literal["mean", "max", "min", "minmax"]


@dataclass(frozen=True, slots=True)
class PoolContext:
    """Variables of `triton/kernels/pool.py.jinja`.

    has_max and has_min say which extremes are computed; has_low, that the smallest goes to an
    output of its own; is_min, that it is the only output. is_packed: x is packed sequences, those
    of q where is_of_queries.
    """

    header: tuple[str, ...]
    is_mean: bool
    has_max: bool
    has_min: bool
    has_low: bool
    is_min: bool
    head_dim: int
    block_d: int
    block: int
    stride: int
    unit_tile: int
    token_tile: int
    is_interpreted: bool
    is_packed: bool
    is_of_queries: bool


def pool_context(
    *,
    header: tuple[str, ...],
    by: PoolKind,
    head_dim: int,
    block: int,
    stride: int,
    unit_tile: int,
    token_tile: int,
    is_interpreted: bool = False,
    is_packed: bool = False,
    is_of_queries: bool = False,
) -> PoolContext:
    """Make the context of the pool kernel.

    block, stride: tokens of a unit, and from one unit's first token to the next one's; any >= 1.
    unit_tile, token_tile: units per program and tokens of each per step, powers of two.
    """
    return PoolContext(
        header=header,
        is_mean=by == "mean",
        has_max=by in ("max", "minmax"),
        has_min=by in ("min", "minmax"),
        has_low=by == "minmax",
        is_min=by == "min",
        head_dim=head_dim,
        block_d=padded_dim(head_dim),
        block=block,
        stride=stride,
        unit_tile=unit_tile,
        token_tile=token_tile,
        is_interpreted=is_interpreted,
        is_packed=is_packed,
        is_of_queries=is_of_queries,
    )
