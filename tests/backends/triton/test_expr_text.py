"""Printed expressions: the text itself, and what it computes in Triton against torch and Python."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from spcomp.backends.triton.expr_text import Helpers, helpers_of, to_triton
from spcomp.codegen.render import environment
from spcomp.ir.expr import Expr, Lit, Load, Op, Sym, op
from tests.backends.triton.rendering import compile_kernel, import_file

Q, K, SQ, SKV, H, SCORE = (Sym(n) for n in ("q", "k", "Sq", "Skv", "h", "score"))
BEHIND = op("sub", Q, K)

TEXTS = [
    (op("le", K, op("add", Q, op("sub", SKV, SQ))), "cols <= rows + (skv - sq)"),
    (op("and", op("lt", K, Lit(4)), op("lt", Q, SQ)), "(cols < 4) & (rows < sq)"),
    (
        op("or", op("and", Sym("chosen0"), Sym("chosen1")), op("eq", Q, K)),
        "chosen0 & chosen1 | (rows == cols)",
    ),
    (
        op("and", op("or", Sym("chosen0"), Sym("chosen1")), op("eq", Q, K)),
        "(chosen0 | chosen1) & (rows == cols)",
    ),
    (op("not", op("lt", Q, K)), "rows >= cols"),
    (op("not", op("lt", SCORE, Lit(0.5))), "(score < 0.5) == 0"),
    (op("not", Sym("chosen0")), "chosen0 == 0"),
    (op("floordiv", Q, Lit(64)), "rows // 64"),
    (op("floordiv", BEHIND, Lit(64)), "floor_div(rows - cols, 64)"),
    (op("mod", BEHIND, Lit(64)), "floor_mod(rows - cols, 64)"),
    (op("mod", op("add", Q, K), Lit(64)), "(rows + cols) % 64"),
    (op("sub", Q, op("sub", K, Lit(-3))), "rows - (cols - (-3))"),
    (op("mul", BEHIND, op("neg", H)), "(rows - cols) * -head"),
    (op("min", op("abs", BEHIND), Lit(9)), "tl.minimum(tl.abs(rows - cols), 9)"),
    (
        op("where", op("lt", Q, K), Lit(1), Sym("chosen0")),
        "tl.where(rows < cols, 1, tl.where(chosen0, 1, 0))",
    ),
    (op("add", Sym("chosen0"), op("lt", Q, K)), "chosen0 | (rows < cols)"),
    (op("ge", Lit(float("-inf")), SCORE), 'float("-inf") >= score'),
    (op("exp", BEHIND), "tl.exp(tl.cast(rows - cols, tl.float32))"),
    (
        op("add", SCORE, Load("bias", (H, BEHIND), "float")),
        "score + tl.cast(tl.load(bias_ptr + tl.cast(head, tl.int64) * bias_stride_0"
        " + tl.cast(rows - cols, tl.int64) * bias_stride_1), tl.float32)",
    ),
    (
        op("and", op("le", K, Q), Load("seen", (K,), "bool")),
        "(cols <= rows) & (tl.load(seen_ptr + tl.cast(cols, tl.int64) * seen_stride_0) != 0)",
    ),
]


@pytest.mark.parametrize(("expr", "text"), TEXTS, ids=[t for _, t in TEXTS])
def test_an_expression_prints_with_the_fewest_parentheses(expr: Expr, text: str) -> None:
    assert to_triton(expr, q="rows", k="cols", h="head") == text


def test_a_name_that_is_not_an_operand_by_itself_gets_parentheses() -> None:
    expr = op("mul", Q, K)
    assert to_triton(expr, q="rows[:, None]", k="first + cols") == "rows[:, None] * (first + cols)"


def test_helpers_are_asked_for_only_where_called() -> None:
    assert helpers_of(op("floordiv", Q, Lit(4)), op("lt", Q, K)) == Helpers()
    assert helpers_of(op("lt", Q, K), op("mod", BEHIND, Lit(4))) == Helpers(has_floor_division=True)
    assert helpers_of(op("tanh", SCORE)) == Helpers(has_tanh=True)


def _module(tmp_path: Path, body: str, helpers: Helpers) -> ModuleType:
    return import_file(_write(tmp_path, body, helpers))


def _write(tmp_path: Path, body: str, helpers: Helpers) -> Path:
    macros = environment().get_template("triton/macros/expression.jinja").module
    source = "import triton\nimport triton.language as tl\n" + macros.define_helpers(helpers) + body
    path = tmp_path / "expression_kernel.py"
    path.write_text(source)
    return path


KERNEL = """

