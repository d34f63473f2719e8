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
