"""Context of the score kernel: rows against units, for the topk kernel to choose among."""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.backends.ascendc.contexts.base import C_TYPES, Span

TEMPLATE = "ascendc/kernels/score.h.jinja"

TILE_ROWS = 128
"""Rows of a product: the query heads of a KV head times list rows. No group may have more heads."""

L0B_SLOT_BYTES = 32768
"""Half of L0B, so that the next units arrive while these are multiplied."""

SLOTS = 2
"""Tiles of scores on their way from the cube core to the vector cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreContext:
    """Variables of `ascendc/kernels/score.h.jinja`.

    element: type of rows and units. unit_tile: units of a product. join: the instruction that takes
    the heads of a group together, where is_shared; is_mean: their sum is divided by their number.
    visible, forced: spans of units over q_lo, q_hi, Sq and Skv.
    """

    header: tuple[str, ...]
    tiling_header: str
    struct: str
    name: str
    element: str
    head_dim: int
    granule: int
    tile_rows: int
    unit_tile: int
    slots: int
    is_shared: bool
    is_mean: bool
    join: str
    scale: str
    visible: tuple[Span, ...]
    forced: tuple[Span, ...]

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace for each AI core."""
        return self.slots * self.tile_rows * self.unit_tile * 4


def units_of_tile(head_dim: int) -> int:
    """Give the units of a product: as many as half of L0B holds."""
    return 128 if 2 * 128 * head_dim <= L0B_SLOT_BYTES else 64


def score_context(
    *,
    name: str,
    struct: str,
    tiling_header: str,
    dtype: str,
    head_dim: int,
    heads: str,
    reduce: str,
    scale: str,
    granule: int,
    visible: tuple[Span, ...],
    forced: tuple[Span, ...] = (),
    header: tuple[str, ...] = (),
) -> ScoreContext:
    """Make the context of the score kernel.

    dtype: torch's name. heads: "query" where each query head has its own list, "group" where those
    of a KV head share one; then reduce ("mean", "sum", "max") takes their scores together. scale: a
    float literal of C++. granule: query tokens that a row stands for.
    """
    is_shared = heads == "group"
    # The largest scaled product is the smallest product times a negative scale.
    largest = "Min" if scale.startswith("-") else "Max"
    return ScoreContext(
        header=header,
        tiling_header=tiling_header,
        struct=struct,
        name=name,
        element=C_TYPES[dtype],
        head_dim=head_dim,
        granule=granule,
        tile_rows=TILE_ROWS,
        unit_tile=units_of_tile(head_dim),
        slots=SLOTS,
        is_shared=is_shared,
        is_mean=is_shared and reduce == "mean",
        join=largest if reduce == "max" else "Add",
        scale=scale,
        visible=visible,
        forced=forced,
    )
