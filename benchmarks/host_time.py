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


@sp.pattern
def listed(q, k, v, *, indices):
    """Attend to blocks of 16 keys that the caller chose: one launch in the gather order."""
    chosen = sp.block_indices(indices, block=16)
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))


def launches() -> list[dict[str, Any]]:
    """Time warm calls on tensors so small that the card never holds the host up."""
    q, k, v = (torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    indices = torch.zeros(1, 1, 4, 1, device="cuda", dtype=torch.int32)
    rows = []
    for attention in (
        sp.compile(listed(indices=indices), order="gather"),
        sp.compile(streaming_llm(sinks=4, recent=28)),
        sp.compile(block_topk(block=32, budget=2, sinks=0, locals=1)),
        sp.compile(moba(block=32, k_blocks=2)),
    ):
        count = len(attention.built(q, k, v).plan.launches())
        spent = statistics.median(host_us(lambda a=attention: a(q, k, v)) for _ in range(5))
        print(f"  {attention.pattern!r:<60} {count} launches {spent:8.1f} us", flush=True)
        rows.append({"pattern": repr(attention.pattern), "launches": count, "host_us": spent})
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
