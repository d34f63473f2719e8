"""The passes of the pattern level: text before and after, meaning kept, errors and lines."""

from __future__ import annotations

import pytest

from spcomp.dsl import attend, downsample, gather, merge, pattern, score, topk
from spcomp.errors import CannotLower, ForcedSetTooLarge, NegativeCount, WrongStage
from spcomp.ir.nodes import Attend, Downsample, Gather, Input, Local, Score, Sink, Stream, TopK
from spcomp.ir.passes import (
    PATTERN_PIPELINE,
    check_selection,
    infer_masks,
    infer_types,
    simplify,
)
from spcomp.ir.program import Program
from spcomp.ir.text import parse_program, print_program
from tests.ir.programs import PATTERNS
from tests.passes.meaning import assert_same_meaning

Q, K, V = Input("q", "query"), Input("k", "key"), Input("v", "value")


def text_of(program: Program) -> str:
    return print_program(program, comments=False)


def program_with(scores: Score, **fields: object) -> Program:
    selection = TopK(scores, **{"k": 4, **fields})  # type: ignore[arg-type]
    return Program("p", (), Attend(Q, (Gather(Stream(K, V), selection),)))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("count", range(1, len(PATTERN_PIPELINE) + 1))
def test_every_pass_keeps_the_meaning(name: str, count: int) -> None:
    made = PATTERNS[name]
    program = made.program
    for step in PATTERN_PIPELINE[:count]:
        before, program = program, step(program)
    assert_same_meaning(made, before, program)


@pytest.mark.parametrize("step", PATTERN_PIPELINE, ids=lambda s: s.__name__)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pass_has_nothing_left_to_do_after_itself(name: str, step: object) -> None:
    program = PATTERNS[name].program
    for each in PATTERN_PIPELINE:
        program = each(program)
        if each is step:
            break
    if step is not infer_masks:  # it reads selections, and a Region is no longer one
        assert step(program) == program  # type: ignore[operator]


# ---- infer_types ---------------------------------------------------------------------------------


def test_infer_types_refuses_a_score_of_keys_against_keys() -> None:
    with pytest.raises(WrongStage) as caught:
        infer_types(program_with(Score(K, Downsample(K, 16, 16))))
    assert str(caught.value) == (
        "WrongStage: score takes queries as its q, "
        "but was given something made from the key input.\n"
        "  help: score(q side, k side): the first ranks, the second is ranked."
    )


def test_infer_types_refuses_query_blocks_that_overlap() -> None:
    with pytest.raises(CannotLower) as caught:
        infer_types(program_with(Score(Downsample(Q, 32, 16), K)))
    assert str(caught.value) == (
        "CannotLower: a score of query blocks of 32 every 16 tokens cannot be lowered: "
        "the blocks of queries must tile the sequence, so that each query has one list.\n"
        "  help: downsample q with stride equal to block and tail='keep'."
    )


def test_infer_types_refuses_values_attended_as_keys() -> None:
    program = Program("p", (), Attend(Q, (Gather(Stream(V, K), Sink(1)),)))
    with pytest.raises(WrongStage) as caught:
        infer_types(program)
    assert str(caught.value) == (
        "WrongStage: attend takes keys and values as its streams, "
        "but was given a value tensor as keys and a key tensor as values.\n"
        "  help: attend(q, k, v): the keys come from k and the values from v."
    )


# ---- check_selection -----------------------------------------------------------------------------


def test_check_selection_names_both_figures_of_a_forced_set_and_the_line() -> None:
    @pattern
    def wrong(q, k, v):
        from spcomp.dsl import local, sink

        best = topk(score(q, downsample(k, block=16)), k=2, always=sink(1) | local(2))
        return attend(q, gather(k, best), gather(v, best))

    program = wrong().program
    where = program.result.streams[0].selection.where  # type: ignore[attr-defined]
    with pytest.raises(ForcedSetTooLarge) as caught:
        check_selection(program)
    assert str(caught.value) == (
        "ForcedSetTooLarge: topk keeps 2 blocks, "
        "but its forced set alone has 1 sink + 2 local = 3.\n"
        f"  --> {where}\n"
        "  help: raise k to 3 or more, or shrink the forced set."
    )
    assert "always=sink(1) | local(2))" in str(where)


def test_check_selection_refuses_a_negative_k() -> None:
    with pytest.raises(NegativeCount) as caught:
        check_selection(program_with(Score(Q, K), k=-1))
    assert str(caught.value) == (
        "NegativeCount: topk was given k = -1, which is below 0.\n"
        "  help: k counts units to keep; give 0 or more."
    )


def test_check_selection_accepts_a_forced_set_of_exactly_k() -> None:
    program = program_with(Score(Q, Downsample(K, 16, 16)), k=3, always=(Sink(1, 16), Local(2, 16)))
    assert check_selection(program) is program


# ---- simplify ------------------------------------------------------------------------------------

BEFORE_SIMPLIFY = """\
pattern p()
%0 = Input(name="q", role="query")
%1 = Input(name="k", role="key")
%2 = Input(name="v", role="value")
%3 = Stream(k=%1, v=%2)
%4 = Downsample(x=%1, block=1, stride=1)
%5 = Score(q=%0, k=%4)
%6 = TopK(scores=%5, k=4)
%7 = Gather(stream=%3, selection=%6)
%8 = Attend(q=%0, streams=[%7])
%9 = Attend(q=%0, streams=[%3])
%10 = Merge(parts=[%9])
%11 = Merge(parts=[%8, %10])
%12 = Merge(parts=[%11, %9])
return %12
"""
AFTER_SIMPLIFY = """\
pattern p()
%0 = Input(name="q", role="query")
%1 = Input(name="k", role="key")
%2 = Input(name="v", role="value")
%3 = Stream(k=%1, v=%2)
%4 = Score(q=%0, k=%1)
%5 = TopK(scores=%4, k=4)
%6 = Gather(stream=%3, selection=%5)
%7 = Attend(q=%0, streams=[%6])
%8 = Attend(q=%0, streams=[%3])
%9 = Merge(parts=[%7, %8, %8])
return %9
"""


