"""Estimates that a few rows make for all: sums along lines, counts a share needs, agreement,
diagonals, tables by head; each against its definition, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.backends.reference.call import Call
from spcomp.backends.reference.probing import alike
from spcomp.backends.reference.scoring import list_rows, row_grid, scores
from spcomp.backends.reference.selecting import needed
from spcomp.dsl.pattern import Pattern
from spcomp.ir.nodes import Alike, Needed, Node, Regroup, Score, Softmax, Sums
from spcomp.ir.types import types_of
from tests import oracle


def stage(pattern: Pattern, kind: type[Node], nth: int = 0) -> Node:
    return [n for n in pattern.program.stages() if isinstance(n, kind)][nth]


def call_of(pattern: Pattern, q: Tensor, k: Tensor) -> Call:
    return Call(pattern.program, {"q": q, "k": k, "v": k, **pattern.tensors})


def map_of(call: Call, node: Node) -> Tensor:
    return scores(call, node, list_rows(call, node, 0, row_grid(call, node).count))


def tensors(sq: int, skv: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(sq + skv)
    return torch.randn(2, 4, sq, 8).double(), torch.randn(2, 2, skv, 8).double()


@sp.pattern
def lines(q, k, v, *, rows=16, whole=False, p=0.6, block=10, from_end=False, pooled=0):
    keys = sp.downsample(k, block=pooled) if pooled else k
    exact = sp.softmax(sp.score(q if whole else sp.probe(q, rows=rows), keys))
    down = sp.column_sums(exact)
    along = sp.diagonal_sums(sp.softmax(sp.score(q if whole else sp.probe(q, rows=rows), k)))
    far = sp.regroup(along, block=block, from_end=from_end)
    chosen = sp.topk(down, k=sp.needed(down, p=p)) | sp.diagonals(sp.topk(far, k=3))
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("sq", "skv"), [(40, 40), (5, 70), (300, 300), (70, 40)])
def test_sums_add_the_map_of_the_last_rows_along_lines(sq: int, skv: int, whole: bool) -> None:
    q, k = tensors(sq, skv)
    pattern = lines(whole=whole)
    call = call_of(pattern, q, k)
    down, along = (map_of(call, stage(pattern, Sums, n)) for n in (0, 1))
    wide = map_of(call, stage(pattern, Softmax))
    first = 0 if whole else max(0, sq - 16)
    assert wide.shape == (2, 4, sq - first, skv)
    keys = k.repeat_interleave(2, 1)
    want_down, want_along = torch.zeros(2, 4, skv).double(), torch.zeros(2, 4, skv).double()
    for i in range(first, sq):
        t = i + skv - sq
        if t >= 0:
            logits = torch.einsum("bhd,bhud->bhu", q[:, :, i], keys[:, :, : t + 1]) / math.sqrt(8)
            chances = torch.softmax(logits, -1)
            want_down[..., : t + 1] += chances
            for u in range(t + 1):
                want_along[..., t - u] += chances[..., u]
    torch.testing.assert_close(down[:, :, 0], want_down)
    torch.testing.assert_close(along[:, :, 0], want_along)


@pytest.mark.parametrize("from_end", [False, True])
@pytest.mark.parametrize("skv", [40, 43, 7])
def test_blocks_of_offsets_count_from_either_end(skv: int, from_end: bool) -> None:
    q, k = tensors(skv, skv)
    pattern = lines(from_end=from_end)
    call = call_of(pattern, q, k)
    along = map_of(call, stage(pattern, Sums, 1))[:, :, 0]
    got = map_of(call, stage(pattern, Regroup))[:, :, 0]
    slip = -skv % 10 if from_end else 0
    padded = torch.nn.functional.pad(along, (slip, -(skv + slip) % 10))
    torch.testing.assert_close(got, padded.unflatten(-1, (-1, 10)).sum(-1))
    # Entry d is a block diagonal, t // 10 - u // 10 = d, however its offsets were counted.
    mask = sp.compile(pattern, backend="reference").to_mask(q, k)
    t, u = torch.arange(skv)[:, None], torch.arange(skv)[None]
    count = needed(call, stage(pattern, Needed))[:, :, 0]  # type: ignore[arg-type]
    for b in range(2):
        for h in range(4):
            near = sorted(range(got.shape[-1]), key=lambda d: (-float(got[b, h, d]), d))[:3]
            held = torch.stack([t // 10 - u // 10 == d for d in near]).any(0)
            down = map_of(call, stage(pattern, Sums))[b, h, 0]
            best = sorted(range(skv), key=lambda n: (-float(down[n]), n))[: int(count[b, h])]
            held[:, best] = True
            assert torch.equal(mask[b, h], held & (u <= t))


def test_diagonals_hold_no_later_key_where_attention_is_not_causal() -> None:
    q, k = tensors(30, 34)

    @sp.pattern
    def free(q, k, v):
        along = sp.diagonal_sums(sp.score(sp.probe(q, rows=4), k))
        chosen = sp.diagonals(sp.topk(sp.regroup(along, block=8), k=9))
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen), mask=None)

    mask = sp.compile(free(), backend="reference").to_mask(q, k)
    assert torch.equal(mask, oracle.causal_mask(30, 34).expand_as(mask))


COUNTS = [  # values, p, options, count
    ([0.5, 0.3125, 0.1875], 0.5, {}, 1),
    ([0.5, 0.3125, 0.1875], 0.51, {}, 2),
    ([0.5, 0.3125, 0.1875], 0.51, {"crossing": "drop"}, 1),
    ([0.5, 0.3125, 0.1875], 0.4, {"crossing": "drop"}, 0),
    ([0.5, 0.3125, 0.1875], 0.4, {"crossing": "drop", "least": 2}, 2),
    ([0.5, 0.3125, 0.1875], 1.0, {"per": 2}, 2),
    ([0.5, 0.3125, 0.1875], 1.0, {"per": 3}, 1),
    ([0.5, 0.3125, 0.1875], 0.51, {"crossing": "drop", "extra": 2, "per": 3}, 1),
    ([0.5, 0.3125, 0.1875], 0.9, {"crossing": "drop", "extra": 2, "per": 3}, 2),
    ([0.5, 0.3125, 0.1875], 1.0, {"most": 2}, 2),
    ([0.5, 0.3125, 0.1875], 1.0, {"least": 5, "most": 2}, 2),
    ([math.nan, 0.5, 0.5], 0.5, {}, 1),
    ([0.0, 0.0, 0.0], 1.0, {}, 0),
]


@pytest.mark.parametrize("case", COUNTS, ids=str)
def test_a_share_needs_so_many(case: tuple[list[float], float, dict[str, object], int]) -> None:
    values, p, options, want = case

    @sp.pattern
    def counted(q, k, v):
        down = sp.column_sums(sp.score(sp.probe(q, rows=1), k))
        best = sp.topk(down, k=sp.needed(down, p=p, **options))
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    pattern = counted()
    k = torch.tensor(values).double()[None, None, :, None]
    call = call_of(pattern, torch.ones(1, 1, 3, 1).double(), k)
    assert needed(call, stage(pattern, Needed)).tolist() == [[[want]]]  # type: ignore[arg-type]


@sp.pattern
def agreeing(q, k, v, *, below):
    one, other = (sp.column_sums(sp.score(sp.probe(q, rows=n), k)) for n in (1, 2))
    chosen = sp.switch(sp.alike(one, other, below=below), sp.sink(1), sp.window(2))
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))


def test_estimates_agree_below_their_distance_and_not_at_it() -> None:
    # Scores of the last row, and the sums of both: [2,2,0] against [2,2,0]+[0,2,2].
    q = torch.eye(2).double()[None, None]
    k = torch.tensor([[0.0, 2.0], [2.0, 2.0], [2.0, 0.0]]).double()[None, None]
    q = torch.cat([q, q[:, :, 1:]], 2)[:, :, [0, 0, 1]]

    @sp.pattern
    def free(q, k, v, *, below):
        one, other = (sp.column_sums(sp.score(sp.probe(q, rows=n), k, mask=None)) for n in (1, 2))
        chosen = sp.switch(sp.alike(one, other, below=below), sp.sink(1), sp.window(2))
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))

    p, m = [1 / 2, 1 / 2, 0], [1 / 4, 1 / 2, 1 / 4]
    middle = [(a + b) / 2 for a, b in zip(p, m, strict=True)]
    parts = [sum(a * math.log(a / c) for a, c in zip(x, middle, strict=True) if a) for x in (p, m)]
    distance = math.sqrt(sum(parts) / 2)
    for below, want in ((distance + 1e-9, True), (distance - 1e-9, False), (0.0, False)):
        pattern = free(below=below)
        call = call_of(pattern, q, k)
        assert alike(call, stage(pattern, Alike)).tolist() == [[want]]  # type: ignore[arg-type]
        mask = sp.compile(pattern, backend="reference").to_mask(q, k)[0, 0]
        causal = oracle.causal_mask(3, 3)
        held = torch.arange(3)[None] < 1 if want else oracle.window_mask(3, 3, 2)
        assert torch.equal(mask, held & causal)


def test_what_sums_to_nothing_or_is_no_number_is_like_nothing() -> None:
    for k in (torch.zeros(1, 1, 3, 2).double(), torch.full((1, 1, 3, 2), math.nan).double()):
        pattern = agreeing(below=5.0)
        call = call_of(pattern, torch.ones(1, 1, 3, 2).double(), k)
        assert not alike(call, stage(pattern, Alike)).any()  # type: ignore[arg-type]


def test_counts_of_a_rule_may_differ_by_head() -> None:
    q, k = tensors(30, 50)
    sinks, sizes = (torch.tensor(n, dtype=torch.int32) for n in ([0, 2, 9, 60], [1, 5, 60, 2]))

    @sp.pattern
    def streams(q, k, v):
        chosen = sp.sink(sinks) | sp.window(sizes)
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))

    mask = sp.compile(streams(), backend="reference").to_mask(q, k)
    for h, (n, w) in enumerate(zip(sinks.tolist(), sizes.tolist(), strict=True)):
        want = oracle.sink_window_mask(30, 50, n, w)
        assert torch.equal(mask[:, h], want.expand(2, 30, 50))


def test_a_padded_mean_divides_by_the_whole_block() -> None:
    q, k = tensors(23, 23)

    @sp.pattern
    def padded(q, k, v, *, tail):
        best = sp.topk(sp.score(q, sp.downsample(k, block=10, tail=tail)), k=1)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    kept, filled = (
        map_of(call_of(p, q, k), stage(p, Score)) for p in (padded(tail="keep"), padded(tail="pad"))
    )
    torch.testing.assert_close(filled[..., :2], kept[..., :2])
    torch.testing.assert_close(filled[..., 2], kept[..., 2] * 3 / 10)


def chosen(make: Callable[[Node, Node], Node]) -> Pattern:
    @sp.pattern
    def wrong(q, k, v):
        part = make(q, k)
        return sp.attend(q, sp.gather(k, part), sp.gather(v, part))  # type: ignore[arg-type]

    return wrong()


def last(q: Node, k: Node) -> Node:
    return sp.softmax(sp.score(sp.probe(q, rows=8), k))


REFUSED = [
    (lambda q, k: sp.topk(last(q, k), k=4), "a list for each row of a probe cannot be lowered"),
    (lambda q, k: sp.topk(sp.regroup(last(q, k), block=4), k=4), "a list for each row of a probe"),
    (lambda q, k: sp.topk(sp.diagonal_sums(last(q, k)), k=4), "a list of offsets taken as keys"),
    (lambda q, k: sp.diagonals(sp.topk(sp.column_sums(last(q, k)), k=4)),
     "diagonals named by a list of keys"),
    (lambda q, k: sp.topk(sp.column_sums(last(q, k)), k=4, always=sp.own()),
     "local units in a list for all rows"),
    (lambda q, k: sp.diagonals(sp.topk(sp.diagonal_sums(sp.score(q, k, mask=None)), k=4)),
     "an offset is a query's position less a key's"),
    (lambda q, k: sp.diagonals(sp.topk(sp.diagonal_sums(sp.score(
        q, sp.downsample(k, block=4))), k=4)), "its rows or units are no tokens"),
    (lambda q, k: sp.topk(sp.regroup(sp.column_sums(last(q, k)), block=4, from_end=True), k=1),
     "scores regrouped from the end"),
    (lambda q, k: sp.switch(sp.alike(sp.column_sums(last(q, k)), last(q, k), below=1),
                            sp.sink(1), sp.sink(2)), "comparing float32[B, Hq, 1, Skv] with"),
    (lambda q, k: sp.covered(sp.topk(sp.column_sums(last(q, k)), k=1), sp.topk(sp.regroup(
        sp.diagonal_sums(last(q, k)), block=4), k=1), block=8), "covering offsets that are no"),
    (lambda q, k: sp.topk(sp.column_sums(last(q, k)), k=sp.needed(last(q, k), p=2.0)),
     "needed was given p = 2.0"),
    (lambda q, k: sp.topk(sp.column_sums(sp.column_sums(last(q, k))), k=1),
     "column_sums takes a score() or a softmax() of one as its scores"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_has_no_meaning_is_refused(make: Callable[[Node, Node], Node], said: str) -> None:
    with pytest.raises(sp.SpcompError) as caught:
        types_of(chosen(make).program)
    assert said in str(caught.value)
