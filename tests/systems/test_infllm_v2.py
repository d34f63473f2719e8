"""InfLLM-V2 against a second opinion written from its paper and official code: the blocks each
query reads first, then the output, its gradients, and decoding with kept windows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.kvcache import KVCache
from spcomp.patterns.infllm_v2 import infllm_v2
from tests import oracle


@dataclass(frozen=True)
class Sizes:
    """Hyper-parameters; small ones show in short sequences what the official ones mean."""

    block: int = 16
    k_blocks: int = 6
    sinks: int = 1
    window: int = 32
    kernel: int = 8
    stride: int = 4
    coarse: int = 4


SMALL, OFFICIAL = Sizes(), Sizes(64, 96, 1, 2048, 32, 16, 4)
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


def windows(k: Tensor, size: int, step: int) -> tuple[Tensor, Tensor]:
    """Give the means of the complete windows, [N,D], rounded to k's dtype and then float64, and
    the last token of each."""
    starts = list(range(0, len(k) - size + 1, step))
    means = [k[a : a + size].double().mean(0).to(k.dtype).double() for a in starts]
    held = torch.stack(means) if means else torch.zeros(0, k.shape[1], dtype=torch.float64)
    return held, torch.tensor(starts, dtype=torch.int64) + size - 1


def block_scores(q: Tensor, k: Tensor, sizes: Sizes) -> Tensor:
    """Score the blocks for the heads of one group, [Sq,Nb] in float64: q [G,Sq,D], k [Skv,D].

    A block that no window in sight touches has 0.
    """
    t = oracle.positions(q.shape[1], len(k))
    fine, fine_last = windows(k, sizes.kernel, sizes.stride)
    wide, wide_last = windows(k, sizes.coarse * sizes.kernel, sizes.coarse * sizes.stride)
    total = torch.zeros(q.shape[1], len(fine), dtype=torch.float64)
    for head in q.double() / math.sqrt(q.shape[2]):
        divisor = ((head @ wide.T).exp() * (wide_last <= t)).sum(1, keepdim=True)
        divisor = torch.where(divisor == 0, 1.0, divisor)
        total += (head @ fine.T).exp() / divisor * (fine_last <= t)
    scores = torch.zeros(q.shape[1], -(-len(k) // sizes.block), dtype=torch.float64)
    for n in range(scores.shape[1]):
        for c, last in enumerate(fine_last.tolist()):
            if last >= n * sizes.block and last - sizes.kernel + 1 < (n + 1) * sizes.block:
                scores[:, n] = torch.maximum(scores[:, n], total[:, c])
    return scores


def kept_blocks(scores: Tensor, skv: int, sizes: Sizes, close: float) -> tuple[Tensor, Tensor]:
    """Keep the blocks of each row, bool [Sq,Nb], and tell which rows rounding may decide: those
    where the last block kept and the best one left out are near, and not the same number (two
    blocks have the same window as their best, often; then the lower one is kept)."""
    rows, blocks = scores.shape
    kept, unsure = torch.zeros(rows, blocks, dtype=torch.bool), torch.zeros(rows, dtype=torch.bool)
    near = sizes.window // sizes.block
    for row, values in enumerate(scores.tolist()):
        t = row + skv - rows
        if t < 0:
            continue
        own = t // sizes.block
        forced = {n for n in range(own + 1) if n < sizes.sinks or n >= own - near}
        chosen = oracle.choose(values, range(own), forced, sizes.k_blocks)
        kept[row, sorted(chosen)] = True
        taken = [values[n] for n in chosen - forced]
        left = [values[n] for n in range(own) if n not in chosen]
        if taken and left:
            gap = min(taken) - max(left)
            unsure[row] = 0 < gap < close * min(taken)
    return kept, unsure


def mask_of(q: Tensor, k: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Give the mask [B,Hq,Sq,Skv], and the rows [B,Hq,Sq] that rounding may decide."""
    (batch, heads, sq, _), (_, lists, skv, _) = q.shape, k.shape
    group = heads // lists
    mask = torch.zeros(batch, heads, sq, skv, dtype=torch.bool)
    unsure = torch.zeros(batch, heads, sq, dtype=torch.bool)
    for b in range(batch):
        for g in range(lists):
            shared = slice(g * group, (g + 1) * group)
            scores = block_scores(q[b, shared], k[b, g], sizes)
            kept, unsure[b, shared] = kept_blocks(scores, skv, sizes, CLOSE[q.dtype])
            mask[b, shared] = kept.repeat_interleave(sizes.block, 1)[:, :skv]
    return mask & oracle.causal_mask(sq, skv), unsure


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, sharp: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    b, hq, hkv, sq, skv, d = shape
    torch.manual_seed(sum(shape))
    q = (sharp * torch.randn(b, hq, sq, d)).to(dtype)
    k = torch.randn(b, hkv, skv, d).to(dtype)
    return q, k, torch.randn(b, hkv, skv, d + 4).to(dtype)


def compiled(sizes: Sizes) -> sp.Attention:
    return sp.compile(infllm_v2(**asdict(sizes)), backend="reference")


def agreed(q: Tensor, k: Tensor, sizes: Sizes) -> Tensor:
    """Check the mask, and give it with the rows that rounding decided as ours."""
    want, unsure = mask_of(q, k, sizes)
    got = compiled(sizes).to_mask(q, k)
    assert not ((got != want).any(dim=-1) & ~unsure).any()
    assert float(unsure.float().mean()) < 0.05
    return got


