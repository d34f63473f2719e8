"""The AscendC score kernel in the emulator, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import jinja2.meta
import pytest
import torch

from spcomp.backends.ascendc.contexts.base import Span
from spcomp.backends.ascendc.contexts.score import (
    TEMPLATE,
    ScoreContext,
    score_context,
)
from spcomp.backends.ascendc.emulate import (
    Buffer,
    EmulatedKernel,
    EmulatorFault,
    Launch,
    Statistics,
    compile_kernel,
)
from spcomp.codegen.render import TEMPLATES, environment, render

INT_FIELDS = ("B", "Hq", "Hkv", "Sq", "Skv", "R0", "Nr", "Nk")
STRIDE_FIELDS = ("rows_b", "rows_h", "rows_s", "units_b", "units_h", "units_s")


class Tiling(ctypes.Structure):
    """The struct of a score launch, passed by value."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in INT_FIELDS),
        *((name, ctypes.c_int64) for name in STRIDE_FIELDS),
    )


STRUCT = "struct ScoreTiling {{\n  int32_t {};\n  int64_t {};\n}};\n".format(
    ", ".join(INT_FIELDS), ", ".join(STRIDE_FIELDS)
)

Spans = Callable[[int, int, int, int], list[tuple[int, int]]]


@dataclass(frozen=True)
class Predicate:
    """The same spans in C++ and in Python, over q_lo, q_hi, Sq and Skv."""

    spans: tuple[Span, ...]
    of: Spans


