"""The select and score kernels against Python, in Triton's interpreter; and compiled for a card."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spcomp.backends.triton.contexts.base import CapturedArg
from spcomp.backends.triton.contexts.select import (
    ScoreContext,
    SelectContext,
    score_context,
    select_context,
)
from spcomp.ir.expr import Lit, Load, Sym, op
from tests.backends.triton.choice import Rules, choose, unit_scores
from tests.backends.triton.rendering import (
    compile_kernel,
    field_names,
    import_rendered,
    variables_of,
    write_rendered,
)

SELECT, SCORE = "triton/kernels/select.py.jinja", "triton/kernels/score.py.jinja"
K, Q_LO, Q_HI, H = Sym("k"), Sym("q_lo"), Sym("q_hi"), Sym("h")

# A unit of UNIT tokens is visible once its last token is; the first and a row's own are forced.
UNIT = 4
LAST_TOKEN = op("add", op("mul", K, Lit(UNIT)), Lit(UNIT - 1))
CAUSAL = op("le", LAST_TOKEN, Q_HI)
OWN = op("or", op("eq", K, Lit(0)), op("eq", K, op("floordiv", Q_HI, Lit(UNIT))))
RULES = Rules(
    visible=lambda b, h, q_lo, q_hi, u: u * UNIT + UNIT - 1 <= q_hi,
    forced=lambda b, h, q_lo, q_hi, u: u in (0, q_hi // UNIT),
)


@dataclass(frozen=True)
class Case:
    """One call: heads, rows, units and what is asked of them."""

    batch: int = 1
    hq: int = 2
    hkv: int = 2
    n_lists: int = 2
    n_rows: int = 11
    n_units: int = 13
    dim: int = 16
    granule: int = 4
    sq: int = 42
    k: int = 4
    width: int = 6
    scale: float = 1.0
    reduction: str = "none"
    is_bound: bool = False
    row_begin: int = 0
    slab: int | None = None
    dtype: torch.dtype = torch.float32
    spread: int = 2
    is_relu: bool = False
    has_weights: bool = False

    def weights(self) -> Tensor | None:
        """Give small integers of both signs, the same at each call."""
        if not self.has_weights:
            return None
        shape = (self.batch, self.hq, self.n_rows)
        made = torch.Generator().manual_seed(4)
        return torch.randint(-2, 3, shape, generator=made).to(self.dtype)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Give integers, so that products are exact and ties are frequent."""
        shape = (self.batch, self.hq, self.n_rows, self.dim)
        q = torch.randint(-self.spread, self.spread + 1, shape).to(self.dtype)
        pages = (self.batch, self.n_units, self.hkv, self.dim)  # strided once transposed
        k = torch.randint(-self.spread, self.spread + 1, pages).to(self.dtype).transpose(1, 2)
        low = k - torch.randint(0, 2, k.shape).to(self.dtype).transpose(
            1, 2
        ).contiguous().transpose(1, 2)
        return q, k, low if self.is_bound else None


def _arguments(case: Case, q: Tensor, k: Tensor, low: Tensor | None) -> tuple[list[Any], list[Any]]:
    """The pointers and strides, then the numbers that select and score share."""
    if low is not None:
        low = low.as_strided(k.shape, k.stride()) if low.stride() == k.stride() else _like(k, low)
    pointers = [q, k] if low is None else [q, k, low]
    if case.has_weights:
        pointers.append(case.weights())
    n_slab = case.slab or case.n_rows
    numbers = [
        case.hq // case.hkv,
        case.hq // case.n_lists,
        case.n_lists,
        case.sq,
        case.n_units * UNIT,
    ]
    return pointers, [*numbers, case.row_begin, n_slab, case.n_units]


def _weight_strides(case: Case) -> tuple[int, ...]:
    weights = case.weights()
    return () if weights is None else weights.stride()[:2]


def _like(k: Tensor, low: Tensor) -> Tensor:
    same = torch.empty_strided(k.shape, k.stride(), dtype=k.dtype)
    return same.copy_(low)


