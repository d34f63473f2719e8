"""Ranges admit exactly the keys that their predicate admits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spcomp.backends.ascendc.spans import NotRanges, Ranges, ranges_of
from spcomp.ir.expr import COMPARISONS, Expr, Lit, Load, Op, Sym, op
from tests.ascendc.integers import value_of

SCALARS = ("q", "Sq", "Skv")
NUMBERS = st.integers(-40, 40).map(Lit)
ROW = st.sampled_from([Sym(name) for name in SCALARS]) | NUMBERS


def keyed(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    """Draw expressions that hold k once, or in both terms of a minimum."""
    factor = st.integers(1, 9).map(Lit)
    return st.one_of(
        st.builds(lambda n, a, b: Op(n, (a, b)), st.sampled_from(["add", "sub"]), inner, ROW),
        st.builds(lambda n, a, b: Op(n, (b, a)), st.sampled_from(["add", "sub"]), inner, ROW),
        st.builds(lambda a, m: Op("mul", (a, m)), inner, factor),
        st.builds(lambda a, m: Op("floordiv", (a, m)), inner, factor),
        st.builds(lambda n, a, b: Op(n, (a, b)), st.sampled_from(["min", "max"]), inner, ROW),
    )


KEYED = st.recursive(st.just(Sym("k")), keyed, max_leaves=4)
COMPARED = st.builds(
    lambda n, a, b, turned: op(n, b, a) if turned else op(n, a, b),
    st.sampled_from(sorted(COMPARISONS)),
    KEYED,
    ROW,
    st.booleans(),
)
OF_ROW = st.builds(lambda n, a, b: op(n, a, b), st.sampled_from(sorted(COMPARISONS)), ROW, ROW)
PREDICATE = st.recursive(
    COMPARED | OF_ROW,
    lambda inner: st.one_of(
        st.builds(lambda n, a, b: op(n, a, b), st.sampled_from(["and", "or"]), inner, inner),
        st.builds(lambda a: op("not", a), inner),
    ),
    max_leaves=5,
)


def admitted(ranges: Ranges, row: dict[str, int], keys: int) -> list[bool]:
    bounds = [(value_of(r.lo, row), value_of(r.hi, row)) for r in ranges]
    return [any(lo <= k < hi for lo, hi in bounds) for k in range(keys)]


@given(PREDICATE, st.integers(0, 60), st.integers(1, 60), st.integers(1, 60))
def test_ranges_admit_what_the_predicate_admits(
    predicate: Expr, q: int, rows: int, keys: int
) -> None:
    row = {"q": q, "Sq": rows, "Skv": keys}
    got = admitted(ranges_of(predicate), row, 50)
    assert got == [bool(value_of(predicate, {**row, "k": k})) for k in range(50)]


@pytest.mark.parametrize(
    ("predicate", "named"),
    [
        (op("eq", op("mod", Sym("k"), Lit(2)), Lit(0)), "mod"),
        (op("lt", op("mul", Sym("k"), Lit(-2)), Sym("q")), "product"),
        (op("lt", Sym("k"), op("sub", Sym("k"), Sym("q"))), "both sides"),
        (op("lt", Load("table", (Sym("k"),), "int"), Sym("q")), "Load"),
        (Load("keep", (Sym("k"),), "bool"), "keep"),
    ],
)
def test_what_is_no_union_of_ranges_is_named(predicate: Expr, named: str) -> None:
    with pytest.raises(NotRanges, match=named):
        ranges_of(predicate)
