"""Pass: a plan whose programs do not fit on chip is refused before anything is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spcomp.ir.launches import AttendLaunch, GatherLaunch, KeysLaunch
from spcomp.ir.plan import Launch, Plan
from spcomp.ir.target import Target

LEAST_PADDED_DIM = 16  # a matrix instruction takes no narrower operand


@dataclass(frozen=True, slots=True)
class Misfit:
    """A launch that needs more memory on chip than a program of the target has."""

    kernel: str
    needed_bytes: int
    limit_bytes: int
    target: str
    tiles: str

    @property
    def reason(self) -> str:
        """The two figures that clash."""
        return (
            f"{self.kernel} needs {self.needed_bytes} bytes on chip for {self.tiles}, "
            f"and a program of {self.target} has {self.limit_bytes}"
        )

    @property
    def way_out(self) -> str:
        """What to change."""
        return "take smaller tiles or fewer stages, or use backend='reference'."


def fit_target(
    plan: Plan, target: Target, *, head_dim: int, value_dim: int, element_bytes: int
) -> Misfit | None:
    """Check the on-chip bytes of every attend-like launch against what the target has.

    A program holds its tile of queries, and one tile of keys and one of values for each stage in flight; dims are padded
    to a power of two. Accumulators live in registers and are not counted.

    Rewrite: none.
    Needs:   cut.
    Gives:   on-chip bytes within the target's limit, or the misfit with both figures.
    """
    for launch in plan.launches():
        for rows, keys, stages in _tiles(launch):
            wide, value = padded(head_dim), padded(value_dim)
            needed = (rows * wide + stages * keys * (wide + value)) * element_bytes
            if needed > target.shared_bytes:
                tiles = (
                    f"{rows} queries and {stages} stages of {keys} keys of {head_dim} and "
                    f"{value_dim} dims of {element_bytes} bytes"
                )
                return Misfit(launch.kernel, needed, target.shared_bytes, target.name, tiles)
    return None


def _tiles(launch: Launch) -> Iterator[tuple[int, int, int]]:
    """Yield the queries, keys and stages a program of an attend-like launch holds."""
    if isinstance(launch, AttendLaunch):
        yield launch.axis("block_q"), launch.axis("block_k"), launch.axis("stages")
    elif isinstance(launch, (GatherLaunch, KeysLaunch)):
        yield launch.axis("block_m"), launch.axis("block_k"), launch.axis("stages")


def padded(dim: int) -> int:
    """Give the width a tile of vectors of `dim` elements has on chip."""
    return max(LEAST_PADDED_DIM, 1 << (dim - 1).bit_length())
