"""The AscendC kernel that attends over listed blocks of keys, in the emulator against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import pytest
import torch

from spcomp.backends.ascendc.contexts.attend_gather import (
    AttendGatherContext,
    attend_gather_context,
)
from spcomp.backends.ascendc.contexts.base import Span
from spcomp.backends.ascendc.emulate import (
    Argument,
    Buffer,
    EmulatedKernel,
    Launch,
    Statistics,
    compile_kernel,
)
from spcomp.codegen.render import render

INCLUDE = '#include "tiling.h"'
NAME = "attend_gather_00"
COUNTS = ("B", "Hq", "Hkv", "Hl", "Sq", "Skv", "R0", "R", "Nr", "width", "out_row0")
STRIDES = (
    *("q_b", "q_h", "q_s", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s"),
    *("out_b", "out_h", "out_s", "lse_b", "lse_h"),
)
TOLERANCE = {"float16": (2e-3, 1e-3), "bfloat16": (1.6e-2, 1e-2)}


class Tiling(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in COUNTS),
        *((name, ctypes.c_int64) for name in STRIDES),
        ("scale", ctypes.c_float),
    )


TILING_HEADER = (
    "struct Tiling {\n"
    + "".join(f"  int32_t {name};\n" for name in COUNTS)
    + "".join(f"  int64_t {name};\n" for name in STRIDES)
    + "  float scale;\n};\n"
)

Sees = Callable[[int, int, int, int], bool]


@dataclass(frozen=True)
class Predicate:
    """A pair rule twice: as the kernel's spans and as the model's function of q, k, Sq and Skv."""

    spans: tuple[Span, ...] | None
    sees: Sees


ALL = Predicate(None, lambda q, k, sq, skv: True)
CAUSAL = Predicate((Span("0", "q + Skv - Sq + 1"),), lambda q, k, sq, skv: k <= q + skv - sq)
SINK_AND_WINDOW = Predicate(
    (Span("0", "4"), Span("q - 40", "q + 1")), lambda q, k, sq, skv: k < 4 or q - 40 <= k <= q
)
NOTHING = Predicate((), lambda q, k, sq, skv: False)


@dataclass(frozen=True)
class Kernel:
    """What is fixed when the kernel is generated."""

    dtype: str = "float16"
    head_dim: int = 64
    value_dim: int = 64
    unit: int = 64
    granule: int = 1
    predicate: Predicate = ALL

    def context(self) -> AttendGatherContext:
        return attend_gather_context(
            name=NAME,
            header=("a test",),
            tiling_header="tiling.h",
            struct="Tiling",
            dtype=self.dtype,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            unit=self.unit,
            granule=self.granule,
            spans=self.predicate.spans,
        )


@lru_cache(maxsize=32)
def compiled(kernel: Kernel) -> tuple[EmulatedKernel, int]:
    context = kernel.context()
    source = render("ascendc/kernels/attend_gather.h.jinja", context)
    return compile_source(source), context.workspace_bytes


def compile_source(source: str) -> EmulatedKernel:
    assert INCLUDE in source
    return compile_kernel(source.replace(INCLUDE, TILING_HEADER).replace("#pragma once", ""), NAME)


@dataclass(frozen=True)
class Case:
    """One launch. rows: (R0, R) of a slab; None takes all queries. spread: q, k and v lie as
    [B, S, H, D]. out_row0: rows of the outputs before the slab. empty_every: this many lists
    apart one is empty; 0 for none. out_step: elements between the rows of out, which one row does
    not need; 0 for what they are."""

    kernel: Kernel = field(default_factory=Kernel)
    B: int = 1
    Hq: int = 2
    Hkv: int = 1
    Hl: int = 1
    Sq: int = 4
    Skv: int = 256
    width: int = 3
    rows: tuple[int, int] | None = None
    spread: bool = False
    out_row0: int = 0
    scale: float = 0.125
    empty_every: int = 0
    out_step: int = 0
    launch: Launch = field(default_factory=lambda: Launch(kind="mix", blocks=3))


Tensors = tuple[torch.Tensor, ...]


def draw(case: Case) -> Tensors:
    """Give q, k, v, indices and counts."""
    generator = torch.Generator().manual_seed(case.Sq * 1009 + case.Skv)
    dtype = getattr(torch, case.kernel.dtype)

    def tensor(heads: int, length: int, width: int) -> torch.Tensor:
        shape = (case.B, length, heads, width) if case.spread else (case.B, heads, length, width)
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return values.transpose(1, 2) if case.spread else values

    q = tensor(case.Hq, case.Sq, case.kernel.head_dim)
    k = tensor(case.Hkv, case.Skv, case.kernel.head_dim)
    v = tensor(case.Hkv, case.Skv, case.kernel.value_dim)
    _, length = case.rows or (0, case.Sq)
    list_rows = -(-length // case.kernel.granule)
    blocks = -(-case.Skv // case.kernel.unit)
    indices = torch.full((case.B, case.Hl, list_rows, case.width), -1, dtype=torch.int32)
    counts = torch.zeros((case.B, case.Hl, list_rows), dtype=torch.int32)
    for number, row in enumerate(counts.view(-1)):
        most = min(case.width, blocks)
        row.fill_(int(torch.randint(1, most + 1, (1,), generator=generator)))
        if case.empty_every and number % case.empty_every == 0:
            row.fill_(0)
        chosen = torch.randperm(blocks, generator=generator)[: int(row)].sort().values
        if number == 1:
            chosen[-1:] = blocks - 1  # the block with a tail
        indices.view(-1, case.width)[number, : int(row)] = chosen.to(torch.int32)
    return q, k, v, indices, counts


def model(case: Case, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, indices, counts = (t.double() if t.is_floating_point() else t for t in tensors)
    first, length = case.rows or (0, case.Sq)
    out = torch.zeros(case.B, case.Hq, length, case.kernel.value_dim, dtype=torch.float64)
    lse = torch.full((case.B, case.Hq, length), -torch.inf, dtype=torch.float64)
    unit, sees = case.kernel.unit, case.kernel.predicate.sees
    for b in range(case.B):
        for h in range(case.Hq):
            for r in range(length):
                place = (b, h // (case.Hq // case.Hl), r // case.kernel.granule)
                entries = indices[place][: int(counts[place])].tolist()
                keys = [
                    key
                    for entry in entries
                    for key in range(entry * unit, min(entry * unit + unit, case.Skv))
                    if sees(first + r, key, case.Sq, case.Skv)
                ]
                if not keys:
                    continue
                kv_head = h // (case.Hq // case.Hkv)
                logits = case.scale * (k[b, kv_head, keys] @ q[b, h, first + r])
                lse[b, h, r] = torch.logsumexp(logits, 0)
                out[b, h, r] = torch.softmax(logits, 0) @ v[b, kv_head, keys]
    return out, lse


def run(
    case: Case, tensors: Tensors, kernel: EmulatedKernel | None = None
) -> tuple[torch.Tensor, torch.Tensor, Statistics]:
    """Give out and lse of the slab, after checking that nothing else was touched."""
    q, k, v, indices, counts = tensors
    made, workspace_bytes = compiled(case.kernel)
    first, length = case.rows or (0, case.Sq)
    rows = case.out_row0 + length + 2
    shape = (case.B, rows, case.Hq) if case.spread else (case.B, case.Hq, rows)
    held_out = torch.full((*shape, case.kernel.value_dim), 7.0, dtype=q.dtype)
    out = held_out.transpose(1, 2) if case.spread else held_out
    lse = torch.full((case.B, case.Hq, rows), 7.0)
    workspace = torch.full((workspace_bytes * case.launch.blocks // 4,), torch.nan)
    values = {name: getattr(case, name) for name in ("B", "Hq", "Hkv", "Hl", "Sq", "Skv", "width")}
    inputs = {"q": q, "k": k, "v": v}
    values |= {"R0": first, "R": length, "Nr": counts.shape[2], "out_row0": case.out_row0}
    for name, tensor in (*inputs.items(), ("out", out)):
        values |= {f"{name}_{axis}": tensor.stride(i) for i, axis in enumerate("bhs")}
    values |= {"lse_b": lse.stride(0), "lse_h": lse.stride(1)}
    if case.out_step:
        values["out_s"] = case.out_step
    tiling = bytes(Tiling(scale=case.scale, **values))
    arguments: list[Argument] = [
        Buffer(name, t.transpose(1, 2) if case.spread else t, read_only=True)
        for name, t in inputs.items()
    ]
    arguments += [Buffer("indices", indices, True), Buffer("counts", counts, True)]
    arguments += [Buffer("out", held_out), Buffer("lse", lse), Buffer("workspace", workspace)]
    statistics = (kernel or made).run([*arguments, tiling], case.launch)
    slab = slice(case.out_row0, case.out_row0 + length)
    for tensor in (out, lse):
        kept = tensor.clone()
        kept[:, :, slab] = 7.0
        assert (kept == 7.0).all(), "the kernel wrote rows outside the slab"
    return out[:, :, slab], lse[:, :, slab], statistics


def check(case: Case) -> None:
    tensors = draw(case)
    got_out, got_lse, statistics = run(case, tensors)
    out, lse = model(case, tensors)
    relative, absolute = TOLERANCE[case.kernel.dtype]
    torch.testing.assert_close(got_out.double(), out, rtol=relative, atol=absolute)
    torch.testing.assert_close(got_lse.double(), lse, rtol=relative, atol=absolute)
    assert not statistics.warnings


TOKEN = Kernel()
TILE = Kernel("bfloat16", 128, 128, 128, granule=64, predicate=CAUSAL)
ODD = Kernel("float16", 80, 48, 256, granule=16, predicate=SINK_AND_WINDOW)
WIDE = Kernel("bfloat16", 256, 256, 64, granule=3, predicate=CAUSAL)
UNEVEN = Kernel("float16", 64, 128, 144, granule=5, predicate=CAUSAL)

SHAPES = {
    "one-query": Case(Sq=1, width=2),
    "list-per-query-head": Case(Hq=4, Hkv=2, Hl=4, Sq=3, width=4, Skv=300, empty_every=2),
    "list-per-kv-head": Case(B=2, Hq=6, Hkv=2, Hl=2, Sq=3, Skv=201, empty_every=3),
    "one-list": Case(B=2, Hq=8, Hkv=2, Hl=1, Sq=2, Skv=40, width=1),
    "group-16": Case(Hq=16, Hkv=1, Hl=1, Sq=5, Skv=333, width=6, spread=True),
    "group-130": Case(Hq=130, Hkv=1, Hl=1, Sq=2, Skv=80, width=2),
    "keys-fewer-than-16": Case(Sq=2, Skv=64 * 3 + 3, width=4),
    "slab": Case(Hq=3, Hkv=3, Hl=3, Sq=9, rows=(4, 3), out_row0=5),
    "tile": Case(TILE, Hq=4, Hkv=2, Hl=2, Sq=200, Skv=300, width=3, scale=0.09),
    "tile-spread": Case(TILE, B=2, Hq=3, Hkv=1, Hl=1, Sq=65, Skv=129, width=2, spread=True),
    "tile-slab": Case(TILE, Hq=2, Hkv=2, Hl=1, Sq=300, Skv=300, rows=(128, 100), out_row0=128),
    "odd": Case(ODD, Hq=6, Hkv=2, Hl=2, Sq=39, Skv=530, width=3),
    "odd-one-query": Case(ODD, Hq=4, Hkv=4, Hl=4, Sq=1, Skv=257, width=2, spread=True),
    "wide": Case(WIDE, Hq=8, Hkv=2, Hl=2, Sq=8, Skv=150, width=3, scale=0.06),
    "uneven": Case(UNEVEN, Hq=3, Hkv=1, Hl=3, Sq=12, Skv=400, width=3, empty_every=4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_the_models(name: str) -> None:
    check(SHAPES[name])


@pytest.mark.parametrize(
    ("unit", "head_dim", "pieces", "chunk"),
    [(64, 64, 1, 64), (128, 128, 1, 128), (256, 80, 2, 128), (144, 64, 2, 80), (256, 256, 4, 64)],
)
def test_a_block_is_cut_into_even_chunks(unit: int, head_dim: int, pieces: int, chunk: int) -> None:
    context = Kernel(unit=unit, head_dim=head_dim).context()
    assert (context.pieces, context.chunk) == (pieces, chunk)


@pytest.mark.parametrize("blocks", [1, 2, 40])
@pytest.mark.parametrize("descending", [False, True])
def test_any_number_of_cores_in_any_order(blocks: int, descending: bool) -> None:
    launch = Launch(kind="mix", blocks=blocks, descending=descending, physical_ai_cores=40)
    check(replace(SHAPES["list-per-kv-head"], launch=launch))
    check(replace(SHAPES["tile-spread"], launch=launch))


def test_nothing_listed_and_nothing_visible_give_zero() -> None:
    case = replace(SHAPES["one-list"], empty_every=1)
    for each in (case, replace(case, empty_every=0, kernel=replace(TOKEN, predicate=NOTHING))):
        out, lse, _ = run(each, draw(each))
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


def test_a_negative_scale_hides_as_well() -> None:
    check(replace(SHAPES["uneven"], scale=-0.2))


HOLED = Kernel(
    "float16",
    80,
    48,
    256,
    granule=16,
    predicate=Predicate(
        (
            Span("0", "Least(FloorDiv(q - 7, 2) + 4, 63)"),
            Span("Most(q - 200, 64)", "CeilDiv(q + 1, 4) * 4"),
        ),
        lambda q, k, sq, skv: (
            k < min((q - 7) // 2 + 4, 63) or max(q - 200, 64) <= k < -(-(q + 1) // 4) * 4
        ),
    ),
)
"""Query 264 sees of the first 256 keys all but 63, query 457 of the next ones all but 256, and the
first queries see none."""

ALL_LISTED = {"Hq": 8, "Hkv": 2, "Hl": 8}
# A large scale gives few keys all the weight, so that one too many shows.
EDGES = {
    "last-key-hidden": Case(WIDE, **ALL_LISTED, Sq=150, Skv=150, rows=(62, 1), scale=0.5),
    "last-key-of-a-later-block-hidden": Case(
        WIDE, **ALL_LISTED, Sq=150, Skv=150, rows=(126, 1), scale=0.5
    ),
    "last-key-of-the-second-part-hidden": Case(
        TILE, **ALL_LISTED, Sq=300, Skv=300, rows=(126, 1), width=3, scale=0.5
    ),
    "one-key-hidden": Case(HOLED, **ALL_LISTED, Sq=530, Skv=530, rows=(264, 1)),
    "first-key-of-a-later-block-hidden": Case(HOLED, **ALL_LISTED, Sq=530, Skv=530, rows=(457, 1)),
    "first-key-hidden": Case(HOLED, **ALL_LISTED, Sq=530, Skv=530, rows=(265, 1)),
    "nothing-to-much": Case(HOLED, Hq=3, Hkv=3, Hl=3, Sq=300, Skv=300, rows=(0, 90)),
    "holes": Case(HOLED, Hq=2, Hkv=1, Hl=2, Sq=530, Skv=530, rows=(256, 40)),
    "sink-beyond-the-window": Case(ODD, Hq=4, Hkv=2, Hl=2, Sq=530, Skv=530, rows=(208, 40)),
    "a-tile-of-no-rows": Case(TILE, Hq=4, Hkv=1, Hl=1, Sq=96, Skv=140, width=2),
    "a-piece-of-no-keys": Case(ODD, Hq=4, Hkv=2, Hl=2, Sq=17, Skv=384, width=2),
    "heads-too-far-apart-for-a-load": Case(Sq=1024, Skv=64, width=1, rows=(5, 2)),
    "one-row-without-a-step": Case(Sq=1, width=2, out_step=1),
    "two-queries-of-spread-outputs": Case(
        UNEVEN, Hq=2, Hkv=1, Hl=1, Sq=2, Skv=300, spread=True, width=3
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_every_edge_is_the_models(name: str) -> None:
    check(EDGES[name])


@pytest.mark.parametrize("kernel", [TOKEN, TILE, ODD], ids=["one part", "two parts", "pieces"])
def test_the_largest_score_may_be_any_key(kernel: Kernel) -> None:
    """Without it in the row's maximum the weight of that key would overflow."""
    blocks = 3
    keys = blocks * kernel.unit
    case = Case(kernel, Hq=1, Sq=keys, Skv=keys, width=blocks, rows=(keys - 1, 1), scale=1.0)
    q, k, v, indices, counts = draw(case)
    indices[...], counts[...] = torch.arange(blocks), blocks
    sees = kernel.predicate.sees
    for key in (0, 15, 16, 62, 63, 64, 127, kernel.unit - 1, keys - 64, keys - 1):
        if sees(keys - 1, key, keys, keys):
            q[...], k[...] = 1.0, 0.0
            k[:, :, key] = 1.5
            out, lse, _ = run(case, (q, k, v, indices, counts))
            want_lse = torch.full_like(lse, 1.5 * kernel.head_dim)
            torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=0.0)
            torch.testing.assert_close(out[:, :, 0], v[:, :, key], rtol=1e-2, atol=1e-2)


