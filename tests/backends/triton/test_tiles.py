"""The tiles kernel against a dense mask, in Triton's interpreter; and compiled for a card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spcomp.backends.triton.contexts.base import CapturedArg
from spcomp.backends.triton.contexts.tiles import Leaf, TilesContext, tiles_context
from spcomp.ir.expr import TRUE, Expr, Lit, Load, Sym, conjunction, op
from tests.backends.triton.rendering import (
    compile_kernel,
    field_names,
    import_rendered,
    variables_of,
    write_rendered,
)

TEMPLATE = "triton/kernels/tiles.py.jinja"
Q, K, SQ, SKV, B, H = (Sym(n) for n in ("q", "k", "Sq", "Skv", "b", "h"))
AT = op("add", Q, op("sub", SKV, SQ))
CAUSAL = op("le", K, AT)
WINDOW = op("lt", op("sub", AT, K), Lit(9))
DOCUMENTS = op("eq", Load("doc", (Q,), "int"), Load("doc", (K,), "int"))

Mask = Callable[["Case", list[Tensor]], Tensor]  # bool [B, Hl, Sq, Skv]


@dataclass(frozen=True)
class Case:
    """One call of the kernel."""

    predicate: Expr
    mask: Mask
    sq: int = 37
    skv: int = 50
    batch: int = 1
    heads: int = 2
    block_q: int = 8
    block_k: int = 4
    chunk: int = 16
    leaves: tuple[Leaf, ...] = ()
    groups: tuple[int, ...] = ()
    is_tight: bool = True  # bounds tell empty tiles exactly

    @property
    def n_tiles(self) -> tuple[int, int]:
        return -(-self.sq // self.block_q), -(-self.skv // self.block_k)

    def lists(self, leaf: Leaf, group: int) -> tuple[Tensor, Tensor]:
        """Draw a selection: idx [B, heads // group, Nr, K] and cnt, of any length up to all."""
        n_rows, n_units = -(-self.sq // leaf.granule), -(-self.skv // leaf.unit)
        shape = (self.batch, self.heads // group, n_rows)
        cnt = torch.randint(0, n_units + 1, shape, dtype=torch.int32)
        idx = torch.full((*shape, n_units), -1, dtype=torch.int32)
        for row, n in zip(idx.view(-1, n_units), cnt.flatten().tolist(), strict=True):
            row[:n] = torch.randperm(n_units)[:n].sort().values.to(torch.int32)
        return idx, cnt


def _grid(case: Case) -> tuple[Tensor, Tensor]:
    return torch.arange(case.sq)[:, None], torch.arange(case.skv)[None, :]


def _static(rule: Callable[[Tensor, Tensor, int], Tensor]) -> Mask:
    def mask(case: Case, chosen: list[Tensor]) -> Tensor:
        q, k = _grid(case)
        flags = rule(q, k, case.skv - case.sq)
        return flags.expand(case.batch, case.heads, case.sq, case.skv)

    return mask


def _expanded(case: Case, leaf: Leaf, group: int, idx: Tensor, cnt: Tensor) -> Tensor:
    """Turn a selection into a mask [B, heads, Sq, Skv]."""
    n_units = -(-case.skv // leaf.unit)
    is_entry = torch.arange(idx.shape[-1]) < cnt[..., None]
    rows = torch.zeros(*idx.shape[:3], n_units + 1, dtype=torch.bool)
    rows.scatter_(3, torch.where(is_entry, idx, n_units).long(), True)
    rows = rows[..., :n_units].repeat_interleave(group, 1)
    tokens = rows.repeat_interleave(leaf.granule, 2)[:, :, : case.sq]
    return tokens.repeat_interleave(leaf.unit, 3)[..., : case.skv]


def _expected(
    case: Case, mask: Tensor, flags: list[Tensor]
) -> list[tuple[list[int], list[int], list[int]]]:
    """Per row of tiles: partial, full and empty entries, with the flags of each leaf."""
    n_q, n_k = case.n_tiles
    rows = []
    for b, h, i in torch.cartesian_prod(
        *(torch.arange(n) for n in (*mask.shape[:2], n_q))
    ).tolist():
        lists: tuple[list[int], list[int], list[int]] = ([], [], [])
        for t in range(n_k):
            part = (
                slice(i * case.block_q, (i + 1) * case.block_q),
                slice(t * case.block_k, (t + 1) * case.block_k),
            )
            tile = mask[b, h][part]
            is_inside = (t + 1) * case.block_k <= case.skv
            state = 2 if not tile.any() else 1 if tile.all() and is_inside else 0
            entry = t | sum(int(f[b, h][part][0, 0]) << 24 + n for n, f in enumerate(flags))
            lists[state].append(entry)
        rows.append(lists)
    return rows


def _run(
    folder: Path,
    case: Case,
    context: TilesContext,
    lists: list[tuple[Tensor, Tensor]],
    captured: tuple[Any, ...] = (),
) -> list[tuple[list[int], list[int]]]:
    n_q, n_k = case.n_tiles
    tiles = torch.full((case.batch, case.heads, n_q, n_k + 2), -7, dtype=torch.int32)
    partial, total = (
        torch.full((case.batch, case.heads, n_q), -7, dtype=torch.int32) for _ in range(2)
    )
    strides = [*tiles.stride()[:3], *partial.stride()[:2]]
    for (idx, cnt), group in zip(lists, case.groups, strict=True):
        strides += [*idx.stride()[:3], *cnt.stride()[:2], group]
    numbers = [case.sq, case.skv, case.heads, 0, n_q, n_k, n_k]
    pointers = [tiles, partial, total, *(t for pair in lists for t in pair)]
    kernel = import_rendered(TEMPLATE, context, folder).tiles_kernel
    kernel[(case.batch * case.heads * n_q,)](*pointers, *strides, *numbers, *captured)
    assert (tiles[..., n_k:] == -7).all(), "wrote past the capacity"
    rows = zip(
        tiles.flatten(0, 2).tolist(),
        partial.flatten().tolist(),
        total.flatten().tolist(),
        strict=True,
    )
    return [(row[:p], row[p:t]) for row, p, t in rows]


def _check(
    folder: Path, case: Case, inputs: tuple[CapturedArg, ...] = (), captured: tuple[Any, ...] = ()
) -> None:
    context = tiles_context(
        header=("test",), block_q=case.block_q, block_k=case.block_k, predicate=case.predicate,
        leaves=case.leaves, inputs=inputs, chunk=case.chunk,
    )  # fmt: skip
    lists = [case.lists(leaf, group) for leaf, group in zip(case.leaves, case.groups, strict=True)]
    flags = [
        _expanded(case, leaf, g, *pair)
        for leaf, g, pair in zip(case.leaves, case.groups, lists, strict=True)
    ]
    got = _run(folder, case, context, lists, captured)
    want = _expected(case, case.mask(case, flags), flags)
    for (partial, full), (want_partial, want_full, empty) in zip(got, want, strict=True):
        assert full == want_full
        if case.is_tight:
            assert partial == want_partial
        numbers = [entry & 0xFFFFFF for entry in partial]
        assert sorted(numbers) == numbers and set(want_partial) <= set(partial)
        assert set(partial) <= {*want_partial, *empty}


LEAF0, LEAF1 = Leaf(0, granule=16, unit=8), Leaf(1, granule=8, unit=4)
CASES = {
    "everything": Case(TRUE, _static(lambda q, k, d: (q >= 0) & (k >= 0))),
    "causal": Case(CAUSAL, _static(lambda q, k, d: k <= q + d)),
    "causal, more queries than keys": Case(
        CAUSAL, _static(lambda q, k, d: k <= q + d), sq=50, skv=21
    ),
    "causal, one query": Case(CAUSAL, _static(lambda q, k, d: k <= q + d), sq=1),
    "causal window": Case(
        conjunction(CAUSAL, WINDOW), _static(lambda q, k, d: (k <= q + d) & (q + d - k < 9))
    ),
    "sink or window": Case(
        conjunction(CAUSAL, op("or", WINDOW, op("lt", K, Lit(3)))),
        _static(lambda q, k, d: (k <= q + d) & ((q + d - k < 9) | (k < 3))),
    ),
    "strided keys": Case(
        conjunction(CAUSAL, op("eq", op("mod", K, Lit(8)), Lit(7))),
        _static(lambda q, k, d: (k <= q + d) & (k % 8 == 7)),
        is_tight=False,
    ),
    "chunks of key tiles": Case(CAUSAL, _static(lambda q, k, d: k <= q + d), chunk=4),
    "a list for all": Case(
        Sym("chosen0"), lambda c, f: f[0], leaves=(LEAF0,), groups=(2,), batch=2
    ),
    "a list per head and causal": Case(
        conjunction(Sym("chosen0"), CAUSAL),
        lambda c, f: f[0] & (_grid(c)[1] <= _grid(c)[0] + c.skv - c.sq),
        leaves=(LEAF0,), groups=(1,), batch=2, chunk=8,
    ),
    "two lists": Case(
        conjunction(CAUSAL, op("or", Sym("chosen0"), Sym("chosen1"))),
        lambda c, f: (f[0] | f[1]) & (_grid(c)[1] <= _grid(c)[0] + c.skv - c.sq),
        leaves=(LEAF0, LEAF1), groups=(2, 1),
    ),
    "all but a list": Case(
        op("not", Sym("chosen0")), lambda c, f: ~f[0], leaves=(Leaf(0, 8, 4),), groups=(1,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_tiles_are_listed_by_what_the_mask_shows_of_them(tmp_path: Path, case: Case) -> None:
    _check(tmp_path, case)


@pytest.mark.parametrize("chunk", [4, 16])
def test_pairs_decide_where_bounds_cannot(tmp_path: Path, chunk: int) -> None:
    doc = torch.tensor([0] * 13 + [1] * 8 + [2] * 29, dtype=torch.int32)
    guarded = torch.cat([doc, torch.full((30,), 2, dtype=torch.int32)])[:50]
    case = Case(
        conjunction(DOCUMENTS, CAUSAL),
        _static(lambda q, k, d: (doc[q] == doc[k]) & (k <= q + d)),
        chunk=chunk,
    )
    _check(tmp_path, case, (CapturedArg("doc", 1),), (guarded, guarded.stride(0)))


def test_pairs_are_looked_at_with_the_flags_of_their_tile(tmp_path: Path) -> None:
    table = torch.randint(0, 2, (2, 2, 50)).bool()
    allowed = op("or", Sym("chosen0"), Load("table", (B, H, K), "bool"))
    case = Case(
        conjunction(CAUSAL, allowed),
        lambda c, f: (f[0] | table[:, :, None, :]) & (_grid(c)[1] <= _grid(c)[0] + c.skv - c.sq),
        leaves=(LEAF0,),
        groups=(1,),
        batch=2,
    )
    _check(tmp_path, case, (CapturedArg("table", 3),), (table, *table.stride()))


def test_a_slab_begins_at_its_first_query(tmp_path: Path) -> None:
    case = Case(CAUSAL, _static(lambda q, k, d: k <= q + d))
    context = tiles_context(header=("t",), block_q=8, block_k=4, predicate=CAUSAL, chunk=16)
    tiles = torch.full((1, 1, 2, 13), -7, dtype=torch.int32)
    partial, total = (
        torch.empty(1, 1, 2, dtype=torch.int32),
        torch.empty(1, 1, 2, dtype=torch.int32),
    )
    kernel = import_rendered(TEMPLATE, context, tmp_path).tiles_kernel
    kernel[(2,)](
        tiles, partial, total, *tiles.stride()[:3], *partial.stride()[:2], 37, 50, 1, 16, 2, 13, 13
    )
    want = _expected(case, case.mask(case, []), [])[2:4]
    for i, (want_partial, want_full, _) in enumerate(want):
        assert tiles[0, 0, i, : int(total[0, 0, i])].tolist() == want_partial + want_full
        assert int(partial[0, 0, i]) == len(want_partial)


def test_the_context_holds_exactly_the_variables_of_the_template() -> None:
    assert variables_of(TEMPLATE) == field_names(TilesContext)


@pytest.mark.parametrize(
    "predicate",
    [conjunction(Sym("chosen0"), CAUSAL), conjunction(DOCUMENTS, CAUSAL)],
    ids=["bounds", "pairs"],
)
def test_the_default_schedule_compiles_for_sm_90_without_spills(
    tmp_path: Path, predicate: Expr
) -> None:
    leaves = (Leaf(0, 128, 128),) if predicate != conjunction(DOCUMENTS, CAUSAL) else ()
    inputs = () if leaves else (CapturedArg("doc", 1),)
    context = tiles_context(
        header=("t",), block_q=128, block_k=128, predicate=predicate, leaves=leaves, inputs=inputs
    )
    path = write_rendered(TEMPLATE, context, tmp_path)
    built = compile_kernel(path, "tiles_kernel", element="i32", num_warps=4)
    assert built.spill_bytes == 0
