"""Pass: a plan whose programs do not fit on chip is refused before anything is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spcomp.ir import dims
from spcomp.ir.dims import Env
from spcomp.ir.launches import (
    AttendLaunch,
    BlockScoresLaunch,
    GatherLaunch,
    KeysLaunch,
    PartsLaunch,
    ScoreLaunch,
    WarpsLaunch,
)
from spcomp.ir.plan import Launch, Plan
from spcomp.ir.target import Target

SCORED_HEADS = 16  # query heads a program scores in one step
LEAST_PADDED_DIM = 16  # a matrix instruction takes no narrower operand
MOST_IN_A_TILE = 256  # elements of a head that every kernel holds in one tile


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a plan cannot be built for a target, with the figures, and the way out."""

    what: str
    reason: str
    way_out: str


def fit_target(
    plan: Plan,
    target: Target,
    head_dim: int,
    value_dim: int,
    element_bytes: int,
    widths: Env | None = None,
) -> Refusal | None:
    """Check the on-chip bytes of every launch with tiles in flight against what the target has.

    A program that attends holds its tile of queries, and one tile of keys and one of values for
    each stage in flight; one that scores holds heads, and one or two tiles of units; one that
    multiplies a map has rows and units in flight. Dims are padded to a power of two. Accumulators
    live in registers and are not counted. widths: sizes of the last dims that the pattern named.

    Rewrite: none.
    Needs:   cut.
    Gives:   on-chip bytes within the target's limit, or a refusal with both figures.
    """
    for launch in plan.launches():
        for tile in _tiles(launch):
            across, beside = head_dim, value_dim
            if isinstance(launch, ScoreLaunch):
                here = {"D": head_dim, "Dv": value_dim, **(widths or {})}
                across = dims.evaluate(plan.buffer(launch.rows_buf).dims[-1], here)
                beside = across if launch.low_buf else 0
            needed = on_chip_bytes(tile, across, beside, element_bytes)
            if isinstance(launch, (PartsLaunch, BlockScoresLaunch)):
                needed = map_bytes(tile, head_dim, element_bytes, 2 if launch.low_buf else 1)
            if needed > target.shared_bytes:
                rows, keys, stages = tile
                return Refusal(
                    f"{launch.kernel} with {rows} rows, {keys} keys and {stages} stages",
                    f"at head dimensions {across} and {value_dim} of {element_bytes} bytes "
                    f"it needs {needed} bytes on chip, and {target.name} has {target.shared_bytes}",
                    "take smaller tiles or fewer stages, or use backend='reference'.",
                )
    return None


def on_chip_bytes(
    tile: tuple[int, int, int], head_dim: int, value_dim: int, element_bytes: int
) -> int:
    """Give the bytes on chip of a program that holds (rows, keys, stages); value_dim 0: no values
    beside the keys."""
    rows, keys, stages = tile
    wide, value = sum(tile_widths(head_dim)), padded(value_dim) if value_dim else 0
    return (rows * wide + stages * keys * (wide + value)) * element_bytes


def map_bytes(tile: tuple[int, int, int], head_dim: int, element_bytes: int, sides: int = 1) -> int:
    """Give the bytes on chip of a program that multiplies a map: (rows, units, stages), rows and
    units both in flight; sides: tiles of units of a step."""
    rows, units, stages = tile
    return stages * (rows + sides * units) * padded(head_dim) * element_bytes


def _tiles(launch: Launch) -> Iterator[tuple[int, int, int]]:
    """Yield the rows, keys and stages a program with tiles in flight holds."""
    if isinstance(launch, WarpsLaunch):
        yield launch.rows, launch.step, launch.axis("stages")
    elif isinstance(launch, AttendLaunch):
        yield launch.axis("block_q"), launch.axis("block_k"), launch.axis("stages")
    elif isinstance(launch, (GatherLaunch, KeysLaunch)):
        yield launch.axis("block_m"), launch.axis("block_k"), launch.axis("stages")
    elif isinstance(launch, PartsLaunch):
        yield launch.axis("block_r"), launch.axis("block_u"), launch.axis("stages")
    elif isinstance(launch, BlockScoresLaunch):
        yield launch.axis("block_r"), launch.axis("block_n"), launch.axis("stages")
    elif isinstance(launch, ScoreLaunch):
        yield SCORED_HEADS, launch.axis("block_u"), launch.axis("stages")


def tile_widths(dim: int) -> tuple[int, int]:
    """Give the widths of the one or two tiles that queries and keys of `dim` elements lie in; 0: no
    second one.

    Above MOST_IN_A_TILE, 512 and 64 elements hold 576, the latent and the rotary key of MLA, where
    one padded tile would take 1024."""
    first = 1 << (dim.bit_length() - 1)
    second = padded(dim - first) if dim > first else 0
    if dim <= MOST_IN_A_TILE or first + second >= padded(dim):
        return padded(dim), 0
    return first, second


def padded(dim: int) -> int:
    """Give the width a tile of vectors of `dim` elements has on chip."""
    return max(LEAST_PADDED_DIM, 1 << (dim - 1).bit_length())
