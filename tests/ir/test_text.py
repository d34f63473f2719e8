"""Text reads back to the same IR, and text that is wrong says where and how."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spcomp.errors import IRText
from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.expr import CONNECTIVES, OPERATORS, Expr, Lit, Load, Op, Sym
from spcomp.ir.passes import PATTERN_PIPELINE
from spcomp.ir.plan import Phase
from spcomp.ir.text import parse_plan, parse_program, print_plan, print_program
from spcomp.ir.text_exprs import parse_dim, parse_expr, print_dim, print_expr
from tests.ir.programs import LOWERED, PATTERNS, PHASES, plan_of

# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
def test_program_reads_back_after_every_pass(name: str) -> None:
    program = PATTERNS[name].program
    for step in (lambda p: p, *PATTERN_PIPELINE):
        program = step(program)
        again = parse_program(print_program(program))
        assert again == program
        assert print_program(again, comments=False) == print_program(program, comments=False)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", LOWERED)
def test_plan_reads_back(name: str, phase: Phase) -> None:
    plan = plan_of(name, phase)
    again = parse_plan(print_plan(plan))
    assert again == plan
    assert print_plan(again, comments=False) == print_plan(plan, comments=False)


def test_a_field_that_is_true_is_not_read_as_one() -> None:
    program = PATTERNS["hooked"].program
    text = print_program(program)
    assert "causal=False" in text
    assert "scale=0.25" in text
    with pytest.raises(IRText):
        parse_program(text.replace("causal=False", "causal=0"))


SYMBOLS = st.sampled_from(["b", "h", "q", "k", "q_lo", "k_hi", "Sq", "Skv", "score", "chosen0"])
NUMBERS = st.one_of(
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False),
)


def _grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def operator(name: str) -> st.SearchStrategy[Expr]:
        least, most = {
            "where": (3, 3),
            **dict.fromkeys(CONNECTIVES, (1, 4)),
            **dict.fromkeys(("neg", "not", "abs", "exp", "log", "tanh", "float"), (1, 1)),
        }.get(name, (2, 2))
        args = st.lists(inner, min_size=least, max_size=most)
        return args.map(lambda parts: Op(name, tuple(parts)))

    load = st.builds(
        Load,
        st.sampled_from(["table0", "table12"]),
        st.lists(inner, max_size=3).map(tuple),
        st.sampled_from(["bool", "int", "float"]),
    )
    return st.one_of(load, st.sampled_from(sorted(OPERATORS)).flatmap(operator))


EXPRESSIONS = st.recursive(SYMBOLS.map(Sym) | NUMBERS.map(Lit), _grown, max_leaves=12)


@given(EXPRESSIONS)
def test_any_expression_reads_back(expr: Expr) -> None:
    again = parse_expr(ast.parse(print_expr(expr), mode="eval").body)
    # repr tells True from 1 and 1 from 1.0, which == does not.
    assert repr(again) == repr(expr)


def _dims(inner: st.SearchStrategy[Dim]) -> st.SearchStrategy[Dim]:
    factor = st.integers(1, 300)
    pair = st.tuples(inner, inner)
    return st.one_of(
        st.tuples(inner, factor).map(lambda p: dims.ceildiv(*p)),
        pair.map(lambda p: dims.ceildiv(p[0], p[1] + 1)),
        pair.map(lambda p: dims.least(*p)),
        st.tuples(factor, inner, inner).map(lambda p: dims.largest(*p)),
        pair.map(lambda p: dims.plain(p[0] + p[1])),
        pair.map(lambda p: dims.plain(p[0] - p[1])),
        st.tuples(factor, inner, inner).map(lambda p: dims.plain(p[0] * (p[1] + 1) * p[2])),
        st.tuples(inner, factor).map(lambda p: dims.plain(p[0] / dims.Hkv * p[1])),
    )


@given(
    st.recursive(st.sampled_from(sorted(dims.SYMBOLS)).map(dims.SYMBOLS.get), _dims, max_leaves=6)
)
def test_any_dim_reads_back(dim: Dim) -> None:
    assert parse_dim(ast.parse(print_dim(dim), mode="eval").body) == dim


def test_a_product_with_a_sum_reads_back_undistributed() -> None:
    dim = (dims.Sq + 1) * dims.ceildiv(dims.Skv, 128) * 2
    assert print_dim(dim) == "2*(Sq + 1)*ceiling(Skv/128)"
    assert parse_dim(ast.parse(print_dim(dim), mode="eval").body) == dim


# ---- the form ------------------------------------------------------------------------------------


def test_program_text_is_one_stage_a_line_with_types_and_lines_as_comments() -> None:
    text = print_program(PATTERNS["streaming_llm"].program)
    lines = text.splitlines()
    assert lines[0] == "pattern streaming_llm(sinks=4, recent=20)"
    assert lines[1] == '%0 = Input(name="q", role="query")  # data[B, Hq, Sq, D]'
    assert lines[5].startswith("%4 = Sink(count=4)  # pairs  streaming_llm.py:")
    assert lines[-1] == "return %8"


def test_plan_text_without_comments_is_the_same_for_every_reason() -> None:
    plan = plan_of("moba")
    assert "# key_major: " in print_plan(plan)
    assert "#" not in print_plan(plan, comments=False)


def test_wide_calls_go_over_several_lines() -> None:
    text = print_plan(plan_of("moba"), comments=False)
    first = text.split("pool: ")[1].splitlines()
    assert first[0] == "PoolLaunch("
    assert first[-1] != ")"
    assert all(len(line) <= 100 for line in first if "rule=" not in line and "buffer" not in line)


# ---- wrong text ----------------------------------------------------------------------------------

HEAD = 'pattern p()\n%0 = Input(name="q", role="query")\n'
KEYS = HEAD + '%1 = Input(name="k", role="key")\n'
LAUNCHES = (
    "PoolLaunch, SelectLaunch, ScoreLaunch, TopKLaunch, PartsLaunch, RowLseLaunch, "
    "BlockSumsLaunch, BlockScoresLaunch, TopPLaunch, TilesLaunch, AttendLaunch, "
    "WarpsLaunch, GatherLaunch, InvertLaunch, KeysLaunch, MergeLaunch"
)
STAGES = (
    "Input, Captured, Argument, Permute, Centre, Downsample, Fold, State, Score, Softmax, Regroup, "
    "Probe, Sums, Needed, Alike, TopK, TopP, Diagonals, Covered, Switch, Given, Sink, Local, "
    "Causal, Everything, MaskMod, Similar, Union, Intersect, Region, Stream, Gather, Attend, Merge"
)
WRONG_PROGRAMS = [
    ("", "line 1 of the IR text holds no program: ", 0),
    ("%0 = Sink(count=1)", "does not begin with 'pattern name(...)'", 1),
    ("pattern p(1)", "gives p a value without its field's name", 1),
    ("pattern p(x=[1])", "holds '[1]' where a plain value is needed", 1),
    (HEAD, "is the last, and no line returns a stage", 2),
    (HEAD + "return %1", "returns %1, which no line defines", 3),
    (HEAD + "return %0\n%1 = Sink(count=1)", "stands after the return", 4),
    (HEAD + "%1 = Sinc(count=1)", f"names the unknown stage 'Sinc' (known: {STAGES})", 3),
    (
        HEAD + "%1 = Sink(size=1)",
        "gives Sink the unknown field 'size' (it has count, unit, by_head)",
        3,
    ),
    (HEAD + "%1 = Sink()", "gives Sink no 'count'", 3),
    (HEAD + "%1 = Sink(1)", "gives Sink a value without its field's name", 3),
    (
        HEAD + '%1 = Sink(count="4")',
        "gives Sink.count the value '4', where an integer is needed",
        3,
    ),
    (
        HEAD + "%1 = Sink(count=True)",
        "gives Sink.count the value True, where an integer is needed",
        3,
    ),
    (HEAD + "%1 = Sink(count=-1)", "gives Sink.count the value -1, which is below 0", 3),
    (HEAD + "%0 = Sink(count=1)", "defines %0 a second time", 3),
    (HEAD + "%1 = Downsample(x=%2, block=4, stride=4)", "reads %2 before it is defined", 3),
    (
        HEAD + "%1 = Downsample(x=4, block=4, stride=4)",
        "gives Downsample.x the value 4, where a stage such as %0 is needed",
        3,
    ),
    (
        HEAD + '%1 = Downsample(x=%0, block=4, stride=4, by="median")',
        "gives Downsample.by the value 'median', where one of "
        '"mean", "max", "min", "minmax" is needed',
        3,
    ),
    (
        HEAD + '%1 = Argument(name="g", dims=[B, hq])',
        "uses the unknown dim 'hq'",
        3,
    ),
    (
        HEAD + '%1 = Argument(name="g", dims=[B, R0])',
        "gives Argument.dims the value R0, where a number of 1 or more or a name is",
        3,
    ),
    (
        HEAD + '%1 = Argument(name="g", dims=[B, 0])',
        "gives Argument.dims the value 0, where a number of 1 or more or a name is",
        3,
    ),
    (
        HEAD + '%1 = Argument(name="g", dims=[B], dtype="int8")',
        "gives Argument.dtype the value 'int8', where one of data, float32, float16, bfloat16, "
        "int32 is needed",
        3,
    ),
    (
        HEAD + '%1 = Argument(name="out", dims=[B])',
        "names an Argument 'out', which is taken or no name",
        3,
    ),
    (
        HEAD + "%1 = Sink(count=1)\n%2 = Downsample(x=%1, block=4, stride=4)",
        "gives Downsample.x a Sink, where a Input or Permute or Centre or Argument or Probe is "
        "needed",
        4,
    ),
    (
        KEYS + "%2 = Gather(stream=%0, selection=%1)",
        "gives Gather.stream a Input, where a Stream is needed",
        4,
    ),
    (HEAD + "%1 = Union(parts=[])", "gives Union.parts nothing, where at least one is needed", 3),
    (HEAD + "%1 = Union(parts=%0)", "gives Union.parts the value %0, where a list is needed", 3),
    (HEAD + "%1 = MaskMod(predicate=q < x)", "uses the unknown symbol 'x'", 3),
    (
        HEAD + "%1 = MaskMod(predicate=f(q))",
        "calls 'f', which element expressions lack",
        3,
    ),
    (
        HEAD + "%1 = MaskMod(predicate=where(q, k))",
        "gives where() 2 arguments, where it takes 3",
        3,
    ),
    (
        HEAD + "%1 = MaskMod(predicate=q ** k)",
        "uses the operator Pow, which element expressions lack",
        3,
    ),
    (
        HEAD + "%1 = MaskMod(predicate=a < b < k)",
        "holds 'a < b < k', which is no element expression",
        3,
    ),
    (
        HEAD + "%1 = MaskMod(predicate=t[q])",
        "reads 't[q]'; an element is written table.kind[index]",
        3,
    ),
    (
        HEAD + '%1 = Captured(name="t", dims=[N], dtype="int32")',
        "uses the unknown dim 'N'",
        3,
    ),
    (
        HEAD + '%1 = Captured(name="t", dims=[Sq // 2], dtype="int32")',
        "uses the operator FloorDiv, which dims lack",
        3,
    ),
    (
        HEAD + '%1 = Captured(name="t", dims=[Sq / 0], dtype="int32")',
        "divides a dim by zero",
        3,
    ),
    (HEAD + "%1 = Sink(count=1", "opens a bracket that is never closed", 3),
    (HEAD + "%1 = Sink(count=1))", "cannot be read (unmatched ')')", 3),
    (HEAD + "import os", "is neither '%n = Stage(...)' nor 'return %n'", 3),
    (HEAD + '__import__("os").system("true")', "is neither '%n = Stage(...)' nor 'return %n'", 3),
    (HEAD + "%1 = Sink(count=1); x = 2", "cannot be read (not one plain statement)", 3),
    (HEAD + "%1 = Sink(**x)", "unpacks fields with **, which the text does not know", 3),
]


@pytest.mark.parametrize(("text", "problem", "line"), WRONG_PROGRAMS)
def test_wrong_program_text_is_refused_with_its_line(text: str, problem: str, line: int) -> None:
    with pytest.raises(IRText) as caught:
        parse_program(text)
    shown = text.splitlines()[line - 1].strip() if line else ""
    start = problem if not line else f"line {line} of the IR text {problem}: {shown}"
    assert str(caught.value) == (
        f"IRText: {start}\n"
        "  help: `spcomp show PATTERN --at pattern` prints the form that reads back."
    )


def test_wrong_text_names_the_file_it_came_from() -> None:
    with pytest.raises(IRText) as caught:
        parse_program(HEAD + "%1 = Sinc()", "mine.ir")
    assert "\n  --> mine.ir:3\n" in str(caught.value)


PLAN_HEAD = 'plan "p()" prefill gather\n'
POOL = 'pool: PoolLaunch(x_buf="q", out_buf="out", block=2, stride=2, by="mean")'
TWO = "buffer q data[B] input\nbuffer out data[B] output\n"
WRONG_PLANS = [
    ("pattern p()", "does not begin with 'plan \"pattern\" phase order'", 1),
    ('plan "p" train gather', "names the unknown phase 'train' (known: prefill, decode)", 1),
    (
        'plan "p" decode across',
        "names the unknown order 'across' (known: query_major, query_major_ws, key_major, gather)",
        1,
    ),
    (PLAN_HEAD, "is the last, and no line returns the results", 1),
    (PLAN_HEAD + "buffer q data(B) input", "does not read 'buffer name dtype[dims] kind'", 2),
    (
        PLAN_HEAD + "buffer q data[B] secret",
        "names the unknown kind 'secret' (known: input, captured, scratch, output)",
        2,
    ),
    (PLAN_HEAD + "buffer q data[B+] input", "cannot be read (invalid syntax)", 2),
    (PLAN_HEAD + TWO + "buffer q data[B] input", "declares the buffer 'q' a second time", 4),
    (PLAN_HEAD + TWO + "return out", "does not return two buffers of the plan", 4),
    (PLAN_HEAD + TWO + "slabs align=x:", "does not read 'slabs align=n:'", 4),
    (PLAN_HEAD + TWO + "    " + POOL, "is indented outside slabs", 4),
    (
        PLAN_HEAD + TWO + POOL.replace("PoolLaunch", "PollLaunch"),
        f"names the unknown launch 'PollLaunch' (known: {LAUNCHES})",
        4,
    ),
    (
        PLAN_HEAD + TWO + POOL.replace("pool:", "pull:"),
        "calls the kernel 'pull', where this PoolLaunch is 'pool'",
        4,
    ),
    (
        PLAN_HEAD + TWO + POOL.replace('"q"', '"z"'),
        "touches the buffer 'z', which no line declares",
        4,
    ),
    (
        PLAN_HEAD + TWO + POOL.replace("block=2", "axes={4: 4}, block=2"),
        "gives PoolLaunch.axes the value {4: 4}, where axes such as {block_k: 64} is needed",
        4,
    ),
    (
        PLAN_HEAD + TWO + 'merge: MergeLaunch(part_buf="q", part_lse_buf="q", out_buf="out", '
        'lse_buf="out", parts=2, part_axis=1)',
        "gives MergeLaunch.part_axis the value 1, where one of 0, 3 is needed",
        4,
    ),
    (PLAN_HEAD + TWO + "launch(q)", "does not read 'kernel: Launch(...)'", 4),
]


@pytest.mark.parametrize(("text", "problem", "line"), WRONG_PLANS)
def test_wrong_plan_text_is_refused_with_its_line(text: str, problem: str, line: int) -> None:
    with pytest.raises(IRText) as caught:
        parse_plan(text)
    shown = text.splitlines()[line - 1].strip()
    assert str(caught.value).splitlines()[0] == (
        f"IRText: line {line} of the IR text {problem}: {shown}"
    )
