"""Context of the top-k kernel: how many lanes it sorts at a time, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.backends.ascendc.contexts.base import UB_BYTES

MAX_WIDTH = 2048
"""The longest list of units that the kernel keeps."""

CHUNK = 2048
"""Lanes that are sorted at a time."""

SHORTEST = 64
"""Lanes of the shortest sorted row: one repeat of a float instruction."""

BLOCK_FLOATS = 8
"""Floats of a 32 B block, the least that a buffer takes."""


@dataclass(frozen=True, slots=True)
class TopKContext:
    """Variables of `ascendc/kernels/topk.h.jinja`.

    chunk: lanes sorted at a time. max_slots: of the longest list that is kept. max_rows, max_parts:
    the most rows of a tile and repeats of a list, at least a block of floats. ub_table: a line per
    group of buffers.
    """

    header: tuple[str, ...]
    name: str
    tiling_header: str
    struct: str
    chunk: int
    max_slots: int
    max_rows: int
    max_parts: int
    ub_bytes: int
    ub_table: tuple[str, ...]


def topk_context(
    *,
    header: tuple[str, ...],
    name: str,
    tiling_header: str,
    struct: str,
    chunk: int = CHUNK,
    max_width: int = MAX_WIDTH,
) -> TopKContext:
    """Make the context of the top-k kernel.

    chunk, max_width: powers of two, SHORTEST <= max_width <= chunk, 256 <= chunk <= 2048. Two lists
    of a chunk each are what the merge of a long row has room for.
    """
    assert SHORTEST <= max_width <= chunk and 256 <= chunk <= 2048
    assert chunk & (chunk - 1) == 0 and max_width & (max_width - 1) == 0
    max_rows = max(BLOCK_FLOATS, chunk // SHORTEST)
    max_parts = max(BLOCK_FLOATS, max_width // SHORTEST)
    buffers = (
        ("loaded_ x 2", 2 * 4 * chunk, "scores of a step; MTE2 writes, V reads"),
        ("pairs_ x 2", 2 * 8 * chunk, "pair lists while runs are merged, from one to the other"),
        ("kept_ x 2", 2 * 16 * max_width, "the best of a chunked row, before and after a merge"),
        ("chosen_ x 2", 2 * 4 * chunk, "indices of a tile; V writes, MTE3 reads"),
        ("lane_numbers_", 4 * chunk, "the units that the lanes of a step stand for"),
        ("keys_", 4 * chunk, "scores of the best, then their negated indices"),
        ("numbers_", 4 * chunk, "indices of the best, then of the chosen, -1 elsewhere"),
        ("values_", 4 * chunk, "the same as floats, then a 1 for each chosen slot"),
        ("ones_", 4 * chunk, "1"),
        ("is_...", 4 * chunk // 8, "bits, one a slot"),
        ("parts_", 4 * max_rows * max_parts, "ones of each repeat of each row"),
        ("sums_", 4 * max_rows, "ones of each row"),
        ("chosen_counts_ x 2", 2 * 4 * max_rows, "the same as integers; V writes, MTE3 reads"),
    )
    ub_bytes = sum(size for _, size, _ in buffers)
    assert ub_bytes <= UB_BYTES
    return TopKContext(
        header=header,
        name=name,
        tiling_header=tiling_header,
        struct=struct,
        chunk=chunk,
        max_slots=max_width,
        max_rows=max_rows,
        max_parts=max_parts,
        ub_bytes=ub_bytes,
        ub_table=tuple(f"{buffer:<20}{size:>6}  {use}" for buffer, size, use in buffers),
    )
