"""Formulas that kernels evaluate for a sequence of their own."""

from __future__ import annotations

import pytest
import sympy

from spcomp.ir import dims
from spcomp.ir.dim_exprs import expr_of
from spcomp.ir.dims import Dim
from spcomp.ir.expr import Lit, Sym, substitute
from spcomp.ir.units import Units

DIMS: dict[str, Dim] = {
    "a number": 7,
    "tokens": dims.Skv,
    "blocks": Units(16, 16).count(dims.Skv),
    "overlapping": Units(32, 16).count(dims.Skv),
    "whole blocks": Units(16, 16, "drop").count(dims.Skv),
    "a share": dims.ceildiv(dims.ceildiv(dims.Skv, 16) * 19661, 65536),
    "an extreme": dims.least(dims.largest(3, dims.ceildiv(dims.Skv, 4)), dims.Skv + 2),
    "two symbols": dims.ceildiv(dims.Sq * 3 - dims.Skv, 5) + 2 * dims.Skv,
    "a floor": sympy.floor(dims.Skv / 3),
}


@pytest.mark.parametrize("name", DIMS)
def test_an_expression_gives_what_the_formula_gives(name: str) -> None:
    dim = DIMS[name]
    expr = expr_of(dim)
    for skv in (0, 1, 3, 15, 16, 17, 31, 32, 33, 1000):
        values = {"Skv": Lit(skv), "Sq": Lit(11)}
        assert substitute(expr, values) == Lit(dims.evaluate(dim, {"Skv": skv, "Sq": 11}))


def test_a_symbol_stays_one() -> None:
    assert expr_of(dims.Skv) == Sym("Skv")


def test_a_formula_without_an_expression_is_an_error() -> None:
    with pytest.raises(TypeError, match="no expression for"):
        expr_of(sympy.sqrt(dims.Skv))
