"""Pass: where scratch lies: sizes as formulas, the rows of a slab, places in one arena."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import sympy

from spcomp.ir import dims
from spcomp.ir.dims import Dim, Env
from spcomp.ir.lifetimes import Lifetime, lifetimes
from spcomp.ir.plan import SCRATCH_LIMIT_BYTES, Buffer, Plan, Slabs

E = sympy.Symbol("E", integer=True, positive=True)
"""Bytes of one element of q, k and v; the formulas of this module may hold it beside the dims."""

ITEM_BYTES: dict[str, Dim] = {
    "data": E,
    "float32": 4,
    "int32": 4,
    "float64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
ROW_TILES = (128, 64, 16)  # query rows that kernels take at a time, the best first
ALIGN_BYTES = 256  # what a CUDA allocation promises; more than any vector load needs


@dataclass(frozen=True, slots=True)
class Placement:
    """Scratch of one call: the first byte of every buffer in one arena, and the arena's size."""

    offsets: tuple[tuple[str, int], ...]
    arena_bytes: int
    slab_rows: int


def bytes_of(buffer: Buffer) -> Dim:
    """Give the size of a buffer as a formula over the dims and E.

    Raises: KeyError for a dtype no buffer can have.
    """
    size: Dim = ITEM_BYTES[buffer.dtype]
    for dim in buffer.dims:
        size = size * dim
    return dims.plain(size)


def scratch_bytes(plan: Plan) -> Dim:
    """Give what all scratch buffers take when none shares its place, with R and E in it."""
    total: Dim = 0
    for b in plan.scratch():
        total = total + bytes_of(b)
    return dims.plain(total)


def peak_scratch_bytes(plan: Plan) -> Dim:
    """Give the most scratch alive at one launch: what an arena needs at least."""
    alive = lifetimes(plan)
    sums: list[Dim] = []
    for n in range(len(plan.launches())):
        live: Dim = 0
        for name, span in alive.items():
            if span.first <= n <= span.last:
                live = live + bytes_of(plan.buffer(name))
        sums.append(dims.plain(live))
    return dims.largest(*sums) if sums else 0


def slab_align(plan: Plan) -> int:
    """Give the row count that slabs must be a multiple of; 1 without slabs."""
    return max((s.align for s in plan.steps if isinstance(s, Slabs)), default=1)


def slab_rows(plan: Plan, env: Env, element_bytes: int, limit: int = SCRATCH_LIMIT_BYTES) -> int:
    """Give the rows a slab should have so that all scratch stays within a limit in bytes.

    env: B, Hq, Hkv, Sq, Skv, D, Dv. element_bytes: of q, k and v. The result is a multiple of the
    plan's alignment, at most Sq rounded up to it. Slabs of one call are of about equal size, whole
    row tiles where that costs nothing. It is the smallest slab when even that passes the limit,
    which a caller sees by evaluating `scratch_bytes`. Buffers made once a call count in full. The
    sum of all buffers is kept within the limit, so it also holds for a runtime that shares no
    memory between them.
    """
    return slab_sizer(plan)(env, element_bytes, limit)


def slab_sizer(plan: Plan) -> Callable[[Env, int, int], int]:
    """Give `slab_rows` of one plan with its formula built once, for the launch path."""
    align = slab_align(plan)
    size = dims.evaluator(scratch_bytes(plan))

    def rows(env: Env, element_bytes: int, limit: int = SCRATCH_LIMIT_BYTES) -> int:
        every = -(-env["Sq"] // align)

        def fits(units: int) -> bool:
            return size({**env, "E": element_bytes, "R": units * align, "R0": 0}) <= limit

        most = every if fits(every) else _largest(fits, every)
        return align * (every if most == every else _balanced(every, most, align))

    return rows


def _largest(fits: Callable[[int], bool], beyond: int) -> int:
    """Find the largest number below `beyond` that fits, or 1; what fits once fits for less."""
    low, high = 1, beyond
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _balanced(every: int, most: int, align: int) -> int:
    """Give the size of equal slabs of at most `most`, in whole row tiles if they stay within it."""
    equal = -(-every // -(-every // most))
    for rows in ROW_TILES:
        tile = math.lcm(align, rows) // align
        whole = -(-equal // tile) * tile
        if whole <= most:
            return whole
    return equal


def place_buffers(
    plan: Plan, env: Env, element_bytes: int, limit: int = SCRATCH_LIMIT_BYTES
) -> Placement:
    """Give every scratch buffer a place in one arena, for the lengths of one call.

    Rewrite: buffers -> byte ranges of one allocation.
    Needs:   cut; env as for `slab_rows`.
    Gives:   sizes and lifetimes known; no two buffers that are alive at one time overlap.
    """
    rows = slab_rows(plan, env, element_bytes, limit)
    inner = {**env, "E": element_bytes, "R": rows, "R0": 0}
    spans = lifetimes(plan)
    sizes = {n: _aligned(dims.evaluate(bytes_of(plan.buffer(n)), inner)) for n in spans}
    placed: dict[str, int] = {}
    for name in sorted(spans, key=lambda n: -sizes[n]):
        placed[name] = _first_gap(name, sizes, spans, placed)
    arena = max((placed[n] + sizes[n] for n in placed), default=0)
    return Placement(tuple((n, placed[n]) for n in spans), arena, rows)


def _aligned(size: int) -> int:
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


def _first_gap(
    name: str, sizes: dict[str, int], spans: dict[str, Lifetime], placed: dict[str, int]
) -> int:
    """Find the lowest offset where a buffer meets no placed buffer of an overlapping lifetime."""
    offset = 0
    neighbours = sorted((placed[n], sizes[n]) for n in placed if spans[n].meets(spans[name]))
    for start, size in neighbours:
        if offset + sizes[name] <= start:
            break
        offset = max(offset, start + size)
    return offset
