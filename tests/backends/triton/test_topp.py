"""The topp kernel against the share that a sort keeps, in Triton's interpreter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spcomp.backends.reference.selecting import share
from spcomp.backends.triton.contexts.maps import TopPContext, topp_context
from spcomp.ir.expr import FALSE, Expr, Lit, Sym, op
from spcomp.ir.nodes.select import Crossing
from tests.backends.triton.rendering import field_names, import_rendered, variables_of

TEMPLATE = "triton/kernels/topp.py.jinja"
# With 256, tiles of short rows hold 64 units.
SHORT_ROW, ONE_TILE, MANY_TILES = 256, 64, 16
FIRST = op("lt", Sym("k"), Lit(1))
OWN = op("eq", Sym("k"), op("floordiv", Sym("q_hi"), Lit(4)))


@dataclass(frozen=True)
class Case:
    p: float | Tensor = 0.7
    crossing: Crossing = "keep"
    least: int = 0
    forced: Expr = FALSE
    block_u: int = ONE_TILE
    row_begin: int = 0


def _run(folder: Path, scores: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    table = "shares" if isinstance(case.p, Tensor) else ""
    context = topp_context(
        header=("test",),
        block_u=case.block_u,
        granule=4,
        least=case.least,
        is_dropped=case.crossing == "drop",
        table=table,
        forced=case.forced,
    )
    kernel = import_rendered(TEMPLATE, context, folder).topp_kernel
    batch, lists, rows, units = scores.shape
    guarded = torch.full((batch, lists, rows, units + 3), 77, dtype=torch.int32)
    idx, cnt = guarded[..., :units], torch.full((batch, lists, rows), 77, dtype=torch.int32)
    strides = (*scores.stride()[:3], *idx.stride()[:3], *cnt.stride()[:2])
    numbers = (lists, 4 * (case.row_begin + rows), 4 * units, case.row_begin, rows, units, units)
    last = (case.p, 1) if isinstance(case.p, Tensor) else (case.p,)
    kernel[(batch * lists * rows,)](scores, idx, cnt, *strides, *numbers, *last)
    assert (guarded[..., units:] == 77).all(), "wrote past the width"
    return idx, cnt


def _always(scores: Tensor, case: Case) -> Tensor:
    held = torch.zeros(scores.shape[2:], dtype=torch.bool)
    for row in range(scores.shape[2]):
        own = case.row_begin + row
        if case.forced == FIRST:
            held[row, 0] = True
        elif case.forced == OWN and own < scores.shape[3]:
            held[row, own] = True
    return held & (scores != -math.inf)


def _check(folder: Path, scores: Tensor, case: Case) -> Tensor:
    """Compare with a sort in float64. A row may differ only by where it ends, and there only by
    what float32 rounds off its sum."""
    idx, cnt = _run(folder, scores, case)
    exact, able = scores.double(), scores != -math.inf
    always = _always(scores, case)
    p = case.p.double()[None, :, None, None] if isinstance(case.p, Tensor) else case.p
    want = share(exact, able, always, p, case.crossing, case.least)
    valid = torch.arange(idx.shape[3]) < cnt[..., None]
    assert torch.equal(valid, idx >= 0)
    assert (idx[~valid] == -1).all()
    steps = idx.diff(dim=-1)
    assert (steps[valid[..., 1:]] > 0).all(), "not ascending"
    place = torch.where(valid, idx, idx.shape[3]).long()
    got = torch.zeros(*want.shape[:3], want.shape[3] + 1, dtype=torch.bool)
    got = got.scatter(3, place, True)[..., :-1]
    for at in (got != want).any(-1).nonzero().tolist():
        _ends_within_rounding(
            got[tuple(at)], want[tuple(at)], exact[tuple(at)], always[tuple(at)], p, at
        )
    return got


def _ends_within_rounding(
    got: Tensor, want: Tensor, row: Tensor, always: Tensor, p: Tensor | float, at: list[int]
) -> None:
    counted = torch.where(row.isfinite(), row, 0.0)
    goal = float(counted.sum() * (p[0, at[1], 0, 0] if isinstance(p, Tensor) else p))
    differ = got ^ want
    assert not (differ & always).any()
    smaller = got if int(got.sum()) < int(want.sum()) else want
    assert not (smaller & ~(got & want)).any(), "neither is a part of the other"
    reached = float(counted[smaller].sum())
    slack = 32 * torch.finfo(torch.float32).eps * float(counted.sum())
    crossed = float(counted[differ].sum())
    assert min(abs(reached - goal), abs(reached + crossed - goal)) <= slack, (at, reached, goal)


def probabilities(*shape: int) -> Tensor:
    return torch.softmax(3 * torch.randn(*shape), -1)


@pytest.mark.parametrize("block_u", [SHORT_ROW, ONE_TILE, MANY_TILES])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("crossing", ["keep", "drop"])
def test_the_best_units_that_hold_a_share_are_kept(
    tmp_path: Path, p: float, crossing: Crossing, block_u: int
) -> None:
    scores = probabilities(1, 1, 3, 39)
    got = _check(tmp_path, scores, Case(p, crossing, block_u=block_u))
    if p == 0.0:
        assert not got.any()
    if p == 1.0 and crossing == "drop":
        assert bool(got.all())


@pytest.mark.parametrize("block_u", [SHORT_ROW, MANY_TILES])
@pytest.mark.parametrize("crossing", ["keep", "drop"])
def test_ties_go_to_the_lower_index(tmp_path: Path, crossing: Crossing, block_u: int) -> None:
    scores = torch.randint(0, 3, (1, 1, 4, 40)).float()
    scores[0, 0, 0] = 1.0
    scores[0, 0, 1] = 0.0
    scores[0, 0, 2] = torch.tensor([0.0, -0.0]).repeat(20)
    for p in (0.0, 0.25, 0.5, 1.0):
        got = _check(tmp_path, scores, Case(p, crossing, block_u=block_u))
        assert int(got[0, 0, 0].sum()) == round(p * 40), "quarters of forty ones are exact"
        assert bool(got[0, 0, 0, : round(p * 40)].all())


@pytest.mark.parametrize("crossing", ["keep", "drop"])
@pytest.mark.parametrize("forced", [FALSE, FIRST, OWN], ids=["none", "first", "own"])
@pytest.mark.parametrize("least", [0, 3, 100])
def test_forced_units_come_first_and_no_row_is_shorter_than_the_least(
    tmp_path: Path, least: int, forced: Expr, crossing: Crossing
) -> None:
    scores = probabilities(1, 2, 3, 41)
    scores[0, 0, 0] = -math.inf
    scores[0, 0, 1, 3:] = -math.inf
    scores[0, 1, 2, ::2] = -math.inf
    for p in (0.1, 0.8):
        case = Case(p, crossing, least, forced, ONE_TILE, row_begin=2)
        got = _check(tmp_path, scores, case)
        able = (scores != -math.inf).sum(-1)
        assert bool((got.sum(-1) >= torch.minimum(able, torch.tensor(least))).all())
        assert not got[0, 0, 0].any()


@pytest.mark.parametrize("crossing", ["keep", "drop"])
def test_nan_counts_nothing_and_is_taken_last(tmp_path: Path, crossing: Crossing) -> None:
    scores = probabilities(1, 1, 4, 30)
    scores[0, 0, 0, ::3] = math.nan
    scores[0, 0, 1] = math.nan
    scores[0, 0, 2, :-1] = math.nan
    scores[0, 0, 3, ::2] = -math.inf
    scores[0, 0, 3, 1::2] = math.nan
    for p in (0.0, 0.5, 1.0):
        for least in (0, 4):
            _check(tmp_path, scores, Case(p, crossing, least))


def test_each_head_has_its_own_share(tmp_path: Path) -> None:
    scores = probabilities(1, 4, 2, 50)
    got = _check(tmp_path, scores, Case(torch.tensor([0.0, 0.4, 0.9, 1.0])))
    kept = got.sum((0, 2, 3))
    assert bool((kept[1:] > kept[:-1]).all())


def test_tiny_and_huge_scores_keep_their_order(tmp_path: Path) -> None:
    largest, tiny = torch.finfo(torch.float32).max, 1e-45
    scores = torch.tensor([tiny, 1.0, 1e30, tiny, 0.0, largest / 4, largest / 4, 1e-30])
    for p in (0.0, 0.4, 0.6, 0.999, 1.0):
        _check(tmp_path, scores.view(1, 1, 1, -1), Case(p, block_u=MANY_TILES))
    few = torch.tensor([1e-36, 0.0, 1e-36, 1e-36]).view(1, 1, 1, -1)
    for crossing in ("keep", "drop"):
        _check(tmp_path, few, Case(0.5, crossing))  # type: ignore[arg-type]


def test_any_strides_are_read(tmp_path: Path) -> None:
    scores = probabilities(2, 2, 2, 40).permute(1, 2, 0, 3)[..., 3:33]
    _check(tmp_path, scores, Case(0.6, block_u=MANY_TILES))


def test_the_context_holds_exactly_the_variables_of_the_template() -> None:
    assert variables_of(TEMPLATE) == field_names(TopPContext)
