"""What the bindings share: small formulas over the symbols of a call."""

from __future__ import annotations

from collections.abc import Mapping

from spcomp.backends.triton.layouts import Number


def ceildiv(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


def shape_of(env: Mapping[str, int]) -> dict[str, Number]:
    """Give the counts that most kernels take."""
    return {
        "sq": env["Sq"],
        "skv": env["Skv"],
        "hq": env["Hq"],
        "group": env["Hq"] // env["Hkv"],
        "row_begin": env["R0"],
    }


def heads_per_program(list_group: int, group: int) -> int:
    """Give the query heads one program serves: those of a KV head when they share a list, else
    one."""
    return group if list_group >= group else 1


MOST_WIDE = 16  # units of a part that a step of part_lse multiplies


def wide_of(part: int, block_u: int) -> int:
    """Give the units of a part of `part` units that one step of `block_u` units takes: the largest
    power of two in it, up to a limit."""
    return min(part & -part, MOST_WIDE, block_u)
