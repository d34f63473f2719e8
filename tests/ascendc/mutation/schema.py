"""All mutants of a text that can be chosen when the kernel runs, in one text that compiles once.

A literal `8` becomes `((8 + (mutant == 17)) - (mutant == 18))`, a statement gets a condition before
it. Where the language wants a constant this does not compile; the lines that the compiler names
keep their text, and their mutants are compiled one by one. What such a mutant computes is what the
text with that one edit computes, so what notices it would notice the edit. A mutant that nothing
notices here is judged again as a text of its own, since that one may still not compile.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.ascendc.mutation.mutants import Edit

VARIABLE = "SPCOMP_MUTANT"
"""The environment variable that says which mutant a library is, when it is loaded."""

PRELUDE = f"""#include <cstdlib>
static const int spcomp_mutant = [] {{
    const char* number = std::getenv("{VARIABLE}");
    return number ? std::atoi(number) : 0;
}}();
"""

FILE = "mutated"
FLAGS = ("-Wno-narrowing", "-Werror=vla")
"""A literal that is no constant may be narrowed without harm, but a size must be a constant."""

MOST_ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Schema:
    """A text, and the numbers under which it holds edits of the text it was made from."""

    text: str
    numbers: Mapping[Edit, int]


def schema_of(text: str, edits: Sequence[Edit], errors_of: Callable[[str], set[int]]) -> Schema:
    """Put into one text whatever compiles; errors_of: the wrong lines of a text, from 1."""
    numbers = {edit: number for number, edit in enumerate(edits, 1)}
    for _ in range(MOST_ROUNDS):
        made = _text(text, numbers)
        wrong = errors_of(made)
        if not wrong:
            return Schema(made, numbers)
        guilty = [edit for edit in numbers if wrong & _lines(text, edit)]
        guilty = [edit for edit in guilty if edit.kind != "sync"] or guilty
        if not guilty:
            break
        numbers = {e: n for e, n in numbers.items() if e not in set(guilty)}
    return Schema(text, {})


def compiler_errors(command: Sequence[str], source: str) -> set[int]:
    """Give the lines of FILE that the compiler complains about, or {0} for anything else."""
    whole = [*command, "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(whole, input=source, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return set()
    return {int(line) for line in re.findall(rf"^{FILE}:(\d+):\d+: error", done.stderr, re.M)} or {
        0
    }


def _lines(text: str, edit: Edit) -> set[int]:
    return set(range(edit.line + 1, edit.line + 2 + text.count("\n", edit.start, edit.end)))


def _text(text: str, numbers: Mapping[Edit, int]) -> str:
    """Insert before and behind what each edit would replace; a statement may hold literals."""
    inserted: dict[int, str] = {}
    begin = text.index("\n", text.rfind("#include")) + 1
    inserted[begin] = f'#line {text.count(chr(10), 0, begin) + 1} "{FILE}"\n'
    for edit, number in sorted(numbers.items(), key=lambda item: (item[0].start, item[1])):
        if edit.kind == "sync":
            before, behind = f"{{ if (spcomp_mutant != {number}) ", " }"
        else:
            sign = "+" if edit.kind == "more" else "-"
            before, behind = "(", f" {sign} (spcomp_mutant == {number}))"
        inserted[edit.start] = before + inserted.get(edit.start, "")
        inserted[edit.end] = inserted.get(edit.end, "") + behind
    pieces, at = [], 0
    for place in sorted(inserted):
        pieces += [text[at:place], inserted[place]]
        at = place
    return "".join([*pieces, text[at:]])
