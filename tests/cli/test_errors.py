"""Wrong input: one clear text on stderr, the right exit code, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spcomp.cli import main

SHIPPED = (
    "block_topk, flexprefill, infllm_v2, minference, moba, nsa, quest, spargeattn, streaming_llm, "
    "xattention"
)
ALL_TARGETS = "torch, sm80, sm90, sm100, gfx942, interpreter, ascend910b"


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args, catch_exceptions=False)


def assert_fails(code: int, text: str, *args: str) -> None:
    result = run(*args)
    assert result.stderr == text
    assert result.exit_code == code
    assert result.stdout == ""


# ---- patterns ------------------------------------------------------------------------------------


def test_unknown_pattern_names_the_nearest() -> None:
    assert_fails(
        2,
        "UnknownPattern: there is no pattern 'mobba'.\n"
        f"  help: did you mean 'moba'? choose one of {SHIPPED}; "
        "or name a function: ./mine.py:my_pattern.\n",
        "show",
        "mobba",
    )


def test_unknown_pattern_without_a_near_name_lists_all() -> None:
    assert_fails(
        2,
        "UnknownPattern: there is no pattern 'zzz'.\n"
        f"  help: choose one of {SHIPPED}; or name a function: ./mine.py:my_pattern.\n",
        "check",
        "zzz",
    )


def test_missing_file() -> None:
    assert_fails(
        2,
        "UnknownPattern: there is no pattern 'mine' in ./nowhere.py.\n"
        "  help: the file does not exist.\n".replace("./nowhere", "nowhere"),
        "show",
        "./nowhere.py:mine",
    )


OWN = """\
from spcomp import attend, gather, pattern, topk, score, downsample, local, sink, window
from neighbour import SIZE


@pattern
def mine(q, k, v, *, size=SIZE):
    return attend(q, gather(k, window(size)), gather(v, window(size)))


@pattern
def forced(q, k, v, *, k_blocks=2):
    best = topk(score(q, downsample(k, block=16)), k=k_blocks, always=sink(1) | local(2))
    return attend(q, gather(k, best), gather(v, best))


@pattern
def nothing(q, k, v):
    attend(q, k, v)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("SIZE = 99\n")
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_function_of_a_file_works_like_a_shipped_pattern(own: Path) -> None:
    result = run("show", f"{own}:mine", "--at", "pattern")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("pattern mine(size=99)\n")
    again = run("show", f"{own}:mine", "--at", "pattern", "--set", "size=7")
    assert "Local(count=7)  # pairs  own.py:7" in again.stdout


def test_missing_function_lists_those_of_the_file(own: Path) -> None:
    assert_fails(
        2,
        f"UnknownPattern: there is no pattern 'yours' in {own}.\n"
        "  help: functions under @pattern there: mine, forced, nothing.\n",
        "show",
        f"{own}:yours",
    )


def test_a_file_that_does_not_load_says_why(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name\n")
    assert_fails(
        2,
        f"UnknownPattern: there is no pattern '{path}' that can be loaded.\n"
        "  help: running the file raised ModuleNotFoundError: "
        "No module named 'nothing_of_this_name'.\n",
        "show",
        f"{path}:mine",
    )


def test_a_forced_set_larger_than_k_points_at_the_users_line(own: Path) -> None:
    assert_fails(
        1,
        "ForcedSetTooLarge: topk keeps 2 blocks, "
        "but its forced set alone has 1 sink + 2 local = 3.\n"
        f"  --> {own}:12:  best = topk(score(q, downsample(k, block=16)), k=k_blocks, "
        "always=sink(1) | local(2))\n"
        "  help: raise k to 3 or more, or shrink the forced set.\n",
        "show",
        f"{own}:forced",
    )


def test_a_pattern_that_returns_nothing(own: Path) -> None:
    assert_fails(
        1,
        "PatternReturnsNothing: the pattern 'nothing' returned nothing, "
        "not the result of attend() or merge().\n"
        f"  --> {own}:16:  @pattern\n"
        "  help: end the function with `return attend(q, ...)`.\n",
        "show",
        f"{own}:nothing",
    )


def test_malformed_ir_text_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "wrong.ir"
    path.write_text('pattern p()\n%0 = Input(name="q", role="quarry")\nreturn %0\n')
    assert_fails(
        1,
        "IRText: line 2 of the IR text gives Input.role the value 'quarry', where one of "
        '"query", "key", "value" is needed: %0 = Input(name="q", role="quarry")\n'
        f'  --> {path}:2:  %0 = Input(name="q", role="quarry")\n'
        "  help: `spcomp show PATTERN --at pattern` prints the form that reads back.\n",
        "show",
        str(path),
    )


def test_ir_text_takes_no_hyper_parameters(tmp_path: Path) -> None:
    path = tmp_path / "saved.ir"
    path.write_text(run("show", "moba", "--at", "pattern").stdout)
    assert run("show", str(path)).exit_code == 0
    assert_fails(
        2,
        "WrongArguments: the pattern 'saved.ir' is IR text, whose hyper-parameters are fixed.\n"
        "  help: its signature is saved.ir without --set; "
        "change the numbers in the text instead.\n",
        "show",
        str(path),
        "--set",
        "block=64",
    )


# ---- options -------------------------------------------------------------------------------------


def test_unknown_hyper_parameter_shows_the_signature() -> None:
    result = run("show", "moba", "--set", "blok=64")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == (
        "WrongArguments: the pattern 'moba' was called wrongly: "
        "got an unexpected keyword argument 'blok'."
    )
    assert result.stderr.endswith(
        "  help: its signature is moba(q, k, v, *, block=512, k_blocks=8).\n"
    )


def test_a_word_where_a_number_is_needed() -> None:
    result = run("show", "moba", "--set", "block=big")
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "NotANumber: downsample was given block = 'big' of type str, where an integer is needed.\n"
    )


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--set", "block", "Invalid value for '--set': 'block' is not of the form name=value."),
        (
            "--set",
            "block=[1]",
            "Invalid value for '--set': '[1]' is not a number, a word, True, False or None.",
        ),
        (
            "--axis",
            "attend=64",
            "Invalid value for '--axis': 'attend=64' is not of the form kernel.axis=number.",
        ),
        (
            "--dtype",
            "int8",
            "Invalid value for '--dtype': 'int8' is not one of bf16, fp16, fp32.",
        ),
        (
            "--shape",
            "X=4",
            "Invalid value for '--shape': 'X' is no dimension; "
            "choose from B, Hq, Hkv, Sq, Skv, D, Dv, S.",
        ),
        (
            "--shape",
            "S=0",
            "Invalid value for '--shape': 'S=0' does not give a whole number of 1 or more.",
        ),
        ("--shape", "B=4", "Invalid value for '--shape': a shape needs S, or Sq and Skv."),
        (
            "--at",
            "kernel",
            "Invalid value for '--at': "
            "'kernel' is not one of 'pattern', 'plan', 'source', 'graph'.",
        ),
    ],
)
def test_wrong_value_of_an_option(option: str, value: str, problem: str) -> None:
    result = run("show", "moba", option, value)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: {problem}"
    assert result.stdout == ""


