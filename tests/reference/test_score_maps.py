"""Maps of scores: softmax over candidates, regrouping onto blocks, lists as long as a share."""

from __future__ import annotations

import math

import pytest
import torch

import spcomp as sp
from spcomp.backends.reference.call import Call
from spcomp.backends.reference.scoring import Rows, list_rows, row_grid, scores
from spcomp.backends.reference.selecting import share
from spcomp.dsl.pattern import Pattern
from spcomp.ir.nodes import Node, Regroup, Softmax


def made(pattern: Pattern, kind: type[Node]) -> Node:
    return next(n for n in pattern.program.stages() if isinstance(n, kind))


def values(pattern: Pattern, kind: type[Node], q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    call = Call(pattern.program, {"q": q, "k": k, "v": k})
    node = made(pattern, kind)
    rows: Rows = list_rows(call, node, 0, row_grid(call, node).count)
    return scores(call, node, rows)


def tensors(sq: int, skv: int, d: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(sq + skv)
    return torch.randn(2, 4, sq, d).double(), torch.randn(2, 2, skv, d).double()


@sp.pattern
def overlapping(q, k, v, *, block=32, stride=16, to=64, by="sum", over=0, heads=None):
    units = sp.downsample(k, block=block, stride=stride, tail="drop")
    coarse = sp.downsample(k, block=over, stride=over // 2, tail="drop") if over else None
    other = None if coarse is None else sp.score(q, coarse)
    chances = sp.softmax(sp.score(q, units), over=other, heads=heads)
    best = sp.topk(sp.regroup(chances, block=to, by=by), k=4, always=sp.sink(1) | sp.own())
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


@pytest.mark.parametrize(("sq", "skv"), [(130, 130), (65, 200), (1, 70), (40, 20)])
def test_a_softmax_is_over_the_units_that_are_complete(sq: int, skv: int) -> None:
    q, k = tensors(sq, skv)
    chances = values(overlapping(), Softmax, q, k)
    count = max(0, (skv - 32) // 16 + 1)
    assert chances.shape == (2, 4, sq, count)
    for row in range(sq):
        seen = [c for c in range(count) if 16 * c + 31 <= row + skv - sq]
        assert not chances[:, :, row, len(seen) :].any()
        if seen:
            means = torch.stack([k[:, :, 16 * c : 16 * c + 32].mean(2) for c in seen], 2)
            logits = torch.einsum("bhd,bhud->bhu", q[:, :, row], means.repeat_interleave(2, 1))
            want = torch.softmax(logits / math.sqrt(8), -1)
            torch.testing.assert_close(chances[:, :, row, : len(seen)], want)


@pytest.mark.parametrize("by", ["sum", "max"])
def test_regrouping_counts_the_units_that_touch_a_block(by: str) -> None:
    q, k = tensors(150, 150)
    pattern = overlapping(by=by)
    fine, blocks = values(pattern, Softmax, q, k), values(pattern, Regroup, q, k)
    weights = {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1}  # NSA's figure for 32/16/64
    for n in range(3):
        units = [(4 * n + m, w) for m, w in weights.items() if 0 <= 4 * n + m < fine.shape[3]]
        if by == "sum":
            want = sum(w * fine[..., c] for c, w in units)
        else:
            want = torch.stack([fine[..., c] for c, _ in units]).amax(0)
        torch.testing.assert_close(blocks[..., n], want)


def test_a_foreign_sum_divides_and_heads_are_joined() -> None:
    q, k = tensors(200, 200)
    got = values(overlapping(block=16, over=64, heads="group"), Softmax, q, k)
    assert got.shape == (2, 2, 200, 12)
    fine = torch.stack([k[:, :, 16 * c : 16 * c + 16].mean(2) for c in range(12)], 2)
    coarse = torch.stack([k[:, :, 32 * e : 32 * e + 64].mean(2) for e in range(5)], 2)
    row, seen, wide = 199, 12, 5
    logits = q[:, :, row, None] @ fine.repeat_interleave(2, 1)[:, :, :seen].mT / math.sqrt(8)
    other = q[:, :, row, None] @ coarse.repeat_interleave(2, 1)[:, :, :wide].mT / math.sqrt(8)
    chances = (logits - other.logsumexp(-1, keepdim=True)).exp()[:, :, 0]
    want = chances.reshape(2, 2, 2, seen).sum(2)
    torch.testing.assert_close(got[:, :, row], want)


CASES = [  # scores, able, always, p, crossing, least, kept
    ([0.5, 0.3, 0.2], "111", "000", 0.5, "keep", 0, "100"),
    ([0.5, 0.3, 0.2], "111", "000", 0.6, "keep", 0, "110"),
    ([0.5, 0.3, 0.2], "111", "000", 0.6, "drop", 0, "100"),
    ([0.5, 0.3, 0.2], "111", "000", 0.4, "drop", 0, "000"),
    ([0.5, 0.3, 0.2], "111", "000", 0.4, "drop", 1, "100"),
    ([0.5, 0.3, 0.2], "111", "001", 0.5, "keep", 0, "101"),
    ([0.5, 0.3, 0.2], "011", "000", 0.5, "keep", 0, "010"),
    ([0.25, 0.25, 0.25, 0.25], "1111", "0000", 0.5, "keep", 0, "1100"),
    ([0.25, 0.5, 0.25], "111", "000", 1.0, "keep", 0, "111"),
    ([0.0, 0.0, 0.0], "111", "000", 1.0, "keep", 0, "000"),
    ([0.0, 0.0, 0.0], "111", "000", 1.0, "drop", 0, "111"),
    ([math.nan, 0.5, 0.5], "111", "000", 0.5, "keep", 2, "011"),
    ([0.5, 0.5], "00", "00", 0.9, "keep", 2, "00"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_share_keeps_what_its_rule_says(case: tuple[object, ...]) -> None:
    given, able, always, p, crossing, least, want = case
    row = torch.tensor([[[given]]], dtype=torch.float64)
    marks = [torch.tensor([[[[c == "1" for c in str(s)]]]]) for s in (able, always, want)]
    kept = share(row, marks[0], marks[1], float(p), crossing, int(least))  # type: ignore[arg-type]
    assert torch.equal(kept, marks[2])


def test_bad_arguments_are_refused_with_their_figures() -> None:
    @sp.pattern
    def wrong(q, k, v, *, p=0.5, rows=8, block=8, size=4, other=4):
        tiles = sp.score(sp.fold(q, size=size, reverse=True), sp.fold(k, size=other))
        best = sp.topp(sp.regroup(sp.softmax(tiles), block=block, rows=rows), p=p)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    q = torch.randn(1, 2, 32, 8)

    def said(**given: object) -> str:
        with pytest.raises(sp.SpcompError) as caught:
            sp.compile(wrong(**given), backend="reference")(q, q, q)
        return str(caught.value).splitlines()[0]

    assert "p is 1.5" in said(p=1.5) or "1.5" in said(p=1.5)
    assert "float64" in said(p=torch.zeros(2, dtype=torch.float64))
    assert "rows=6" in said(rows=6) and "6 is no multiple of 4" in said(rows=6)
    assert "block=10" in said(block=10)
    assert "4*D by data units of width 2*D" in said(other=2)


def test_heads_that_a_score_joined_are_not_parted_by_its_softmax() -> None:
    @sp.pattern
    def wrong(q, k, v, *, first="all", then="group"):
        chances = sp.softmax(sp.score(q, sp.downsample(k, block=8), heads=first), heads=then)
        best = sp.topk(chances, k=2, always=sp.own())
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    q, k = tensors(40, 40)
    for first, then in (("all", "group"), ("all", "query"), ("group", "query")):
        with pytest.raises(sp.SpcompError) as caught:
            sp.compile(wrong(first=first, then=then), backend="reference")(q, k, k)
        assert f'heads="{then}" of scores with heads="{first}"' in str(caught.value)
    sp.compile(wrong(first="group", then="all"), backend="reference")(q, k, k)


def test_a_sequence_shorter_than_a_unit_has_no_scores_and_attends_to_the_rest() -> None:
    @sp.pattern
    def both(q, k, v):
        keys, values = (sp.downsample(x, block=32, stride=16, tail="drop") for x in (k, v))
        chances = sp.softmax(sp.score(q, keys), heads="group")
        best = sp.topk(sp.regroup(chances, block=64), k=1, always=sp.own())
        return sp.attend(q, [sp.stream(keys, values), sp.gather(sp.stream(k, v), best)])

    q, k = tensors(9, 20)
    out, lse = sp.compile(both, backend="reference")(q, k, k, return_lse=True)
    want, want_lse = sp.compile(whole, backend="reference")(q, k, k, return_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


@sp.pattern
def whole(q, k, v):
    return sp.attend(q, k, v)
