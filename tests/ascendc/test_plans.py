"""Whole patterns in the emulator give what the reference gives."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp import compiler
from spcomp.backends.ascendc import BACKEND
from spcomp.backends.ascendc.executor import EmulatedExecutable
from spcomp.backends.ascendc.expr_text import dim_text
from spcomp.backends.ascendc.targets import TARGETS
from spcomp.backends.base import Specialisation
from spcomp.dsl.pattern import Pattern
from spcomp.ir import dims
from spcomp.ir.plan import Phase
from spcomp.patterns import block_topk, moba

TARGET = TARGETS["ascend910b"]
TOLERANCE = {"float16": (2e-3, 1e-3), "bfloat16": (1.6e-2, 1e-2)}
PATTERNS = {
    "block_topk": block_topk(block=64, budget=0.5),
    "moba": moba(block=64, k_blocks=2),
    "block_topk-128": block_topk(block=128, budget=2, locals=1),
    "moba-256": moba(block=256, k_blocks=2),
}


@lru_cache(maxsize=8)
def emulated(
    name: str, dtype: str, dim: int, phase: Phase, ai_cores: int = 2, descending: bool = False
) -> EmulatedExecutable:
    spec = Specialisation(dtype, dim, dim)
    plan = compiler.lower(PATTERNS[name], backend=BACKEND, target=TARGET, spec=spec, phase=phase)
    source = compiler.emit(plan, BACKEND, TARGET, spec)
    return EmulatedExecutable(source, ai_cores=ai_cores, descending=descending)


def tensors(shape: tuple[int, ...], dim: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, rows, keys = shape
    made = torch.Generator().manual_seed(sum(shape))
    sizes = ((batch, heads, rows), (batch, kv_heads, keys), (batch, kv_heads, keys))
    q, k, v = (
        torch.randn(*s, dim, generator=made).to(getattr(torch, dtype)).transpose(1, 2).contiguous()
        for s in sizes
    )
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def check(run: EmulatedExecutable, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> None:
    env = dict(zip(("B", "Hq", "Sq", "D"), q.shape, strict=True))
    env |= {"Hkv": k.shape[1], "Skv": k.shape[2], "Dv": v.shape[3]}
    out, lse = run.run({"q": q, "k": k, "v": v}, env, {})
    want, want_lse = sp.compile(pattern, backend="reference")(q, k, v, return_lse=True)
    relative, absolute = TOLERANCE[str(q.dtype).removeprefix("torch.")]
    torch.testing.assert_close(out.float(), want.float(), rtol=relative, atol=absolute)
    torch.testing.assert_close(lse, want_lse.float(), rtol=relative, atol=absolute)


SHAPES: list[tuple[str, str, int, tuple[int, ...]]] = [
    ("block_topk", "float16", 64, (1, 4, 2, 200, 300)),
    ("block_topk", "float16", 64, (2, 3, 1, 129, 129)),
    ("block_topk", "float16", 64, (1, 2, 2, 17, 33)),
    ("block_topk", "float16", 64, (2, 4, 1, 1, 300)),
    ("block_topk", "float16", 64, (1, 16, 1, 3, 70)),
    ("block_topk", "float16", 64, (3, 4, 1, 129, 257)),
    ("block_topk", "float16", 64, (1, 16, 1, 65, 130)),
    ("block_topk-128", "bfloat16", 128, (1, 6, 2, 129, 257)),
    ("block_topk-128", "bfloat16", 128, (2, 16, 1, 257, 127)),
    ("moba-256", "float16", 128, (1, 4, 1, 35, 600)),
    ("moba-256", "float16", 128, (3, 2, 2, 300, 270)),
    ("moba", "bfloat16", 80, (1, 3, 1, 70, 200)),
    ("moba", "bfloat16", 80, (1, 4, 2, 20, 7)),
]


@pytest.mark.parametrize(("name", "dtype", "dim", "shape"), SHAPES)
def test_a_pattern_means_in_the_emulator_what_it_means(
    name: str, dtype: str, dim: int, shape: tuple[int, ...]
) -> None:
    run = emulated(name, dtype, dim, compiler.phase_for(shape[3]))
    check(run, PATTERNS[name], *tensors(shape, dim, dtype))


@pytest.mark.parametrize(("ai_cores", "descending"), [(1, True), (24, False)])
def test_the_number_and_order_of_the_cores_change_nothing(ai_cores: int, descending: bool) -> None:
    run = emulated("block_topk", "float16", 64, "prefill", ai_cores, descending)
    check(run, PATTERNS["block_topk"], *tensors((1, 4, 2, 100, 200), 64, "float16"))


def test_a_lone_row_may_lie_anywhere() -> None:
    """Its stride steps to no other row, and frameworks leave large ones there."""
    run = emulated("block_topk", "float16", 64, "decode")
    q, k, v = tensors((2, 4, 2, 1, 300), 64, "float16")
    far = torch.empty_strided(q.shape, (4 * 64, 64, 70000, 1), dtype=q.dtype).copy_(q)
    check(run, PATTERNS["block_topk"], far, k, v)


def environments() -> Iterator[dict[str, int]]:
    for rows, keys, heads in product((1, 17, 300), (1, 64, 1000), (1, 3)):
        yield {"B": 2, "Hq": 4 * heads, "Hkv": heads, "Sq": rows, "Skv": keys, "R": rows, "R0": 0}


def test_dims_are_printed_as_what_they_are() -> None:
    names = {name: name for name in dims.SYMBOLS}
    functions = {
        "CeilDiv": lambda a, b: -(-a // b),
        "FloorDiv": lambda a, b: a // b,
        "Least": min,
        "Most": max,
    }
    spec = Specialisation("float16", 64, 64)
    for pattern, phase in product(PATTERNS.values(), ("prefill", "decode")):
        plan = compiler.lower(pattern, backend=BACKEND, target=TARGET, spec=spec, phase=phase)
        sizes = {d for b in plan.buffers for d in b.dims}
        for size, env in product(sizes, environments()):
            whole = {**env, "D": 64, "Dv": 64}
            printed = eval(dim_text(size, names).replace("/", "//"), {**functions, **whole})
            assert printed == dims.evaluate(size, whole)
