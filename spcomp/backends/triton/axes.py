"""The schedule axes of the Triton kernels, read from the manifest beside their templates."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache

from spcomp.backends.base import MAX_HEAD_DIM, Specialisation
from spcomp.codegen.render import TEMPLATES
from spcomp.ir.passes.fit_target import map_bytes, tile_widths
from spcomp.ir.schedule import AxisSpace, KernelAxes, frozen
from spcomp.ir.target import Target

ROW_ALIGN_BYTES = 16
HOPPER = "cuda:90"


@lru_cache(maxsize=1)
def manifest() -> dict[str, dict[str, dict[str, object]]]:
    """Read the manifest: kernel -> axis -> default, choices, meaning."""
    text = (TEMPLATES / "triton" / "axes.json").read_text()
    table: dict[str, dict[str, dict[str, object]]] = json.loads(text)
    return table


def default_axes(target: Target, spec: Specialisation) -> KernelAxes:
    """Give the axes a kernel runs with when nobody tuned it, shrunk to what the chip holds."""
    table = {
        kernel: {name: int(str(axis["default"])) for name, axis in axes.items()}
        for kernel, axes in manifest().items()
    }
    _fit(table, target, spec)
    if target.arch != HOPPER or lacking(target, spec):
        del table["attend_ws"]
    if target.arch == "interpreter":
        for axes in table.values():
            if "programs" in axes:
                axes["programs"] = 4
        table["topk"]["block_u"] = table["topp"]["block_u"] = 1024
        table["tiles"]["chunk"] = 64
    return frozen(table)


def axis_space(target: Target, spec: Specialisation) -> AxisSpace:
    """Give the values of every axis, ascending: the manifest's choices and the default."""
    default = {kernel: dict(axes) for kernel, axes in default_axes(target, spec)}
    return {
        kernel: {
            name: tuple(sorted({*_choices(axis), default[kernel][name]}))
            for name, axis in axes.items()
        }
        for kernel, axes in manifest().items()
        if kernel in default
    }


def lacking(target: Target, spec: Specialisation) -> dict[str, str]:
    """Give the kernels of a chip that tensors cannot have, each with the reason: on Hopper, one has
    its tiles copied by hardware, which reads whole 16 bytes, and multiplies 16-bit numbers."""
    rows = [dim * spec.element_bytes for dim in (spec.head_dim, spec.value_dim)]
    if target.arch != HOPPER:
        return {}
    if spec.element_bytes != 2:
        return {"attend_ws": f"that multiplies 16-bit numbers, and these are {spec.dtype}"}
    if spec.is_packed:
        return {"attend_ws": "its copies would run past the end of a packed sequence"}
    if not spec.is_aligned or any(size % ROW_ALIGN_BYTES for size in rows):
        return {"attend_ws": f"rows of q, k or v do not begin at {ROW_ALIGN_BYTES} bytes"}
    return {}


def _choices(axis: Mapping[str, object]) -> tuple[int, ...]:
    choices = axis["choices"]
    assert isinstance(choices, list)
    return tuple(choices)


# Tiles that compile for sm_90 without spills, by what is computed; see tests/backends/triton/.
_FLOAT32 = {
    "attend": {"block_q": 32, "block_k": 16, "warps": 4, "stages": 2},
    "attend_keys": {"block_m": 32, "block_k": 16, "warps": 8, "stages": 2},
    "attend_gather": {"block_m": 16, "block_k": 16, "warps": 4, "stages": 2},
    "select": {"block_r": 32, "block_u": 64, "warps": 8, "stages": 2},
    "score": {"block_u": 32, "warps": 4, "stages": 2},
    "part_lse": {"block_r": 32, "block_u": 32, "warps": 8, "stages": 2},
    "block_scores": {"block_r": 32, "block_n": 32, "warps": 4, "stages": 2},
}
_WIDE_HEADS = {
    "attend": {"block_q": 128, "block_k": 32, "warps": 8, "stages": 2},
    "attend_ws": {"block_k": 64},
    "attend_keys": {"block_m": 128, "block_k": 32, "warps": 8, "stages": 2},
    "attend_gather": {"block_m": 16, "block_k": 32, "warps": 4, "stages": 2},
    "score": {"block_u": 32, "warps": 4, "stages": 2},
}
_LATENT = {
    2: {"attend_gather": {"block_m": 32, "block_k": 32, "warps": 8, "stages": 2}},
    4: {"attend_gather": {"block_m": 16, "block_k": 16, "warps": 8, "stages": 2}},
}
"""For heads wider than 256, by the bytes of an element: what 8 warps have registers for."""


def _fit(table: dict[str, dict[str, int]], target: Target, spec: Specialisation) -> None:
    """Take the tiles of the dtype and head dimension, then smaller ones until they fit on chip."""
    if spec.head_dim > 128 or spec.value_dim > 128:
        _take(table, _WIDE_HEADS)
    hq, hkv = spec.heads
    if hkv and hq // hkv % 2:
        table["attend_ws"]["heads"] = 1  # the second half of a program would have no head
    if spec.element_bytes == 4:
        _take(table, _FLOAT32)
    if spec.head_dim > MAX_HEAD_DIM or spec.value_dim > MAX_HEAD_DIM:
        _take(table, _LATENT.get(spec.element_bytes, {}))
    if target.arch.startswith("hip"):
        table["score"]["block_u"], table["score"]["stages"] = 32, 2
    for kernel in ("attend", "attend_keys", "attend_gather"):
        _shrink(table[kernel], target, spec)
    _shrink_map(table["part_lse"], "block_u", target, spec)
    _shrink_map(table["block_scores"], "block_n", target, spec)


def _take(table: dict[str, dict[str, int]], tiles: dict[str, dict[str, int]]) -> None:
    for kernel, axes in tiles.items():
        table[kernel].update(axes)


def _shrink(axes: dict[str, int], target: Target, spec: Specialisation) -> None:
    rows = "block_q" if "block_q" in axes else "block_m"
    if target.arch.startswith("hip"):
        axes["stages"] = 2
    while attend_bytes(axes, rows, spec) > target.shared_bytes and axes["block_k"] > 16:
        if axes["stages"] > 2:
            axes["stages"] -= 1
        elif axes[rows] > 64:
            axes[rows] //= 2
        else:
            axes["block_k"] //= 2


def _shrink_map(axes: dict[str, int], units: str, target: Target, spec: Specialisation) -> None:
    """Take fewer stages, then smaller tiles, until rows and units in flight fit on chip."""

    def needed() -> int:
        tile = axes["block_r"], axes[units], axes["stages"]
        return map_bytes(tile, spec.head_dim, spec.element_bytes)

    while needed() > target.shared_bytes and axes["block_r"] > 16:
        if axes["stages"] > 2:
            axes["stages"] -= 1
        elif axes["block_r"] > axes[units]:
            axes["block_r"] //= 2
        else:
            axes[units] //= 2


def attend_bytes(axes: dict[str, int], rows: str, spec: Specialisation) -> int:
    """Estimate the on-chip bytes of an attend program: its queries, and keys and values in
    flight."""
    wide = sum(tile_widths(spec.head_dim))
    value = _padded(spec.value_dim)
    held = axes[rows] * wide + axes["stages"] * axes["block_k"] * (wide + value)
    return held * spec.element_bytes


def _padded(dim: int) -> int:
    return max(16, 1 << math.ceil(math.log2(dim)))
