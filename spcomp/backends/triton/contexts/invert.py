"""Contexts of the three kernels that turn lists of units per row into lists of rows per unit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class InvertContext:
    """Variables of `triton/kernels/invert_count.py.jinja` and `invert_fill.py.jinja`.

    rows: list rows of a chunk, the same in both, a power of two; block_u: units per program, a
    power of two, at most 32.
    """

    header: tuple[str, ...]
    rows: int
    block_u: int
    is_packed: bool = False

    def __post_init__(self) -> None:
        assert self.block_u <= 32, "a row's choices are the bits of one int32"


@dataclass(frozen=True, slots=True)
class InvertScanContext:
    """Variables of `triton/kernels/invert_scan.py.jinja`.

    block: numbers summed per step, a power of two.
    """

    header: tuple[str, ...]
    block: int
