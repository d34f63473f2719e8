"""FlexPrefill against a second opinion written from the paper and the official code's description:
the choice of each head first, then its blocks, then the output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.patterns.flexprefill import flexprefill
from tests import oracle

SHAPES = [  # B, Hq, Hkv, Sq, Skv, D
    (1, 1, 1, 64, 64, 16),
    (2, 4, 4, 130, 130, 16),
    (3, 3, 1, 129, 257, 20),
    (1, 16, 1, 1, 77, 16),
    (2, 8, 2, 100, 37, 8),
    (1, 4, 1, 255, 255, 16),
    (1, 2, 2, 7, 9, 8),
]
CLOSE = 1e-9


@dataclass
class Found:
    """The mask of one head [Sq,Skv], whether it is query-aware, its distance, and whether rounding
    decides anything."""

    mask: Tensor
    aware: bool
    distance: float
    unsure: bool


def count_within(masses: Tensor, goal: float, official: bool) -> tuple[int, bool]:
    """Count the largest masses that reach a goal (or stay within it), and tell if it is close."""
    total, count, close = 0.0, 0, False
    for value in sorted(masses.tolist(), reverse=True):
        close |= abs(total - goal) < CLOSE or abs(total + value - goal) < CLOSE
        if (total + value > goal) if official else (total >= goal):
            break
        total += value
        count += 1
    return count, close


def highest(masses: list[float], n: int, forced: int) -> tuple[set[int], bool]:
    """Keep `forced` and the best others up to n in all."""
    ranked = sorted((i for i in range(len(masses)) if i != forced), key=lambda i: (-masses[i], i))
    kept, rest = ranked[: max(n - 1, 0)], ranked[max(n - 1, 0) :]
    close = bool(kept and rest) and masses[kept[-1]] - masses[rest[0]] < CLOSE
    return {forced, *kept}, close


def head(
    q: Tensor,
    k: Tensor,
    *,
    gamma: float,
    tau: float,
    least: int,
    most: int | None,
    block: int,
    official: bool,
) -> Found:
    """Work out one head: q [Sq,D], k [Skv,D], float64."""
    (sq, d), skv = q.shape, k.shape[0]
    shift, n_keys = skv - sq, -(-skv // block)
    probe = min(block, sq)
    causal = oracle.causal_mask(sq, skv)
    logits = (q[-probe:] @ k.T / math.sqrt(d)).masked_fill(~causal[-probe:], -math.inf)
    seen = causal[-probe:].any(-1)
    exact = torch.zeros(probe, skv, dtype=torch.float64)
    exact[seen] = torch.softmax(logits[seen], -1)

    column = exact.sum(0)
    offset = torch.zeros(skv, dtype=torch.float64)
    for r in range(probe):
        t = sq - probe + r + shift
        if t >= 0:
            offset[: t + 1] += exact[r, : t + 1].flip(0)
    start = [n * block for n in range(n_keys)]
    by_key = [float(column[s : s + block].sum()) for s in start]
    slip = n_keys * block - skv if official else 0
    by_distance = [float(offset[max(s - slip, 0) : s - slip + block].sum()) for s in start]

    means = torch.stack([k[s : s + block].mean(0) for s in start])
    pooled = torch.softmax(means @ q[-probe:].mean(0) / math.sqrt(d), 0)
    held = torch.tensor(by_key, dtype=torch.float64) / column.sum()
    middle = (pooled + held) / 2
    divergence = 0.0
    for part in (pooled, held):
        for p, m in zip(part.tolist(), middle.tolist(), strict=True):
            divergence += 0.5 * p * math.log(p / m) if p > 0 else 0.0
    distance = math.sqrt(max(divergence, 0.0))
    aware = distance < tau
    unsure = tau > 0 and abs(distance - tau) < CLOSE

    low = -(-least // block)
    high = n_keys if most is None else min(-(-most // block), n_keys)
    sizes = []
    for masses in (column, offset):
        x, close = count_within(masses, gamma * float(masses.sum()), official)
        unsure |= close and not aware
        n = (x + 1) // 128 + 1 if official else -(-x // block)
        sizes.append(low if aware else min(max(n, low), high))
    keys, close_keys = highest(by_key, sizes[0], 0)
    distances, close_distances = highest(by_distance, sizes[1], 0)
    unsure |= close_keys or close_distances

    t, u = oracle.positions(sq, skv) // block, torch.arange(skv)[None] // block
    mask = torch.zeros(sq, skv, dtype=torch.bool)
    for n in keys:
        mask |= u == n
    for n in distances:
        mask |= t - u == n
    if aware:
        entries, close = block_map(q, means, skv, gamma, block, official)
        unsure |= close
        for m, n in entries:
            mask[m * block : (m + 1) * block, n * block : (n + 1) * block] = True
    return Found(mask & causal, aware, distance, unsure)


def block_map(
    q: Tensor, means: Tensor, skv: int, gamma: float, block: int, official: bool
) -> tuple[list[tuple[int, int]], bool]:
    """Choose the entries of the whole map of blocks that hold gamma of it."""
    sq, d = q.shape
    entries: list[tuple[float, int, int]] = []
    for m in range(-(-sq // block)):
        rows = q[m * block : (m + 1) * block]
        newest = min((m + 1) * block, sq) - 1 + skv - sq
        able = [n for n in range(len(means)) if min((n + 1) * block, skv) - 1 <= newest]
        if able:
            chances = torch.softmax(means[able] @ rows.mean(0) / math.sqrt(d), 0)
            entries += [(-float(p), m, n) for p, n in zip(chances, able, strict=True)]
    entries.sort()
    goal = gamma * sum(-p for p, _, _ in entries)
    count, close = count_within(torch.tensor([-p for p, _, _ in entries]), goal, official)
    if 0 < count < len(entries):
        close |= entries[count][0] - entries[count - 1][0] < CLOSE
    return [(m, n) for _, m, n in entries[:count]], close


def tensors(shape: tuple[int, ...], sharp: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    b, hq, hkv, sq, skv, d = shape
    torch.manual_seed(sum(shape))
    q = sharp * torch.randn(b, hq, sq, d, dtype=torch.float64)
    k = torch.randn(b, hkv, skv, d, dtype=torch.float64)
    return q, k, torch.randn(b, hkv, skv, d, dtype=torch.float64)


def check(
    q: Tensor, k: Tensor, v: Tensor, *, variant: str, gamma: float, tau: float, block: int,
    least: int, most: int | None = None,
) -> list[Found]:  # fmt: skip
    """Compare masks head by head and the output under the mask; give what the oracle found."""
    pattern = flexprefill(
        gamma=gamma, tau=tau, min_budget=least, max_budget=most, block=block, variant=variant
    )
    attention = sp.compile(pattern, backend="reference")
    got = attention.to_mask(q, k)
    group = q.shape[1] // k.shape[1]
    found = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            want = head(
                q[b, h], k[b, h // group], gamma=gamma, tau=tau, least=least, most=most,
                block=block, official=variant == "official",
            )  # fmt: skip
            found.append(want)
            if not want.unsure:
                assert torch.equal(got[b, h], want.mask), (b, h, want.aware)
    out, lse = attention(q, k, v, return_lse=True)
    expected, expected_lse = oracle.attention(q, k, v, got)
    assert oracle.error(out, expected) < 1e-12
    assert oracle.error(lse, expected_lse) < 1e-12
    return found


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("tau", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_and_output_are_those_of_the_paper(
    shape: tuple[int, ...], tau: float, variant: str
) -> None:
    found = check(*tensors(shape), variant=variant, gamma=0.83, tau=tau, block=16, least=20)
    assert sum(f.unsure for f in found) <= len(found) // 4
    if tau != 0.35:
        assert {f.aware for f in found} == {tau == 1.0}


@pytest.mark.parametrize(("gamma", "block", "least", "most"), [
    (0.95, 32, 1, None), (0.5, 8, 16, 48), (0.02, 16, 1, None), (0.7, 16, 64, 32), (0.9, 64, 1, 64),
])  # fmt: skip
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_budgets_are_raised_to_the_least_and_cut_to_the_most(
    variant: str, gamma: float, block: int, least: int, most: int | None
) -> None:
    q, k, v = tensors((2, 4, 2, 190, 190, 16))
    found = check(q, k, v, variant=variant, gamma=gamma, tau=0.0, block=block, least=least,
                  most=most)  # fmt: skip
    assert not all(f.unsure for f in found)


def test_heads_of_one_call_take_different_ways() -> None:
    q, k, v = tensors((2, 4, 2, 192, 192, 16))
    q[:, :2] /= 20  # nearly uniform: the pooled estimate is right
    q[:, 2:] *= 4
    found = check(q, k, v, variant="paper", gamma=0.83, tau=0.1, block=16, least=16)
    assert {f.aware for f in found} == {True, False}
    assert [f.aware for f in found] == [True, True, False, False] * 2


def test_everything_is_read_where_the_least_budget_holds_the_sequence() -> None:
    q, k, _ = tensors((1, 2, 1, 100, 100, 16))
    mask = sp.compile(flexprefill(), backend="reference").to_mask(q, k)
    assert torch.equal(mask, oracle.causal_mask(100, 100).expand_as(mask))
    two = sp.compile(flexprefill(block=64, min_budget=1), backend="reference").to_mask(q, k)
    assert torch.equal(two, mask)


def test_the_share_of_a_map_is_one_for_all_its_rows() -> None:
    q, k, _ = tensors((1, 1, 1, 128, 128, 16))
    q[:, :, :64] *= 8
    q[:, :, 64:] /= 8

    @sp.pattern
    def whole(q, k, v, *, over):
        rows, units = sp.downsample(q, block=16), sp.downsample(k, block=16)
        best = sp.topp(sp.softmax(sp.score(rows, units)), p=0.7, over=over)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    masks = [sp.compile(whole(over=o), backend="reference").to_mask(q, k) for o in ("row", "map")]
    sharp, flat = ([float(m[0, 0, rows].sum()) for m in masks] for rows in (
        slice(0, 64), slice(64, 128)))  # fmt: skip
    assert sharp[1] > sharp[0] and flat[1] < flat[0]
    means = torch.stack([k[0, 0, n : n + 16].mean(0) for n in range(0, 128, 16)])
    entries, close = block_map(q[0, 0], means, 128, 0.7, 16, False)
    want = torch.zeros(128, 128, dtype=torch.bool)
    for m, n in entries:
        want[16 * m : 16 * m + 16, 16 * n : 16 * n + 16] = True
    assert not close
    assert torch.equal(masks[1][0, 0], want & oracle.causal_mask(128, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_of_short_dtypes_is_attention_over_the_mask(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors((2, 6, 2, 129, 201, 32)))
    attention = sp.compile(flexprefill(block=16, min_budget=16, tau=0.3), backend="reference")
    mask = attention.to_mask(q, k)
    out, lse = attention(q, k, v, return_lse=True)
    want, want_lse = oracle.attention(q, k, v, mask)
    budget, budget_lse = oracle.budgets(q, k, v, mask)
    assert oracle.error(out, want) <= budget
    assert oracle.error(lse, want_lse) <= budget_lse


def test_scores_that_are_no_numbers_choose_nothing_but_what_is_forced() -> None:
    q, k, v = tensors((1, 2, 1, 96, 96, 16))
    q[:, 0, -1] = math.nan
    attention = sp.compile(flexprefill(block=16, min_budget=16, tau=1.0), backend="reference")
    mask = attention.to_mask(q, k)
    t, u = oracle.positions(96, 96), torch.arange(96)[None]
    forced = (u < 16) | (t // 16 == u // 16)
    assert torch.equal(mask[0, 0], forced & (u <= t))  # NaN is like nothing, so it takes lines
    assert mask[0, 1].sum() > mask[0, 0].sum()
    assert not attention(q, k, v)[:, 1].isnan().any()
    assert not attention(q, k, v)[:, 0, :-1].isnan().any()


def test_gradients_flow_through_attention_alone() -> None:
    q, k, v = (x.requires_grad_() for x in tensors((1, 2, 1, 70, 70, 8)))
    attention = sp.compile(flexprefill(block=16, min_budget=16), backend="reference")
    mask = attention.to_mask(q, k)
    weights = torch.randn(1, 2, 70, 8, dtype=torch.float64)
    got = torch.autograd.grad((attention(q, k, v) * weights).sum(), (q, k, v))
    want = torch.autograd.grad((oracle.attention(q, k, v, mask)[0] * weights).sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        assert oracle.error(a, b) < 1e-11


@pytest.mark.parametrize(("given", "said"), [
    ({"gamma": 1.5}, "needed was given p = 1.5 of type float, where a share from 0 to 1 is needed"),
    ({"min_budget": 0}, "flexprefill was given min_budget = 0, which is below 1"),
    ({"max_budget": -1}, "flexprefill was given max_budget = -1, which is below 1"),
    ({"block": 0}, "flexprefill was given block = 0, which is below 1"),
    ({"tau": "low"}, "alike was given below = 'low'"),
    ({"variant": "mine"}, "flexprefill was given variant = 'mine'"),
])  # fmt: skip
def test_bad_arguments_are_refused_with_their_figures(given: dict[str, object], said: str) -> None:
    with pytest.raises(sp.SpcompError) as caught:
        flexprefill(**given)
    assert said in str(caught.value)


def test_no_kernel_is_offered_for_it() -> None:
    from spcomp.compiler import plan_for

    for target in ("sm90", "ascend910b"):
        with pytest.raises(sp.SpcompError) as caught:
            plan_for(flexprefill(), {"Sq": 4096, "D": 64, "Dv": 64}, "float16", None, {}, target)
        text = str(caught.value)
        assert "cannot be lowered: no kernel makes it yet" in text
        assert "use backend='reference'" in text
