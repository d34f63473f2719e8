"""Row B1: MoBA forward, 32 heads (MHA), S 32768, random input, beside the official code and dense
attention.

The official package is timed when it can be imported (`moba`, from MoonshotAI/MoBA, in the folder
--peers). Floor: 4*S*k*chunk*D*H FLOPs (about half of the own chunk is masked) at the dense rate,
and the parts written and read once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from common import alternate, arguments, as_row, check, record, relative_error

import spcomp as sp
from spcomp.patterns import moba

HEADS, DIM = 32, 128


def official() -> Any:
    """Give the official function, or None where it cannot be imported."""
    try:
        from moba.moba_efficient import moba_attn_varlen
    except ImportError as error:
        print(f"  official MoBA cannot be imported: {error}")
        return None
    return moba_attn_varlen


def case(length: int, chunk: int, keep: int) -> dict[str, Any]:
    """Time one case."""
    print(f"S {length}, chunk {chunk}, top-{keep}", flush=True)
    packed = [
        torch.randn(length, HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    ]
    q, k, v = (x.transpose(0, 1)[None] for x in packed)
    attention = sp.compile(moba(block=chunk, k_blocks=keep))
    work = {"spcomp": lambda: attention(q, k, v)}
    peer = official()
    if peer is not None:
        bounds = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        work["official"] = lambda: peer(*packed, bounds, length, chunk, keep)
        theirs = work["official"]().transpose(0, 1)[None]
        check("against the official code", relative_error(attention(q, k, v), theirs), 1e-2)
    work["dense"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    timings = alternate(work)
    flops = 4 * length * keep * chunk * DIM * HEADS
    for name, timing in timings.items():
        print(f"  {name:<12}{timing}", flush=True)
    if "official" in timings:
        ratio = timings["official"].median_ms / timings["spcomp"].median_ms
        print(f"  {ratio:.2f}x the official code; {flops / 1e12:.2f} TFLOP of selected pairs")
    return as_row(timings, length=length, chunk=chunk, keep=keep, flops=flops)


if __name__ == "__main__":
    options = arguments(__doc__ or "")
    cases = [(32768, 512, 8), (32768, 2048, 3)]
    rows = [case(*c) for c in cases[: 1 if options.quick else None]]
    record("moba", rows, options.out)