def test_an_axis_that_is_not_there_lists_those_that_are() -> None:
    assert_fails(
        2,
        "UnknownChoice: axes was given the axis = 'attend.block_z'.\n"
        "  help: choose one of block_k, block_q, stages, warps.\n",
        "show",
        "moba",
        "--axis",
        "attend.block_z=64",
    )


def test_heads_of_a_shape_must_divide() -> None:
    assert_fails(
        2,
        "HeadsDoNotDivide: q has 9 heads and k has 2: 9 is not a multiple of 2.\n"
        "  help: grouped-query attention needs Hq = G * Hkv; query head h uses KV head h // G.\n",
        "explain",
        "moba",
        "--shape",
        "Hq=9,Hkv=2,S=64",
    )


def test_unknown_target_lists_all() -> None:
    assert_fails(
        2,
        f"UnknownTarget: there is no target 'sm42'.\n  help: choose one of {ALL_TARGETS}.\n",
        "show",
        "moba",
        "--target",
        "sm42",
    )


def test_unknown_backend_lists_all() -> None:
    result = run("check", "moba", "--backend", "cuda")
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "UnknownBackend: there is no backend 'cuda'.\n"
        "  help: choose one of reference, triton, ascendc.\n"
    )


def test_head_dimension_too_large_is_refused_before_any_compile(tmp_path: Path) -> None:
    result = run("compile", "moba", "--head-dim", "512", "-o", str(tmp_path / "x"))
    assert result.exit_code == 1
    assert result.stderr.startswith("Refused: the triton backend refuses head_dim = 512: ")
    assert not (tmp_path / "x").exists()


def test_a_target_without_a_compiler_is_refused(tmp_path: Path) -> None:
    args = ("compile", "moba", "--target", "interpreter", "-o", str(tmp_path / "x"))
    result = run(*args)
    assert result.exit_code == 1
    assert result.stderr.endswith(
        "Refused: the triton backend refuses to make binaries for interpreter: "
        "it has no compiler that works without the device.\n"
        "  help: `spcomp show PATTERN --at source` prints the source.\n"
    )


def test_output_that_cannot_be_made_is_told_before_compiling(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    result = run("compile", "streaming_llm", "-o", str(taken / "x"))
    assert result.exit_code == 2
    assert "cannot make the folder" in result.stderr
    assert "compiling" not in result.stderr


def test_a_pattern_that_is_more_than_a_mask_is_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "biased.py"
    path.write_text(
        "from spcomp import attend, pattern\n\n\n@pattern\ndef biased(q, k, v):\n"
        "    return attend(q, k, v, score_mod=lambda s, b, h, i, j: s - (i - j))\n"
    )
    assert_fails(
        1,
        "MoreThanAMask: check compares with float64 attention under a mask, "
        "and 'biased' changes scores by a score_mod.\n"
        f"  --> {path}:6:  return attend(q, k, v, score_mod=lambda s, b, h, i, j: s - (i - j))\n"
        "  help: compare two backends in Python: spcomp.compile(pattern, backend=...).\n",
        "check",
        f"{path}:biased",
        "--shape",
        "S=8",
    )


def test_a_pattern_with_sinks_is_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "sunk.py"
    path.write_text(
        "import torch\nfrom spcomp import attend, pattern\n\n\n@pattern\ndef sunk(q, k, v):\n"
        "    return attend(q, k, v, sinks=torch.zeros(4))\n"
    )
    assert_fails(
        1,
        "MoreThanAMask: check compares with float64 attention under a mask, "
        "and 'sunk' has sink logits.\n"
        f"  --> {path}:7:  return attend(q, k, v, sinks=torch.zeros(4))\n"
        "  help: compare two backends in Python: spcomp.compile(pattern, backend=...).\n",
        "check",
        f"{path}:sunk",
        "--shape",
        "S=8",
    )
