"""SpargeAttn against a second opinion written from the paper and its code: the map of blocks first,
then the output, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.errors import SpcompError
from spcomp.patterns.spargeattn import spargeattn
from tests import oracle

SHAPES = [  # B, Hq, Hkv, Sq, Skv, D
    (1, 1, 1, 64, 64, 16),
    (2, 4, 1, 130, 130, 16),
    (3, 3, 1, 129, 257, 20),
    (1, 16, 1, 1, 77, 16),
    (2, 8, 2, 100, 37, 8),
    (1, 4, 4, 255, 255, 16),
    (1, 32, 2, 65, 97, 8),
]
BLOCKS = [(32, 16), (16, 32), (16, 16)]
NEAR = 1e-9


@dataclass(frozen=True, slots=True)
class Setting:
    """The hyper-parameters of one call, per query head where they may differ."""

    block_q: int
    block_k: int
    tau: list[float] | None = None
    kappa: tuple[int, int] | None = None
    theta: list[float] | None = None
    causal: bool = False
    attention_sink: bool = False


def pairwise_cosine(x: Tensor, block: int) -> list[float]:
    """Give the mean cosine over all pairs of each block of x [S, D]; NaN where it is not judged."""
    found = []
    for first in range(0, x.shape[0], block):
        tokens = x[first : first + block]
        if len(tokens) < block or bool((tokens.abs().amax(dim=1) == 0).any()):
            found.append(math.nan)
            continue
        cosines = [torch.cosine_similarity(a, tokens, dim=-1, eps=0).mean() for a in tokens]
        found.append(float(torch.stack(cosines).mean()))
    return found


def means(x: Tensor, block: int, stored: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([stored(x[i : i + block].mean(dim=0)) for i in range(0, x.shape[0], block)])


def row_of_map(
    scores: Tensor, able: list[int], tau: float | None, kept_blocks: int
) -> tuple[set[int], float]:
    """Choose the blocks of one row, and give the least distance of what decided it."""
    if not able:
        return set(), math.inf
    chances = torch.softmax(scores[able], dim=0).tolist()
    order = sorted(range(len(able)), key=lambda n: (-chances[n], able[n]))
    ordered = [float(scores[able[n]]) for n in order]

    def gap(kept: int) -> float:
        return ordered[kept - 1] - ordered[kept] if kept < len(ordered) else math.inf

    if tau is None:
        return {able[n] for n in order[:kept_blocks]}, gap(kept_blocks)
    reached, kept, near = 0.0, 0, math.inf
    for n in order:
        reached += chances[n]
        if tau < 1:
            near = min(near, abs(reached - tau))
        if reached <= tau or tau >= 1:
            kept += 1
    kept = max(kept, 1)
    return {able[n] for n in order[:kept]}, min(near, gap(kept))


def block_map(
    q: Tensor, k: Tensor, how: Setting, head: int, stored: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Give the map of one head, [Nq, Nk], and how near each row is to being another, [Nq]."""
    (sq, d), skv = q.shape, k.shape[0]
    keys = stored(k - k.mean(dim=0))
    rows, cols = -(-sq // how.block_q), -(-skv // how.block_k)
    theta = how.theta[head] if how.theta else 0.6
    like_q, like_k = pairwise_cosine(q, how.block_q), pairwise_cosine(keys, how.block_k)
    near_k = min((abs(s - theta) for s in like_k if not math.isnan(s)), default=math.inf)
    scores = (means(q, how.block_q, stored) @ means(keys, how.block_k, stored).T) / math.sqrt(d)
    amount = max(1, how.kappa[0] * cols // how.kappa[1]) if how.kappa else 0
    tau = how.tau[head] if how.tau else None
    held = torch.zeros(rows, cols, dtype=torch.bool)
    near = torch.full((rows,), near_k, dtype=torch.float64)
    for m in range(rows):
        newest = min((m + 1) * how.block_q, sq) - 1 + skv - sq
        begun = [n for n in range(cols) if not how.causal or n * how.block_k <= newest]
        able = [n for n in begun if like_k[n] > theta]
        kept, distance = row_of_map(scores[m], able, tau, amount)
        near_q = math.inf if math.isnan(like_q[m]) else abs(like_q[m] - theta)
        near[m] = min(near_k, near_q, distance)
        for n in begun:
            dense = not like_q[m] > theta or not like_k[n] > theta
            held[m, n] = dense or n in kept or (how.attention_sink and n == 0)
    return held, near


def maps(
    q: Tensor, k: Tensor, how: Setting, stored: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor, Tensor]:
    """Give the token mask [B,Hq,Sq,Skv], and how near each query's row of blocks is to another."""
    batch, heads, sq, _ = q.shape
    skv, group = k.shape[2], heads // k.shape[1]
    mask = torch.zeros(batch, heads, sq, skv, dtype=torch.bool)
    near = torch.zeros(batch, heads, sq, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            held, distance = block_map(q[b, h].double(), k[b, h // group].double(), how, h, stored)
            rows = held.repeat_interleave(how.block_q, 0)[:sq]
            mask[b, h] = rows.repeat_interleave(how.block_k, 1)[:, :skv]
            near[b, h] = distance.repeat_interleave(how.block_q)[:sq]
    return (mask & oracle.causal_mask(sq, skv) if how.causal else mask), near


def whole(x: Tensor) -> tuple[Tensor, float]:
    """Quantise a block: whole numbers and their delta, number by number."""
    delta = float(x.abs().max()) / 127 + 1e-7
    numbers = [
        [math.copysign(math.floor(abs(n) / delta + 0.5), n) for n in row] for row in x.tolist()
    ]
    return torch.tensor(numbers, dtype=torch.float64), delta


def online(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, tile: tuple[int, int], lam: float, int8: bool
) -> tuple[Tensor, Tensor, int, float]:
    """Attend with one head as the kernel does: tiles by ascending keys, a running maximum in units
    of log 2. Also give how many tiles were dropped, and how near a tile was to the other fate."""
    (sq, d), skv = q.shape, k.shape[0]
    keys = k - k.mean(dim=0)
    out = torch.zeros(sq, v.shape[1], dtype=torch.float64)
    lse = torch.full((sq,), -math.inf, dtype=torch.float64)
    dropped, near = 0, math.inf
    for top in range(0, sq, tile[0]):
        rows = range(top, min(top + tile[0], sq))
        starts = range(0, skv, tile[1])
        visited = [j for j in starts if bool(mask[rows, j : j + tile[1]].any())]
        best, total, sums = [-math.inf] * len(rows), [0.0] * len(rows), torch.zeros_like(out[rows])
        for j in visited:
            x, y = q[rows], k[j : j + tile[1]]
            logits = x @ y.T
            if int8:
                (a, da), (b, db) = whole(x), whole(keys[j : j + tile[1]])
                logits = a @ b.T * da * db + (x @ k.mean(dim=0))[:, None]
            logits = logits / math.sqrt(d) * math.log2(math.e)
            logits = logits.masked_fill(~mask[rows, j : j + tile[1]], -math.inf)
            highest = logits.amax(dim=1).tolist()
            gains = [
                h - m if h > -math.inf else -math.inf for h, m in zip(highest, best, strict=True)
            ]
            near = min(near, abs(max(gains) + lam)) if math.isfinite(max(gains)) else near
            skip = max(gains) + lam <= 0 and j != visited[-1]
            dropped += skip
            for i, high in enumerate(highest):
                newest = max(best[i], high)
                if newest == -math.inf:
                    continue
                shrink = 2.0 ** (best[i] - newest) if best[i] > -math.inf else 0.0
                total[i] *= shrink
                sums[i] *= shrink
                best[i] = newest
                if not skip:
                    weights = 2.0 ** (logits[i] - newest)
                    total[i] += float(weights.sum())
                    sums[i] += weights @ v[j : j + tile[1]]
        for i, row in enumerate(rows):
            if total[i] > 0:
                out[row] = sums[i] / total[i]
                lse[row] = (best[i] + math.log2(total[i])) * math.log(2)
    return out, lse, dropped, near


def tensors(shape: tuple[int, ...], sharp: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tokens that come in runs of 16, some of them around a direction of their own."""
    b, hq, hkv, sq, skv, d = shape
    torch.manual_seed(sum(shape))

    def runs(heads: int, tokens: int) -> Tensor:
        count = -(-tokens // 16)
        strength = 3.0 * torch.rand(b, heads, count, 1, dtype=torch.float64)
        base = strength * torch.randn(b, heads, count, d, dtype=torch.float64)
        noise = torch.randn(b, heads, tokens, d, dtype=torch.float64)
        return base.repeat_interleave(16, dim=2)[:, :, :tokens] + noise

    q, k = sharp * runs(hq, sq), runs(hkv, skv) + 0.5
    return q, k, torch.randn(b, hkv, skv, d, dtype=torch.float64)


def assert_same_map(got: Tensor, want: Tensor, near: Tensor, eps: float = NEAR) -> None:
    differs = (got != want).any(dim=-1)
    assert not (differs & (near > eps)).any()
    assert float((near > eps).float().mean()) > 0.9  # little is left to rounding


# ---- the map, and the output of it ---------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tau", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_and_output_are_those_of_the_paper(
    shape: tuple[int, ...], block_q: int, block_k: int, tau: float, causal: bool
) -> None:
    q, k, v = tensors(shape)
    how = Setting(block_q, block_k, [tau] * shape[1], theta=[0.3] * shape[1], causal=causal)
    made = spargeattn(tau=tau, theta=0.3, causal=causal, block_q=block_q, block_k=block_k)
    attention = sp.compile(made, backend="reference")
    want, near = maps(q, k, how)
    got = attention.to_mask(q, k)
    assert_same_map(got, want, near)
    out, lse = attention(q, k, v, return_lse=True)
    expected, expected_lse = oracle.attention(q, k, v, got)
    assert oracle.error(out, expected) < 1e-12
    assert oracle.error(lse, expected_lse) < 1e-12


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kappa", [(1, 100), (3, 10), (1, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_share_of_all_blocks_is_kept(
    shape: tuple[int, ...], kappa: tuple[int, int], causal: bool
) -> None:
    q, k, _ = tensors(shape)
    how = Setting(32, 16, kappa=kappa, theta=[-0.1] * shape[1], causal=causal)
    made = spargeattn(kappa=kappa[0] / kappa[1], theta=-0.1, causal=causal, block_q=32, block_k=16)
    want, near = maps(q, k, how)
    assert_same_map(sp.compile(made, backend="reference").to_mask(q, k), want, near)


def test_the_map_is_sparse_where_tokens_are_alike_and_dense_where_not() -> None:
    q, k, _ = tensors((1, 4, 2, 256, 256, 16))
    density = {}
    for theta in (-0.1, 0.3, 0.7, 1.0):
        made = spargeattn(tau=0.5, theta=theta, block_q=16, block_k=16)
        density[theta] = float(sp.compile(made, backend="reference").to_mask(q, k).float().mean())
    assert density[-0.1] < 0.4 < density[0.3] + 0.2 < density[0.7] + 0.2
    assert density[1.0] == 1.0


def test_tokens_that_are_all_the_same_are_no_more_alike_than_the_same() -> None:
    torch.manual_seed(1)
    q = torch.randn(1, 2, 1, 7).expand(1, 2, 64, 7).contiguous()
    k = torch.randn(1, 2, 64, 7)
    made = spargeattn(tau=0.1, theta=1.0, block_q=16, block_k=16)
    assert bool(sp.compile(made, backend="reference").to_mask(q, k).all())


@pytest.mark.parametrize("which", ["query heads", "KV heads"])
def test_each_head_has_its_own_thresholds(which: str) -> None:
    q, k, v = tensors((2, 4, 2, 130, 130, 16))
    theta = [-0.1, 0.2, 0.4, 1.0] if which == "query heads" else [0.1, 0.4]
    each = theta if which == "query heads" else [0.1, 0.1, 0.4, 0.4]
    tau = [0.2, 0.5, 0.9, 1.0]
    how = Setting(32, 16, tau, theta=each)
    made = spargeattn(tau=torch.tensor(tau), theta=torch.tensor(theta), block_q=32, block_k=16)
    attention = sp.compile(made, backend="reference")
    # The table is float32, so each threshold is the float32 nearest to it.
    how = Setting(32, 16, torch.tensor(tau).tolist(), theta=torch.tensor(each).tolist())
    want, near = maps(q, k, how)
    got = attention.to_mask(q, k)
    assert_same_map(got, want, near)
    assert oracle.error(attention(q, k, v), oracle.attention(q, k, v, got)[0]) < 1e-12


def test_the_sink_is_the_first_key_block() -> None:
    q, k, _ = tensors((1, 2, 2, 160, 160, 16))
    how = Setting(32, 16, [0.1] * 2, theta=[-0.1] * 2, causal=True, attention_sink=True)
    made = spargeattn(tau=0.1, theta=-0.1, causal=True, attention_sink=True, block_q=32, block_k=16)
    want, near = maps(q, k, how)
    got = sp.compile(made, backend="reference").to_mask(q, k)
    assert_same_map(got, want, near)
    assert bool(got[..., 0].all())
    without = spargeattn(tau=0.1, theta=-0.1, causal=True, block_q=32, block_k=16)
    assert not bool(sp.compile(without, backend="reference").to_mask(q, k)[..., 0].all())


def test_a_causal_row_may_see_nothing_and_gives_0() -> None:
    # Block 1 of the keys is the best of the first row of blocks, and its first queries are before.
    torch.manual_seed(3)
    q, k = torch.ones(1, 1, 64, 8).double(), torch.ones(1, 1, 64, 8).double()
    k[:, :, 16:32] *= 4
    k[:, :, 32:] *= -1
    v = torch.randn(1, 1, 64, 8).double()
    made = spargeattn(tau=0.0, theta=-0.1, causal=True, block_q=32, block_k=16)
    attention = sp.compile(made, backend="reference")
    out, lse = attention(q, k, v, return_lse=True)
    assert not out[:, :, :16].any() and bool((lse[:, :, :16] == -math.inf).all())
    assert bool(out[:, :, 16:32].any()) and bool(lse[:, :, 16:].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_narrow_inputs_choose_and_attend_as_float64_does(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors((2, 4, 2, 250, 250, 16)))
    how = Setting(32, 16, [0.7] * 4, theta=[0.3] * 4)
    made = spargeattn(tau=0.7, theta=0.3, block_q=32, block_k=16)
    attention = sp.compile(made, backend="reference")
    want, near = maps(q, k, how, lambda x: x.to(dtype).double())
    got = attention.to_mask(q, k)
    # A mean or a key that float32 rounds to the neighbour in `dtype` moves a score by that step.
    step = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    differs = (got != want).any(dim=-1)
    assert not (differs & (near > step)).any()
    assert float((near > step).float().mean()) > (0.9 if dtype == torch.float32 else 0.25)
    out, lse = attention(q, k, v, return_lse=True)
    expected = oracle.attention(q, k, v, got)
    budgets = oracle.budgets(q, k, v, got)
    for found, right, budget in zip((out, lse), expected, budgets, strict=True):
        assert oracle.error(found, right) <= budget


def test_strides_of_the_caller_change_nothing() -> None:
    q, k, v = tensors((2, 4, 2, 130, 100, 16))
    wide = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    made = spargeattn(tau=0.5, theta=0.2, lam=4.0, int8=True, block_q=32, block_k=16)
    attention = sp.compile(made, backend="reference")
    assert torch.equal(attention(q, k, v), attention(*wide))


def test_a_number_that_is_none_makes_its_block_dense_and_stays_there() -> None:
    q, k, v = tensors((1, 1, 1, 96, 96, 16))
    q[0, 0, 40, 3] = math.nan
    made = spargeattn(tau=0.3, theta=-0.1, block_q=32, block_k=16)
    attention = sp.compile(made, backend="reference")
    mask, out = attention.to_mask(q, k), attention(q, k, v)
    assert bool(mask[0, 0, 32:64].all())
    assert bool(out[0, 0, 40].isnan().all())
    assert not bool(out[0, 0, :32].isnan().any() | out[0, 0, 41:].isnan().any())


# ---- tiles that are skipped, and products in whole numbers ---------------------------------------


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("int8", [False, True], ids=["exact", "int8"])
@pytest.mark.parametrize("lam", [0.0, 2.0, 6.0, math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_are_skipped_as_the_online_softmax_skips_them(
    shape: tuple[int, ...], lam: float, int8: bool, causal: bool
) -> None:
    q, k, v = tensors(shape, sharp=2.5)
    made = spargeattn(tau=0.9, theta=0.2, lam=lam, int8=int8, causal=causal, block_q=32, block_k=16)
    chosen = spargeattn(tau=0.9, theta=0.2, causal=causal, block_q=32, block_k=16)
    mask = sp.compile(chosen, backend="reference").to_mask(q, k)
    attention = sp.compile(made, backend="reference")
    out, lse = attention(q, k, v, return_lse=True)
    left = attention.to_mask(q, k)
    group, dropped = shape[1] // shape[2], 0
    for b in range(shape[0]):
        for h in range(shape[1]):
            want, want_lse, gone, near = online(
                q[b, h], k[b, h // group], v[b, h // group], mask[b, h], (32, 16), lam, int8
            )
            assert near > NEAR  # no tile's fate hangs on rounding
            assert oracle.error(out[b, h], want) < 1e-11
            assert oracle.error(lse[b, h], want_lse) < 1e-11
            dropped += gone
    assert (dropped > 0) == bool((left != mask).any())
    if lam == 0.0 and shape[3] > 64 and shape[4] > 64:
        assert dropped > 0
    if lam == math.inf:
        assert dropped == 0


def test_each_head_skips_at_its_own_distance() -> None:
    q, k, v = tensors((1, 4, 2, 130, 130, 16), sharp=2.5)
    lams = [0.0, 3.0]
    made = spargeattn(tau=1.0, theta=-0.1, lam=torch.tensor(lams), block_q=32, block_k=16)
    out = sp.compile(made, backend="reference")(q, k, v)
    for h in range(4):
        mask = torch.ones(130, 130, dtype=torch.bool)
        want, _, dropped, _ = online(
            q[0, h], k[0, h // 2], v[0, h // 2], mask, (32, 16), lams[h // 2], False
        )
        assert oracle.error(out[0, h], want) < 1e-11
        assert dropped > 0 or h >= 2


def test_chunks_of_rows_that_cut_a_tile_change_nothing() -> None:
    from spcomp.backends.reference.pattern import run_program, selection_mask

    q, k, v = tensors((1, 2, 1, 150, 130, 16), sharp=2.5)
    made = spargeattn(tau=0.9, theta=0.2, lam=2.0, int8=True, block_q=32, block_k=16)
    given = {"q": q, "k": k, "v": v}
    whole_call = run_program(made.program, given)
    for rows in (7, 32, 50):
        cut = run_program(made.program, given, chunk_rows=rows)
        for a, b in zip(cut, whole_call, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    mask = sp.compile(made, backend="reference").to_mask(q, k)
    assert torch.equal(selection_mask(made.program, given, slice(41, 77)), mask[:, :, 41:77])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_numbers_stay_near_what_they_stand_for(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors((2, 4, 2, 250, 250, 16)))
    dense = spargeattn(theta=1.0, int8=True, block_q=32, block_k=16)
    out, lse = sp.compile(dense, backend="reference")(q, k, v, return_lse=True)
    want, want_lse = oracle.attention(q, k, v, torch.ones(250, 250, dtype=torch.bool))
    keys = k.double() - k.double().mean(dim=2, keepdim=True)
    # A number is off by half a delta at most, so is a product by D halves of either side's.
    worst = max(float(x.abs().max()) for x in (q.double(), keys)) ** 2 * 16 / 127 / 4
    assert 1e-6 < oracle.error(lse, want_lse) < worst
    assert oracle.error(out, want) < worst


# ---- tokens in another order ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] == s[4]], ids=str)
def test_permuted_tokens_come_back_in_their_places(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, v = tensors(shape)
    order = torch.randperm(shape[3])
    options = {"tau": 0.5, "theta": 0.1, "lam": 3.0, "block_q": 32, "block_k": 16}
    plain = sp.compile(spargeattn(**options), backend="reference")
    moved = sp.compile(spargeattn(**options, order=order.to(dtype)), backend="reference")
    out, lse = moved(q, k, v, return_lse=True)
    want, want_lse = plain(*(x[:, :, order] for x in (q, k, v)), return_lse=True)
    assert oracle.error(out[:, :, order], want) < 1e-13
    assert oracle.error(lse[:, :, order], want_lse) < 1e-13
    mask = moved.to_mask(q, k)
    inside = plain.to_mask(q[:, :, order], k[:, :, order])
    assert torch.equal(mask[:, :, order][..., order], inside)
    assert not torch.equal(mask, plain.to_mask(q, k)) or shape[3] < 65


def test_dense_attention_is_the_same_in_any_order() -> None:
    q, k, v = tensors((2, 4, 2, 130, 130, 16))
    made = spargeattn(theta=1.0, order=torch.randperm(130), block_q=32, block_k=16)
    out = sp.compile(made, backend="reference")(q, k, v)
    want, _ = oracle.attention(q, k, v, torch.ones(130, 130, dtype=torch.bool))
    assert oracle.error(out, want) < 1e-12


# ---- what is refused -----------------------------------------------------------------------------


def said(call: Callable[[], object]) -> str:
    with pytest.raises(SpcompError) as caught:
        call()
    return "\n".join(n for n in str(caught.value).splitlines() if not n.startswith("  -->"))


OUT_OF_DOMAIN = [
    (
        {"theta": 1.5},
        "NotANumber: similar was given least = 1.5 of type float, where a cosine from -1 to 1 is "
        "needed.\n  help: pass a cosine from -1 to 1.",
    ),
    (
        {"tau": -0.1},
        "NotANumber: topp was given p = -0.1 of type float, where a share from 0 to 1 is needed.\n"
        "  help: pass a share from 0 to 1.",
    ),
    (
        {"kappa": 0.0},
        "NotANumber: topk was given fraction = 0.0 of type float, where a share above 0 and at "
        "most 1 is needed.\n  help: pass a share above 0 and at most 1.",
    ),
    (
        {"lam": -1.0},
        "NotANumber: attend was given skip = -1.0 of type float, where a number of 0 or more is "
        "needed.\n  help: pass a number of 0 or more.",
    ),
    (
        {"lam": math.nan},
        "NotANumber: attend was given skip = nan of type float, where a number of 0 or more is "
        "needed.\n  help: pass a number of 0 or more.",
    ),
    (
        {"theta": math.nan},
        "NotANumber: similar was given least = nan of type float, where a cosine from -1 to 1 is "
        "needed.\n  help: pass a cosine from -1 to 1.",
    ),
    (
        {"block_k": 0},
        "NegativeCount: similar was given block = 0, which is below 1.\n"
        "  help: block counts the tokens of a block; give 1 or more.",
    ),
    (
        {"order": torch.tensor([0, 2, 2])},
        "NotAPermutation: permute was given an order of 3 tokens that does not hold each of 0 to "
        "3 - 1 once: sorted, it differs from them at place 1.\n"
        "  help: give each token one place, as torch.randperm(tokens) does.",
    ),
    (
        {"order": torch.randperm(8), "causal": True},
        "CannotLower: a causal score over permuted tokens cannot be lowered: a place in the new "
        "order tells nothing of what is past.\n"
        "  help: permute only under mask=None, where every query may see every key.",
    ),
]


@pytest.mark.parametrize(("given", "text"), OUT_OF_DOMAIN, ids=lambda x: str(x)[:24])
def test_what_is_out_of_domain_is_refused(given: dict[str, object], text: str) -> None:
    assert said(lambda: sp.compile(spargeattn(**given))) == text


@pytest.mark.parametrize("name", ["theta", "tau", "lam"])
def test_a_table_for_other_heads_is_refused(name: str) -> None:
    q, k, v = tensors((1, 4, 2, 64, 64, 16))
    text = said(lambda: sp.compile(spargeattn(**{name: torch.zeros(3)}))(q, k, v))
    field = {"theta": "least", "tau": "p", "lam": "skip"}[name]
    heads = "Hq = 4" if name == "tau" else "Hq = 4 or Hkv = 2"
    assert text == (
        f"ShapeMismatch: the table of {field} with 3 numbers and q and k with Hq = 4 and Hkv = 2 "
        f"do not agree: it should have one for each of the {heads} heads.\n"
        "  help: give a number for all heads, or a float32 tensor of that length."
    )


def test_an_order_of_other_tokens_is_refused() -> None:
    q, k, v = tensors((1, 4, 2, 64, 64, 16))
    text = said(lambda: sp.compile(spargeattn(order=torch.randperm(65)))(q, k, v))
    assert text == (
        "MaskOfOtherLength: the order that permutes q was built for 65 tokens, but q and k are "
        "Sq = 64 and Skv = 64.\n  help: build it again for these lengths."
    )


def test_whole_numbers_have_no_gradient_and_the_rest_has() -> None:
    q, k, v = (x.requires_grad_() for x in tensors((1, 2, 1, 70, 70, 8)))
    rounded = sp.compile(spargeattn(int8=True), backend="reference")
    assert said(lambda: rounded(q, k, v)) == (
        "CannotLower: the gradient of products in int8 cannot be lowered: rounding to whole "
        "numbers has none.\n  help: train with quantise=None, or call under torch.no_grad()."
    )
    made = spargeattn(tau=0.5, theta=0.1, lam=2.0, order=torch.randperm(70), block_q=16, block_k=16)
    attention = sp.compile(made, backend="reference")
    attention(q, k, v).square().sum().backward()
    got = [x.grad.clone() for x in (q, k, v)]  # type: ignore[union-attr]
    with torch.no_grad():
        mask = attention.to_mask(q, k)
    for x in (q, k, v):
        x.grad = None
    oracle.attention(q, k, v, mask)[0].square().sum().backward()
    for x, found in zip((q, k, v), got, strict=True):
        assert oracle.error(found, x.grad) < 1e-11  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["sm90", "ascend910b"])
@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({}, "keys less their mean"),
        ({"order": torch.randperm(256)}, "a permutation of tokens"),
    ],
    ids=["plain", "permuted"],
)
def test_no_kernel_makes_it_and_lowering_says_which_part(
    given: dict[str, object], what: str, target: str
) -> None:
    from spcomp.compiler import plan_for

    shape = {"Sq": 256, "D": 64, "Dv": 64, "Hq": 4, "Hkv": 2}
    text = said(lambda: plan_for(spargeattn(**given), shape, "float16", None, {}, target))
    assert text == (
        f"CannotLower: {what} cannot be lowered: no kernel makes it yet.\n"
        "  help: use backend='reference'."
    )