def _select(
    folder: Path, case: Case, context: SelectContext, tensors: Any, captured: tuple[Any, ...] = ()
) -> tuple[Tensor, Tensor]:
    q, k, low = tensors
    pointers, numbers = _arguments(case, q, k, low)
    n_slab = case.slab or case.n_rows
    programs = case.batch * case.n_lists * -(-n_slab // context.block_r)
    guarded = torch.full((case.batch, case.n_lists, n_slab, case.width + 2), 77, dtype=torch.int32)
    idx = guarded[..., : case.width]
    cnt = torch.full((case.batch, case.n_lists, n_slab), 77, dtype=torch.int32)
    scratch = torch.full((programs * context.block_r, case.n_units), 99, dtype=torch.int32)
    strides = [
        *q.stride()[:3],
        *k.stride()[:3],
        *_weight_strides(case),
        *idx.stride()[:3],
        *cnt.stride()[:2],
        scratch.stride(0),
    ]
    kernel = import_rendered(SELECT, context, folder).select_kernel
    kernel[(programs,)](
        *pointers, scratch, idx, cnt, *strides, *numbers, case.k, case.width, case.scale, *captured
    )
    assert (guarded[..., case.width :] == 77).all(), "wrote past the width"
    return idx, cnt


def _score(
    folder: Path,
    case: Case,
    tensors: Any,
    captured: tuple[Any, ...] = (),
    runs: int = 2,
    **options: Any,
) -> Tensor:
    defaults: dict[str, Any] = {"block_u": 16, "visible": CAUSAL, "forced": OWN}
    context = score_context(
        header=("test",),
        head_dim=case.dim,
        granule=case.granule,
        is_bound=case.is_bound,
        reduction=case.reduction,
        is_relu=case.is_relu,
        has_weights=case.has_weights,
        is_float32=case.dtype == torch.float32,
        is_interpreted=True,
        **(defaults | options),
    )
    q, k, low = tensors
    pointers, numbers = _arguments(case, q, k, low)
    n_slab = case.slab or case.n_rows
    n_groups = case.hkv if case.reduction == "none" else case.n_lists
    n_runs = min(runs, -(-case.n_units // context.block_u))
    out = torch.full((case.batch, case.n_lists, n_slab, case.n_units), 77.0)
    strides = [*q.stride()[:3], *k.stride()[:3], *_weight_strides(case), *out.stride()[:3]]
    kernel = import_rendered(SCORE, context, folder).score_kernel
    kernel[(case.batch * n_groups * n_slab * n_runs,)](
        *pointers, out, *strides, *numbers, n_groups, n_runs, case.scale, *captured
    )
    return out


def _context(case: Case, **options: Any) -> SelectContext:
    defaults: dict[str, Any] = {"block_r": 16, "block_u": 16, "visible": CAUSAL, "forced": OWN}
    return select_context(
        header=("test",),
        head_dim=case.dim,
        granule=case.granule,
        is_bound=case.is_bound,
        reduction=case.reduction,
        is_relu=case.is_relu,
        has_weights=case.has_weights,
        is_float32=case.dtype == torch.float32,
        is_interpreted=True,
        **(defaults | options),
    )


def _marked(case: Case, tensors: Any, rules: Rules = RULES) -> Tensor:
    changes = (case.is_relu, case.weights())
    scores = unit_scores(*tensors, case.n_lists, case.reduction, *changes) * case.scale
    marked = rules.mark(scores, case.granule, case.sq)
    end = case.row_begin + (case.slab or case.n_rows)
    return marked[:, :, case.row_begin : end]


def _check(folder: Path, case: Case) -> None:
    tensors = case.tensors()
    idx, cnt = _select(folder, case, _context(case), tensors)
    want_idx, want_cnt = choose(_marked(case, tensors), case.k, case.width)
    assert torch.equal(cnt, want_cnt)
    assert torch.equal(idx, want_idx)


CASES = {
    "one list per head": Case(),
    "a list per KV group, summed": Case(hq=6, hkv=2, n_lists=2, reduction="sum"),
    "a list per KV group, mean": Case(hq=6, hkv=2, n_lists=2, reduction="mean"),
    "a list per KV group, largest": Case(hq=6, hkv=2, n_lists=2, reduction="max"),
    "one list for all heads": Case(hq=6, hkv=2, n_lists=1, reduction="sum"),
    "one list for all heads, largest": Case(hq=4, hkv=2, n_lists=1, reduction="max"),
    "grouped heads with lists of their own": Case(hq=6, hkv=2, n_lists=6),
    "upper bounds with negative queries": Case(
        is_bound=True, hq=4, hkv=2, n_lists=2, reduction="max"
    ),
    "upper bounds, one list per head": Case(is_bound=True, spread=3),
    "batch 2, odd dimension": Case(batch=2, dim=17),
    "dimension 80, float16": Case(dim=80, dtype=torch.float16),
    "bfloat16": Case(dtype=torch.bfloat16, hq=6, hkv=2, n_lists=2, reduction="sum"),
    "bfloat16 bounds": Case(dtype=torch.bfloat16, is_bound=True),
    "k 0": Case(k=0),
    "k above what is visible": Case(k=30, width=13),
    "k above the width": Case(k=9, width=4),
    "width above the units": Case(k=30, width=40),
    "negative scale": Case(scale=-0.5),
    "one row, one token": Case(n_rows=1, granule=1, sq=1, n_units=1),
    "rows of several tiles": Case(n_rows=37, granule=1, sq=37, n_units=10),
    "units of several tiles": Case(n_units=37, granule=12, sq=130, width=37, k=9),
    "several tiles, ties only": Case(n_units=37, granule=12, sq=130, width=37, k=9, spread=0),
    "several tiles, everything kept": Case(n_units=33, granule=12, sq=130, width=33, k=40),
    "a slab of rows": Case(row_begin=4, slab=5),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_best_visible_units_are_chosen(tmp_path: Path, case: Case) -> None:
    _check(tmp_path, case)


def test_a_row_with_no_visible_unit_gets_an_empty_list(tmp_path: Path) -> None:
    case = Case(granule=1, sq=11)
    idx, cnt = _select(tmp_path, case, _context(case), case.tensors())
    assert (cnt[..., :3] == 0).all() and (idx[..., :3, :] == -1).all()
    assert (cnt[..., 3] == 1).all() and (idx[..., 3, 0] == 0).all()


@pytest.mark.parametrize("n_units", [13, 20])
def test_nan_scores_are_chosen_last(tmp_path: Path, n_units: int) -> None:
    case = Case(hq=4, hkv=2, n_lists=2, reduction="max", n_units=n_units, granule=8, sq=88, k=6)
    q, k, low = case.tensors()
    k[0, 0, 1::2] = math.nan
    q[0, 2, 5] = math.nan  # the first of two heads that share a list
    idx, cnt = _select(tmp_path, case, _context(case), (q, k, low))
    marked = _marked(case, (q, k, low))
    assert marked.isnan().any()
    want_idx, want_cnt = choose(marked, case.k, case.width)
    assert torch.equal(cnt, want_cnt) and torch.equal(idx, want_idx)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, on the infinities below
def test_infinite_scores_of_visible_units_stay_candidates(tmp_path: Path) -> None:
    case = Case(k=13, width=13)
    q, k, _ = case.tensors()
    q[:], k[:] = 1.0, 1.0
    k[:, :, 2], k[:, :, 3] = math.inf, -math.inf
    idx, cnt = _select(tmp_path, case, _context(case), (q, k, None))
    scores = unit_scores(q, k, None, 2, "none").clamp(-1e30, 1e30)
    want_idx, want_cnt = choose(RULES.mark(scores, case.granule, case.sq), 13, 13)
    assert torch.equal(cnt, want_cnt) and torch.equal(idx, want_idx)
    out = _score(tmp_path, case, (q, k, None))
    assert out[0, 0, -1, 3] == -torch.finfo(torch.float32).max


def test_no_predicate_means_every_unit_is_visible(tmp_path: Path) -> None:
    case = Case(n_units=10)
    tensors = case.tensors()
    plain = select_context(
        header=("t",),
        head_dim=16,
        block_r=16,
        block_u=16,
        granule=4,
        is_float32=True,
        is_interpreted=True,
    )
    idx, cnt = _select(tmp_path, case, plain, tensors)
    want_idx, want_cnt = choose(_marked(case, tensors, Rules()), case.k, case.width)
    assert torch.equal(cnt, want_cnt) and torch.equal(idx, want_idx)


def test_a_predicate_may_read_a_table_of_exactly_the_units(tmp_path: Path) -> None:
    case = Case(n_units=9)
    tensors = case.tensors()
    table = torch.randint(0, 2, (2, 9), dtype=torch.int32)
    limit = Load("limit", (H, K), "int")
    options = {"visible": op("eq", limit, Lit(1)), "inputs": (CapturedArg("limit", 2),)}
    guarded = torch.full((2, 40), 1, dtype=torch.int32)
    guarded[:, :9] = table
    idx, cnt = _select(
        tmp_path, case, _context(case, **options), tensors, (guarded[:, :9], *guarded.stride())
    )
    rules = replace(RULES, visible=lambda b, h, q_lo, q_hi, u: bool(table[h, u] == 1))
    want_idx, want_cnt = choose(_marked(case, tensors, rules), case.k, case.width)
    assert torch.equal(cnt, want_cnt) and torch.equal(idx, want_idx)


SCORED = [name for name, case in CASES.items() if case.k == Case.k]


@pytest.mark.parametrize("name", SCORED)
def test_score_writes_what_select_compares(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    tensors = case.tensors()
    out = _score(tmp_path, case, tensors)
    torch.testing.assert_close(out, _marked(case, tensors).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("runs", [1, 3, 4, 9])
def test_units_may_be_cut_into_any_number_of_runs(tmp_path: Path, runs: int) -> None:
    """Nine tiles in four runs of three: the last run has none."""
    case = Case(hq=6, hkv=2, n_lists=6, n_units=139, sq=600)
    tensors = case.tensors()
    out = _score(tmp_path, case, tensors, runs=runs)
    torch.testing.assert_close(out, _marked(case, tensors).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("is_bound", [False, True])
def test_there_may_be_more_heads_than_one_step_multiplies(
    tmp_path: Path, is_bound: bool, reduction: str
) -> None:
    lists = 44 if reduction == "none" else 1
    case = Case(hq=44, hkv=2, n_lists=lists, is_bound=is_bound, reduction=reduction, n_rows=3)
    tensors = case.tensors()
    out = _score(tmp_path, case, tensors)
    torch.testing.assert_close(out, _marked(case, tensors).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["none", "sum", "max"])
@pytest.mark.parametrize("is_bound", [False, True])
def test_a_nan_query_makes_the_scores_of_its_list_nan(
    tmp_path: Path, is_bound: bool, reduction: str
) -> None:
    lists = 4 if reduction == "none" else 2
    case = Case(hq=4, hkv=2, n_lists=lists, is_bound=is_bound, reduction=reduction)
    q, k, low = case.tensors()
    q[0, 1, 5, 3] = math.nan
    out = _score(tmp_path, case, (q, k, low))
    marked = _marked(case, (q, k, low))
    assert marked.isnan().any()
    torch.testing.assert_close(out, marked.float(), rtol=1e-6, atol=0, equal_nan=True)


def test_scores_of_rounded_inputs_are_as_exact_as_float32(tmp_path: Path) -> None:
    """The sum over heads and channels must not lose what ranks neighbours: 1e-6 of a score."""
    case = Case(
        hq=8, hkv=2, n_lists=2, dim=128, is_bound=True, reduction="mean", dtype=torch.bfloat16
    )
    q = torch.randn(1, 8, 11, 128).bfloat16()
    k = torch.randn(1, 2, 13, 128).bfloat16().abs()
    low = k - torch.rand(1, 2, 13, 128).bfloat16()
    out = _score(tmp_path, case, (q, k, low))
    marked = _marked(case, (q, k, low))
    finite = marked.isfinite()
    size = (q.double().abs().sum(-1).max() * k.double().abs().max()).item()
    assert (out.double() - marked)[finite].abs().max() < 1e-6 * size


def test_score_may_read_a_table_of_exactly_the_units(tmp_path: Path) -> None:
    case = Case(n_units=9)
    tensors = case.tensors()
    guarded = torch.full((2, 40), 1, dtype=torch.int32)
    guarded[:, :9] = torch.randint(0, 2, (2, 9), dtype=torch.int32)
    table = guarded[:, :9]
    out = _score(
        tmp_path,
        case,
        tensors,
        (table, *table.stride()),
        visible=op("eq", Load("limit", (H, K), "int"), Lit(1)),
        inputs=(CapturedArg("limit", 2),),
    )
    rules = replace(RULES, visible=lambda b, h, q_lo, q_hi, u: bool(table[h, u] == 1))
    torch.testing.assert_close(out, _marked(case, tensors, rules).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("template", "context_class"), [(SELECT, SelectContext), (SCORE, ScoreContext)]
)
def test_the_context_holds_exactly_the_variables_of_the_template(
    template: str, context_class: type[Any]
) -> None:
    assert variables_of(template) == field_names(context_class)


TYPES = {
    "scale": "fp32",
    "idx_ptr": "*i32",
    "cnt_ptr": "*i32",
    "scratch_ptr": "*i32",
    "scores_ptr": "*fp32",
}


@pytest.mark.parametrize(
    ("block_r", "block_u", "warps", "is_bound", "reduction"),
    [
        (64, 128, 8, False, "sum"),
        (64, 64, 8, True, "max"),
        (64, 64, 4, False, "none"),
    ],
)
def test_default_schedules_of_select_compile_for_sm_90_without_spills(
    tmp_path: Path, block_r: int, block_u: int, warps: int, is_bound: bool, reduction: Any
) -> None:
    context = select_context(
        header=("test",), head_dim=128, block_r=block_r, block_u=block_u, granule=64,
        is_bound=is_bound, reduction=reduction, visible=CAUSAL, forced=OWN,
    )  # fmt: skip
    path = write_rendered(SELECT, context, tmp_path)
    assert compile_kernel(path, "select_kernel", types=TYPES, num_warps=warps).spill_bytes == 0


@pytest.mark.parametrize("element", ["bf16", "fp32"])
@pytest.mark.parametrize("reduction", ["none", "mean", "max"])
def test_the_default_schedule_of_score_compiles_for_sm_90_without_spills(
    tmp_path: Path, reduction: Any, element: str
) -> None:
    is_float32 = element == "fp32"
    context = score_context(
        header=("test",), head_dim=128, block_u=32 if is_float32 else 64, granule=1,
        is_float32=is_float32,
        is_bound=True, reduction=reduction, visible=CAUSAL, forced=OWN,
    )  # fmt: skip
    path = write_rendered(SCORE, context, tmp_path)
    built = compile_kernel(path, "score_kernel", types=TYPES, num_warps=4, element=element)
    assert built.spill_bytes == 0
