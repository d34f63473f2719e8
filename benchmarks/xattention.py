"""Row C2: XAttention, 32 heads, stride 16, block 128: the estimate alone at S 32768 and 131072, and
whole prefill at about 10 % density, beside the official estimate and dense attention.

On random input the map is flat, so a threshold of 0.1 keeps about 10 % of the blocks; the share
kept by one head is printed. The official estimate is timed when it can be imported (`xattn`, from
mit-han-lab/x-attention, in the folder --peers). Floor of the estimate: S^2 * D / stride * H FLOPs,
half the map once."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from common import Timing, Work, alternate, arguments, as_row, record

import spcomp as sp
from spcomp.backends.reference.pattern import lists
from spcomp.patterns import xattention

HEADS, DIM, STRIDE, BLOCK = 32, 128, 16, 128
ESTIMATE = ("part_lse", "row_lse", "block_sums", "topp")


def official() -> Any:
    """Give the official estimate, or None where it cannot be imported. The kernel it attends with
    is not needed, and stood in for by an empty module."""
    stand_in = types.ModuleType("block_sparse_attn")
    stand_in.block_sparse_attn_func = None  # type: ignore[attr-defined]
    sys.modules.setdefault("block_sparse_attn", stand_in)
    try:
        from xattn.src.Xattention import xattn_estimate
    except ImportError as error:
        print(f"  official XAttention cannot be imported: {error}")
        return None
    return xattn_estimate


def estimate_ms(work: Work, calls: int = 10) -> float:
    """Give the time of the estimate's kernels in one call, as the profiler sees it."""
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
    spent_us = sum(
        event.self_device_time_total
        for event in seen.key_averages()
        if event.key.startswith(ESTIMATE)
    )
    return float(spent_us) / calls / 1e3


def density(pattern: sp.Pattern, q: torch.Tensor, k: torch.Tensor) -> float:
    """Give the share of the causal blocks that the first head keeps."""
    one = {"q": q[:, :1], "k": k[:, :1], "v": k[:, :1], **pattern.tensors}
    (found,) = lists(pattern.program, one)
    rows = found.counts.shape[2]
    return float(found.counts.sum()) / (rows * (rows + 1) / 2)


def case(length: int) -> dict[str, Any]:
    """Time one length."""
    print(f"S {length}", flush=True)
    shape = (1, HEADS, length, DIM)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    pattern = xattention(block=BLOCK, stride=STRIDE, threshold=0.1)
    attention = sp.compile(pattern)
    kept = density(pattern, q, k)
    print(f"  density {kept:.3f}", flush=True)
    ours = estimate_ms(lambda: attention(q, k, v))
    flops = length * length * DIM * HEADS / STRIDE
    print(f"  estimate    {ours:9.4f} ms, {flops / ours / 1e9:.0f} TFLOP/s of half the map")
    work: dict[str, Work] = {
        "spcomp": lambda: attention(q, k, v),
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    peer = official()
    if peer is not None:
        work["official estimate"] = lambda: peer(
            q, k, block_size=BLOCK, stride=STRIDE, threshold=0.1, causal=True
        )
    timings = {**alternate(work), "estimate": Timing(ours, 0.0)}
    for name, timing in timings.items():
        print(f"  {name:<18}{timing}", flush=True)
    dense = timings["dense"].median_ms / timings["spcomp"].median_ms
    print(f"  prefill {dense:.2f}x dense")
    if peer is not None:
        print(f"  estimate {timings['official estimate'].median_ms / ours:.2f}x the official one")
    return as_row(timings, length=length, stride=STRIDE, density=kept, flops=flops)


if __name__ == "__main__":
    options = arguments(__doc__ or "")
    lengths = [32768, 131072]
    record("xattention", [case(n) for n in lengths[: 1 if options.quick else None]], options.out)
