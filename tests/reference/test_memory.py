"""The reference never holds the whole score map, forward or backward."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

FORWARD = """
import resource, sys, torch
import spcomp.backends.reference.pattern as interpreter
from spcomp.backends.reference.pattern import run_program
from spcomp.patterns import block_topk, moba

interpreter.LOGITS_AT_ONCE = 1 << 22
S, HQ, HKV, D = 4096, 8, 2, 64
pattern = {"block_topk": block_topk(block=128), "moba": moba(block=512)}[sys.argv[1]]
q, k, v = (torch.randn(1, h, S, D, dtype=torch.bfloat16) for h in (HQ, HKV, HKV))
run_program(pattern.program, {"q": q[:, :, :64], "k": k[:, :, :64], "v": v[:, :, :64]})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out, lse = run_program(pattern.program, {"q": q, "k": k, "v": v})
assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("name", ["block_topk", "moba"])
def test_a_long_call_needs_a_few_chunks_of_memory(name: str) -> None:
    # The score map of this call is 512 MiB, a chunk 16 MiB. As shipped a chunk is 128 MiB, so that
    # 32k tokens with 32 heads take five of them and 3 GiB of tensors as long as the call.
    done = subprocess.run(
        [sys.executable, "-c", FORWARD, name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    chunk_mib = (1 << 22) * 4 / 2**20
    tensors_mib = (8 * 3 + 2 * 2) * 4096 * 64 * 4 / 2**20
    assert float(done.stdout) < 6 * chunk_mib + tensors_mib


def test_the_backward_pass_saves_no_score_map() -> None:
    from spcomp.patterns import moba
    from tests.reference.make import Shape, qkv, run

    q, k, v = (x.requires_grad_() for x in qkv(Shape(1, 4, 2, 300, 300, 8, 8), torch.float32))
    largest = 0

    def note(x: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out, _ = run(moba(block=32, k_blocks=3), q, k, v, chunk_rows=300)
    assert largest < 300 * 300
    out.sum().backward()
