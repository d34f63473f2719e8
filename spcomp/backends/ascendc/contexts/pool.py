"""Context of the pool kernel: how many units and tokens a vector core folds at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spcomp.backends.ascendc.contexts.base import C_TYPES, FRACTAL, UB_BYTES

PoolKind = Literal["mean", "max", "min"]

TILE_ELEMENTS = 16384
"""Elements of a load: 32 KiB of 16-bit values, twice what a transfer needs for full bandwidth."""

_FOLDS = {
    "mean": ("Add", "0.0f", "mean"),
    "max": ("Max", "-__builtin_inff()", "largest value"),
    "min": ("Min", "__builtin_inff()", "smallest value"),
}
"""The instruction that folds two rows, its neutral element, and what comes out."""


@dataclass(frozen=True, slots=True)
class PoolContext:
    """Variables of `ascendc/kernels/pool.h.jinja`.

    units: of a tile. is_split: whether a unit is folded in several parts of `part` tokens. span:
    tokens of a load. operation, nothing, result: of the fold. ub_table: a line per buffer.
    """

    header: tuple[str, ...]
    name: str
    tiling_header: str
    struct: str
    element: str
    head_dim: int
    block: int
    stride: int
    units: int
    is_split: bool
    part: int
    span: int
    is_mean: bool
    operation: str
    nothing: str
    result: str
    ub_bytes: int
    ub_table: tuple[str, ...]


def pool_context(
    *,
    header: tuple[str, ...],
    name: str,
    tiling_header: str,
    struct: str,
    dtype: str,
    by: PoolKind,
    head_dim: int,
    block: int,
    stride: int,
) -> PoolContext:
    """Make the context of the pool kernel.

    dtype: torch's name. block, stride: tokens of a unit, and from one unit's first token to the
    next one's; any >= 1.
    """
    assert head_dim % FRACTAL == 0 and head_dim <= 256
    assert block >= 1 and stride >= 1
    room = TILE_ELEMENTS // head_dim
    parts = -(-block // room)
    part = -(-block // parts)
    # As many units as there is room for: loaded, folded, and as results, a fourth of that.
    units = max(1, min(room // max(block, 4), (room - block) // stride + 1))
    span = part if parts > 1 else (units - 1) * stride + block
    rows = part + 1 if parts > 1 else block
    operation, nothing, result = _FOLDS[by]
    buffers = [
        ("loaded_ x 2", 2 * 2 * span * head_dim, "tokens of a step; MTE2 writes, V reads"),
        ("pooled_ x 2", 2 * 2 * units * head_dim, "rows of a tile; V writes, MTE3 reads"),
        ("values_", 4 * units * rows * head_dim, "tokens as floats, each unit's by itself"),
    ]
    if by == "mean":
        buffers.append(("means_", 4 * units * head_dim, "means of a tile before rounding"))
    ub_bytes = sum(size for _, size, _ in buffers)
    assert ub_bytes <= UB_BYTES
    return PoolContext(
        header=header,
        name=name,
        tiling_header=tiling_header,
        struct=struct,
        element=C_TYPES[dtype],
        head_dim=head_dim,
        block=block,
        stride=stride,
        units=units,
        is_split=parts > 1,
        part=part,
        span=span,
        is_mean=by == "mean",
        operation=operation,
        nothing=nothing,
        result=result,
        ub_bytes=ub_bytes,
        ub_table=tuple(f"{buffer:<12}{size:>7}  {use}" for buffer, size, use in buffers),
    )
