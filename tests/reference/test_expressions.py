"""Element expressions mean what the same Python expression means on plain numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from spcomp.backends.reference.expressions import evaluate
from spcomp.ir.expr import Expr, Lit, Load, Op, Sym, op

A, B = Sym("q"), Sym("k")
NUMBERS = (-7, -3, -1, 0, 1, 2, 5)


def _on_tensors(expr: Expr, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    column = torch.tensor(NUMBERS)[:, None]
    row = torch.tensor(NUMBERS)[None, :]
    value = evaluate(expr, {"q": column, "k": row}, dtype=dtype)
    return torch.as_tensor(value).expand(len(NUMBERS), len(NUMBERS))


@pytest.mark.parametrize(
    "expr",
    [
        op("add", A, B),
        op("sub", op("mul", A, Lit(3)), B),
        op("floordiv", A, Lit(3)),
        op("floordiv", Lit(7), op("add", op("abs", B), Lit(1))),
        op("mod", A, Lit(3)),
        op("mod", A, op("sub", op("neg", op("abs", B)), Lit(1))),
        op("min", A, B),
        op("max", A, Lit(2)),
        op("and", op("lt", A, B), op("not", op("eq", B, Lit(0)))),
        op("or", op("ge", A, B), op("ne", B, Lit(2))),
        op("and", A, Lit(1)),
        op("where", op("gt", A, B), A, Lit(0.25)),
        op("div", A, Lit(4)),
        op("exp", op("div", A, Lit(8))),
        op("log", op("add", op("abs", A), Lit(0.1))),
        op("tanh", op("mul", A, Lit(0.3))),
        op("mul", op("float", A), Lit(0.1)),
        op("min", op("float", A), Lit(0.1)),
    ],
    ids=lambda e: str(e.name),
)
def test_an_operator_agrees_with_python(expr: Op) -> None:
    got = _on_tensors(expr)
    for (i, a), (j, b) in itertools.product(enumerate(NUMBERS), enumerate(NUMBERS)):
        want = evaluate(expr, {"q": a, "k": b})
        assert not isinstance(want, torch.Tensor)
        assert math.isclose(float(got[i, j]), float(want), rel_tol=1e-15), (a, b)


def test_numbers_follow_python_itself() -> None:
    values = {"q": -7, "k": 2}
    assert evaluate(op("floordiv", A, B), values) == -7 // 2
    assert evaluate(op("mod", A, B), values) == -7 % 2
    assert evaluate(op("not", op("lt", A, B)), values) is False
    assert evaluate(op("where", op("lt", A, B), A, B), values) == -7


def test_what_must_be_a_float_is_one_of_the_dtype_asked_for() -> None:
    for dtype in (torch.float32, torch.float64):
        for expr in (op("div", A, Lit(2)), op("exp", A), op("float", A)):
            assert _on_tensors(expr, dtype).dtype == dtype


def test_a_table_is_read_element_by_element() -> None:
    table = torch.arange(12.0).reshape(3, 4)
    expr = Load("t", (op("mod", A, Lit(3)), op("mod", B, Lit(4))), "float")
    got = evaluate(expr, {"q": torch.arange(5)[:, None], "k": torch.arange(6)}, {"t": table})
    assert isinstance(got, torch.Tensor)
    want = [[float(table[q % 3, k % 4]) for k in range(6)] for q in range(5)]
    assert got.tolist() == want
    scalar = evaluate(Load("t", (), "float"), {}, {"t": torch.tensor(3.5)})
    assert float(scalar) == 3.5


def test_a_table_read_out_of_range_is_an_error() -> None:
    with pytest.raises(IndexError):
        evaluate(Load("t", (A,), "int"), {"q": torch.arange(5)}, {"t": torch.arange(4)})
