"""Attention over gathered keys, split and not, against dense attention, and its code for sm_90."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spcomp.backends.triton.contexts.attend import GatherContext, gather_context
from spcomp.backends.triton.contexts.base import CapturedArg
from spcomp.ir.expr import Lit, Load, Sym, op
from tests.backends.triton.attention import LOG2_E, SINKS, assert_close, causal
from tests.backends.triton.rendering import (
    compile_kernel,
    field_names,
    import_rendered,
    variables_of,
    write_rendered,
)

TEMPLATE = "triton/kernels/attend_gather.py.jinja"
Q, K, H, SCORE = Sym("q"), Sym("k"), Sym("h"), Sym("score")
CAUSAL = op("le", K, op("add", Q, op("sub", Sym("Skv"), Sym("Sq"))))
TYPES = {"lse_ptr": "*fp32", "idx_ptr": "*i32", "cnt_ptr": "*i32", "scale_log2": "fp32"}


def random_lists(
    shape: tuple[int, int, int], n_units: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ascending lists: idx [B,Hl,Nr,K] with -1 at the end, cnt [B,Hl,Nr], chosen [..,Nu]."""
    chosen = torch.zeros(*shape, n_units, dtype=torch.bool)
    idx = torch.full((*shape, width), -1, dtype=torch.int32)
    cnt = torch.randint(0, min(width, n_units) + 1, shape, dtype=torch.int32)
    for place in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        units = torch.randperm(n_units)[: int(cnt[tuple(place)])].sort().values
        idx[tuple(place)][: len(units)] = units.int()
        chosen[tuple(place)][units] = True
    return idx, cnt, chosen


def tokens_of(chosen: Tensor, granule: int, unit: int, sq: int, skv: int) -> Tensor:
    """Spread chosen units [B,Hl,Nr,Nu] over tokens: [B,Hl,Sq,Skv]."""
    return chosen.repeat_interleave(granule, 2)[:, :, :sq].repeat_interleave(unit, 3)[..., :skv]


