"""The key-major kernel, joined by LSE, against dense attention, and its code for sm_90."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spcomp.backends.triton.contexts.attend import KeysContext, keys_context
from spcomp.backends.triton.contexts.base import CapturedArg
from spcomp.ir.expr import FALSE, TRUE, Expr, Lit, Load, Sym, op
from tests.backends.triton.attention import LOG2_E, assert_close, causal
from tests.backends.triton.rendering import (
    compile_kernel,
    field_names,
    import_rendered,
    variables_of,
    write_rendered,
)

TEMPLATE = "triton/kernels/attend_keys.py.jinja"
BLOCK_M = 16
Q, K, H, SCORE = Sym("q"), Sym("k"), Sym("h"), Sym("score")
DIAGONAL = op("add", Q, op("sub", Sym("Skv"), Sym("Sq")))
CAUSAL = op("le", K, DIAGONAL)
TYPES = {
    "part_ptr": "*fp32",
    "plse_ptr": "*fp32",
    "entries_ptr": "*i32",
    "unit_start_ptr": "*i32",
    "tile_start_ptr": "*i32",
    "scale_log2": "fp32",
}


def inverted(chosen: Tensor, slots: int, per_program: int) -> tuple[Tensor, Tensor, Tensor]:
    """List the queries of each unit of chosen [B,Hl,Nr,Nu]: entries, unit_start, tile_start."""
    batch, heads, rows, units = chosen.shape
    entries = torch.full((batch, heads, rows * slots), -7, dtype=torch.int32)
    unit_start = torch.zeros(batch, heads, units + 1, dtype=torch.int32)
    tile_start = torch.zeros_like(unit_start)
    slot_of = chosen.cumsum(3) - 1
    for b, h, u in torch.cartesian_prod(*map(torch.arange, (batch, heads, units))).tolist():
        members = chosen[b, h, :, u].nonzero()[:, 0]
        begin = int(unit_start[b, h, u])
        entries[b, h, begin : begin + len(members)] = (
            members * slots + slot_of[b, h, members, u]
        ).int()
        unit_start[b, h, u + 1] = begin + len(members)
        tiles = -(-len(members) * per_program // BLOCK_M)
        tile_start[b, h, u + 1] = tile_start[b, h, u] + tiles
    return entries, unit_start, tile_start


def run(
    folder: Path,
    qkv: tuple[Tensor, Tensor, Tensor],
    chosen: Tensor,
    *,
    unit: int,
    scale: float,
    row_begin: int = 0,
    part_dtype: torch.dtype = torch.float32,
    captured: tuple[Tensor, ...] = (),
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Render and run; give part [B,Hq,Nr,K,Dv] and plse [B,Hq,Nr,K], NaN where not written."""
    q, k, v = qkv
    batch, hq, sq, _ = q.shape
    group, list_group = hq // k.shape[1], hq // chosen.shape[1]
    context = keys_context(
        header=("A test.",),
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        block_m=BLOCK_M,
        block_k=16,
        unit=unit,
        num_stages=2,
        has_shared_lists=list_group > 1,
        is_float32=q.dtype == torch.float32,
        is_interpreted=True,
        **options,
    )
    kernel = import_rendered(TEMPLATE, context, folder).attend_keys_kernel
    per_program = group if list_group >= group else 1
    slots = max(int(chosen.sum(3).max()), 1)
    rows, units = chosen.shape[2:]
    entries, unit_start, tile_start = inverted(chosen, slots, per_program)
    max_tiles = int(tile_start[..., -1].max()) + 1  # one program too many returns
    part = torch.full((batch, hq, rows * slots, v.shape[3]), math.nan, dtype=part_dtype)
    plse = torch.full((batch, hq, rows * slots), math.nan)
    extra = [a for tensor in captured for a in (tensor, *tensor.stride())]
    kernel[(batch * (hq // per_program) * max_tiles,)](
        *(q, k, v, part, plse, entries, unit_start, tile_start),
        *(s for x in (q, k, v, part) for s in x.stride()[:3]),
        *(s for x in (plse, entries, unit_start, tile_start) for s in x.stride()[:2]),
        *(sq, k.shape[2], hq, group, list_group, per_program),
        *(units, slots, row_begin, max_tiles, scale * LOG2_E, *extra),
    )
    shape = (batch, hq, rows, slots)
    return part.view(*shape, -1), plse.view(shape)


def joined(part: Tensor, plse: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Join the parts of each row; those beyond its count must not have been written."""
    lists = chosen.repeat_interleave(plse.shape[1] // chosen.shape[1], 1)
    exists = torch.arange(plse.shape[3]) < lists.sum(3)[..., None]
    assert torch.equal(torch.isnan(plse), ~exists)
    plse = plse.masked_fill(~exists, -math.inf)
    whole = plse.logsumexp(3)
    weights = torch.exp(plse - whole.masked_fill(whole == -math.inf, 0.0)[..., None])
    part = part.float().masked_fill(~exists[..., None], 0.0)
    return (part * weights[..., None]).sum(3), whole


def spread(chosen: Tensor, unit: int, skv: int, hq: int) -> Tensor:
    """Give the chosen pairs [B,Hq,Sq,Skv]."""
    pairs = chosen.repeat_interleave(unit, 3)[..., :skv]
    return pairs.repeat_interleave(hq // chosen.shape[1], 1)


def inputs(
    shape: tuple[int, int, int, int, int], d: int, dv: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    batch, hq, hkv, sq, skv = shape
    q = torch.randn(batch, sq, hq, d).to(dtype).transpose(1, 2)
    k = torch.randn(batch, skv, hkv, d).to(dtype).transpose(1, 2)
    v = torch.randn(batch, skv, hkv, dv).to(dtype).transpose(1, 2)
    return q, k, v


def test_context_holds_exactly_the_variables_of_the_template():
    assert field_names(KeysContext) == variables_of(TEMPLATE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "list_heads", "unit", "d", "dv"),
    [
        (
            (2, 3, 1, 37, 130),
            1,
            40,
            80,
            17,
        ),  # unit of two and a half tiles, tails, a group of three
        ((1, 4, 2, 21, 64), 4, 16, 32, 32),  # a list per query head
        ((1, 2, 2, 1, 33), 1, 64, 17, 64),  # one query, one unit longer than the keys
    ],
)
def test_causal_routing_equals_dense(tmp_path, dtype, shape, list_heads, unit, d, dv):
    batch, hq, _, sq, skv = shape
    qkv = inputs(*(shape, d, dv, dtype))
    chosen = torch.rand(batch, list_heads, sq, -(-skv // unit)) < 0.5
    part, plse = run(tmp_path, qkv, chosen, unit=unit, scale=0.2, predicate=CAUSAL)
    out, lse = joined(part, plse, chosen)
    allowed = spread(chosen, unit, skv, hq) & causal(sq, skv)
    assert_close((out, lse), *qkv, allowed, 0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharpness", [1.0, 4.0], ids=["even", "sharp"])
def test_parts_in_the_dtype_of_the_inputs_keep_the_joined_result_accurate(
    tmp_path, dtype, sharpness
):
    q, k, v = inputs((1, 2, 2, 96, 128), 32, 32, torch.float32)
    qkv = ((q * sharpness).to(dtype), k.to(dtype), v.to(dtype))
    chosen = torch.rand(1, 2, 96, 4) < 0.6
    part, plse = run(tmp_path, qkv, chosen, unit=32, scale=0.2, predicate=CAUSAL, part_dtype=dtype)
    assert part.dtype == dtype
    allowed = spread(chosen, 32, 128, 2) & causal(96, 128)
    assert_close(joined(part, plse, chosen), *qkv, allowed, 0.2)


def test_every_unit_is_found_among_many(tmp_path):
    """More units than one step of the search looks at, most of them chosen by nobody."""
    qkv = inputs((1, 1, 1, 12, 700), 16, 16, torch.float32)
    chosen = torch.rand(1, 1, 12, 350) < 0.02
    chosen[0, 0, 0, 349] = True
    part, plse = run(tmp_path, qkv, chosen, unit=2, scale=0.25)
    assert_close(joined(part, plse, chosen), *qkv, spread(chosen, 2, 700, 1), 0.25)


HIDDEN_IN_THE_MIDDLE = op("or", op("lt", K, Lit(20)), op("ge", K, Lit(64)))
WINDOW = op("and", CAUSAL, op("gt", op("add", K, Lit(24)), DIAGONAL))


@pytest.mark.parametrize(
    ("predicate", "mask"),
    [
        (TRUE, lambda q, k: k >= 0),
        (FALSE, lambda q, k: k < 0),
        (HIDDEN_IN_THE_MIDDLE, lambda q, k: (k < 20) | (k >= 64)),
        (WINDOW, lambda q, k: (k <= q + 60) & (k + 24 > q + 60)),
        (op("ge", K, DIAGONAL), lambda q, k: k >= q + 60),
        (op("eq", op("mod", K, Lit(3)), H), lambda q, k: k % 3 == 0),
    ],
    ids=["all", "none", "two runs", "window", "future", "by head"],
)
def test_masked_and_full_tiles_cover_what_the_mask_shows(tmp_path, predicate, mask):
    """Full tiles at the front, in the middle, behind, in two runs, or nowhere."""
    qkv = inputs((1, 1, 1, 40, 100), 16, 16, torch.float32)
    chosen = torch.ones(1, 1, 40, 1, dtype=torch.bool)
    part, plse = run(tmp_path, qkv, chosen, unit=112, scale=0.25, predicate=predicate)
    allowed = mask(torch.arange(40)[:, None], torch.arange(100)[None]).expand(1, 1, 40, 100)
    assert_close(joined(part, plse, chosen), *qkv, allowed, 0.25)


def test_rows_of_a_slab_are_the_tokens_behind_its_begin(tmp_path):
    q, k, v = inputs((1, 2, 1, 30, 48), 16, 16, torch.float32)
    chosen = torch.rand(1, 1, 10, 3) < 0.6
    part, plse = run(
        tmp_path, (q, k, v), chosen, unit=16, scale=0.25, row_begin=20, predicate=CAUSAL
    )
    allowed = spread(chosen, 16, 48, 2) & causal(30, 48)[20:]
    assert_close(joined(part, plse, chosen), q[:, :, 20:], k, v, allowed, 0.25)


def test_score_hook_reads_the_head_of_each_row(tmp_path):
    qkv = inputs((1, 2, 1, 20, 64), 16, 16, torch.float32)
    chosen = torch.rand(1, 1, 20, 2) < 0.7
    table = torch.randn(2, 64)
    hook: Expr = op("add", SCORE, Load("bias", (H, K), "float"))
    part, plse = run(
        tmp_path,
        qkv,
        chosen,
        unit=32,
        scale=-0.25,
        predicate=CAUSAL,
        score_hook=hook,
        has_score_hook=True,
        inputs=(CapturedArg("bias", 2),),
        captured=(table,),
    )
    allowed = spread(chosen, 32, 64, 2) & causal(20, 64)
    assert_close(joined(part, plse, chosen), *qkv, allowed, -0.25, bias=table[None, :, None])


@pytest.mark.parametrize("has_shared_lists", [False, True], ids=["own lists", "shared lists"])
@pytest.mark.parametrize(
    ("block_m", "block_k", "warps", "stages", "spill_bytes"),
    [(64, 64, 4, 2, 0), (64, 64, 4, 3, 0), (128, 64, 8, 3, 0), (128, 128, 8, 2, 128)],
)
def test_sm90_code_hardly_spills_overlaps_loads_and_does_not_wait_after_every_wgmma(
    tmp_path, block_m, block_k, warps, stages, spill_bytes, has_shared_lists
):
    """At 255 registers some addresses for the epilogue may rest in memory; no more."""
    context = keys_context(
        header=("A test.",),
        head_dim=128,
        value_dim=128,
        block_m=block_m,
        block_k=block_k,
        unit=512,
        num_stages=stages,
        predicate=CAUSAL,
        has_shared_lists=has_shared_lists,
    )
    path = write_rendered(TEMPLATE, context, tmp_path)
    built = compile_kernel(
        path, "attend_keys_kernel", types=TYPES, num_warps=warps, num_stages=stages
    )
    assert built.spill_bytes <= spill_bytes
    # The queries, and keys and values in flight; one step of them where the loop has no pipeline.
    assert built.shared_bytes >= 2 * 128 * (block_m + stages * 2 * block_k)
    assert built.warnings == ()
