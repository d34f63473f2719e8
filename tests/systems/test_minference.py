"""MInference against a second opinion written from the paper and the official code's description:
the lines and blocks of each head first, then the output."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.patterns.minference import KINDS, minference
from tests import oracle

SHAPES = [  # B, Hq, Hkv, Sq, Skv, D
    (1, 1, 1, 64, 64, 16),
    (2, 4, 2, 130, 130, 16),
    (3, 3, 1, 129, 257, 20),
    (1, 16, 1, 1, 77, 16),
    (2, 8, 2, 100, 37, 8),
    (1, 4, 4, 255, 255, 16),
    (1, 2, 2, 7, 9, 8),
]
CLOSE = 1e-9
HeadMask = Callable[[Tensor, Tensor], tuple[Tensor, bool]]


def best(sums: list[float], n: int, forced: int) -> tuple[set[int], bool]:
    """Keep the first `forced` and the highest others, n in all; tell if rounding decides."""
    kept = set(range(min(forced, len(sums))))
    others = sorted((i for i in range(len(sums)) if i not in kept), key=lambda i: (-sums[i], i))
    taken, left = others[: max(n - len(kept), 0)], others[max(n - len(kept), 0) :]
    close = bool(taken and left) and abs(sums[taken[-1]] - sums[left[0]]) < CLOSE
    return kept | set(taken), close


def lines(
    q: Tensor, k: Tensor, *, columns: int, offsets: int, last_q: int, sinks: int, nearest: int
) -> tuple[set[int], set[int], bool]:
    """Find the vertical lines and the distances of one head, q [Sq,D], k [Skv,D]."""
    (sq, d), skv = q.shape, k.shape[0]
    down, along = [0.0] * skv, [0.0] * skv
    for i in range(max(0, sq - last_q), sq):
        t = i + skv - sq
        if t < 0:
            continue
        for u, p in enumerate(torch.softmax(k[: t + 1] @ q[i] / math.sqrt(d), 0).tolist()):
            down[u] += p
            along[t - u] += p
    keys, a = best(down, columns, sinks)
    distances, b = best(along, offsets, nearest)
    return keys, distances, a or b


def vertical_slash(q: Tensor, k: Tensor, **given: int) -> tuple[Tensor, bool]:
    keys, distances, close = lines(q, k, **given)
    t, u = oracle.positions(len(q), len(k)), torch.arange(len(k))[None]
    held = torch.zeros(len(q), len(k), dtype=torch.bool)
    held[:, sorted(keys)] = True
    for o in distances:
        held |= t - u == o
    return held & (u <= t), close


def kernel_reads(q: Tensor, k: Tensor, block: int, **given: int) -> tuple[Tensor, bool]:
    """The keys that the official index lists, row block by row block: a sweep over columns and
    slashes at once, each in ascending order."""
    keys, distances, close = lines(q, k, **given)
    sq, skv = len(q), len(k)
    held = torch.zeros(sq, skv, dtype=torch.bool)
    for begin in range(0, sq, block):
        end = begin + block + skv - sq
        edges = [max(end - o, block) for o in sorted(distances, reverse=True) if o < end]
        if not edges:
            continue
        waiting = sorted(keys)
        right = edges.pop(0)
        left = right - block
        read: set[int] = set()
        while True:
            if waiting and waiting[0] < right:
                if waiting[0] < left:
                    read.add(waiting[0])
                waiting.pop(0)
            elif not edges:
                read |= set(range(left, right))
                break
            else:
                edge = edges.pop(0)
                if edge > right + block:
                    read |= set(range(left, right))
                    left, right = edge - block, edge
                elif edge > right:
                    right += block
        held[begin : begin + block, sorted(u for u in read if u < skv)] = True
    return held & oracle.causal_mask(sq, skv), close


def block_sparse(
    q: Tensor, k: Tensor, block: int, blocks: int, padded: bool = False
) -> tuple[Tensor, bool]:
    """Blocks of highest product of means, complete at the row's last query."""
    sq, skv = len(q), len(k)

    def mean(x: Tensor, n: int) -> Tensor:
        part = x[n * block : (n + 1) * block]
        return part.sum(0) / (block if padded else len(part))

    held, unsure = torch.zeros(sq, skv, dtype=torch.bool), False
    for m in range(-(-sq // block)):
        newest = min((m + 1) * block, sq) - 1 + skv - sq
        able = [n for n in range(-(-skv // block)) if min((n + 1) * block, skv) - 1 <= newest]
        kept, close = best([float(mean(q, m) @ mean(k, n)) for n in able], blocks, 0)
        unsure |= close
        for n in kept:
            held[m * block : (m + 1) * block, n * block : (n + 1) * block] = True
    return held & oracle.causal_mask(sq, skv), unsure


def a_shape(q: Tensor, k: Tensor, initial: int, recent: int) -> tuple[Tensor, bool]:
    return oracle.sink_window_mask(len(q), len(k), initial, recent), False


def tensors(shape: tuple[int, ...], sharp: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    b, hq, hkv, sq, skv, d = shape
    torch.manual_seed(sum(shape))
    q = sharp * torch.randn(b, hq, sq, d, dtype=torch.float64)
    k = torch.randn(b, hkv, skv, d, dtype=torch.float64)
    return q, k, torch.randn(b, hkv, skv, d, dtype=torch.float64)


def check(pattern: sp.Pattern, shape: tuple[int, ...], want: list[HeadMask]) -> None:
    """Compare the mask of each head with its own oracle, and the output under the mask."""
    q, k, v = tensors(shape)
    attention = sp.compile(pattern, backend="reference")
    got = attention.to_mask(q, k)
    group, unsure = q.shape[1] // k.shape[1], 0
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            mask, close = want[h % len(want)](q[b, h], k[b, h // group])
            unsure += close
            assert close or torch.equal(got[b, h], mask), (b, h)
    assert unsure <= q.shape[0] * q.shape[1] // 4
    out, lse = attention(q, k, v, return_lse=True)
    expected, expected_lse = oracle.attention(q, k, v, got)
    assert oracle.error(out, expected) < 1e-12
    assert oracle.error(lse, expected_lse) < 1e-12


LINES = [  # columns, offsets, last_q, sinks, nearest
    {"columns": 12, "offsets": 20, "last_q": 16, "sinks": 3, "nearest": 5},
    {"columns": 40, "offsets": 7, "last_q": 64, "sinks": 30, "nearest": 7},
    {"columns": 0, "offsets": 33, "last_q": 5, "sinks": 0, "nearest": 1},
    {"columns": 25, "offsets": 0, "last_q": 1000, "sinks": 4, "nearest": 0},
    {"columns": 25, "offsets": 6, "last_q": 16, "sinks": 0, "nearest": 0},
]


@pytest.mark.parametrize("given", LINES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lines_are_those_of_the_last_queries(shape: tuple[int, ...], given: dict[str, int]) -> None:
    check(minference(**given), shape, [lambda q, k: vertical_slash(q, k, **given)])


@pytest.mark.parametrize("given", LINES, ids=str)
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_official_lines_are_covered_by_blocks(
    shape: tuple[int, ...], block: int, given: dict[str, int]
) -> None:
    pattern = minference(variant="official", block=block, **given)
    check(pattern, shape, [lambda q, k: kernel_reads(q, k, block, **given)])


def test_the_cover_reads_the_lines_and_more() -> None:
    q, k, _ = tensors((1, 4, 2, 300, 300, 16))
    given = LINES[0]
    exact = sp.compile(minference(**given), backend="reference").to_mask(q, k)
    cover = sp.compile(minference(variant="official", **given), backend="reference").to_mask(q, k)
    assert not (exact & ~cover).any()
    assert cover.sum() > exact.sum()


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize(("block", "blocks"), [(16, 3), (64, 1), (8, 100), (32, 0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_those_of_the_means(
    shape: tuple[int, ...], block: int, blocks: int, variant: str
) -> None:
    pattern = minference(kind="block_sparse", block=block, blocks=blocks, variant=variant)
    check(pattern, shape, [lambda q, k: block_sparse(q, k, block, blocks, variant == "official")])


@pytest.mark.parametrize(("initial", "recent"), [(4, 20), (0, 1), (1024, 4096)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_a_shape_is_sink_and_window(shape: tuple[int, ...], initial: int, recent: int) -> None:
    pattern = minference(kind="a_shape", initial=initial, recent=recent)
    check(pattern, shape, [lambda q, k: a_shape(q, k, initial, recent)])


def test_future_blocks_take_no_budget() -> None:
    q = torch.ones(1, 1, 512, 8, dtype=torch.float64)
    k = torch.arange(512, dtype=torch.float64)[None, None, :, None].expand(1, 1, 512, 8)
    pattern = minference(kind="block_sparse", blocks=3)
    mask = sp.compile(pattern, backend="reference").to_mask(q, k)
    rows = mask[0, 0].sum(-1)
    assert all(int(rows[t]) == min(t // 64, 2) * 64 + t % 64 + 1 for t in range(512))


def table(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize("shape", [(2, 6, 2, 130, 201, 16), (1, 6, 6, 255, 255, 16),
                                   (2, 6, 1, 3, 90, 16)], ids=str)  # fmt: skip
def test_each_head_has_its_own_shape_and_budget(shape: tuple[int, ...]) -> None:
    pattern = minference(
        kind=table(1, 0, 2, 1, 0, 2),
        initial=table(0, 4, 0, 0, 9, 0),
        recent=table(1, 20, 1, 1, 5, 1),
        columns=table(9, 2, 2, 40, 2, 2),
        offsets=table(30, 3, 3, 3, 3, 3),
        blocks=table(0, 0, 2, 0, 0, 5),
        block=16, last_q=16, sinks=2, nearest=3,
    )  # fmt: skip
    slash = {"last_q": 16, "sinks": 2, "nearest": 3}
    check(pattern, shape, [
        lambda q, k: vertical_slash(q, k, columns=9, offsets=30, **slash),
        lambda q, k: a_shape(q, k, 4, 20),
        lambda q, k: block_sparse(q, k, 16, 2),
        lambda q, k: vertical_slash(q, k, columns=40, offsets=3, **slash),
        lambda q, k: a_shape(q, k, 9, 5),
        lambda q, k: block_sparse(q, k, 16, 5),
    ])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_of_short_dtypes_is_attention_over_the_mask(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors((2, 6, 2, 129, 201, 80)))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    attention = sp.compile(minference(columns=40, offsets=110), backend="reference")
    mask = attention.to_mask(*strided[:2])
    out, lse = attention(*strided, return_lse=True)
    want, want_lse = oracle.attention(q, k, v, mask)
    budget, budget_lse = oracle.budgets(q, k, v, mask)
    assert oracle.error(out, want) <= budget
    assert oracle.error(lse, want_lse) <= budget_lse


def test_scores_that_are_no_numbers_rank_last() -> None:
    q, k, v = tensors((1, 2, 1, 96, 96, 16))
    k[:, :, 40] = math.nan  # the row sums of its softmax are NaN for every later query
    given = LINES[0]
    attention = sp.compile(minference(**given), backend="reference")
    keys, distances = set(range(12)), set(range(20))  # nothing is a number: ties to the lower
    t, u = oracle.positions(96, 96), torch.arange(96)[None]
    want = (u < len(keys)) | (t - u < len(distances))
    assert torch.equal(attention.to_mask(q, k)[0, 0], want & (u <= t))
    assert not attention(q, k, v)[:, :, :40].isnan().any()


BAD: list[tuple[dict[str, object], str]] = [
    ({"kind": "vertical"}, "minference was given kind = 'vertical'"),
    ({"variant": "x"}, "minference was given variant = 'x'"),
    ({"columns": -1}, "topk was given k = -1, which is below 0"),
    ({"columns": 20}, "topk keeps 20 tokens, but its forced set alone has 30 sink = 30"),
    ({"last_q": 0}, "probe was given rows = 0, which is below 1"),
    ({"recent": 0}, "window was given size = 0, which is below 1"),
    ({"kind": table(0, 3)}, "per_head was given a case = 3"),
    ({"kind": table(0, 1).long()}, "per_head's which of shape [2] in int64"),
    ({"columns": table(40, 29)}, "topk was given k[1] = 29, which is below 30"),
    ({"blocks": table(1, -2)}, "topk was given k[1] = -2, which is below 0"),
    ({"initial": torch.ones(2)}, "sink's count of shape [2] in float32"),
]


@pytest.mark.parametrize(("given", "said"), BAD, ids=str)
def test_bad_arguments_are_refused_with_their_figures(given: dict[str, object], said: str) -> None:
    with pytest.raises(sp.SpcompError) as caught:
        sp.compile(minference(**given), backend="reference")(*tensors((1, 2, 1, 8, 8, 8)))
    assert said in str(caught.value)


@pytest.mark.parametrize("given", [
    {"kind": table(0, 1, 1)}, {"columns": table(30, 40, 50)},
    {"kind": "a_shape", "recent": table(1, 2, 3)},
], ids=str)  # fmt: skip
def test_tables_for_other_heads_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(sp.SpcompError) as caught:
        sp.compile(minference(**given), backend="reference")(*tensors((1, 2, 1, 8, 8, 8)))
    assert "with 3 numbers and q and k with Hq = 2" in str(caught.value)


@pytest.mark.parametrize(("kind", "what"), [
    ("vertical_slash", "a list for all queries, chosen by sums along lines of a map"),
    (table(*range(len(KINDS)), 0), "a list"),
])  # fmt: skip
@pytest.mark.parametrize("target", ["sm90", "ascend910b"])
def test_no_kernel_is_offered_for_lines(kind: object, what: str, target: str) -> None:
    from spcomp.compiler import plan_for

    shape = {"Sq": 4096, "D": 64, "Dv": 64, "Hq": 4, "Hkv": 4}
    with pytest.raises(sp.SpcompError) as caught:
        plan_for(minference(kind=kind), shape, "float16", None, {}, target)
    assert f"CannotLower: {what}" in str(caught.value)
    assert "no kernel makes it yet" in str(caught.value)
