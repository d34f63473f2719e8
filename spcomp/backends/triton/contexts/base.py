"""What every Triton template's context is made of.

A context is one frozen dataclass per kernel; its fields are exactly the variables of the template.
"""

from __future__ import annotations

from dataclasses import dataclass


def padded_dim(dim: int) -> int:
    """Give the width of a tile of head dimension `dim`: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


@dataclass(frozen=True, slots=True)
class CapturedArg:
    """A tensor that a user's expression reads, as kernel arguments.

    The kernel receives ``{name}_ptr`` and ``{name}_stride_0`` … ``{name}_stride_{rank-1}``, in
    elements.
    """

    name: str
    rank: int

    @property
    def axes(self) -> range:
        """The axes that have a stride argument."""
        return range(self.rank)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of its kernel arguments, in order."""
        return (f"{self.name}_ptr", *(f"{self.name}_stride_{axis}" for axis in self.axes))