HIDDEN = [(WIDE, 62, 63), (WIDE, 126, 127), (TILE, 126, 127), (HOLED, 264, 63), (HOLED, 457, 256)]


@pytest.mark.parametrize(("kernel", "query", "key"), HIDDEN)
def test_a_hidden_key_may_have_the_largest_score(kernel: Kernel, query: int, key: int) -> None:
    """It is the only one that the query does not see among the 64 around it."""
    keys = 3 * kernel.unit
    assert not kernel.predicate.sees(query, key, keys, keys)
    case = Case(kernel, Hq=1, Sq=keys, Skv=keys, width=3, rows=(query, 1), scale=1.0)
    q, k, v, indices, counts = draw(case)
    indices[...], counts[...] = torch.arange(3), 3
    q[...], k[...] = 1.0, 0.0
    k[:, :, key] = 1.5
    out, lse, _ = run(case, (q, k, v, indices, counts))
    want_out, want_lse = model(case, (q, k, v, indices, counts))
    torch.testing.assert_close(out.double(), want_out, rtol=1.6e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-3, atol=1e-3)


def test_one_key_may_have_a_stride_that_no_load_can_step() -> None:
    case = Case(Hq=1, Sq=1, Skv=1, width=1)
    q, k, v, indices, counts = draw(case)
    k, v = (t.as_strided(t.shape, (64, 64, 70_000, 1)) for t in (k, v))
    out, lse, _ = run(case, (q, k, v, indices, counts))
    want_out, want_lse = model(case, (q, k, v, indices, counts))
    torch.testing.assert_close(out.double(), want_out, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-3, atol=1e-3)
