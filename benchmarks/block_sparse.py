"""Row A1: block-sparse forward from a given block mask under the plain schedule, beside
FlexAttention and dense attention.

Hq 32, Hkv 8, D 128, bf16, causal; 10 % of the blocks kept, the first and the diagonal block always,
the diagonal masked by token. Floor: FLOPs of the visited blocks at the card's dense rate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from common import alternate, arguments, as_row, check, record, relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import spcomp as sp

HEADS, KV_HEADS, DIM = 32, 8, 128


@sp.pattern
def given_blocks(q, k, v, *, mask, block):
    """Attend to the blocks of a mask, causally by token."""
    return sp.attend(q, k, v, mask=sp.block_mask(mask, block=block) & sp.causal())


def random_mask(blocks: int, keep: int) -> torch.Tensor:
    """Draw a causal block mask [1,H,N,N] with the first and the diagonal block always kept."""
    generator = torch.Generator("cuda").manual_seed(0)
    scores = torch.rand(1, HEADS, blocks, blocks, generator=generator, device="cuda")
    place = torch.arange(blocks, device="cuda")
    visible = place[None, :] <= place[:, None]
    scores = scores.masked_fill(~visible, -1)
    scores[..., 0] = 2
    scores[..., place, place] = 3
    chosen = scores.topk(min(keep, blocks), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True) & visible


def flex_mask(mask: torch.Tensor, block: int, length: int) -> BlockMask:
    """Give the same mask to FlexAttention: the diagonal partial, all else full."""
    diagonal = torch.eye(mask.shape[-1], dtype=torch.bool, device="cuda")

    def ordered(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        listed = torch.argsort(part.int(), dim=-1, descending=True, stable=True)
        return part.sum(-1).int(), listed.int()

    return BlockMask.from_kv_blocks(
        *ordered(mask & diagonal),
        *ordered(mask & ~diagonal),
        BLOCK_SIZE=block,
        mask_mod=lambda b, h, q, k: q >= k,
        seq_lengths=(length, length),
    )


def case(length: int, block: int, share: float) -> dict[str, Any]:
    """Time one case."""
    make = lambda heads: torch.randn(1, heads, length, DIM, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = make(HEADS), make(KV_HEADS), make(KV_HEADS)
    blocks = length // block
    mask = random_mask(blocks, max(2, int(blocks * share)))
    flops = int(mask.sum()) * block * block * DIM * 4
    print(f"S {length}, block {block}, {share:.0%} kept: {flops / 1e12:.2f} TFLOP", flush=True)
    attention = sp.compile(given_blocks(mask=mask, block=block), order="query_major")
    work = {"spcomp": lambda: attention(q, k, v)}
    built = attention.built(q, k, v)
    print("  " + str(dict(built.plan.launches()[-1].axes)))
    if block >= 128:
        flex = torch.compile(flex_attention, dynamic=False)
        blocks_of_flex = flex_mask(mask, block, length)
        work["flex_attention"] = lambda: flex(q, k, v, block_mask=blocks_of_flex, enable_gqa=True)
        check(
            "against FlexAttention",
            relative_error(attention(q, k, v), work["flex_attention"]()),
            5e-3,
        )
    else:
        check("against the reference on 4 heads", _reference_error(q, k, v, mask, block), 5e-3)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        dense = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
        dense_time = alternate({"dense_cudnn": dense}, rounds=2)
    timings = {**alternate(work), **dense_time}
    for name, timing in timings.items():
        rate = "" if name == "dense_cudnn" else f"  {flops / timing.median_ms / 1e9:7.1f} TFLOP/s"
        print(f"  {name:<16}{timing}{rate}", flush=True)
    return as_row(timings, length=length, block=block, share=share, flops=flops)


def _reference_error(q: Any, k: Any, v: Any, mask: torch.Tensor, block: int) -> float:
    rows = slice(q.shape[2] - 512, q.shape[2])
    attention = sp.compile(given_blocks(mask=mask, block=block), order="query_major")
    got = attention(q, k, v)[:, :4, rows]
    visible = mask[:, :4].repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, rows]
    place = torch.arange(q.shape[2], device="cuda")
    visible &= place[None, :] <= place[rows, None]
    scores = q[:, :4, rows].float() @ k[:, :1].float().transpose(-1, -2) / DIM**0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return relative_error(got, weights @ v[:, :1].float())


if __name__ == "__main__":
    options = arguments(__doc__ or "")
    cases = [(32768, 128, 0.1), (32768, 64, 0.1), (131072, 128, 0.05)]
    rows = [case(*c) for c in cases[: 1 if options.quick else None]]
    record("block_sparse", rows, options.out)