def run(
    folder: Path,
    qkv: tuple[Tensor, Tensor, Tensor],
    idx: Tensor,
    cnt: Tensor,
    *,
    unit: int,
    granule: int,
    scale: float,
    splits: int = 1,
    row_begin: int = 0,
    store_begin: int = 0,
    captured: tuple[Tensor, ...] = (),
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Render, run, and give the parts out [S,B,Hq,Sq,Dv], lse [S,B,Hq,Sq]."""
    q, k, v = qkv
    settings: dict[str, Any] = {"block_m": 16, "block_k": 16, "num_stages": 2} | options
    context = gather_context(
        header=("A test.",),
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        unit=unit,
        is_float32=q.dtype == torch.float32,
        is_interpreted=True,
        has_sinks=sinks is not None,
        **settings,
    )
    kernel = import_rendered(TEMPLATE, context, folder).attend_gather_kernel
    batch, hq, sq, _ = q.shape
    group, list_group = hq // k.shape[1], hq // idx.shape[1]
    per_program = group if list_group >= group else 1
    row_tiles = -(-granule * per_program // settings["block_m"])
    rows = idx.shape[2]
    out = torch.full((splits, batch, hq, sq, v.shape[3]), math.nan, dtype=q.dtype)
    lse = torch.full((splits, batch, hq, sq), math.nan)
    read = captured if sinks is None else (sinks, *captured)
    extra = [a for tensor in read for a in (tensor, *tensor.stride())]
    kernel[(batch * (hq // per_program) * rows * row_tiles * splits,)](
        *(q, k, v, out, lse, idx, cnt),
        *(s for x in (q, k, v) for s in x.stride()[:3]),
        *(*out.stride()[:4], *lse.stride()[:3], *idx.stride()[:3], *cnt.stride()[:2]),
        *(sq, k.shape[2], hq, group, list_group, per_program),
        *(granule, rows, row_tiles, row_begin, store_begin, splits, scale * LOG2_E, *extra),
    )
    return out, lse


def inputs(
    shape: tuple[int, int, int, int, int], d: int, dv: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    batch, hq, hkv, sq, skv = shape
    q = torch.randn(batch, sq, hq, d).to(dtype).transpose(1, 2)
    k = torch.randn(batch, skv, hkv, d).to(dtype).transpose(1, 2)
    v = torch.randn(batch, skv, hkv, dv).to(dtype).transpose(1, 2)
    return q, k, v


def test_context_holds_exactly_the_variables_of_the_template():
    assert field_names(GatherContext) == variables_of(TEMPLATE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unit", [1, 7, 16, 32])
def test_gathered_units_of_any_size_equal_dense(tmp_path, unit, dtype):
    """Lists per KV head (a group of three), a list row for two tokens, tails of both dimensions."""
    qkv = inputs((2, 6, 2, 5, 70), 40, 17, dtype)
    idx, cnt, chosen = random_lists((2, 2, 3), -(-70 // unit), 9)
    got = run(tmp_path, qkv, idx, cnt, unit=unit, granule=2, scale=0.2, predicate=CAUSAL)
    allowed = tokens_of(chosen, 2, unit, 5, 70).repeat_interleave(3, 1) & causal(5, 70)
    assert_close((got[0][0], got[1][0]), *qkv, allowed, 0.2)


@pytest.mark.parametrize("unit", [1, 16])
@pytest.mark.parametrize(("d", "dv"), [(576, 512), (300, 257), (272, 16)])
def test_heads_wider_than_256_lie_in_two_tiles_where_that_is_less(tmp_path, d, dv, unit):
    qkv = inputs((1, 3, 1, 3, 40), d, dv, torch.float16)
    idx, cnt, chosen = random_lists((1, 1, 3), -(-40 // unit), 9)
    got = run(tmp_path, qkv, idx, cnt, unit=unit, granule=1, scale=0.04, predicate=CAUSAL)
    allowed = tokens_of(chosen, 1, unit, 3, 40).expand(1, 3, -1, -1) & causal(3, 40)
    assert_close((got[0][0], got[1][0]), *qkv, allowed, 0.04)


@pytest.mark.parametrize("list_heads", [1, 2, 4])
def test_lists_may_belong_to_all_heads_or_to_each(tmp_path, list_heads):
    qkv = inputs((1, 4, 2, 9, 64), 16, 16, torch.float32)
    idx, cnt, chosen = random_lists((1, list_heads, 1), 4, 3)
    got = run(tmp_path, qkv, idx, cnt, unit=16, granule=9, scale=0.25)
    allowed = tokens_of(chosen, 9, 16, 9, 64).repeat_interleave(4 // list_heads, 1)
    assert_close((got[0][0], got[1][0]), *qkv, allowed, 0.25)


@pytest.mark.parametrize("splits", [2, 5])
def test_parts_cover_disjoint_keys_and_empty_parts_say_so(tmp_path, splits):
    """Joined by weights exp(lse - whole), the parts are the whole; splits past it are empty."""
    qkv = inputs((2, 2, 1, 1, 60), 16, 16, torch.float32)
    idx, cnt, chosen = random_lists((2, 1, 1), 15, 12)
    cnt[0] = 0
    chosen[0] = False
    out, lse = run(tmp_path, qkv, idx, cnt, unit=4, granule=1, scale=0.25, splits=splits)
    assert (out[:, 0] == 0).all() and (lse[:, 0] == -math.inf).all()
    assert (lse[-1] == -math.inf).any() or splits == 2
    whole = lse.logsumexp(0)
    weights = torch.exp(lse - whole).nan_to_num(0.0)
    allowed = tokens_of(chosen, 1, 4, 1, 60).repeat_interleave(2, 1)
    assert_close(((out * weights[..., None]).sum(0), whole), *qkv, allowed, 0.25)


@pytest.mark.parametrize("store_begin", [0, 4])
def test_rows_of_a_slab_are_stored_behind_its_begin(tmp_path, store_begin):
    qkv = inputs((1, 1, 1, 8, 32), 16, 16, torch.float32)
    idx, cnt, chosen = random_lists((1, 1, 2), 8, 8)
    begins = {"row_begin": 4, "store_begin": store_begin}
    out, lse = run(tmp_path, qkv, idx, cnt, unit=4, granule=2, scale=0.25, **begins)
    stored = slice(4 - store_begin, 8 - store_begin)
    assert torch.isfinite(out[0, 0, 0, :, 0]).nonzero()[:, 0].tolist() == list(range(8))[stored]
    q = qkv[0][:, :, 4:]
    allowed = tokens_of(chosen, 2, 4, 4, 32)
    assert_close((out[0, :, :, stored], lse[0, :, :, stored]), q, *qkv[1:], allowed, 0.25)


@pytest.mark.parametrize("unit", [8, 16])
def test_flags_heads_and_hooks_reach_each_row_of_a_tile(tmp_path, unit):
    """One tile holds several heads: a predicate and a bias by head differ within it."""
    qkv = inputs((1, 2, 1, 3, 48), 16, 16, torch.float32)
    idx, cnt, chosen = random_lists((1, 1, 1), 48 // unit, 48 // unit)
    flagged = torch.rand(idx.shape) < 0.5
    plain = idx.clamp_min(0)
    marked = torch.where(idx >= 0, plain | (flagged.int() << 24), idx)
    by_flag = torch.zeros(1, 1, 1, 48 // unit, dtype=torch.bool)
    for position in range(int(cnt[0, 0, 0])):
        by_flag[0, 0, 0, plain[0, 0, 0, position]] = flagged[0, 0, 0, position]
    table = torch.randn(2, 48)
    got = run(
        tmp_path,
        qkv,
        marked,
        cnt,
        unit=unit,
        granule=3,
        scale=0.25,
        predicate=op("or", Sym("chosen0"), op("eq", H, Lit(1))),
        flags=("chosen0",),
        score_hook=op("add", SCORE, Load("bias", (H, K), "float")),
        has_score_hook=True,
        inputs=(CapturedArg("bias", 2),),
        captured=(table,),
    )
    both = tokens_of(chosen, 3, unit, 3, 48)
    allowed = torch.cat([both & tokens_of(by_flag, 3, unit, 3, 48), both], 1)
    assert_close((got[0][0], got[1][0]), *qkv, allowed, 0.25, bias=table[None, :, None])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # a sink that is everything
@pytest.mark.parametrize("unit", [7, 16])
@pytest.mark.parametrize("list_heads", [1, 2, 6])
def test_each_row_of_a_tile_has_the_sink_of_its_head(tmp_path, list_heads, unit):
    """Three heads share a tile of rows; some rows have an empty list."""
    qkv = inputs((2, 6, 2, 5, 70), 40, 17, torch.float32)
    idx, cnt, chosen = random_lists((2, list_heads, 3), -(-70 // unit), 9)
    cnt[0, :, 1], chosen[0, :, 1] = 0, False
    sinks = torch.tensor(SINKS)
    scale = {"scale": 0.2, "granule": 2, "unit": unit}
    out, lse = run(tmp_path, qkv, idx, cnt, **scale, predicate=CAUSAL, sinks=sinks)
    allowed = tokens_of(chosen, 2, unit, 5, 70).repeat_interleave(6 // list_heads, 1)
    allowed = allowed & causal(5, 70)
    assert_close((out[0], lse[0]), *qkv, allowed, 0.2, sinks=sinks)
    assert not out[0, :, 4:].any() and not out[0, 0, :, 2:4].any()
    assert bool(lse[0, 0, :, 4].isfinite().any())


@pytest.mark.parametrize(
    ("element", "block_m", "block_k"), [("bf16", 32, 32), ("fp16", 32, 32), ("fp32", 16, 16)]
)
def test_sm90_code_for_the_heads_of_mla_does_not_spill(tmp_path, element, block_m, block_k):
    context = gather_context(
        header=("A test.",),
        head_dim=576,
        value_dim=512,
        block_m=block_m,
        block_k=block_k,
        unit=1,
        num_stages=2,
        predicate=CAUSAL,
        is_float32=element == "fp32",
    )
    path = write_rendered(TEMPLATE, context, tmp_path)
    types = {**TYPES, "scale_log2": "fp32"}
    built = compile_kernel(path, "attend_gather_kernel", types=types, num_warps=8, element=element)
    assert built.spill_bytes == 0
    assert built.shared_bytes < 164 * 1024  # of sm_80


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("block_k", "unit"), [(64, 16), (128, 128)])
def test_sm90_code_does_not_spill(tmp_path, block_k, unit, has_sinks):
    context = gather_context(
        header=("A test.",),
        head_dim=128,
        value_dim=128,
        block_m=16,
        block_k=block_k,
        unit=unit,
        num_stages=3 if block_k == 64 else 2,
        predicate=CAUSAL,
        has_sinks=has_sinks,
    )
    path = write_rendered(TEMPLATE, context, tmp_path)
    built = compile_kernel(path, "attend_gather_kernel", types=TYPES, num_warps=4)
    assert built.spill_bytes == 0
