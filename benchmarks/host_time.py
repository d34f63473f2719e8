"""Rows E1 and E2: host time of a warm call, and the time from a pattern to source without any
cache."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from common import arguments, host_us, record

import spcomp as sp
from spcomp import compiler
from spcomp.backends import registry
from spcomp.backends.base import Specialisation
from spcomp.ir import dims
from spcomp.patterns import block_topk, moba, quest, streaming_llm


def launches() -> list[dict[str, Any]]:
    """Time warm calls on tensors so small that the card never holds the host up."""
    make = lambda rows, heads: torch.randn(1, heads, rows, 64, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = make(256, 4), make(256, 2), make(256, 2)
    rows = []
    for made in (
        streaming_llm(),
        block_topk(block=64, budget=2, locals=1),
        moba(block=64, k_blocks=2),
    ):
        attention = sp.compile(made)
        count = len(attention.built(q, k, v).plan.launches())
        spent = statistics.median(host_us(lambda a=attention: a(q, k, v)) for _ in range(3))
        print(f"  {made!r:<60} {count} launches {spent:8.1f} us", flush=True)
        rows.append({"pattern": repr(made), "launches": count, "host_us": spent})
    return rows


def lowering() -> list[dict[str, Any]]:
    """Time lowering and rendering; imports and the reading of templates are done before."""
    backend = registry.backend("triton")
    target = registry.target("sm90")
    spec = Specialisation("bfloat16", 128, 128)
    compiler.emit(
        compiler.lower(block_topk(), backend=backend, target=target, spec=spec),
        backend,
        target,
        spec,
    )
    rows = []
    for number, function in enumerate((block_topk, moba, quest, streaming_llm)):
        dims.evaluator.cache_clear()
        begin = time.perf_counter()
        made = function()
        plan = compiler.lower(made, backend=backend, target=target, spec=spec)
        compiler.emit(plan, backend, target, spec)
        spent = (time.perf_counter() - begin) * 1e3
        print(f"  {made!r:<60} {spent:8.1f} ms", flush=True)
        rows.append({"pattern": repr(made), "order": number, "lowering_ms": spent})
    return rows


if __name__ == "__main__":
    options = arguments(__doc__ or "")
    print("host time of a warm call")
    host = launches()
    print("pattern to source")
    record("host_time", [*host, *lowering()], options.out)
