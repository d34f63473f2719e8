"""Context of the AscendC kernel that attends over listed blocks of keys."""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.backends.ascendc.contexts.base import C_TYPES, Span, padded

LANES = 64
"""Floats that one repeat of a vector instruction handles."""

WIDE_DIM = 128
"""Up to this head dimension a tile of 128 rows by 128 keys fits each half of L0A, L0B and L0C."""


def widest_tile(head_dim: int, value_dim: int) -> int:
    """Give the most rows of a tile, which are also the most keys of a chunk."""
    return 128 if max(head_dim, value_dim) <= WIDE_DIM else 64


@dataclass(frozen=True, slots=True)
class Part:
    """Columns of a tile that one repeat of a vector instruction handles."""

    start: int
    width: int


def parts_of(columns: int) -> tuple[Part, ...]:
    """Cut the columns of a float tile into parts of one repeat."""
    return tuple(Part(start, min(LANES, columns - start)) for start in range(0, columns, LANES))


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendGatherContext:
    """Variables of `ascendc/kernels/attend_gather.h.jinja`."""

    name: str
    header: tuple[str, ...]
    tiling_header: str
    struct: str
    element: str
    head_dim: int
    value_dim: int
    unit: int
    granule: int
    tile_rows: int
    chunk: int
    pieces: int
    key_parts: tuple[Part, ...]
    value_parts: tuple[Part, ...]
    spans: tuple[Span, ...]
    has_spans: bool
    scores_bytes: int
    weights_bytes: int
    outputs_bytes: int

    @property
    def workspace_bytes(self) -> int:
        """Scratch in global memory of one AI core, two slots of each kind of tile."""
        return 2 * (self.scores_bytes + self.weights_bytes + self.outputs_bytes)


def attend_gather_context(
    *,
    name: str,
    header: tuple[str, ...],
    tiling_header: str,
    struct: str,
    dtype: str,
    head_dim: int,
    value_dim: int,
    unit: int,
    granule: int,
    spans: tuple[Span, ...] | None = None,
) -> AttendGatherContext:
    """Make the context; head dims and unit are multiples of 16, head dims at most 256.

    granule: query tokens of a list row. spans: keys that query `q` sees; None for all keys.
    """
    widest = widest_tile(head_dim, value_dim)
    pieces = -(-unit // widest)
    chunk = padded(-(-unit // pieces))
    return AttendGatherContext(
        name=name,
        header=header,
        tiling_header=tiling_header,
        struct=struct,
        element=C_TYPES[dtype],
        head_dim=head_dim,
        value_dim=value_dim,
        unit=unit,
        granule=granule,
        tile_rows=widest,
        chunk=chunk,
        pieces=pieces,
        key_parts=parts_of(chunk),
        value_parts=parts_of(value_dim),
        spans=spans or (),
        has_spans=spans is not None,
        scores_bytes=widest * chunk * 4,
        weights_bytes=widest * chunk * 2,
        outputs_bytes=widest * value_dim * 4,
    )
