"""C++ cut into tokens, as far as generated kernels need it: one plain style, no macros."""

from __future__ import annotations

import re
from dataclasses import dataclass

KEYWORD_LIST = """
    auto bool break case char class const const_cast constexpr continue default do double else enum
    explicit extern false float for if inline int long mutable namespace operator private protected
    public reinterpret_cast return short signed sizeof static static_assert static_cast struct
    switch template this true typedef typename union unsigned using void volatile while
"""
KEYWORDS = frozenset(KEYWORD_LIST.split())
BUILT_IN_TYPES = frozenset(
    {"auto", "bool", "char", "double", "float", "int", "long", "short", "signed", "unsigned"}
) | {"void"}
TOKEN = re.compile(
    r"""
    (?P<skip>\s+|//[^\n]*|/\*.*?\*/)
  | (?P<directive>\#[^\n]*)
  | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
  | (?P<name>[A-Za-z_]\w*)
  | (?P<number>\.?\d(?:[eE][+-]|['\w.])*)
  | (?P<sign>::|->|\[\[|&&|\|\||<<|>=|<=|==|!=|.)
    """,
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
OPENING, CLOSING = frozenset("([{"), frozenset(")]}")


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of C++: kind is name, number, string, sign or directive."""

    kind: str
    text: str
    line: int


def tokens_of(text: str) -> list[Token]:
    """Cut C++ into tokens; comments and white space are dropped."""
    found: list[Token] = []
    line = 1
    for match in TOKEN.finditer(text):
        kind, piece = match.lastgroup, match.group()
        if kind is not None and kind != "skip":
            found.append(Token(kind, piece.strip(), line))
        line += piece.count("\n")
    return found