@triton.jit(do_not_specialize=["sq", "skv"])
def kernel(
    out_ptr, scalar_ptr, table_ptr, seen_ptr, sq, skv, table_stride_0, table_stride_1, seen_stride_0
):
    rows = tl.arange(0, 16)[:, None]
    cols = tl.arange(0, 32)[None, :]
    head = tl.program_id(0)
    score = (rows * 32 + cols).to(tl.float32) / 100.0 - 2.0
    value = {tensor}
    tl.store(out_ptr + rows * 32 + cols, (value + tl.zeros([16, 32], tl.int32)).to(tl.float32))
    row = sq - 2
    col = skv - 7
    point = (row * 32 + col).to(tl.float32) / 100.0 - 2.0
    scalar = {scalar}
    tl.store(scalar_ptr, (scalar + 0).to(tl.float32))
"""


def _run(expr: Expr, tmp_path: Path) -> tuple[Tensor, float]:
    tensor = to_triton(expr, q="rows", k="cols", h="head")
    scalar = to_triton(expr, q="row", k="col", h="head", score="point")
    body = KERNEL.format(tensor=tensor, scalar=scalar)
    kernel = _module(tmp_path, body, helpers_of(expr)).kernel
    out, one = torch.full((16, 32), -99.0), torch.full((1,), -99.0)
    table, seen = _tables()
    kernel[(1,)](out, one, table, seen, 16, 32, *table.stride(), *seen.stride())
    return out, float(one)


def _tables() -> tuple[Tensor, Tensor]:
    table = torch.arange(3 * 64, dtype=torch.float32).reshape(64, 3).t() / 7
    return table, torch.arange(32) % 3 == 0


MEANINGS = [
    ("floordiv of negatives", op("floordiv", BEHIND, Lit(5)), lambda q, k, s: (q - k) // 5),
    ("floordiv by a negative", op("floordiv", BEHIND, Lit(-5)), lambda q, k, s: (q - k) // -5),
    ("mod of negatives", op("mod", BEHIND, Lit(5)), lambda q, k, s: (q - k) % 5),
    ("mod by a negative", op("mod", BEHIND, Lit(-5)), lambda q, k, s: (q - k) % -5),
    ("float mod", op("mod", SCORE, Lit(0.7)), lambda q, k, s: s - (s / 0.7).floor() * 0.7),
    (
        "abs, min and max",
        op("max", op("min", op("abs", BEHIND), Lit(6)), Lit(2)),
        lambda q, k, s: (q - k).abs().clamp(2, 6),
    ),
    ("division of integers", op("div", BEHIND, Lit(8)), lambda q, k, s: (q - k) / 8),
    (
        "exp, log and neg",
        op("exp", op("neg", op("log", op("add", Q, Lit(1))))),
        lambda q, k, s: 1 / (q + 1.0) + 0 * s,
    ),
    (
        "soft cap",
        op("mul", Lit(3.0), op("tanh", op("div", SCORE, Lit(3.0)))),
        lambda q, k, s: 3 * (s / 3).tanh(),
    ),
    (
        "tanh near zero",
        op("mul", Lit(1e3), op("tanh", op("mul", SCORE, Lit(1e-3)))),
        lambda q, k, s: 1e3 * (s * 1e-3).tanh(),
    ),
    (
        "slope per distance",
        op("add", SCORE, op("mul", Lit(-0.25), BEHIND)),
        lambda q, k, s: s - 0.25 * (q - k),
    ),
    (
        "a strided table",
        Load("table", (Lit(2), op("add", Q, K)), "float"),
        lambda q, k, s: _tables()[0][2][q + k],
    ),
]
TRUTHS = [
    (
        "causal and window",
        op("and", op("le", K, op("add", Q, op("sub", SKV, SQ))), op("lt", op("sub", Q, K), Lit(7))),
        lambda q, k, s: (k <= q + 16) & (q - k < 7),
    ),
    (
        "not of a conjunction",
        op("not", op("and", op("lt", Q, K), op("eq", op("mod", K, Lit(2)), Lit(0)))),
        lambda q, k, s: ~((q < k) & (k % 2 == 0)),
    ),
    (
        "equality of truth values",
        op("eq", op("lt", Q, Lit(5)), op("lt", K, Lit(9))),
        lambda q, k, s: (q < 5) == (k < 9),
    ),
    (
        "a truth value as a number",
        op("ge", op("add", op("lt", Q, K), Lit(1)), Lit(2)),
        lambda q, k, s: q < k,
    ),
    (
        "choice of truth values",
        op("where", op("lt", Q, Lit(5)), op("lt", K, Lit(9)), op("ge", K, Q)),
        lambda q, k, s: torch.where(q < 5, k < 9, k >= q),
    ),
    (
        "a table of truth values",
        op("or", Load("seen", (K,), "bool"), op("eq", Q, K)),
        lambda q, k, s: _tables()[1][k] | (q == k),
    ),
    (
        "documents",
        op("eq", op("floordiv", Q, Lit(6)), op("floordiv", K, Lit(6))),
        lambda q, k, s: q // 6 == k // 6,
    ),
]


@pytest.mark.parametrize("case", [*MEANINGS, *TRUTHS], ids=lambda c: c[0])
def test_the_text_computes_what_the_expression_means(case, tmp_path: Path) -> None:
    _, expr, meaning = case
    expr = op("where", expr, Lit(1), Lit(0)) if case in TRUTHS else expr
    out, one = _run(expr, tmp_path)
    q, k = torch.arange(16)[:, None], torch.arange(32)[None, :]
    score = (q * 32 + k).float() / 100 - 2
    want = (meaning(q, k, score) + torch.zeros(16, 32)).float()
    torch.testing.assert_close(out, want, rtol=2e-6, atol=1e-6)
    assert one == pytest.approx(float(want[14, 25]), rel=2e-6, abs=1e-6)


def test_arithmetic_of_truth_values_alone_is_a_truth_value(tmp_path: Path) -> None:
    several = Op("add", (op("lt", Q, Lit(5)), op("lt", K, Lit(9))))
    out, _ = _run(op("where", several, Lit(1), Lit(0)), tmp_path)
    q, k = torch.arange(16)[:, None], torch.arange(32)[None, :]
    assert torch.equal(out.bool(), (q < 5) | (k < 9))


def test_all_of_it_compiles_for_a_card_on_tensors_and_on_scalars(tmp_path: Path) -> None:
    head, tail = KERNEL.split("    value = {tensor}\n")
    body = [head, "    value = score\n", "    scalar = point\n"]
    body.insert(1, tail[tail.index("    row = sq") : tail.index("    scalar = {scalar}")])
    exprs = [expr for _, expr, _ in MEANINGS]
    exprs += [op("where", expr, Lit(1), Lit(0)) for _, expr, _ in TRUTHS]
    for expr in exprs:
        body.append(f"    value += {to_triton(expr, q='rows', k='cols', h='head')}\n")
        on_scalars = to_triton(expr, q="row", k="col", h="head", score="point")
        body.append(f"    scalar += {on_scalars}\n")
    body.append(
        "    tl.store(out_ptr + rows * 32 + cols, value)\n    tl.store(scalar_ptr, scalar)\n"
    )
    path = _write(tmp_path, "".join(body), helpers_of(*exprs))
    types = {"out_ptr": "*fp32", "scalar_ptr": "*fp32", "table_ptr": "*fp32", "seen_ptr": "*i1"}
    assert compile_kernel(path, "kernel", types=types, num_warps=4).spill_bytes == 0
