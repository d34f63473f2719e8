"""NSA against a second opinion written from its paper: the blocks each query reads first, then
each branch, the gated sum, its gradients, and decoding with kept windows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.kvcache import KVCache
from spcomp.patterns.nsa import nsa
from tests import oracle


@dataclass(frozen=True)
class Sizes:
    """Hyper-parameters; small ones show in short sequences what the paper's mean."""

    block: int = 16
    k_blocks: int = 5
    sinks: int = 1
    locals: int = 2
    window: int = 24
    kernel: int = 8
    stride: int = 4


SMALL, PAPER = Sizes(), Sizes(64, 16, 1, 2, 512, 32, 16)
FLA = Sizes(16, 5, 1, 2, 24, 16, 16)
SHAPES = [  # B, Hq, Hkv, Sq, Skv, D
    (1, 1, 1, 192, 192, 16),
    (3, 3, 1, 129, 257, 20),
    (2, 4, 1, 130, 301, 16),
    (1, 16, 1, 127, 127, 8),
    (2, 4, 4, 95, 143, 8),
    (1, 8, 2, 1, 411, 16),
    (2, 2, 1, 100, 37, 8),
    (1, 4, 2, 31, 31, 8),
    (1, 2, 1, 7, 7, 8),
]
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-4}
"""How near two scores, as a share of the larger, may be decided either way: their rounding."""


def windows(x: Tensor, sizes: Sizes) -> Tensor:
    """Give the means of the complete windows, [B,H,N,D], rounded to x's dtype; differentiable."""
    starts = range(0, x.shape[2] - sizes.kernel + 1, sizes.stride)
    means = [x[:, :, a : a + sizes.kernel].double().mean(2, keepdim=True) for a in starts]
    held = torch.cat(means, dim=2) if means else x[:, :, :0].double()
    return held.to(x.dtype).double()


def seen(sq: int, skv: int, sizes: Sizes) -> Tensor:
    """Tell which windows end at or before each query, bool [Sq,N]."""
    ends = list(range(sizes.kernel - 1, skv, sizes.stride))
    return torch.tensor(ends, dtype=torch.int64) <= oracle.positions(sq, skv)


