"""The three launches that invert index lists, against a loop in Python; and compiled for a card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spcomp.backends.triton.contexts.invert import InvertContext, InvertScanContext
from tests.backends.triton.rendering import (
    compile_kernel,
    field_names,
    import_rendered,
    variables_of,
    write_rendered,
)

COUNT, SCAN, FILL = (f"triton/kernels/invert_{name}.py.jinja" for name in ("count", "scan", "fill"))
UNTOUCHED = -7


@dataclass(frozen=True)
class Inverted:
    """What the three launches leave behind."""

    unit_start: Tensor
    tile_start: Tensor
    entries: Tensor


def _lists(batch: int, heads: int, n_rows: int, slots: int, n_units: int) -> tuple[Tensor, Tensor]:
    cnt = torch.randint(0, min(slots, n_units) + 1, (batch, heads, n_rows), dtype=torch.int32)
    cnt[..., ::5] = 0
    idx = torch.full((batch, heads, n_rows, slots), -1, dtype=torch.int32)
    for b, h, r in torch.cartesian_prod(*(torch.arange(n) for n in cnt.shape)).tolist():
        n = int(cnt[b, h, r])
        idx[b, h, r, :n] = torch.randperm(n_units)[:n].sort().values.to(torch.int32)
    return idx, cnt


def _run(
    folder: Path, idx: Tensor, cnt: Tensor, n_units: int, heads: int, block_m: int
) -> Inverted:
    context, scan = (
        InvertContext(("test",), rows=32, block_u=16),
        InvertScanContext(("test",), block=16),
    )
    batch, lists, n_rows, slots = idx.shape
    n_chunks = -(-n_rows // context.rows)
    counts = torch.full((batch, lists, n_units, n_chunks), UNTOUCHED, dtype=torch.int32)
    entries = torch.full((batch, lists, n_rows * slots), UNTOUCHED, dtype=torch.int32)
    unit_start, tile_start = (
        torch.full((batch, lists, n_units + 1), UNTOUCHED, dtype=torch.int32) for _ in range(2)
    )
    grid = (batch * lists * n_chunks * -(-n_units // context.block_u),)
    strides = [*idx.stride()[:3], *cnt.stride()[:2], *counts.stride()[:2]]
    numbers = [lists, n_rows, n_units, n_chunks]
    import_rendered(COUNT, context, folder).invert_count_kernel[grid](
        idx, cnt, counts, *strides, *numbers
    )
    import_rendered(SCAN, scan, folder).invert_scan_kernel[(batch * lists,)](
        counts, unit_start, tile_start, *counts.stride()[:2], *unit_start.stride()[:2],
        lists, n_units, n_chunks, heads, block_m,
    )  # fmt: skip
    import_rendered(FILL, context, folder).invert_fill_kernel[grid](
        idx, cnt, counts, entries, *strides, *entries.stride()[:2], *numbers, slots
    )
    return Inverted(unit_start, tile_start, entries)


def _check(
    folder: Path, idx: Tensor, cnt: Tensor, n_units: int, heads: int = 1, block_m: int = 4
) -> None:
    got = _run(folder, idx, cnt, n_units, heads, block_m)
    slots = idx.shape[3]
    for b in range(idx.shape[0]):
        for h in range(idx.shape[1]):
            by_unit: list[list[int]] = [[] for _ in range(n_units)]
            for r, n in enumerate(cnt[b, h].tolist()):
                for slot, unit in enumerate(idx[b, h, r, :n].tolist()):
                    by_unit[unit].append(r * slots + slot)
            starts, tiles, entries = [0], [0], [e for unit in by_unit for e in unit]
            for unit in by_unit:
                starts.append(starts[-1] + len(unit))
                tiles.append(tiles[-1] + -(-len(unit) * heads // block_m))
            assert got.unit_start[b, h].tolist() == starts
            assert got.tile_start[b, h].tolist() == tiles
            assert got.entries[b, h, : len(entries)].tolist() == entries
            assert (got.entries[b, h, len(entries) :] == UNTOUCHED).all()


@pytest.mark.parametrize(
    ("n_rows", "slots", "n_units"), [(1, 1, 1), (8, 3, 16), (70, 4, 37), (40, 16, 5), (33, 7, 100)]
)
def test_every_unit_gets_its_rows_in_ascending_order(
    tmp_path: Path, n_rows: int, slots: int, n_units: int
) -> None:
    idx, cnt = _lists(2, 2, n_rows, slots, n_units)
    _check(tmp_path, idx, cnt, n_units)


def test_row_tiles_count_the_heads_that_share_a_list(tmp_path: Path) -> None:
    idx, cnt = _lists(1, 2, 33, 4, 9)
    _check(tmp_path, idx, cnt, 9, heads=3, block_m=16)


def test_lists_with_no_entry_give_units_with_no_row(tmp_path: Path) -> None:
    idx = torch.full((1, 1, 12, 3), -1, dtype=torch.int32)
    _check(tmp_path, idx, torch.zeros(1, 1, 12, dtype=torch.int32), 5)


def test_all_rows_may_choose_one_unit(tmp_path: Path) -> None:
    idx = torch.full((1, 1, 30, 1), 4, dtype=torch.int32)
    _check(tmp_path, idx, torch.ones(1, 1, 30, dtype=torch.int32), 6)


def test_a_list_shared_by_all_heads_is_read_with_stride_zero(tmp_path: Path) -> None:
    idx, cnt = _lists(2, 1, 13, 4, 11)
    _check(tmp_path, idx.expand(2, 3, -1, -1), cnt.expand(2, 3, -1), 11)


@pytest.mark.parametrize(
    ("template", "context"),
    [(COUNT, InvertContext), (FILL, InvertContext), (SCAN, InvertScanContext)],
)
def test_the_context_holds_exactly_the_variables_of_the_template(
    template: str, context: type
) -> None:
    assert variables_of(template) == field_names(context)


@pytest.mark.parametrize("name", ["count", "scan", "fill"])
def test_the_default_schedule_compiles_for_sm_90_without_spills(tmp_path: Path, name: str) -> None:
    scan = InvertScanContext(("test",), block=4096)
    context = scan if name == "scan" else InvertContext(("test",), rows=128, block_u=32)
    path = write_rendered(f"triton/kernels/invert_{name}.py.jinja", context, tmp_path)
    built = compile_kernel(path, f"invert_{name}_kernel", element="i32", num_warps=4)
    assert built.spill_bytes == 0
