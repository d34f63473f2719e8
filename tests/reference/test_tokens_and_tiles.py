"""Tokens centred, permuted and judged, and attention by tiles: each word by itself, and what does
not go together."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.backends.reference.pattern import lists
from spcomp.backends.reference.selecting import share
from spcomp.backends.reference.tokens import similarity, whole_numbers
from spcomp.compiler import plan_for
from spcomp.errors import SpcompError
from spcomp.ir.spec import faults
from spcomp.ir.text import parse_program, print_program
from tests import oracle


def tensors(
    b: int = 2, hq: int = 4, hkv: int = 2, sq: int = 70, skv: int = 70, d: int = 8
) -> list[Tensor]:
    torch.manual_seed(hq + sq + skv)
    shapes = [(b, hq, sq, d), (b, hkv, skv, d), (b, hkv, skv, d)]
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def said(call: Callable[[], object]) -> str:
    with pytest.raises(SpcompError) as caught:
        call()
    return "\n".join(n for n in str(caught.value).splitlines() if not n.startswith("  -->"))


def compiled(pattern: sp.Pattern) -> sp.Attention:
    return sp.compile(pattern, backend="reference")


# ---- centred keys --------------------------------------------------------------------------------


@sp.pattern
def centred(q, k, v, *, hook=None, tile=None, quantise=None, mask="causal"):
    return sp.attend(q, sp.centre(k), v, score_mod=hook, tile=tile, quantise=quantise, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sq", "skv"), [(70, 70), (1, 33), (129, 257), (40, 20)])
def test_attention_over_centred_keys_is_that_of_the_keys(
    sq: int, skv: int, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in tensors(sq=sq, skv=skv))
    mask = oracle.causal_mask(sq, skv)
    got = compiled(centred())(q, k, v, return_lse=True)
    want = oracle.attention(q, k, v, mask)
    for found, right, budget in zip(got, want, oracle.budgets(q, k, v, mask), strict=True):
        assert oracle.error(found, right) <= budget


def test_a_score_hook_reads_the_logits_of_the_keys_as_they_are() -> None:
    q, k, v = tensors()
    k = k + 3.0
    got = compiled(centred(hook=lambda s, b, h, i, j: torch.tanh(s)))(q, k, v)
    want, _ = oracle.attention(q, k, v, oracle.causal_mask(70, 70), hook=torch.tanh)
    assert oracle.error(got, want) < 1e-12


# ---- blocks of like tokens -----------------------------------------------------------------------


def test_similarity_is_the_mean_cosine_of_all_pairs() -> None:
    x = torch.randn(2, 3, 21, 5, dtype=torch.float64)
    x[0, 1, 6] = 0.0
    x[1, 2, 13, 2] = math.nan
    got = similarity(x, 4)
    assert got.shape == (2, 3, 6)
    for b in range(2):
        for h in range(3):
            for u in range(6):
                tokens = x[b, h, 4 * u : 4 * u + 4]
                is_judged = u < 5 and (b, h, u) not in {(0, 1, 1), (1, 2, 3)}
                assert bool(got[b, h, u].isnan()) != is_judged
                if is_judged:
                    a = tokens / tokens.norm(dim=1, keepdim=True)
                    torch.testing.assert_close(got[b, h, u], (a @ a.T).mean())


@sp.pattern
def judged(q, k, v, *, block_q=16, block_k=8, least=0.1, how="or", heads="query"):
    like_q, like_k = (
        sp.similar(q, block=block_q, least=least),
        sp.similar(k, block=block_k, least=least),
    )
    chosen = {
        "q": like_q,
        "k": like_k,
        "not k": ~like_k,
        "not not k": ~~like_k,
        "or": like_q | ~like_k,
        "and": ~like_q & like_k & sp.window(20),
    }[how]
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen), mask=None)


@pytest.mark.parametrize("how", ["q", "k", "not k", "not not k", "or", "and"])
@pytest.mark.parametrize("hkv", [1, 2, 4])
def test_similar_is_a_selection_like_any_other(how: str, hkv: int) -> None:
    q, k, v = tensors(hkv=hkv, sq=50, skv=67)
    k[:, :, 8:24] += 2.0
    q[:, 1:3, :32] += 2.0

    def alike(x: Tensor, block: int) -> Tensor:
        return (similarity(x, block) > 0.1).repeat_interleave(block, dim=2)[:, :, : x.shape[2]]

    a = alike(q, 16)[..., None].expand(-1, -1, -1, 67)
    b = alike(k, 8)[:, :, None].repeat_interleave(4 // hkv, dim=1).expand(-1, -1, 50, -1)
    window = oracle.window_mask(50, 67, 20)
    want = {"q": a, "k": b, "not k": ~b, "not not k": b, "or": a | ~b, "and": ~a & b & window}[how]
    attention = compiled(judged(how=how))
    got = attention.to_mask(q, k)
    assert torch.equal(got, want) and 0 < int(got.sum()) < got.numel()
    out, lse = attention(q, k, v, return_lse=True)
    right = oracle.attention(q, k, v, want)
    assert oracle.error(out, right[0]) < 1e-12 and oracle.error(lse, right[1]) < 1e-12


@pytest.mark.parametrize("token", ["along an axis", "drawn"])
def test_tokens_that_are_all_the_same_are_no_more_alike_than_the_same(token: str) -> None:
    torch.manual_seed(1)
    q = torch.randn(8, 2, 1, 7)
    if token == "along an axis":  # their cosine is 1 without any rounding, and not above it
        q = torch.tensor([2.0, 0, 0, 0, 0, 0, 0]).expand(8, 2, 1, 7)
    q, k = q.expand(8, 2, 64, 7).contiguous(), torch.randn(8, 2, 64, 7)
    assert not compiled(judged(how="q", least=1.0)).to_mask(q, k).any()
    assert bool(compiled(judged(how="q", least=0.999)).to_mask(q, k).all())


@sp.pattern
def among(q, k, v, *, block=8, judged=8, heads="query", coarse=0, least=0.1, negated=False, of="k"):
    like = sp.similar(k if of == "k" else q, block=judged, least=least)
    like = ~like if negated else like
    scores = sp.score(q, sp.downsample(k, block=block), heads=heads, among=like, mask=None)
    ranked = sp.regroup(sp.softmax(scores), block=coarse, rows=1) if coarse else scores
    best = sp.topk(ranked, k=2)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best), mask=None)


@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize("heads", ["query", "group"])
def test_a_score_among_like_blocks_has_no_other_candidates(heads: str, negated: bool) -> None:
    q, k, _ = tensors(skv=64)
    k[:, :, 8:32] += 2.0
    held = (similarity(k, 8) > 0.1) ^ negated
    (found,) = lists(among(heads=heads, negated=negated).program, {"q": q, "k": k, "v": k})
    count = held.repeat_interleave(2, dim=1) if heads == "query" else held
    assert torch.equal(found.counts, count.sum(-1).clamp(max=2)[..., None].expand(-1, -1, 70).int())
    for b in range(2):
        for h in range(count.shape[1]):
            kept = found.indices[b, h][found.indices[b, h] >= 0]
            assert bool(count[b, h][kept.long()].all())


def test_blocks_left_out_count_as_0_in_scores_that_are_regrouped() -> None:
    q, k, _ = tensors(skv=64)
    k[:, :, 8:32] += 2.0
    held = (similarity(k, 8) > 0.1).repeat_interleave(2, dim=1)
    (found,) = lists(among(coarse=16).program, {"q": q, "k": k, "v": k})
    means = k.unflatten(2, (8, 8)).mean(3).repeat_interleave(2, dim=1)
    logits = (q @ means.mT / math.sqrt(8)).masked_fill(~held[:, :, None], -math.inf)
    chances = torch.softmax(logits, -1).nan_to_num(0.0)
    torch.testing.assert_close(found.scores, chances.unflatten(3, (4, 2)).sum(-1))


def test_probabilities_joined_in_a_group_keep_the_candidates_of_its_keys() -> None:
    q, k, v = tensors(skv=64)
    k[:, :, 8:32] += 2.0
    held = similarity(k, 8) > 0.1

    @sp.pattern
    def joined(q, k, v):
        like = sp.similar(k, block=8, least=0.1)
        chances = sp.softmax(
            sp.score(q, sp.downsample(k, block=8), among=like, mask=None), heads="group"
        )
        best = sp.topk(chances, k=2)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best), mask=None)

    (found,) = lists(joined().program, {"q": q, "k": k, "v": v})
    means = k.unflatten(2, (8, 8)).mean(3).repeat_interleave(2, dim=1)
    logits = q @ means.mT / math.sqrt(8)
    logits = logits.masked_fill(~held.repeat_interleave(2, dim=1)[:, :, None], -math.inf)
    chances = torch.softmax(logits, -1).nan_to_num(0.0)
    torch.testing.assert_close(found.scores, chances.unflatten(1, (2, 2)).sum(2))
    counts = held.sum(-1).clamp(max=2)[..., None].expand(-1, -1, 70)
    assert torch.equal(found.counts, counts.int()) and int(counts.sum()) > 0


def test_sinks_take_their_share_of_what_a_skip_leaves() -> None:
    q, k, v = tensors()
    sinks = torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)

    @sp.pattern
    def both(q, k, v, *, sinks=None):
        return sp.attend(q, k, v, tile=(16, 8), skip=1.0, sinks=sinks)

    out, lse = compiled(both())(q, k, v, return_lse=True)
    whole = compiled(sp.pattern(lambda q, k, v: sp.attend(q, k, v))())(q, k, v)
    assert oracle.error(out, whole) > 1e-3  # tiles are left out
    share = torch.sigmoid(lse - sinks[:, None].to(lse.dtype))[..., None]
    got, same = compiled(both(sinks=sinks))(q, k, v, return_lse=True)
    assert torch.equal(same, lse) and oracle.error(got, out * share) < 1e-12


@pytest.mark.parametrize("units", [1, 3, 7, 10, 128])
@pytest.mark.parametrize("share_of", [(1, 100), (1, 3), (3, 10), (29, 100), (1, 2), (1, 1)])
def test_a_share_rounded_down_is_1_at_least(units: int, share_of: tuple[int, int]) -> None:
    @sp.pattern
    def some(q, k, v):
        scores = sp.score(q, sp.downsample(k, block=4), mask=None)
        best = sp.topk(scores, fraction=share_of[0] / share_of[1], round="down")
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best), mask=None)

    q, k, _ = tensors(sq=1, skv=4 * units - 1)
    (found,) = lists(some().program, {"q": q, "k": k, "v": k})
    assert bool((found.counts == max(1, share_of[0] * units // share_of[1])).all())


def test_a_whole_share_is_all_however_its_sum_is_rounded() -> None:
    torch.manual_seed(0)
    scores = torch.softmax(torch.randn(1, 1, 500, 333), dim=-1)
    able = torch.ones_like(scores, dtype=torch.bool)
    for crossing in ("keep", "drop"):
        kept = share(scores, able, torch.zeros_like(able), 1.0, crossing, 0)  # type: ignore[arg-type]
        assert bool(kept.all()) or crossing == "keep"
        assert float(scores.masked_fill(kept, 0).sum(-1).max()) < 1e-6


# ---- tiles ---------------------------------------------------------------------------------------


def test_whole_numbers_round_halves_away_from_zero() -> None:
    most = 127 * (1 - 1e-7)  # so that delta is 1, and halves are halves
    x = torch.tensor([most, 0.5, -0.5, 1.5, -1.5, 0.49, -2.5, 0.0], dtype=torch.float64)
    numbers, delta = whole_numbers(x[None, None, :, None], 8)
    assert bool((delta == 1).all())
    assert numbers.flatten().tolist() == [127, 1, -1, 2, -2, 0, -3, 0]
    short, deltas = whole_numbers(torch.tensor([[[[1.0]], [[4.0]]]]).expand(1, 2, 5, 1), 3)
    assert short.shape == (1, 2, 5, 1) and bool((short == 127).all())
    torch.testing.assert_close(deltas[0, :, 0, 0], torch.tensor([1.0, 4.0]) / 127 + 1e-7)
    zeros, _ = whole_numbers(torch.zeros(1, 1, 5, 2), 3)
    assert not zeros.any()


@sp.pattern
def tiled(q, k, v, *, skip=None, tile=(16, 8), quantise=None, mask=None, hook=None):
    return sp.attend(q, k, v, mask=mask, tile=tile, skip=skip, quantise=quantise, score_mod=hook)


def test_what_is_skipped_is_told_by_the_logits_after_the_score_hook() -> None:
    q, k, v = tensors(hq=1, hkv=1, b=1, sq=16, skv=40)
    # The hook pushes tile 2 far down, and tile 4, the last one, further; only tile 2 may go.
    far = torch.zeros(40)
    far[16:24], far[32:] = -100.0, -200.0

    def hook(s, b, h, i, j):
        return s + far[j]

    attention = compiled(tiled(skip=60.0, hook=hook))
    mask = attention.to_mask(q, k)[0, 0]
    assert not mask[:, 16:24].any() and bool(mask[:, :16].all()) and bool(mask[:, 24:].all())
    got, lse = attention(q, k, v, return_lse=True)
    want = oracle.attention(q, k, v, mask, hook=lambda s: s + far)
    assert oracle.error(got, want[0]) < 1e-12 and oracle.error(lse, want[1]) < 1e-12


def test_a_tile_is_kept_for_the_sake_of_one_row() -> None:
    q, k, _ = tensors(hq=1, hkv=1, b=1, sq=32, skv=24)
    k[:, :, :8] = 0.0
    k[:, :, 0, 0] = 50.0
    q[...] = 0.0
    q[..., 0] = 4.0
    q[0, 0, 20, 0] = 0.0
    mask = compiled(tiled(skip=5.0)).to_mask(q, k)[0, 0]
    assert not mask[:16, 8:16].any()  # every row of the first tile has better before
    assert bool(mask[16:, 8:16].all())  # row 20 has not


# ---- what does not go together -------------------------------------------------------------------

A, B = torch.randperm(70), torch.randperm(70)


@sp.pattern
def of_two_orders(q, k, v):
    return sp.attend(q, sp.permute(k, A), sp.permute(v, B), mask=None)


@sp.pattern
def scored_elsewhere(q, k, v):
    best = sp.topk(sp.score(q, sp.downsample(k, block=8), mask=None), k=2)
    k, v = sp.permute(k, A), sp.permute(v, A)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best), mask=None)


@sp.pattern
def judged_elsewhere(q, k, v):
    like = sp.similar(q, block=8, least=0.5)
    return sp.attend(sp.permute(q, A), sp.gather(k, like), sp.gather(v, like), mask=None)


@sp.pattern
def windowed(q, k, v):
    q, k, v = (sp.permute(x, A) for x in (q, k, v))
    return sp.attend(q, sp.gather(k, sp.window(4)), sp.gather(v, sp.window(4)), mask=None)


@sp.pattern
def causal_at_last(q, k, v):
    return sp.attend(sp.permute(q, A), k, v)


@sp.pattern
def merged_orders(q, k, v):
    return sp.merge(
        sp.attend(q, k, v, mask=None),
        sp.attend(sp.permute(q, A), k, v, mask=None),
    )


@sp.pattern
def cached_centre(q, k, v):
    best = sp.topk(sp.score(q, sp.cached(sp.downsample(sp.centre(k), block=8))), k=2)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


@sp.pattern
def centred_queries(q, k, v):
    return sp.attend(q, sp.centre(v), v)


@sp.pattern
def judged_values(q, k, v):
    like = sp.similar(v, block=8, least=0.5)
    return sp.attend(q, sp.gather(k, like), sp.gather(v, like))


@sp.pattern
def tiles_of_two(q, k, v):
    return sp.attend(q, [sp.stream(k, v), sp.stream(k, v)], tile=(8, 8), skip=1.0)


@sp.pattern
def tiles_of_units(q, k, v):
    pair = sp.stream(sp.downsample(k, block=4), sp.downsample(v, block=4))
    return sp.attend(q, [pair], tile=(8, 8), skip=1.0)


REFUSED = [
    (of_two_orders, "values in another order than their keys cannot be lowered: a place would then "
     "mean two tokens."),
    (scored_elsewhere, "keys that are scored in another order than those attended to cannot be "
     "lowered: a place would then mean two tokens."),
    (judged_elsewhere, "queries that are judged in another order than those that attend cannot be "
     "lowered: a place would then mean two tokens."),
    (windowed, "the selection local() over permuted tokens cannot be lowered: a place in the new "
     "order tells nothing of what is past."),
    (causal_at_last, "causal attention over permuted tokens cannot be lowered: a place in the new "
     "order tells nothing of what is past."),
    (merged_orders, "a part of a merge in another order than its first part cannot be lowered: a "
     "place would then mean two tokens."),
    (cached_centre, "a cache of something made from a centre cannot be lowered: its units would "
     "all change with every token appended."),
    (tiles_of_two, "a skip of tiles over 2 streams cannot be lowered: their tiles are those of one "
     "stream of tokens."),
    (tiles_of_units, "a skip of tiles of units cannot be lowered: their tiles are those of one "
     "stream of tokens."),
    (lambda: among(judged=16), "a score of units of 8 keys every 8 among blocks of 16 keys cannot "
     "be lowered: each unit is left out or not as one."),
    (lambda: among(of="q"), "a score of units of 8 keys every 8 among blocks of 8 queries cannot "
     "be lowered: each unit is left out or not as one."),
    (lambda: among(heads="all"), "a score that all heads share among keys that are judged for each "
     "head cannot be lowered: a unit may be alike in one head and not in another."),
    (lambda: tiled(tile=None, skip=1.0), "a skip of tiles cannot be lowered: no tile of query rows "
     "and key tokens is given."),
    (lambda: tiled(tile=None, quantise="int8"), "quantised products cannot be lowered: no tile of "
     "query rows and key tokens is given."),
]  # fmt: skip


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_what_does_not_fit_is_refused_when_compiled(make: Callable[..., object], text: str) -> None:
    lines = said(lambda: sp.compile(make())).splitlines()  # type: ignore[arg-type]
    assert lines[0] == f"CannotLower: {text}" and lines[1].startswith("  help: ")


def test_stages_of_the_wrong_input_are_refused() -> None:
    assert said(lambda: sp.compile(centred_queries())) == (
        "WrongStage: centre takes keys as its x, but was given something made from the value "
        "input.\n  help: only the mean of the keys moves all scores of a row alike: centre(k)."
    )
    assert said(lambda: sp.compile(judged_values())) == (
        "WrongStage: similar takes queries or keys as its x, but was given something made from the "
        "value input.\n  help: judge what is scored: similar(q, ...) or similar(k, ...)."
    )
    assert said(lambda: tiled(tile=16)).splitlines()[0] == (
        "NotANumber: attend was given tile = 16 of type int, where a pair of (query rows, key "
        "tokens) is needed."
    )
    assert said(lambda: tiled(tile=(16, 0))).splitlines()[0] == (
        "NegativeCount: attend was given tile = 0, which is below 1."
    )
    assert said(lambda: tiled(quantise="int4")) == (
        "UnknownChoice: attend was given quantise = 'int4'.\n  help: choose one of 'int8'."
    )


def test_a_group_cannot_share_what_is_judged_for_each_query_head() -> None:
    q, k, v = tensors()
    each = among(heads="group", least=torch.zeros(4))
    assert said(lambda: compiled(each)(q, k, v)).splitlines()[0] == (
        "ShapeMismatch: blocks that are judged for 4 heads and a use for 2 do not agree: 2 is not "
        "a multiple of 4."
    )


UNMADE = [
    (lambda: centred(), "keys less their mean"),
    (lambda: judged(), "the similarity of the tokens of a block"),
    (lambda: tiled(skip=1.0), "attention that skips tiles"),
    (lambda: tiled(quantise="int8"), "attention with products in int8"),
    (lambda: begun(), "a score of units that have only begun"),
]


@sp.pattern
def begun(q, k, v):
    scores = sp.score(sp.downsample(q, block=64), sp.downsample(k, block=64), mask="begun")
    best = sp.topk(scores, k=2)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


@pytest.mark.parametrize("target", ["sm90", "ascend910b"])
@pytest.mark.parametrize(("make", "what"), UNMADE, ids=[what for _, what in UNMADE])
def test_lowering_names_what_has_no_kernel(
    make: Callable[[], sp.Pattern], what: str, target: str
) -> None:
    shape = {"Sq": 256, "D": 64, "Dv": 64, "Hq": 4, "Hkv": 2}
    assert said(lambda: plan_for(make(), shape, "float16", None, {}, target)) == (
        f"CannotLower: {what} cannot be lowered: no kernel makes it yet.\n"
        "  help: use backend='reference'."
    )


def test_a_tile_alone_changes_nothing_and_is_lowered() -> None:
    q, k, v = tensors()
    assert torch.equal(compiled(tiled())(q, k, v), compiled(tiled(tile=None))(q, k, v))
    shape = {"Sq": 256, "D": 64, "Dv": 64, "Hq": 4, "Hkv": 2}
    plan, _, _ = plan_for(tiled(), shape, "float16", None, {}, "sm90")
    assert plan.launches()


@pytest.mark.parametrize(
    "made",
    [
        centred(),
        judged(how="or", least=torch.zeros(4)),
        among(coarse=16),
        tiled(skip=2.5),
        tiled(skip=torch.ones(2), quantise="int8"),
        tiled(skip=math.inf),
        begun(),
    ],
    ids=lambda p: p.name,
)
def test_every_new_stage_reads_back_from_text(made: sp.Pattern) -> None:
    from spcomp.compiler import normalise

    program = made.program
    assert parse_program(print_program(program)) == program
    assert not faults(program)
    after = normalise(program)
    assert parse_program(print_program(after)) == after
    assert not faults(after, "infer_masks")


@pytest.mark.parametrize(("sq", "skv"), [(70, 70), (64, 100), (100, 37)])
def test_a_unit_that_has_begun_is_a_candidate(sq: int, skv: int) -> None:
    q, k, _ = tensors(sq=sq, skv=skv)

    @sp.pattern
    def all_begun(q, k, v):
        scores = sp.score(sp.downsample(q, block=8), sp.downsample(k, block=16), mask="begun")
        best = sp.topk(scores, k=100)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    (found,) = lists(all_begun().program, {"q": q, "k": k, "v": k})
    for row in range(-(-sq // 8)):
        newest = min(8 * row + 7, sq - 1) + skv - sq
        want = sum(16 * u <= newest for u in range(-(-skv // 16)))
        assert bool((found.counts[:, :, row] == want).all())
