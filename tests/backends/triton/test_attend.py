"""The query-major attend kernel against dense attention, and its code for sm_90."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from spcomp.backends.triton.contexts.attend import AttendContext, attend_context
from spcomp.backends.triton.contexts.base import CapturedArg
from spcomp.ir.expr import FALSE, TRUE, Expr, Lit, Load, Sym, op
from tests.backends.triton.attention import LOG2_E, SINKS, assert_close, causal, tile_lists
from tests.backends.triton.rendering import (
    compile_kernel,
    field_names,
    import_rendered,
    variables_of,
    write_rendered,
)

TEMPLATE = "triton/kernels/attend.py.jinja"
Q, K, H, SCORE = Sym("q"), Sym("k"), Sym("h"), Sym("score")
CAUSAL = op("le", K, op("add", Q, op("sub", Sym("Skv"), Sym("Sq"))))
TYPES = {
    "lse_ptr": "*fp32",
    "tiles_ptr": "*i32",
    "partial_ptr": "*i32",
    "total_ptr": "*i32",
    "scale_log2": "fp32",
}


def module_for(folder: Path, q: Tensor, v: Tensor, **options: Any) -> ModuleType:
    settings: dict[str, Any] = {"block_q": 16, "block_k": 16, "num_stages": 2} | options
    context = attend_context(
        header=("A test.",),
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        is_float32=q.dtype == torch.float32,
        is_interpreted=True,
        **settings,
    )
    return import_rendered(TEMPLATE, context, folder)


def launch(
    module: ModuleType,
    qkv: tuple[Tensor, Tensor, Tensor],
    lists: tuple[Tensor, Tensor, Tensor],
    scale: float,
    *,
    row_begin: int = 0,
    store_begin: int = 0,
    captured: tuple[Tensor, ...] = (),
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv
    tiles, partial, total = lists
    batch, hq, sq, _ = q.shape
    out = torch.full((batch, hq, sq, v.shape[3]), math.nan, dtype=q.dtype)
    lse = torch.full((batch, hq, sq), math.nan)
    rows = partial.shape[2]
    read = captured if sinks is None else (sinks, *captured)
    extra = [a for tensor in read for a in (tensor, *tensor.stride())]
    module.attend_kernel[(batch * hq * rows,)](
        *(q, k, v, out, lse, tiles, partial, total),
        *(s for x in (q, k, v, out) for s in x.stride()[:3]),
        *lse.stride()[:2],
        *(*tiles.stride()[:3], *partial.stride()[:2]),
        *(sq, k.shape[2], hq, hq // k.shape[1], hq // tiles.shape[1], row_begin, rows),
        *(store_begin, scale * LOG2_E, *extra),
    )
    return out, lse


def inputs(
    batch: int, hq: int, hkv: int, sq: int, skv: int, d: int, dv: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v whose storage is [B,S,H,D]: no stride but the last is what it seems."""
    q = torch.randn(batch, sq, hq, d).to(dtype).transpose(1, 2)
    k = torch.randn(batch, skv, hkv, d).to(dtype).transpose(1, 2)
    v = torch.randn(batch, skv, hkv, dv).to(dtype).transpose(1, 2)
    return q, k, v


