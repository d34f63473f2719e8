"""What a pattern may declare to take beside q, k and v, and what it may do with it."""

from __future__ import annotations

from typing import Any

import pytest

import spcomp as sp
from tests.api.input_cases import (
    text_of,
)


def undeclared(q, k, v, gates):
    return sp.attend(q, k, v)


def unread(q, k, v, gates: sp.tensor("B Hq Sq 2")):
    return sp.attend(q, k, v)


def taken(q, k, v, scale: sp.tensor("B Hq Sq 2")):
    return sp.attend(q, k, v)


def misfit(q, k, v, gates: sp.tensor("B Hq Sq 2")):
    return sp.merge(sp.attend(q, k, v), gates=gates)


def numbers(q, k, v, gates: sp.tensor("B Hq Sq 1", dtype="int32")):
    return sp.merge(sp.attend(q, k, v), gates=gates)


def pooled(q, k, v, gates: sp.tensor("B Hq 4")):
    best = sp.topk(sp.score(q, sp.downsample(gates, block=2)), k=1)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


def too_many_lists(q, k, v, iq: sp.tensor("B Hi Sq D")):
    best = sp.topk(sp.score(iq, sp.downsample(k, block=4)), k=1)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


def of_other_width(q, k, v, iq: sp.tensor("B Hq Sq Di")):
    best = sp.topk(sp.score(iq, k), k=1)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


def as_keys(q, k, v, other: sp.tensor("B Hkv Skv D")):
    return sp.attend(q, sp.downsample(other, block=2), sp.downsample(v, block=2))


def swapped(q, k, v, iq: sp.tensor("B Hq Sq D")):
    best = sp.topk(sp.score(k, iq), k=1)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


WRONG_PATTERNS = {
    undeclared: (
        "BadDeclaration: the parameter gates of 'undeclared' stands beside q, k and v and declares "
        "no tensor.\n"
        "  help: give gates: tensor('B Hq Sq 3'), or make it a hyper-parameter behind *."
    ),
    unread: "WrongArguments: the pattern 'unread' takes gates and does not read it.",
    taken: (
        "BadDeclaration: the parameter scale of 'taken' has a name that is taken by spcomp.\n"
        "  help: give another name."
    ),
    misfit: (
        "WrongStage: merge takes a float tensor [B, Hq, Sq, 1], one value for each part, as its "
        "gates, but was given a tensor of data[B, Hq, Sq, 2].\n"
        "  help: declare it with tensor('B Hq Sq 1')."
    ),
    numbers: "but was given a tensor of int32[B, Hq, Sq, 1].",
    pooled: (
        "WrongStage: downsample takes tokens, [B, heads, Sq or Skv, width], as its x, but was "
        "given a tensor of data[B, Hq, 4]."
    ),
    too_many_lists: (
        "CannotLower: a score of Hi heads of rows by Hkv heads of units cannot be lowered: each "
        "head of the units must serve as many heads of the rows.\n"
        "  help: give the units 1 head, or as many as the rows have."
    ),
    of_other_width: (
        "CannotLower: a score of data rows of width Di by data units of width D cannot be lowered: "
        "their product needs one width and one dtype.\n"
        "  help: declare both sides with the same last dim and dtype."
    ),
    as_keys: (
        "WrongStage: attend takes keys and values as its streams, but was given a further tensor "
        "as keys and a value tensor as values."
    ),
    swapped: "but was given something made from the key input.",
}


@pytest.mark.parametrize("function", WRONG_PATTERNS, ids=lambda f: f.__name__)
def test_a_wrong_declaration_or_use_is_refused_when_compiled(function: Any) -> None:
    made = sp.pattern(function)
    assert WRONG_PATTERNS[function] in text_of(lambda: sp.compile(made))


def test_a_list_for_each_head_of_an_indexer_is_refused() -> None:
    @sp.pattern
    def lists(q, k, v, iq: sp.tensor("B Hi Sq Di"), ik: sp.tensor("B Hi Skv Di")):
        best = sp.topk(sp.score(iq, ik), k=1)
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best))

    assert text_of(lambda: sp.compile(lists())) == (
        "CannotLower: a score with a list for each of Hi heads cannot be lowered: attention reads "
        "one list for all heads, for each KV head or for each query head.\n"
        '  help: join the heads: score(..., heads="all", reduce="sum").'
    )


WRONG_FORMS = {
    "": "BadDeclaration: tensor('') names no dims.",
    "B Hq 0": "has the dim '0', which is neither a number of 1 or more nor a name",
    "B heads": "has the dim 'heads', which is neither a number of 1 or more nor a name",
    "B R": "has the dim 'R', which is taken by spcomp",
    "B E": "has the dim 'E', which is taken by spcomp",
    "B 2*D": "has the dim '2*D', which is neither a number of 1 or more nor a name",
}


@pytest.mark.parametrize("form", WRONG_FORMS)
def test_a_wrong_form_is_refused_by_a_sentence(form: str) -> None:
    assert WRONG_FORMS[form] in text_of(lambda: sp.tensor(form))


def test_an_unknown_dtype_is_refused() -> None:
    assert text_of(lambda: sp.tensor("B", dtype="float8")) == (
        "BadDeclaration: tensor('B', dtype='float8') names an unknown dtype.\n"
        "  help: give one of data, float32, float16, bfloat16, int32."
    )
