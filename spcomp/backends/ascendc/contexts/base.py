"""What the contexts of several AscendC templates share."""

from __future__ import annotations

from dataclasses import dataclass

C_TYPES = {"float16": "half", "bfloat16": "bfloat16_t"}
"""Element types of q, k and v in a kernel, by torch's name."""

FRACTAL = 16
"""Rows and columns of a cube fractal of 16-bit elements; also the elements of a 32 B block."""

UB_BYTES = 188160
"""Unified Buffer of a vector core, without what the library's own calls may use."""

L1_BYTES = 524032
"""Level-1 buffer of a cube core that AscendC hands out."""

NARROW_STRIDE = 65535
"""The largest row stride, in elements, of a load that arranges rows as fractals (Nd2Nz)."""


@dataclass(frozen=True, slots=True)
class Span:
    """Keys or units lo <= k < hi that a predicate admits; C++ int64 expressions over the scalars of
    a row."""

    lo: str
    hi: str


def padded(rows: int, to: int = FRACTAL) -> int:
    """Round up to whole fractals."""
    return -(-rows // to) * to
