"""Widths bound from above what a predicate lets a row see; for windows they are exact."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spcomp.ir import dims
from spcomp.ir.expr import Expr, Lit, Sym, op, substitute
from spcomp.ir.nodes import Attend, Gather, Intersect, Region, Selection, Union
from spcomp.ir.nodes.attend import Stream
from spcomp.ir.nodes.inputs import Input
from spcomp.ir.nodes.select import Causal, Everything, Local, Sink
from spcomp.ir.passes import infer_masks
from spcomp.ir.program import Program
from spcomp.ir.widths import Reach, reach_of

SQ, SKV = 23, 31


def predicate_of(selection: Selection, causal: bool = True) -> Expr:
    stream = Stream(Input("k", "key"), Input("v", "value"))
    attend = Attend(Input("q", "query"), (Gather(stream, selection),), causal)
    (part,) = infer_masks(Program("p", (), attend)).result.streams  # type: ignore[attr-defined]
    assert isinstance(part.selection, Region)
    return part.selection.predicate


def seen(predicate: Expr, row: int, key: int) -> bool:
    values = {"q": row, "k": key, "Sq": SQ, "Skv": SKV}
    result = substitute(predicate, {n: Lit(v) for n, v in values.items()})
    assert isinstance(result, Lit)
    return bool(result.value)


def most_seen(predicate: Expr) -> int:
    return max(sum(seen(predicate, r, c) for c in range(SKV)) for r in range(SQ))


def width(reach: Reach) -> int:
    return SKV if reach.width is None else dims.evaluate(reach.width, {"Sq": SQ, "Skv": SKV})


Q, K = Sym("q"), Sym("k")
T = op("add", Q, op("sub", Sym("Skv"), Sym("Sq")))
EXACT = {
    "window": (predicate_of(Local(5)), 5),
    "sink": (predicate_of(Sink(3)), 3),
    "sink or window": (predicate_of(Sink(3) | Local(5)), 8),
    "blocks": (predicate_of(Local(2, 4)), 8),
    "written as a distance": (op("and", op("lt", op("sub", Q, K), Lit(7)), op("le", K, Q)), 7),
    "a band": (
        op("and", op("ge", K, op("sub", T, Lit(9))), op("lt", K, op("sub", T, Lit(4)))),
        5,
    ),
    "one key": (op("eq", K, op("sub", T, Lit(2))), 1),
    "an interval": (op("and", op("ge", K, Lit(4)), op("le", K, Lit(6))), 3),
    "first tokens of units": (op("lt", op("mul", K, Lit(4)), Lit(10)), 3),
    "as many whole units": (op("lt", op("mul", K, Lit(4)), Lit(8)), 2),
    "no later than a token": (op("le", op("mul", K, Lit(4)), Lit(8)), 3),
    "nothing": (op("and", op("gt", K, T), op("lt", K, T)), 0),
}


@pytest.mark.parametrize("name", EXACT)
def test_width_of_a_rule_is_exact(name: str) -> None:
    predicate, expected = EXACT[name]
    assert width(reach_of(predicate, {})) == expected == most_seen(predicate)


@pytest.mark.parametrize(
    ("predicate", "causal"),
    [
        (predicate_of(Everything()), True),
        (predicate_of(Everything(), causal=False), False),
        (predicate_of(Sink(3) | Local(5)), True),
        (predicate_of(Sink(3) | Local(5), causal=False), False),
        (op("le", K, op("add", T, Lit(1))), False),
        (op("lt", K, Q), True),
    ],
)
def test_causal_means_no_key_later_than_the_row(predicate: Expr, causal: bool) -> None:
    assert reach_of(predicate, {}).is_causal is causal


def test_a_list_has_the_width_of_its_rows() -> None:
    chosen = Sym("chosen0")
    narrowed = op("and", chosen, op("le", K, T))
    assert reach_of(narrowed, {"chosen0": 48}).width == 48
    either = op("or", chosen, op("lt", K, Lit(4)))
    assert reach_of(either, {"chosen0": 48}).width == 52


@pytest.mark.parametrize(
    "predicate",
    [
        op("eq", op("mod", K, Lit(4)), Lit(0)),
        op("not", op("lt", K, Lit(3))),
        op("lt", op("mul", K, K), Q),
        op("lt", K, op("mul", Lit(2), Q)),
    ],
)
def test_what_cannot_be_read_off_counts_as_all_keys(predicate: Expr) -> None:
    assert reach_of(predicate, {}).width is None


RULES = st.one_of(
    st.integers(0, 9).map(Sink),
    st.builds(Local, st.integers(1, 9), st.sampled_from([1, 2, 4])),
    st.just(Causal()),
    st.just(Everything()),
)
SELECTIONS = st.recursive(
    RULES,
    lambda inner: st.tuples(
        st.sampled_from([Union, Intersect]), st.lists(inner, min_size=1, max_size=3)
    ).map(lambda p: p[0](tuple(p[1]))),
    max_leaves=5,
)


@given(SELECTIONS, st.booleans())
def test_no_row_sees_more_than_the_width(selection: Selection, causal: bool) -> None:
    predicate = predicate_of(selection, causal)
    reach = reach_of(predicate, {})
    assert most_seen(predicate) <= width(reach)
    if reach.is_causal:
        later = [(r, c) for r in range(SQ) for c in range(r + SKV - SQ + 1, SKV)]
        assert not any(seen(predicate, r, c) for r, c in later)
