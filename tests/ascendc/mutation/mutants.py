"""Mutants of rendered AscendC: one synchronisation statement removed, or one integer off by one.

A site is found in the tokens of the text, so comments, strings and preprocessor lines are no part
of it. Every other integer literal is a site, whatever it means: none is left out as uninteresting.
Digits inside an identifier (`int32_t`, `Sort32`) are no literals, nor are those of a float. A
literal gives two mutants, one more and one less.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

SYNCHRONISATION = frozenset(
    {
        *("SetFlag", "WaitFlag", "PipeBarrier"),
        *("CrossCoreSetFlag", "CrossCoreWaitFlag", "SyncAll", "IBSet", "IBWait"),
        *("DataCacheCleanAndInvalid", "DataSyncBarrier"),
        *("EnQue", "DeQue", "AllocTensor", "FreeTensor"),
    }
)

TOKEN = re.compile(
    r"""(?P<skip>//[^\n]*|/\*.*?\*/|^[ \t]*\#(?:\\\n|[^\n])*)
      | (?P<text>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])+')
      | (?P<number>\.?\d(?:[eEpP][+-]|'\w|[\w.])*)
      | (?P<name>[A-Za-z_]\w*)
      | (?P<sign>\S)""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
INTEGER = re.compile(r"(0[xX][\da-fA-F']+|0[bB][01']+|\d[\d']*)([uUlL]*)")


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the text: its kind as TOKEN names it, and where it lies."""

    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Edit:
    """A replacement in one text; line: the first one it touches, from 0."""

    kind: str
    line: int
    start: int
    end: int
    new: str

    def apply(self, text: str) -> str:
        """Give the mutated text."""
        return text[: self.start] + self.new + text[self.end :]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mutation, in every specialisation whose text has the line.

    kind: "sync", "more" or "less". edits: by the name of the specialisation, in the order they are
    judged. below: the line of code before it. before, after: the line without and with the
    mutation, stripped. The texts are those of the first specialisation.
    """

    template: str
    kind: str
    line: int
    below: str
    before: str
    after: str
    edits: Mapping[str, Edit]


def tokens(text: str) -> Iterator[Token]:
    """Yield what the compiler reads: no comment and no preprocessor line."""
    for found in TOKEN.finditer(text):
        kind = str(found.lastgroup)
        if kind != "skip":
            yield Token(kind, found.group(), found.start(), found.end())


def edits_of(text: str) -> Iterator[Edit]:
    """Yield every mutation of a text, in its order."""
    found = list(tokens(text))
    for n, token in enumerate(found):
        line = text.count("\n", 0, token.start)
        if token.kind == "name" and token.text in SYNCHRONISATION:
            first, last = _statement(found, n)
            yield Edit("sync", line, found[first].start, found[last].end, ";")
        match = INTEGER.fullmatch(token.text) if token.kind == "number" else None
        if match:
            value, suffix = _value(match.group(1)), match.group(2)
            yield Edit("more", line, token.start, token.end, f"{value + 1}{suffix}")
            yield Edit("less", line, token.start, token.end, _less(value, suffix))


def mutants_of(template: str, texts: Mapping[str, str]) -> list[Mutant]:
    """Make the mutants of a template from its texts by the name of the specialisation.

    A line that several texts have is mutated in all of them at once, as in the template. Lines
    correspond when they differ in integers alone and stand at corresponding places.
    """
    keys = {name: _keys(text) for name, text in texts.items()}
    groups: dict[tuple[str, int], tuple[str, int]] = {}
    mutants: dict[tuple[str, int, int], dict[str, Edit]] = {}
    seen: list[str] = []
    for name, text in texts.items():
        same = _same_lines(keys, seen, name, groups)
        ordinals: dict[int, int] = {}
        for edit in edits_of(text):
            ordinal = ordinals[edit.line] = ordinals.get(edit.line, -1) + 1
            group = groups.setdefault((name, edit.line), same.get(edit.line, (name, edit.line)))
            mutants.setdefault((*group, ordinal), {})[name] = edit
        seen.append(name)
    return [_mutant(template, texts, edits) for edits in mutants.values()]


def unchanged(template: str, name: str) -> Mutant:
    """Make the mutant that is none: the text of one specialisation as it is."""
    return Mutant(template, "none", 1, "", "", "", {name: Edit("none", 0, 0, 0, "")})


def _mutant(template: str, texts: Mapping[str, str], edits: dict[str, Edit]) -> Mutant:
    first, edit = next(iter(edits.items()))
    text = texts[first]
    lines = text.splitlines()
    above = (line.strip() for line in reversed(lines[: edit.line]))
    begin = text.rfind("\n", 0, edit.start) + 1
    end = len(text) if (at := text.find("\n", edit.end)) < 0 else at
    return Mutant(
        template=template,
        kind=edit.kind,
        line=edit.line + 1,
        below=next((line for line in above if line and not line.startswith("//")), ""),
        before=text[begin:end].strip(),
        after=(text[begin : edit.start] + edit.new + text[edit.end : end]).strip(),
        edits=edits,
    )


def _statement(found: Sequence[Token], n: int) -> tuple[int, int]:
    """Give the first and the last token of the statement that the n-th token is in."""
    first, last = n, n
    while first and found[first - 1].text not in ("{", ";", "}", ")", "else", "do"):
        first -= 1
    while found[last].text != ";":
        last += 1
    return first, last


def _value(digits: str) -> int:
    plain = digits.replace("'", "")
    is_octal = len(plain) > 1 and plain.isdigit() and plain[0] == "0"
    return int(plain, 8 if is_octal else 0)


def _less(value: int, suffix: str) -> str:
    return f"(-1{suffix})" if value == 0 else f"{value - 1}{suffix}"


def _keys(text: str) -> list[str]:
    """Give the lines with their integers masked."""
    masked = list(text)
    for token in tokens(text):
        if token.kind == "number" and INTEGER.fullmatch(token.text):
            masked[token.start : token.end] = ["#", *[""] * (token.end - token.start - 1)]
    return [line.strip() for line in "".join(masked).splitlines()]


def _same_lines(
    keys: Mapping[str, list[str]],
    seen: Sequence[str],
    name: str,
    groups: Mapping[tuple[str, int], tuple[str, int]],
) -> dict[int, tuple[str, int]]:
    """Give, for lines of a text that an earlier text has, the group of that text's line."""
    same: dict[int, tuple[str, int]] = {}
    for other in seen:
        matcher = SequenceMatcher(None, keys[other], keys[name], autojunk=False)
        for block in matcher.get_matching_blocks():
            for n in range(block.size):
                group = groups.get((other, block.a + n))
                if group is not None:
                    same.setdefault(block.b + n, group)
    return same