def block_scores(q: Tensor, k: Tensor, sizes: Sizes) -> Tensor:
    """Score the blocks for each KV head, [B,Hkv,Sq,Nb] in float64: equation 9, read as the share of
    each window that lies in the block."""
    (batch, heads, sq, d), (_, lists, skv, _) = q.shape, k.shape
    means = windows(k, sizes).repeat_interleave(heads // lists, dim=1)
    allowed = seen(sq, skv, sizes)
    weights = (q.double() @ means.mT / math.sqrt(d)).exp() * allowed
    some = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    chances = (weights / some).unflatten(1, (lists, heads // lists)).sum(2)
    scores = torch.zeros(batch, lists, sq, -(-skv // sizes.block), dtype=torch.float64)
    for n in range(scores.shape[3]):
        block = set(range(n * sizes.block, (n + 1) * sizes.block))
        for c in range(chances.shape[3]):
            tokens = block & set(range(c * sizes.stride, c * sizes.stride + sizes.kernel))
            if tokens:
                scores[..., n] += len(tokens) / sizes.stride * chances[..., c]
    return scores


def kept_blocks(scores: Tensor, skv: int, sizes: Sizes, close: float) -> tuple[Tensor, Tensor]:
    """Keep the blocks of each row, bool [Sq,Nb], and tell which rows rounding may decide: those
    where the last block kept and the best one left out are near, and not both 0."""
    rows, blocks = scores.shape
    kept, unsure = torch.zeros(rows, blocks, dtype=torch.bool), torch.zeros(rows, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        t = row + skv - rows
        if t < 0:
            continue
        own = t // sizes.block
        forced = {n for n in range(own + 1) if n < sizes.sinks or n > own - sizes.locals}
        chosen = oracle.choose(values, range(own), forced, sizes.k_blocks)
        assert len(chosen) == min(sizes.k_blocks, own + 1)
        kept[row, sorted(chosen)] = True
        taken = [values[n] for n in chosen - forced]
        left = [values[n] for n in range(own) if n not in chosen]
        if taken and left and min(taken) > 0:
            unsure[row] = min(taken) - max(left) < close * min(taken)
    return kept, unsure


def mask_of(q: Tensor, k: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Give the pairs of the selected branch [B,Hq,Sq,Skv], and the rows [B,Hq,Sq] that rounding may
    decide."""
    (batch, heads, sq, _), (_, lists, skv, _) = q.shape, k.shape
    mask = torch.zeros(batch, lists, sq, skv, dtype=torch.bool)
    unsure = torch.zeros(batch, lists, sq, dtype=torch.bool)
    scores = block_scores(q, k, sizes)
    for b in range(batch):
        for g in range(lists):
            kept, unsure[b, g] = kept_blocks(scores[b, g], skv, sizes, CLOSE[q.dtype])
            mask[b, g] = kept.repeat_interleave(sizes.block, 1)[:, :skv]
    group = heads // lists
    pairs = mask.repeat_interleave(group, dim=1) & oracle.causal_mask(sq, skv)
    return pairs, unsure.repeat_interleave(group, dim=1)


def branches(
    q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, sizes: Sizes
) -> list[tuple[Tensor, Tensor]]:
    """Give (out, lse) of the compressed, the selected and the window branch, in float64."""
    sq, skv = q.shape[2], k.shape[2]
    near = oracle.window_mask(sq, skv, sizes.window)
    means = windows(k, sizes), windows(v, sizes)
    return [
        oracle.attention(q, *means, seen(sq, skv, sizes)),
        oracle.attention(q, k, v, pairs),
        oracle.attention(q, k, v, near),
    ]


def gated(parts: list[tuple[Tensor, Tensor]], gates: Tensor) -> tuple[Tensor, Tensor]:
    """Add the branches by their gates; the LSE is that of all keys together."""
    out = sum(gates[..., n : n + 1].double() * o for n, (o, _) in enumerate(parts))
    assert isinstance(out, Tensor)
    return out, torch.logsumexp(torch.stack([lse for _, lse in parts]), dim=0)


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, sharp: float = 3.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, hq, hkv, sq, skv, d = shape
    torch.manual_seed(sum(shape))
    q = (sharp * torch.randn(b, hq, sq, d)).to(dtype)
    k = torch.randn(b, hkv, skv, d).to(dtype)
    v = torch.randn(b, hkv, skv, d + 4).to(dtype)
    return q, k, v, torch.sigmoid(torch.randn(b, hq, sq, 3)).to(dtype)


def compiled(sizes: Sizes) -> sp.Attention:
    return sp.compile(nsa(**asdict(sizes)), backend="reference")


def only(branch: int, q: Tensor) -> Tensor:
    """Gates that open one branch."""
    return torch.eye(3, dtype=q.dtype)[branch].expand(*q.shape[:3], 3).contiguous()


def pairs_read(q: Tensor, k: Tensor, sizes: Sizes) -> Tensor:
    """Give the pairs that the selected branch reads: attention to values that are one-hot is the
    row of probabilities."""
    each = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:2], -1, -1)
    out = compiled(sizes)(q.double(), k.double(), each, gates=only(1, q.double()))
    return out > 0


def agreed(q: Tensor, k: Tensor, sizes: Sizes) -> Tensor:
    """Check the pairs of the selected branch, and give them with the rows that rounding decided as
    ours."""
    want, unsure = mask_of(q, k, sizes)
    got = pairs_read(q, k, sizes)
    assert not ((got != want).any(dim=-1) & ~unsure).any()
    assert float(unsure.float().mean()) < 0.05
    return got


@pytest.mark.parametrize(
    "sizes",
    [
        SMALL,
        FLA,
        replace(FLA, sinks=0, locals=1, k_blocks=4),
        replace(SMALL, sinks=2, locals=1, k_blocks=3, window=1),
        replace(SMALL, block=8, kernel=16, stride=8, k_blocks=7, window=50),
        replace(SMALL, block=24, kernel=12, stride=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_branches_and_sum_are_those_of_the_paper(
    shape: tuple[int, ...], sizes: Sizes
) -> None:
    q, k, v, gates = tensors(shape)
    pairs = agreed(q, k, sizes)
    attention = compiled(sizes)
    parts = branches(q, k, v, pairs, sizes)
    for n, (want, _) in enumerate(parts):
        got = attention(q, k, v, gates=only(n, q))
        assert oracle.error(got, want) < 1e-12
    out, lse = attention(q, k, v, gates=gates, return_lse=True)
    expected, expected_lse = gated(parts, gates)
    assert oracle.error(out, expected) < 1e-12
    assert oracle.error(lse, expected_lse) < 1e-12


@pytest.mark.parametrize(
    "shape",
    [(1, 16, 1, 2, 4107, 16), (2, 4, 1, 1, 1999, 8), (1, 3, 1, 70, 1300, 8), (1, 2, 1, 33, 33, 8)],
    ids=str,
)
def test_the_papers_sizes_read_16_blocks_of_64(shape: tuple[int, ...]) -> None:
    q, k, v, gates = tensors(shape)
    pairs = agreed(q, k, PAPER)
    t = shape[4] - 1
    blocks = pairs[0, 0, -1].nonzero()[:, 0].div(64, rounding_mode="floor").unique().tolist()
    assert len(blocks) == min(16, t // 64 + 1)
    assert {0, max(t // 64 - 1, 0), t // 64} <= set(blocks)
    out = sp.compile(nsa, backend="reference")(q, k, v, gates=gates)
    assert oracle.error(out, gated(branches(q, k, v, pairs, PAPER), gates)[0]) < 1e-12


def test_a_query_before_the_first_complete_window_gets_nothing_from_it() -> None:
    q, k, v, gates = tensors((1, 2, 1, 20, 20, 8))
    attention = compiled(SMALL)
    out, lse = attention(q, k, v, gates=only(0, q), return_lse=True)
    assert not out[:, :, :7].any() and bool(out[:, :, 7:].any(dim=-1).all())
    assert bool(lse.isfinite().all())
    closed, wild = gates.clone(), gates.clone()
    closed[:, :, :7, 0], wild[:, :, :7, 0] = 0.0, math.inf
    assert torch.equal(attention(q, k, v, gates=wild), attention(q, k, v, gates=closed))


def test_the_gates_are_needed_and_have_a_form() -> None:
    q, k, v, gates = tensors((1, 2, 1, 20, 20, 8))
    with pytest.raises(sp.SpcompError, match="takes the tensor gates"):
        compiled(SMALL)(q, k, v)
    with pytest.raises(sp.SpcompError, match="gates"):
        compiled(SMALL)(q, k, v, gates=gates[..., :2])


def test_the_scale_of_a_call_holds_for_the_choice_too() -> None:
    q, k, v, gates = tensors((2, 4, 2, 130, 163, 16))
    attention = compiled(SMALL)
    got = attention(q, k, v, gates=gates, scale=2.0)
    assert oracle.error(got, attention(8.0 * q, k, v, gates=gates)) < 1e-12  # 1/sqrt(16) is 1/4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes_choose_by_float32_scores_of_means_in_their_dtype(
    dtype: torch.dtype,
) -> None:
    q, k, v, gates = tensors((2, 4, 2, 150, 233, 16), dtype)
    want, unsure = mask_of(q, k, SMALL)
    parts = branches(q, k, v, want, SMALL)
    out, lse = compiled(SMALL)(q, k, v, gates=gates, return_lse=True)
    expected, expected_lse = gated(parts, gates)
    sure = ~unsure
    assert out.dtype == dtype and float(sure.float().mean()) > 0.95
    skv, near = k.shape[2], oracle.window_mask(150, 233, SMALL.window)
    means = windows(k, SMALL).to(dtype), windows(v, SMALL).to(dtype)
    budgets = [
        oracle.budgets(q, *means, seen(150, skv, SMALL)),
        oracle.budgets(q, k, v, want),
        oracle.budgets(q, k, v, near),
    ]
    assert oracle.error(out[sure], expected[sure]) < sum(b for b, _ in budgets)
    assert oracle.error(lse[sure], expected_lse[sure]) < sum(b for _, b in budgets)


@pytest.mark.parametrize("shape", [(2, 4, 2, 97, 131, 8), (1, 3, 1, 40, 23, 8), (1, 2, 1, 6, 6, 4)])
def test_gradients_are_those_of_the_three_branches_over_the_blocks_kept(
    shape: tuple[int, ...],
) -> None:
    leaves = tensors(shape, sharp=1.0)
    pairs = agreed(leaves[0], leaves[1], SMALL)
    ours = [x.clone().requires_grad_() for x in leaves]
    theirs = [x.clone().requires_grad_() for x in leaves]
    out = compiled(SMALL)(*ours[:3], gates=ours[3])
    expected, _ = gated(branches(*theirs[:3], pairs, SMALL), theirs[3])
    seed = torch.randn_like(out)
    got = torch.autograd.grad(out, ours, seed)
    want = torch.autograd.grad(expected, theirs, seed)
    for a, b in zip(got, want, strict=True):
        assert oracle.error(a, b) < 1e-12


def test_decoding_with_kept_windows_is_what_the_whole_sequence_gives() -> None:
    q, k, v, gates = tensors((2, 4, 2, 150, 150, 8))
    attention = compiled(SMALL)
    whole = attention(q, k, v, gates=gates)
    cache = KVCache.empty(
        attention,
        batch=2,
        kv_heads=2,
        head_dim=8,
        value_dim=12,
        capacity=160,
        dtype=torch.float64,
        device="cpu",
    )
    assert sorted(cache.states) == ["k_compressed.max", "v_compressed.max"]
    cache.append(k[:, :, :5], v[:, :, :5])
    for step in range(5, 150):
        rows = slice(step, step + 1)
        cache.append(k[:, :, rows], v[:, :, rows])
        if step % 7 == 0:  # rejected drafts leave nothing behind
            noise = torch.randn(2, 2, 3, 8, dtype=torch.float64)
            cache.append(noise, torch.randn(2, 2, 3, 12, dtype=torch.float64))
            cache.rewind(3)
        out = cache.attend(q[:, :, rows], gates=gates[:, :, rows])
        assert isinstance(out, Tensor)
        assert oracle.error(out, whole[:, :, rows]) < 1e-12