def test_simplify_drops_identity_stages() -> None:
    assert text_of(simplify(parse_program(BEFORE_SIMPLIFY))) == AFTER_SIMPLIFY


SUNK = """\
pattern p()
%0 = Input(name="q", role="query")
%1 = Input(name="k", role="key")
%2 = Input(name="v", role="value")
%3 = Stream(k=%1, v=%2)
%4 = Attend(q=%0, streams=[%3])
%5 = Attend(q=%0, streams=[%3], causal=False)
%6 = Merge(parts=[%4, %5])
%7 = Captured(name="s", dims=[4], dtype="float32")
{result}
"""


def test_simplify_gives_the_sinks_of_a_merge_to_its_only_part() -> None:
    before = SUNK.format(result="%8 = Merge(parts=[%4], sinks=%7)\nreturn %8")
    after = text_of(simplify(parse_program(before)))
    assert after.splitlines()[-2:] == ["%5 = Attend(q=%0, streams=[%3], sinks=%4)", "return %5"]


def test_simplify_keeps_the_sinks_of_a_merge_it_flattens() -> None:
    before = SUNK.format(result="%8 = Merge(parts=[%6, %5], sinks=%7)\nreturn %8")
    after = text_of(simplify(parse_program(before)))
    assert after.splitlines()[-2:] == ["%7 = Merge(parts=[%4, %5, %5], sinks=%6)", "return %7"]


def test_simplify_keeps_a_pair_of_extremes_of_single_tokens() -> None:
    pair = program_with(Score(Q, Downsample(K, 1, 1, "minmax")))
    assert simplify(pair) == pair


def test_simplify_keeps_the_meaning_of_what_it_drops() -> None:
    @pattern
    def redundant(q, k, v):
        best = topk(score(q, downsample(k, block=1)), k=4)
        return merge(merge(attend(q, gather(k, best), gather(v, best))))

    made = redundant()
    after = simplify(made.program)
    assert len(after.stages()) < len(made.program.stages())
    assert_same_meaning(made, made.program, after)


# ---- infer_masks ---------------------------------------------------------------------------------

BEFORE_MASKS = """\
pattern p()
%0 = Input(name="q", role="query")
%1 = Input(name="k", role="key")
%2 = Input(name="v", role="value")
%3 = Stream(k=%1, v=%2)
%4 = Downsample(x=%1, block=16, stride=16)
%5 = Score(q=%0, k=%4)
%6 = TopK(scores=%5, k=4)
%7 = Local(count=8)
%8 = MaskMod(predicate=(q - k) != 3)
%9 = Union(parts=[%6, %7])
%10 = Intersect(parts=[%9, %8, %6])
%11 = Gather(stream=%3, selection=%10)
%12 = Attend(q=%0, streams=[%11, %3])
return %12
"""
POSITION = "(q + (Skv - Sq))"
AFTER_MASKS = f"""\
pattern p()
%0 = Input(name="q", role="query")
%1 = Input(name="k", role="key")
%2 = Input(name="v", role="value")
%3 = Stream(k=%1, v=%2)
%4 = Downsample(x=%1, block=16, stride=16)
%5 = Score(q=%0, k=%4)
%6 = TopK(scores=%5, k=4)
%7 = Region(
    predicate=(((chosen0 | ((k > ({POSITION} - 8)) & (k <= {POSITION}))) & ((q - k) != 3)) """
AFTER_MASKS += f"""& chosen0) & (k <= {POSITION}),
    lists=[%6],
)
%8 = Gather(stream=%3, selection=%7)
%9 = Region(predicate=k <= {POSITION})
%10 = Gather(stream=%3, selection=%9)
%11 = Attend(q=%0, streams=[%8, %10], causal=False)
return %11
"""


def test_infer_masks_makes_one_predicate_and_lists_each_list_once() -> None:
    assert text_of(infer_masks(parse_program(BEFORE_MASKS))) == AFTER_MASKS


def test_infer_masks_refuses_units_that_are_no_whole_number_of_entries() -> None:
    units = Stream(Downsample(K, 8, 8), Downsample(V, 8, 8))
    best = TopK(Score(Q, Downsample(K, 12, 12)), 2)
    with pytest.raises(CannotLower) as caught:
        infer_masks(Program("p", (), Attend(Q, (Gather(units, best),))))
    assert str(caught.value) == (
        "CannotLower: gathering units of 12 tokens from a stream of units of 8 cannot be lowered: "
        "a selected unit is not a whole number of the stream's entries.\n"
        "  help: select units that are a multiple of the stream's units."
    )


def test_infer_masks_refuses_overlapping_units() -> None:
    best = TopK(Score(Q, Downsample(K, 32, 16)), 2)
    with pytest.raises(CannotLower) as caught:
        infer_masks(Program("p", (), Attend(Q, (Gather(Stream(K, V), best),))))
    assert str(caught.value) == (
        "CannotLower: a selection of units of 32 tokens every 16 cannot be lowered: "
        "its units overlap, so an index does not name tokens of its own.\n"
        "  help: regroup the scores onto blocks that tile the sequence first."
    )
