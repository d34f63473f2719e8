"""Rows A2 to A6: the warp-specialised schedule on Hopper, beside the plain one and FlexAttention.

Hq 32, Hkv 8, bf16, causal, the first and the diagonal block always kept, the diagonal masked by
token. The lists are given, so a call is one launch that makes tile lists and one that attends.
Floor: FLOPs of the visited blocks at the card's dense rate, which needs the clock it holds:
`nvidia-smi` is asked for it after each case."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from block_sparse import HEADS, KV_HEADS, flex_mask, given_blocks
from common import alternate, arguments, as_row, check, record, relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import spcomp as sp


@dataclass(frozen=True)
class Case:
    """One row: what is kept, and whose lists it is."""

    row: str
    length: int
    block: int
    share: float
    dim: int = 128
    is_shared: bool = False
    is_uneven: bool = False
    axes: dict[str, int] = field(default_factory=dict)


CASES = (
    Case("A2", 32768, 128, 0.1),
    Case("A5", 32768, 128, 0.1, is_uneven=True),
    Case("A2", 32768, 256, 0.1),
    Case("A3 shared", 32768, 64, 0.1, is_shared=True),
    Case("A3 per head", 32768, 64, 0.1),
    Case("A4", 16384, 128, 0.1, dim=64),
    Case("A4", 16384, 128, 0.1, dim=256),
    Case("A2", 131072, 128, 0.05),
)


@sp.pattern
def dense(q, k, v):
    """Attend to every earlier key."""
    return sp.attend(q, k, v)


def drawn_mask(case: Case) -> torch.Tensor:
    """Draw a causal block mask [1,H,N,N]; uneven: a row keeps 2 … 2 n blocks instead of n."""
    blocks, heads = case.length // case.block, KV_HEADS if case.is_shared else HEADS
    keep = max(2, int(blocks * case.share))
    generator = torch.Generator("cuda").manual_seed(0)
    scores = torch.rand(1, heads, blocks, blocks, generator=generator, device="cuda")
    place = torch.arange(blocks, device="cuda")
    visible = place[None, :] <= place[:, None]
    scores = scores.masked_fill(~visible, -1)
    scores[..., 0], scores[..., place, place] = 2, 3
    rank = scores.argsort(-1, descending=True).argsort(-1)
    kept = torch.full((1, heads, blocks, 1), keep, device="cuda")
    if case.is_uneven:
        kept = torch.randint(2, 2 * keep, kept.shape, generator=generator, device="cuda")
    return (rank < kept) & visible


def clock_mhz() -> int:
    """Ask for the clock of the multiprocessors."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True).stdout.split()[0])


def sparse_case(case: Case) -> dict[str, Any]:
    """Time one block list under both schedules, and FlexAttention where it takes the block."""
    make = lambda heads: torch.randn(  # noqa: E731
        1, heads, case.length, case.dim, device="cuda", dtype=torch.bfloat16
    )
    q, k, v = make(HEADS), make(KV_HEADS), make(KV_HEADS)
    mask = drawn_mask(case)
    flops = int(mask.sum()) * (HEADS // mask.shape[1]) * case.block**2 * case.dim * 4
    print(f"{case.row}: {case} {flops / 1e12:.2f} TFLOP", flush=True)
    pattern = given_blocks(mask=mask, block=case.block)
    attention = sp.compile(pattern)
    plain = sp.compile(pattern, order="query_major")
    print(f"  {attention.built(q, k, v).plan.order}", flush=True)
    check("against the plain schedule", relative_error(attention(q, k, v), plain(q, k, v)), 5e-3)
    work = {"spcomp": lambda: attention(q, k, v), "spcomp_plain": lambda: plain(q, k, v)}
    if case.block >= 128 and not case.is_shared and case.dim <= 128:
        flex = torch.compile(flex_attention, dynamic=False)
        blocks = flex_mask(mask, case.block, case.length)
        work["flex_attention"] = lambda: flex(q, k, v, block_mask=blocks, enable_gqa=True)
        error = relative_error(attention(q, k, v), work["flex_attention"]())
        check("against FlexAttention", error, 5e-3)
    return _timed(case.row, work, flops, length=case.length, block=case.block, dim=case.dim)


def dense_case(length: int) -> dict[str, Any]:
    """Time dense causal attention as a pattern beside cuDNN."""
    make = lambda heads: torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = make(HEADS), make(KV_HEADS), make(KV_HEADS)
    attention = sp.compile(dense())

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    print(f"A6: dense causal, S {length}", flush=True)
    check("against cuDNN", relative_error(attention(q, k, v), cudnn()), 5e-3)
    work = {"spcomp": lambda: attention(q, k, v), "dense_cudnn": cudnn}
    return _timed("A6", work, HEADS * length**2 * 128 * 2, length=length)


def _timed(row: str, work: dict[str, Any], flops: int, **facts: Any) -> dict[str, Any]:
    timings = alternate(work, rep_ms=400)
    clock = clock_mhz()
    for name, timing in timings.items():
        rate = flops / timing.median_ms / 1e9
        print(f"  {name:<16}{timing}  {rate:7.1f} TFLOP/s", flush=True)
    print(f"  SM clock after it {clock} MHz", flush=True)
    return as_row(timings, row=row, flops=flops, clock_mhz=clock, **facts)


if __name__ == "__main__":
    options = arguments(__doc__ or "")
    rows = [sparse_case(c) for c in CASES[: 1 if options.quick else None]]
    rows.append(dense_case(8192 if options.quick else 32768))
    record("hopper", rows, options.out)