@pytest.mark.parametrize(
    "sizes",
    [
        SMALL,
        replace(SMALL, coarse=1),
        replace(SMALL, sinks=2, window=16, k_blocks=4),
        replace(SMALL, sinks=0, window=0, k_blocks=2),
        replace(SMALL, block=32, kernel=16, stride=8, coarse=2),
        replace(SMALL, block=8, kernel=16, stride=8, k_blocks=9),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_and_output_are_those_of_the_official_code(
    shape: tuple[int, ...], sizes: Sizes
) -> None:
    q, k, v = tensors(shape)
    mask = agreed(q, k, sizes)
    out, lse = compiled(sizes)(q, k, v, return_lse=True)
    expected, expected_lse = oracle.attention(q, k, v, mask)
    assert oracle.error(out, expected) < 1e-12
    assert oracle.error(lse, expected_lse) < 1e-12


@pytest.mark.parametrize(
    "shape", [(1, 16, 1, 3, 8229, 16), (1, 4, 2, 1, 6209, 8), (1, 2, 1, 130, 6208, 8)], ids=str
)
def test_the_official_sizes_keep_96_blocks_of_a_long_sequence(shape: tuple[int, ...]) -> None:
    q, k, v = tensors(shape)
    mask = agreed(q, k, OFFICIAL)
    t = shape[4] - 1
    blocks = mask[0, 0, -1].nonzero()[:, 0].div(64, rounding_mode="floor").unique().tolist()
    assert len(blocks) == 96 and blocks[0] == 0
    assert blocks[-33:] == list(range(t // 64 - 32, t // 64 + 1))
    out = sp.compile(infllm_v2, backend="reference")(q, k, v)
    assert oracle.error(out, oracle.attention(q, k, v, mask)[0]) < 1e-12


def test_a_pair_of_blocks_that_share_their_best_window_keeps_the_lower() -> None:
    sizes = replace(SMALL, window=0, sinks=0, k_blocks=2)
    q = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    k = torch.zeros(1, 1, 160, 4, dtype=torch.float64)
    k[:, :, 12 + 32 : 20 + 32] = 5.0  # the window that touches blocks 2 and 3
    blocks = compiled(sizes).to_mask(q, k)[0, 0, 0].nonzero()[:, 0].div(16, rounding_mode="floor")
    assert blocks.unique().tolist() == [2, 9]


def test_logits_far_above_those_of_the_wide_windows_give_no_nan() -> None:
    q, k, v = tensors((1, 2, 1, 150, 150, 16), torch.float32, sharp=1e4)
    out, lse = compiled(SMALL)(q, k, v, return_lse=True)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
    mask = compiled(SMALL).to_mask(q, k)
    own = torch.arange(150) // 16
    for n in range(10):
        forced = (own >= n) & ((n < 1) | (own - 2 <= n))
        assert bool(mask[0, :, forced, n * 16].all())
    assert bool((mask.sum(-1) >= torch.minimum(torch.arange(150) + 1, torch.tensor(81))).all())


def test_the_scale_of_a_call_holds_for_the_choice_too() -> None:
    q, k, v = tensors((2, 4, 2, 130, 163, 16))
    attention = compiled(SMALL)
    got = attention(q, k, v, scale=2.0)
    assert oracle.error(got, attention(8.0 * q, k, v)) < 1e-12  # 1/sqrt(16) is 1/4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes_choose_by_float32_scores_of_means_in_their_dtype(
    dtype: torch.dtype,
) -> None:
    q, k, v = tensors((2, 4, 2, 150, 233, 16), dtype)
    mask = agreed(q, k, SMALL)
    out, lse = compiled(SMALL)(q, k, v, return_lse=True)
    expected, expected_lse = oracle.attention(q, k, v, mask)
    budget, lse_budget = oracle.budgets(q, k, v, mask)
    assert out.dtype == dtype and oracle.error(out, expected) < budget
    assert oracle.error(lse, expected_lse) < lse_budget


def test_gradients_are_those_of_attention_over_the_blocks_kept() -> None:
    leaves = tensors((2, 4, 2, 97, 131, 8), sharp=1.0)
    mask = agreed(leaves[0], leaves[1], SMALL)
    ours = [x.clone().requires_grad_() for x in leaves]
    theirs = [x.clone().requires_grad_() for x in leaves]
    out = compiled(SMALL)(*ours)
    expected, _ = oracle.attention(*theirs, mask)
    seed = torch.randn_like(out)
    got = torch.autograd.grad(out, ours, seed)
    want = torch.autograd.grad(expected, theirs, seed)
    for a, b in zip(got, want, strict=True):
        assert oracle.error(a, b) < 1e-12


def test_decoding_with_kept_windows_is_what_the_whole_sequence_gives() -> None:
    q, k, v = tensors((2, 4, 2, 150, 150, 8))
    attention = compiled(SMALL)
    whole = attention(q, k, v)
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
    assert sorted(cache.states) == ["k1.max", "k2.max"]
    cache.append(k[:, :, :5], v[:, :, :5])
    for step in range(5, 150):
        rows = slice(step, step + 1)
        cache.append(k[:, :, rows], v[:, :, rows])
        if step % 7 == 0:  # rejected drafts leave nothing behind
            noise = torch.randn(2, 2, 3, 8, dtype=torch.float64)
            cache.append(noise, torch.randn(2, 2, 3, 12, dtype=torch.float64))
            cache.rewind(3)
        out = cache.attend(q[:, :, rows])
        assert isinstance(out, Tensor)
        assert oracle.error(out, whole[:, :, rows]) < 1e-12
