"""The pool kernel in the emulator against a model in double precision."""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from functools import lru_cache

import jinja2.meta
import pytest
import torch

from spcomp.backends.ascendc.contexts.pool import PoolContext, PoolKind, pool_context
from spcomp.backends.ascendc.emulate import (
    Argument,
    Buffer,
    EmulatedKernel,
    Launch,
    Statistics,
    compile_kernel,
)
from spcomp.codegen.render import TEMPLATES, environment, render

TEMPLATE = "ascendc/kernels/pool.h.jinja"
TILING = """#include <cstdint>
struct PoolTiling {
    int32_t B, H, S, U;
    int64_t x_b, x_h, x_s;
};
"""
TOLERANCES = {"float16": (2e-3, 1e-3), "bfloat16": (1.6e-2, 1e-2)}


@dataclass(frozen=True)
class Kind:
    """What a pool kernel is specialised for."""

    dtype: str = "float16"
    by: PoolKind = "mean"
    head_dim: int = 64
    block: int = 64
    stride: int = 64

    def context(self) -> PoolContext:
        return pool_context(
            header=("test",),
            name="test_00_pool",
            tiling_header="tiling.h",
            struct="PoolTiling",
            dtype=self.dtype,
            by=self.by,
            head_dim=self.head_dim,
            block=self.block,
            stride=self.stride,
        )


@lru_cache(maxsize=64)
def kernel(kind: Kind) -> EmulatedKernel:
    source = render(TEMPLATE, kind.context()).replace("#pragma once\n", "")
    return compile_kernel(source.replace('#include "tiling.h"', TILING), "test_00_pool")


def pooled(
    kind: Kind, x: torch.Tensor, units: int, launch: Launch
) -> tuple[torch.Tensor, Statistics]:
    """Run the kernel on a view whose storage is what the launch gets."""
    batch, heads, tokens, dim = x.shape
    out = torch.full((batch, heads, units, dim), 77.0, dtype=x.dtype)
    storage = torch.tensor([], dtype=x.dtype).set_(x.untyped_storage())
    assert x.storage_offset() == 0
    sizes = struct.pack("=4i3q", batch, heads, tokens, units, *x.stride()[:3])
    arguments: list[Argument] = [Buffer("x", storage, read_only=True), Buffer("out", out), sizes]
    return out, kernel(kind).run(arguments, launch)


def model(kind: Kind, x: torch.Tensor, units: int) -> torch.Tensor:
    wide = x.double()
    rows = []
    for unit in range(units):
        tokens = wide[:, :, unit * kind.stride : unit * kind.stride + kind.block]
        if kind.by == "mean":
            rows.append(tokens.mean(2))
        else:
            rows.append(tokens.amax(2) if kind.by == "max" else tokens.amin(2))
    return torch.stack(rows, 2) if rows else wide[:, :, :0]


def drawn(kind: Kind, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(getattr(torch, kind.dtype))


def check(kind: Kind, x: torch.Tensor, units: int, launch: Launch | None = None) -> None:
    launch = launch or Launch()
    got, statistics = pooled(kind, x, units, launch)
    relative, absolute = TOLERANCES[kind.dtype]
    torch.testing.assert_close(
        got.double(), model(kind, x, units), rtol=relative, atol=absolute, equal_nan=False
    )
    assert not statistics.warnings


def all_units(kind: Kind, tokens: int) -> int:
    return -(-tokens // kind.stride)


KINDS = [
    Kind(),
    Kind("bfloat16", head_dim=80, block=128, stride=128),
    Kind(head_dim=128, block=256, stride=256),  # in two parts
    Kind("bfloat16", "max", 256, 256, 256),  # in four parts
    Kind(by="min", head_dim=16, block=48, stride=48),
    Kind(by="max", head_dim=80, block=32, stride=16),  # units overlap
    Kind("bfloat16", "mean", 128, 32, 80),  # tokens between the units
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 256, 257, 1030])
def test_units_are_pooled_with_the_tokens_they_have(kind: Kind, tokens: int) -> None:
    check(kind, drawn(kind, 2, 3, tokens, kind.head_dim), all_units(kind, tokens))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("blocks", [2, 5, 48])
def test_cores_share_the_units(kind: Kind, descending: bool, blocks: int) -> None:
    x = drawn(kind, 1, 2, 700, kind.head_dim)
    check(kind, x, all_units(kind, 700), Launch(blocks=blocks, descending=descending))


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_inputs_may_be_strided(kind: Kind) -> None:
    by_token = drawn(kind, 2, 300, 3, kind.head_dim + 16)[..., : kind.head_dim].transpose(1, 2)
    check(kind, by_token, all_units(kind, 300), Launch(blocks=3))
    one_token = drawn(kind, 2, 1, 5, kind.head_dim).transpose(1, 2)[:, ::2]
    check(kind, one_token, 1)


def test_a_tail_may_be_left_out_and_nothing_may_be_asked_for() -> None:
    kind = KINDS[0]
    check(kind, drawn(kind, 1, 2, 150, 64), 2)
    check(kind, drawn(kind, 1, 2, 150, 64), 0, Launch(blocks=2))
    check(kind, drawn(kind, 0, 1, 64, 64), 1)


def test_an_infinite_value_stays() -> None:
    kind = Kind(by="max", head_dim=80, block=32, stride=16)
    x = drawn(kind, 1, 1, 50, 80)
    x[0, 0, 3] = float("-inf")
    x[0, 0, 48:, 5] = float("-inf")
    x[0, 0, 7, 9] = float("inf")
    check(kind, x, all_units(kind, 50))


def test_the_context_holds_what_the_template_names() -> None:
    text = (TEMPLATES / TEMPLATE).read_text()
    names = jinja2.meta.find_undeclared_variables(environment().parse(text))
    assert names == {field.name for field in fields(PoolContext)}


@pytest.mark.parametrize("head_dim", [16, 80, 128, 256])
@pytest.mark.parametrize("block", [1, 16, 64, 112, 256, 4096])
@pytest.mark.parametrize("stride", [1, 16, 64, 256])
def test_every_specialisation_fits_the_unified_buffer(
    head_dim: int, block: int, stride: int
) -> None:
    context = Kind(head_dim=head_dim, block=block, stride=stride).context()
    assert context.part <= block and context.span <= 4095
    assert context.units == 1 or not context.is_split


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2], KINDS[3], KINDS[5], KINDS[6]], ids=str)
def test_a_load_may_bring_two_strided_tokens_or_one_without_a_stride(kind: Kind) -> None:
    for tokens in (2, 258):
        wide = drawn(kind, 1, tokens, 3, kind.head_dim + 16)
        x = wide[..., : kind.head_dim].transpose(1, 2)
        check(kind, x, all_units(kind, tokens), Launch(blocks=2))
    one = drawn(kind, 1, 2, 1, kind.head_dim)
    check(kind, one.as_strided(one.shape, (*one.stride()[:2], 1, 1)), 1)
    check(kind, drawn(kind, 1, 1, 1, kind.head_dim), 1)
