"""Which patterns a tuning looks at, and what a pattern may leave open."""

from __future__ import annotations

from typing import Any

import pytest

import spcomp as sp
from spcomp.errors import NothingToTune, WrongArguments
from spcomp.patterns import SHIPPED, block_topk, moba
from spcomp.tuning.meanings import meanings


def titles(pattern: Any, **hyper: Any) -> list[str]:
    return [made.program.title() for made in meanings(pattern, hyper)]


def test_what_a_pattern_leaves_open_is_tried_with_the_default_first() -> None:
    assert titles(block_topk) == [
        f"block_topk(block={block}, budget=0.25, sinks=1, locals=2)" for block in (128, 64, 256)
    ]


def test_values_given_by_the_caller_hold_and_lists_are_tried_one_by_one() -> None:
    assert titles(block_topk, block=64, budget=[0.5, 0.25, 0.5]) == [
        "block_topk(block=64, budget=0.25, sinks=1, locals=2)",
        "block_topk(block=64, budget=0.5, sinks=1, locals=2)",
    ]
    assert titles(moba) == ["moba(block=512, k_blocks=8)"]
    assert titles(moba(block=64)) == ["moba(block=64, k_blocks=8)"]


def test_block_topk_alone_leaves_its_block_open() -> None:
    found = {name: function.open for name, function in SHIPPED.items() if function.open}
    assert found == {"block_topk": {"block": (64, 128, 256)}}


def test_an_unknown_hyper_parameter_is_refused() -> None:
    with pytest.raises(WrongArguments, match=r"was called wrongly: .* 'blok'"):
        meanings(block_topk, {"blok": (1, 2)})


def test_a_made_pattern_takes_no_hyper_parameters() -> None:
    with pytest.raises(WrongArguments) as caught:
        meanings(moba(), {"block": 64})
    assert str(caught.value) == (
        "WrongArguments: the pattern 'moba' is made already, and block was given.\n"
        "  help: its signature is tune(function, name=(value, value)) for a function under "
        "@pattern."
    )


def test_what_is_no_pattern_is_refused() -> None:
    with pytest.raises(WrongArguments, match="the pattern 'print' is a builtin_function"):
        meanings(print, {})  # type: ignore[arg-type]


def test_a_hyper_parameter_without_values_is_refused() -> None:
    with pytest.raises(NothingToTune) as caught:
        meanings(block_topk, {"block": ()})
    assert str(caught.value) == (
        "NothingToTune: block_topk cannot be tuned: block has no value.\n  help: give one or more."
    )


# ---- @pattern(open=...) --------------------------------------------------------------------------


def declare(**values: Any) -> Any:
    @sp.pattern(open=values)
    def mine(q, k, v, *, size=64, other=1):  # type: ignore[no-untyped-def]
        return sp.attend(q, sp.gather(k, sp.window(size)), sp.gather(v, sp.window(size)))

    return mine


def test_a_pattern_declared_with_open_is_an_ordinary_pattern() -> None:
    mine = declare(size=[32, 64])
    assert mine.open == {"size": (32, 64)}
    assert mine(size=16).program.title() == "mine(size=16, other=1)"
    assert mine.name == "mine"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"length": (1, 2)}, "leaves length open, which is none of its hyper-parameters"),
        ({"q": (1, 2)}, "leaves q open, which is none of its hyper-parameters"),
        ({"size": (1, 2)}, "leaves size open without its default, 64"),
        ({"size": ()}, "leaves size open without its default, 64"),
        ({"size": 64}, "leaves size open with 64, which is no tuple of values"),
    ],
)
def test_open_is_checked_where_the_pattern_is_declared(
    values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(WrongArguments) as caught:
        declare(**values)
    first, place, way_out = str(caught.value).splitlines()
    assert first == f"WrongArguments: the pattern 'mine' {problem}."
    assert place.startswith(f"  --> {__file__}:")
    assert way_out == "  help: its signature is mine(q, k, v, *, size=64, other=1)."
