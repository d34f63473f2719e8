"""Row D1: a whole Quest decode step (estimate, select, attend) under a CUDA graph, beside dense
decode.

Hq 32, Hkv 8, D 128, bf16, page 16, budget 2048. Floor: page minima and maxima once, the selected
keys and values once, over the card's bandwidth."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from common import alternate, arguments, as_row, check, graphed, record, relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel

import spcomp as sp
from spcomp.backends.reference.pattern import run_program
from spcomp.kvcache import KVCache
from spcomp.patterns import quest

HEADS, KV_HEADS, DIM, PAGE, BUDGET = 32, 8, 128, 16, 2048


def filled_cache(attention: sp.Attention, batch: int, length: int) -> KVCache:
    """Make a cache with random tokens."""
    cache = KVCache.empty(
        attention, batch=batch, kv_heads=KV_HEADS, head_dim=DIM, capacity=length + 64
    )
    shape = (batch, KV_HEADS, length, DIM)
    cache.append(
        torch.randn(shape, device="cuda", dtype=torch.bfloat16),
        torch.randn(shape, device="cuda", dtype=torch.bfloat16),
    )
    return cache


def case(batch: int, length: int) -> dict[str, Any]:
    """Time one case, with one list a KV head and with one a query head."""
    print(f"B {batch}, S {length}", flush=True)
    q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    work: dict[str, Any] = {}
    for heads in ("group", "query"):
        attention = sp.compile(quest(page=PAGE, budget=BUDGET, heads=heads))
        cache = filled_cache(attention, batch, length)
        got = cache.attend(q)
        k, v, _ = cache.tensors()
        item = slice(0, 1)
        inputs = {"q": q[item], "k": k[item], "v": v[item]}
        want, _ = run_program(attention.pattern.program, inputs)
        check(f"{heads} lists against the reference", relative_error(got[item], want), 2e-2)
        work[f"spcomp_{heads}"] = graphed(lambda cache=cache: cache.attend(q))
        if heads == "query":
            work["spcomp_query_no_graph"] = lambda cache=cache: cache.attend(q)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        work["dense_cudnn"] = graphed(
            lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        )
    timings = alternate(work)
    pages = 2 * 2 * batch * KV_HEADS * (length // PAGE) * DIM
    tokens = 2 * 2 * batch * KV_HEADS * BUDGET * DIM
    for name, timing in timings.items():
        print(f"  {name:<24}{timing}", flush=True)
    ratio = timings["dense_cudnn"].median_ms / timings["spcomp_group"].median_ms
    print(f"  {ratio:.2f}x dense; floor {(pages + tokens) / 3.0e9:.4f} ms at 3.0 TB/s", flush=True)
    return as_row(timings, batch=batch, length=length, floor_bytes=pages + tokens)


if __name__ == "__main__":
    options = arguments(__doc__ or "")
    cases = [(1, 131072), (8, 32768), (64, 8192)]
    rows = [case(*c) for c in cases[: 1 if options.quick else None]]
    record("quest_decode", rows, options.out)