def all_tiles(batch: int, heads: int, sq: int, skv: int, block: int = 16) -> Tensor:
    return torch.ones(batch, heads, -(-sq // block), -(-skv // block), dtype=torch.bool)


def test_context_holds_exactly_the_variables_of_the_template():
    assert field_names(AttendContext) == variables_of(TEMPLATE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "d", "dv"),
    [
        ((2, 3, 1, 37, 130), 80, 17),  # tails of both head dimensions, a group of three
        ((1, 2, 2, 1, 33), 32, 32),  # one query
        ((1, 4, 2, 33, 16), 17, 64),  # more queries than keys: the first rows see nothing
    ],
)
def test_causal_equals_dense(tmp_path, dtype, shape, d, dv):
    batch, hq, _, sq, skv = shape
    qkv = inputs(*shape, d, dv, dtype)
    allowed = causal(sq, skv).expand(batch, 1, sq, skv)
    lists = tile_lists(allowed, all_tiles(batch, 1, sq, skv), 16, 16)
    module = module_for(tmp_path, qkv[0], qkv[2], predicate=CAUSAL)
    got = launch(module, qkv, lists, 0.3)
    assert_close(got, *qkv, allowed.expand(batch, hq, sq, skv), 0.3)


@pytest.mark.parametrize("list_heads", [1, 2, 4])
def test_chosen_tiles_are_read_per_list_head(tmp_path, list_heads):
    """The flag matters inside the mask only: a local window is seen in tiles nobody chose."""
    batch, hq, sq, skv = 2, 4, 37, 70
    qkv = inputs(batch, hq, 2, sq, skv, 16, 16, torch.float32)
    chosen = torch.rand(batch, list_heads, 3, 5) < 0.4
    wide = chosen.repeat_interleave(16, 2)[:, :, :sq].repeat_interleave(16, 3)[..., :skv]
    local = op("gt", op("add", K, Lit(4)), op("add", Q, op("sub", Sym("Skv"), Sym("Sq"))))
    near = torch.arange(skv)[None] + 4 > torch.arange(sq)[:, None] + skv - sq
    allowed = causal(sq, skv) & (wide | near)
    predicate = op("and", CAUSAL, op("or", Sym("chosen0"), local))
    lists = tile_lists(allowed, chosen, 16, 16)
    module = module_for(tmp_path, qkv[0], qkv[2], predicate=predicate, flags=("chosen0",))
    got = launch(module, qkv, lists, 0.25)
    assert_close(got, *qkv, allowed.repeat_interleave(hq // list_heads, 1), 0.25)


def test_empty_lists_give_zero_and_minus_infinity(tmp_path):
    qkv = inputs(1, 2, 1, 20, 20, 16, 16, torch.float16)
    allowed = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    lists = tile_lists(allowed, all_tiles(1, 1, 20, 20), 16, 16)
    out, lse = launch(module_for(tmp_path, qkv[0], qkv[2]), qkv, lists, 1.0)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_a_row_hidden_in_every_listed_tile_is_empty(tmp_path):
    qkv = inputs(1, 1, 1, 16, 32, 16, 16, torch.float32)
    lists = tile_lists(torch.ones(1, 1, 16, 32).bool(), all_tiles(1, 1, 16, 32), 16, 16)
    tiles, _, total = lists
    module = module_for(tmp_path, qkv[0], qkv[2], predicate=op("gt", Q, Lit(5)))
    got = launch(module, qkv, (tiles, total.clone(), total), 0.5)
    visible = (torch.arange(16) > 5)[:, None].expand(1, 1, 16, 32)
    assert_close(got, *qkv, visible, 0.5)


def test_keys_past_the_end_are_never_seen_and_never_read(tmp_path):
    """The memory behind the last key holds NaN: reading it would show."""
    q, k, v = inputs(1, 1, 1, 8, 21, 16, 16, torch.float32)
    wide_k, wide_v = torch.full((1, 1, 32, 16), math.nan), torch.full((1, 1, 32, 16), math.nan)
    wide_k[:, :, :21], wide_v[:, :, :21] = k, v
    qkv = (q, wide_k[:, :, :21], wide_v[:, :, :21])
    allowed = torch.ones(1, 1, 8, 21).bool()
    lists = tile_lists(allowed, all_tiles(1, 1, 8, 21), 16, 16)
    got = launch(module_for(tmp_path, q, v), qkv, lists, 0.25)
    assert_close(got, q, k, v, allowed, 0.25)


@pytest.mark.parametrize("store_begin", [0, 32])
def test_a_slab_of_rows_stores_its_own_rows_only(tmp_path, store_begin):
    qkv = inputs(1, 2, 2, 64, 64, 16, 16, torch.float32)
    allowed = causal(64, 64).expand(1, 1, 64, 64)
    tiles, partial, total = tile_lists(allowed, all_tiles(1, 1, 64, 64), 16, 16)
    slab = (tiles[:, :, 2:3], partial[:, :, 2:3], total[:, :, 2:3])
    module = module_for(tmp_path, qkv[0], qkv[2], predicate=CAUSAL)
    out, lse = launch(module, qkv, slab, 0.25, row_begin=32, store_begin=store_begin)
    stored, cut = slice(32 - store_begin, 48 - store_begin), slice(32, 48)
    assert torch.isfinite(out[0, 0, :, 0]).nonzero()[:, 0].tolist() == list(range(64))[stored]
    assert_close(
        (out[:, :, stored], lse[:, :, stored]),
        *(qkv[0][:, :, cut], *qkv[1:]),
        *(allowed[:, :, cut].expand(1, 2, 16, 64), 0.25),
    )


@pytest.mark.parametrize("scale", [0.25, 0.0, -0.5])
def test_score_hook_sees_every_pair_and_any_scale(tmp_path, scale):
    """A bias per (head, distance) read from a captured tensor, in masked and in full tiles."""
    qkv = inputs(1, 2, 1, 40, 48, 16, 16, torch.float32)
    table = torch.randn(2, 96)[:, ::2]  # strides (96, 2)
    distance = op("sub", op("add", Q, Lit(8)), K)
    hook: Expr = Load("bias", (H, op("max", distance, Lit(0))), "float")
    allowed = causal(40, 48).expand(1, 1, 40, 48)
    lists = tile_lists(allowed, all_tiles(1, 1, 40, 48), 16, 16)
    module = module_for(
        tmp_path,
        qkv[0],
        qkv[2],
        predicate=CAUSAL,
        score_hook=op("add", SCORE, hook),
        has_score_hook=True,
        inputs=(CapturedArg("bias", 2),),
    )
    got = launch(module, qkv, lists, scale, captured=(table,))
    gap = (torch.arange(40)[:, None] + 8 - torch.arange(48)[None]).clamp_min(0)
    assert_close(got, *qkv, allowed.expand(1, 2, 40, 48), scale, bias=table[:, gap][None])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # a sink that is everything
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sinks_take_their_share_and_leave_empty_rows_and_the_lse_alone(tmp_path, dtype):
    """The first rows see nothing; groups of three, a stride of two between the sinks."""
    qkv = inputs(2, 6, 2, 33, 16, 40, 17, dtype)
    sinks = torch.tensor(SINKS).repeat_interleave(2)[::2]
    allowed = causal(33, 16).expand(2, 1, 33, 16)
    lists = tile_lists(allowed, all_tiles(2, 1, 33, 16), 16, 16)
    module = module_for(tmp_path, qkv[0], qkv[2], predicate=CAUSAL, has_sinks=True)
    out, lse = launch(module, qkv, lists, 0.3, sinks=sinks)
    assert_close((out, lse), *qkv, allowed.expand(2, 6, 33, 16), 0.3, sinks=sinks)
    assert not out[:, 4:].any()
    assert bool(out[:, :4, 17:].any(-1).all())


def test_sinks_stand_before_captured_tensors_and_beside_a_hook(tmp_path):
    qkv = inputs(1, 2, 1, 16, 16, 16, 16, torch.float32)
    bias, sinks = torch.randn(2, 16), torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    allowed = torch.ones(1, 1, 16, 16).bool()
    lists = tile_lists(allowed, all_tiles(1, 1, 16, 16), 16, 16)
    module = module_for(
        tmp_path,
        qkv[0],
        qkv[2],
        score_hook=op("add", SCORE, Load("bias", (H, K), "float")),
        has_score_hook=True,
        inputs=(CapturedArg("bias", 2),),
        has_sinks=True,
    )
    got = launch(module, qkv, lists, -0.5, captured=(bias,), sinks=sinks)
    visible = allowed.expand(1, 2, 16, 16)
    assert_close(got, *qkv, visible, -0.5, bias=bias[None, :, None], sinks=sinks)


def test_a_pattern_that_shows_nothing_is_empty(tmp_path):
    qkv = inputs(1, 1, 1, 16, 16, 16, 16, torch.float32)
    tiles, _, total = tile_lists(torch.ones(1, 1, 16, 16).bool(), all_tiles(1, 1, 16, 16), 16, 16)
    module = module_for(tmp_path, qkv[0], qkv[2], predicate=FALSE)
    out, lse = launch(module, qkv, (tiles, total.clone(), total), 1.0)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize(
    ("block_q", "block_k", "stages", "warps"), [(128, 128, 3, 8), (128, 64, 3, 8), (64, 64, 2, 4)]
)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_sm90_code_neither_spills_nor_waits_after_every_wgmma(
    tmp_path, block_q, block_k, stages, warps, has_sinks
):
    context = attend_context(
        header=("A test.",),
        head_dim=128,
        value_dim=128,
        block_q=block_q,
        block_k=block_k,
        num_stages=stages,
        predicate=CAUSAL,
        has_sinks=has_sinks,
    )
    path = write_rendered(TEMPLATE, context, tmp_path)
    built = compile_kernel(path, "attend_kernel", types=TYPES, num_warps=warps, num_stages=stages)
    assert built.spill_bytes == 0
    assert built.warnings == ()
    assert built.shared_bytes <= 232448


def test_without_predicate_only_the_end_of_the_keys_hides(tmp_path):
    qkv = inputs(2, 2, 1, 5, 50, 64, 64, torch.bfloat16)
    allowed = torch.ones(2, 1, 5, 50).bool()
    lists = tile_lists(allowed, all_tiles(2, 1, 5, 50), 16, 16)
    got = launch(module_for(tmp_path, qkv[0], qkv[2], predicate=TRUE), qkv, lists, 0.125)
    assert_close(got, *qkv, allowed.expand(2, 2, 5, 50), 0.125)