ALL = Predicate((Span("0", "Skv"),), lambda lo, hi, sq, skv: [(0, skv)])
NONE = Predicate((), lambda lo, hi, sq, skv: [])
CAUSAL = Predicate(
    (Span("0", "FloorDiv(q_hi + Skv - Sq, 4) + 1"),),
    lambda lo, hi, sq, skv: [(0, (hi + skv - sq) // 4 + 1)],
)
SINK_AND_WINDOW = Predicate(
    (Span("-5", "3"), Span("FloorDiv(q_lo, 2) - 70", "FloorDiv(q_hi, 2)")),
    lambda lo, hi, sq, skv: [(-5, 3), (lo // 2 - 70, hi // 2)],
)
OWN = Predicate(
    (Span("q_lo + Skv - Sq", "q_lo + Skv - Sq + 2"), Span("9", "7")),
    lambda lo, hi, sq, skv: [(lo + skv - sq, lo + skv - sq + 2)],
)


@dataclass(frozen=True)
class Case:
    """One launch; group: query heads of a KV head; rows: first and number of the slab's rows."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    queries: int = 1
    keys: int = 500
    units: int = 100
    first_row: int = 0
    rows: int | None = None
    dim: int = 64
    granule: int = 1
    dtype: str = "float16"
    heads: str = "query"
    reduce: str = "mean"
    scale: float = 0.125
    visible: Predicate = ALL
    forced: Predicate = NONE
    is_strided: bool = False

    @property
    def slab(self) -> int:
        whole = -(-self.queries // self.granule)
        return self.rows if self.rows is not None else whole - self.first_row

    @property
    def list_heads(self) -> int:
        return self.kv_heads * (self.group if self.heads == "query" else 1)


def context_of(case: Case) -> ScoreContext:
    return score_context(
        name="score_units",
        struct="ScoreTiling",
        tiling_header="tiling.h",
        dtype=case.dtype,
        head_dim=case.dim,
        heads=case.heads,
        reduce=case.reduce,
        scale=f"{case.scale}f",
        granule=case.granule,
        visible=case.visible.spans,
        forced=case.forced.spans,
        header=("Scores of units.",),
    )


def source_of(case: Case) -> str:
    return render(TEMPLATE, context_of(case)).replace('#include "tiling.h"', STRUCT)


@lru_cache(maxsize=64)
def compiled(source: str) -> EmulatedKernel:
    return compile_kernel(source, "score_units")


def draw(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and units; strided ones are views of a wider tensor with another order of axes."""
    generator = torch.Generator().manual_seed(case.units * 7 + case.queries)
    n_rows = -(-case.queries // case.granule)
    dtype = getattr(torch, case.dtype)

    def one(heads: int, length: int) -> torch.Tensor:
        shape = (case.batch, heads, length, case.dim)
        if not case.is_strided:
            return torch.randn(shape, generator=generator).to(dtype)
        wide = torch.randn(case.batch, length, heads + 1, case.dim + 16, generator=generator)
        return wide.to(dtype).permute(0, 2, 1, 3)[:, 1:, :, 16:]

    return one(case.kv_heads * case.group, n_rows), one(case.kv_heads, case.units)


JOIN: dict[str, Callable[..., torch.Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "max": torch.amax,
}


def model(case: Case, rows: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    part = rows[:, :, case.first_row : case.first_row + case.slab].double()
    products = part @ units.double().repeat_interleave(case.group, 1).transpose(2, 3) * case.scale
    if case.heads == "group":
        shape = (case.batch, case.kv_heads, case.group, case.slab, case.units)
        products = JOIN[case.reduce](products.reshape(shape), dim=2)
    for row in range(case.slab):
        q_lo = (case.first_row + row) * case.granule
        q_hi = min(q_lo + case.granule, case.queries) - 1
        hidden = torch.ones(case.units, dtype=torch.bool)
        forced = torch.zeros(case.units, dtype=torch.bool)
        for lo, hi in case.visible.of(q_lo, q_hi, case.queries, case.keys):
            hidden[max(lo, 0) : max(hi, 0)] = False
        for lo, hi in case.forced.of(q_lo, q_hi, case.queries, case.keys):
            forced[max(lo, 0) : max(hi, 0)] = True
        products[:, :, row, hidden] = -torch.inf
        products[:, :, row, forced] = torch.inf
    return products


def storage(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a view from its first element on, and no element more."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.as_strided(tensor, (last + 1,), (1,)).clone()


def launch(
    case: Case, source: str, blocks: int, descending: bool
) -> tuple[torch.Tensor, torch.Tensor, Statistics]:
    """Give what the kernel stored, what the model says, and the run's statistics."""
    return run(case, source, *draw(case), blocks, descending)


def run(
    case: Case,
    source: str,
    rows: torch.Tensor,
    units: torch.Tensor,
    blocks: int = 2,
    descending: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Statistics]:
    shape = (case.batch, case.list_heads, case.slab, case.units)
    scores = torch.full(shape, torch.nan)
    values: dict[str, Any] = {
        "B": case.batch,
        "Hq": case.kv_heads * case.group,
        "Hkv": case.kv_heads,
        "Sq": case.queries,
        "Skv": case.keys,
        "R0": case.first_row * case.granule,
        "Nr": case.slab,
        "Nk": case.units,
    }
    for name, tensor in (("rows", rows), ("units", units)):
        values |= {f"{name}_{axis}": tensor.stride(i) for i, axis in enumerate("bhs")}
    workspace = torch.full((blocks * context_of(case).workspace_bytes // 4,), torch.nan)
    statistics = compiled(source).run(
        [
            Buffer("rows", storage(rows), read_only=True),
            Buffer("units", storage(units), read_only=True),
            Buffer("scores", scores),
            Buffer("workspace", workspace),
            bytes(Tiling(**values)),
        ],
        Launch(kind="mix", blocks=blocks, descending=descending),
    )
    return scores, model(case, rows, units), statistics


TOLERANCE = {"float16": (2e-3, 1e-3), "bfloat16": (1.6e-2, 1e-2)}


def check(case: Case, blocks: int = 2, descending: bool = False) -> None:
    got, want, statistics = launch(case, source_of(case), blocks, descending)
    relative, absolute = TOLERANCE[case.dtype]
    torch.testing.assert_close(got.double(), want, rtol=relative, atol=absolute)
    assert statistics.warnings == ()


# One specialisation a line; the shapes vary.
QUERY = Case(visible=CAUSAL, forced=OWN, dim=64)
MEAN = Case(visible=CAUSAL, forced=OWN, dim=80, heads="group", granule=16)
SUM = Case(visible=SINK_AND_WINDOW, dim=128, dtype="bfloat16", heads="group", reduce="sum")
MAX = Case(dim=256, heads="group", reduce="max", scale=-0.0625)
BLIND = Case(visible=NONE, forced=OWN, dim=16, dtype="bfloat16")

SHAPES = [
    replace(QUERY),
    replace(QUERY, queries=150, keys=600, units=150, is_strided=True),
    replace(QUERY, batch=2, kv_heads=2, group=3, queries=61, keys=520, units=129),
    replace(QUERY, group=16, queries=9, keys=900, units=257, kv_heads=2, is_strided=True),
    replace(QUERY, group=4, queries=40, keys=40, units=10, first_row=31),
    replace(QUERY, group=4, queries=70, keys=70, units=17, first_row=5, rows=33),
    replace(QUERY, group=128, queries=2, keys=70, units=1),
    replace(QUERY, queries=3, keys=3, units=1),
    replace(MEAN, group=4, queries=1000, keys=1000, units=250, batch=2, is_strided=True),
    replace(MEAN, group=3, queries=777, keys=777, units=194, kv_heads=2),
    replace(MEAN, group=1, queries=1, keys=5000, units=1250),
    replace(MEAN, group=16, queries=330, keys=400, units=99, first_row=3, rows=12),
    replace(MEAN, group=64, queries=33, keys=400, units=64, kv_heads=2),
    replace(MEAN, group=128, queries=20, keys=400, units=65),
    replace(SUM, group=4, queries=300, keys=300, units=200),
    replace(SUM, group=7, queries=50, keys=300, units=333, batch=2, is_strided=True),
    replace(MAX, group=3, queries=45, keys=90, units=90),
    replace(MAX, group=16, queries=1, keys=200, units=300, kv_heads=2, is_strided=True),
    replace(MAX, group=1, queries=129, keys=200, units=127),
    replace(BLIND, group=3, queries=45, keys=200, units=140),
]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_scores_are_the_models(number: int, descending: bool) -> None:
    check(SHAPES[number], blocks=3, descending=descending)


@pytest.mark.parametrize("blocks", [1, 2, 24])
def test_scores_do_not_depend_on_the_number_of_cores(blocks: int) -> None:
    check(replace(QUERY, group=4, queries=1, keys=2000, units=500), blocks)
    check(replace(MEAN, group=4, queries=40, keys=40, units=10, kv_heads=2), blocks)


def test_nothing_to_score_leaves_no_flag() -> None:
    for case in (replace(QUERY, rows=0), replace(QUERY, units=0)):
        got, _, statistics = launch(case, source_of(case), 2, False)
        assert got.numel() == 0 and statistics.warnings == ()


def test_overflow_is_neither_forced_nor_excluded() -> None:
    case = replace(SUM, queries=300, keys=300, units=40)
    rows, units = draw(case)
    units[:, :, 1], units[:, :, 2] = 3e38, -3e38
    rows[...] = 3e38
    got, _, _ = run(case, source_of(case), rows, units)
    largest = torch.finfo(torch.float32).max
    assert (got[..., 1] == largest).all() and (got[..., 2] == -largest).all()


def test_workspace_is_what_the_kernel_takes() -> None:
    for case in (QUERY, MAX):
        context = context_of(case)
        slots, rows, units = context.slots, context.tile_rows, context.unit_tile
        assert context.workspace_bytes == slots * rows * units * 4
        assert f"kUnitTile = {units};" in source_of(case)


def test_template_and_context_have_the_same_names() -> None:
    text = (TEMPLATES / TEMPLATE).read_text()
    names = jinja2.meta.find_undeclared_variables(environment().parse(text))
    assert names == {field.name for field in fields(ScoreContext)}


def test_a_missing_flag_is_reported() -> None:
    case = replace(QUERY, group=4, queries=40, keys=900, units=300)
    line = "CrossCoreSetFlag<2, PIPE_FIX>(kReady + slot);"
    assert line in source_of(case)
    with pytest.raises(EmulatorFault):
        launch(case, source_of(case).replace(line, ""), 2, False)


MOVING_AND_OWN = Predicate(
    (
        Span("FloorDiv(q_lo - 40, 4) + 12", "FloorDiv(q_lo - 40, 4) + 13"),
        Span("q_lo + Skv - Sq - 1", "q_hi + Skv - Sq + 1"),
    ),
    lambda lo, hi, sq, skv: [
        ((lo - 40) // 4 + 12, (lo - 40) // 4 + 13),
        (lo + skv - sq - 1, hi + skv - sq + 1),
    ],
)
NARROW = 65535  # elements between rows, the most that a load of the cube core can step


def test_rows_before_the_first_key_see_nothing() -> None:
    """The end of a span may be negative, where C++ divides towards zero."""
    for forced in (NONE, MOVING_AND_OWN):
        check(replace(QUERY, queries=40, keys=33, units=9, forced=forced))
        check(replace(MEAN, group=2, queries=45, keys=41, units=11, forced=forced))


def test_several_spans_may_be_forced() -> None:
    check(replace(QUERY, queries=150, keys=600, units=150, group=2, forced=MOVING_AND_OWN))
    check(replace(MEAN, group=4, queries=330, keys=330, units=99, forced=MOVING_AND_OWN))


def test_one_row_may_have_a_stride_that_no_load_can_step() -> None:
    case = replace(MAX, group=128, kv_heads=4, queries=1, keys=9, units=1, is_strided=True)
    rows, units = draw(case)
    assert rows.stride(2) > NARROW and rows.stride(1) < NARROW
    check(case)
    wide = replace(QUERY, queries=1, keys=9, units=1)
    rows, units = draw(wide)
    far = torch.zeros(1, 1, 1, NARROW + 1 + wide.dim, dtype=units.dtype)
    got, want, _ = run(wide, source_of(wide), rows, far[..., : wide.dim].copy_(units))
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-3)
