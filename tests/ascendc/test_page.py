"""docs/ascendc.md shows kernels and commands as they are generated."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from spcomp import compiler
from spcomp.backends.ascendc import BACKEND
from spcomp.backends.ascendc.targets import TARGETS
from spcomp.backends.base import Specialisation
from spcomp.patterns import moba
from tests.ascendc.projects import unproven

PAGE = Path(__file__).resolve().parents[2] / "docs/ascendc.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
EXCERPTS = [text for language, text in BLOCKS if language == "cpp"]
COMMANDS = [text for language, text in BLOCKS if not language and "cmake" in text]


def attend_gather() -> list[str]:
    target, spec = TARGETS["ascend910b"], Specialisation("bfloat16", 128, 128)
    plan = compiler.lower(moba(), backend=BACKEND, target=target, spec=spec)
    file = compiler.emit(plan, BACKEND, target, spec).files[-1]
    assert file.kernel == "attend_gather"
    return file.text.splitlines()


def place(piece: list[str], lines: list[str]) -> int:
    """Give where neighbouring lines stand, whatever their common indentation; -1 where nowhere."""
    wanted = textwrap.dedent("\n".join(piece))
    starts = range(len(lines) - len(piece) + 1)
    there = (n for n in starts if textwrap.dedent("\n".join(lines[n : n + len(piece)])) == wanted)
    return next(there, -1)


def test_the_page_has_excerpts_and_commands() -> None:
    assert len(EXCERPTS) >= 6
    assert len(COMMANDS) == 1


@pytest.mark.parametrize("excerpt", EXCERPTS, ids=lambda text: text.splitlines()[0][:40])
def test_an_excerpt_is_in_the_generated_kernel(excerpt: str) -> None:
    """A line of `...` stands for any lines."""
    lines = attend_gather()
    for piece in excerpt.split("...\n"):
        shown = piece.splitlines()
        at = place(shown, lines)
        assert at >= 0, f"the kernel has no longer, in this order:\n{piece}"
        lines = lines[at + len(shown) :]


def test_the_commands_are_those_of_the_project() -> None:
    assert f"```\n{COMMANDS[0]}```\n" in unproven("moba", "decode").files["README.md"].decode()
