"""Tier T0 of the proof: a generated file uses AscendC that is allowed, and keeps the rules that can
be read off its text. What cannot be read off it (sizes, orders, values) the emulator checks.

A name is AscendC's when it is neither a keyword of C++ nor a type of <cstdint> nor declared in the
file or its tiling header. The declarations are found without a parser: the generator writes one
plain style, and a declarator follows a type. An API with the name of a variable of the file passes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from spcomp.backends.ascendc import allowed
from spcomp.backends.ascendc.cpp_tokens import (
    BUILT_IN_TYPES,
    CLOSING,
    KEYWORDS,
    OPENING,
    Token,
    tokens_of,
)

LAST_EVENT_ID = 5
LAST_CROSS_ID = 10
HEADERS = ("kernel_operator.h",)
JUDGED_CALLS = frozenset(
    {"SetFlag", "WaitFlag", "CrossCoreSetFlag", "CrossCoreWaitFlag", "PipeBarrier", "MmadParams"}
)

ATTRIBUTES = frozenset({"maybe_unused", "nodiscard"})


@dataclass(frozen=True, slots=True)
class Breach:
    """What a file may not hold, and where."""

    line: int
    what: str


def breaches(text: str, struct: str = "", fields: Collection[str] = ()) -> tuple[Breach, ...]:
    """Give what a kernel's source may not hold, by line; struct, fields: of its tiling."""
    tokens = tokens_of(text)
    code = [token for token in tokens if token.kind != "directive"]
    found = [
        *_directives(tokens),
        *_names(code, declared_in(code, struct) | set(fields)),
        *_calls(code, _constants(code)),
        *_mixtures(code),
    ]
    return tuple(sorted(found, key=lambda breach: breach.line))


def require_allowed(file: str, text: str, struct: str, fields: Collection[str]) -> None:
    """Assert that a generated file keeps the rules: a template that does not is our own fault."""
    found = breaches(text, struct, fields)
    said = "".join(f"\n{file}:{breach.line}: {breach.what}" for breach in found)
    assert not found, f"a generated kernel breaks the generator's rules:{said}"


# ---- names ---------------------------------------------------------------------------------------


def _directives(tokens: Sequence[Token]) -> Iterator[Breach]:
    for token in tokens:
        if token.kind != "directive" or re.fullmatch(r"#\s*pragma\s+once", token.text):
            continue
        include = re.fullmatch(r'#\s*include\s*"([^"/]+)"', token.text)
        if include is None:
            yield Breach(token.line, f"the directive '{token.text}'; none can change the device")
        elif include[1] not in HEADERS and not include[1].endswith("tiling.h"):
            yield Breach(token.line, f"the header '{include[1]}'")


def declared_in(tokens: Sequence[Token], struct: str) -> set[str]:
    """Give the names that a file declares itself, with the struct of its tiling."""
    types = _types_of(tokens) | {struct}
    closes = _template_ends(tokens, types)
    names = set(types)
    for place, token in enumerate(tokens):
        before = tokens[place - 1].text if place else ""
        if token.kind != "name" or token.text in KEYWORDS:
            continue
        if before == "namespace":
            if tokens[place + 1].text == "{":
                names.add(token.text)
        elif _follows_type(tokens, place, types, closes):
            names.add(token.text)
            names.update(_also_declared(tokens, place))
    return names


def _types_of(tokens: Sequence[Token]) -> set[str]:
    """Give the classes, template parameters and aliases that a file declares."""
    types = set()
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if token.kind != "name" or token.text in KEYWORDS:
            continue
        is_alias = before.text == "using" and after.text == "="
        if is_alias or before.text in ("class", "struct", "enum", "union", "typename"):
            types.add(token.text)
    return types


def _is_type(token: Token, types: set[str]) -> bool:
    return token.text in types or token.text in allowed.TYPE_NAMES or token.text in BUILT_IN_TYPES


def _template_ends(tokens: Sequence[Token], types: set[str]) -> set[int]:
    """Give the places of each `>` that ends the arguments of a type."""
    ends: set[int] = set()
    open_lists: list[bool] = []
    for place, token in enumerate(tokens):
        if token.text == "<":
            open_lists.append(place > 0 and _is_type(tokens[place - 1], types))
        elif token.text == ">" and open_lists:
            if open_lists.pop():
                ends.add(place)
        elif token.text in (";", "{"):
            open_lists.clear()  # what was open compared two numbers
    return ends


def _follows_type(tokens: Sequence[Token], place: int, types: set[str], closes: set[int]) -> bool:
    """Tell whether a name is declared: a type stands before it, maybe with `const`, `*` or `&`."""
    at = place - 1
    while at >= 0 and tokens[at].text in ("*", "&", "&&", "const"):
        at -= 1
    return at >= 0 and (at in closes or _is_type(tokens[at], types))


def _also_declared(tokens: Sequence[Token], place: int) -> Iterator[str]:
    """Give the further names of a declaration `T a, b[2], c;`; a parameter has none."""
    depth = 0
    for at in range(place + 1, len(tokens)):
        text = tokens[at].text
        if text in OPENING:
            depth += 1
        elif text in CLOSING:
            depth -= 1
        if depth < 0 or (depth == 0 and text in (";", "}")):
            return
        if depth == 0 and text == "," and tokens[at + 1].kind == "name":
            if tokens[at + 2].text not in (",", ";", "=", "[", "{"):
                return  # the next parameter
            yield tokens[at + 1].text


def _names(tokens: Sequence[Token], declared: set[str]) -> Iterator[Breach]:
    for place, token in enumerate(tokens):
        if token.kind != "name" or token.text in KEYWORDS or token.text in declared:
            continue
        before = tokens[place - 1].text if place else ""
        if before == "[[" and token.text in ATTRIBUTES:
            continue
        if before == "::" and place > 1 and tokens[place - 2].text in _ENUM_VALUES:
            enum = tokens[place - 2].text
            if token.text not in _ENUM_VALUES[enum]:
                yield Breach(token.line, f"'{token.text}' is no value of {enum} that is allowed")
        elif before in (".", "->"):
            if token.text not in allowed.MEMBERS:
                yield Breach(token.line, f"the member '{token.text}' is not allowed")
        elif token.text not in allowed.ANYWHERE:
            yield Breach(token.line, f"'{token.text}' is neither declared here nor allowed")


_ENUM_VALUES = {
    **allowed.ENUMS,
    **{alias: allowed.ENUMS[name] for alias, name in allowed.ALIASES.items()},
}

# ---- rules ---------------------------------------------------------------------------------------


def _calls(tokens: Sequence[Token], constants: dict[str, int]) -> Iterator[Breach]:
    for place, token in enumerate(tokens):
        name = token.text
        if name not in JUDGED_CALLS:
            continue
        templates, values = _arguments(tokens, place + 1)
        if name in ("SetFlag", "WaitFlag"):
            yield from _id_above(token, values, constants, LAST_EVENT_ID, "event id")
        elif name.startswith("CrossCore"):
            yield from _id_above(token, values, constants, LAST_CROSS_ID, "cross-core id")
            if name == "CrossCoreSetFlag" and not {"PIPE_S", "PIPE_ALL"}.isdisjoint(templates):
                yield Breach(token.line, "CrossCoreSetFlag waits for one pipe that moves data")
        elif name == "PipeBarrier":
            if "PIPE_S" in templates:
                yield Breach(token.line, "PipeBarrier<PIPE_S>: the scalar pipe has no barrier")
        elif values and _value(values[0], constants) == 1:
            yield Breach(token.line, "Mmad with m = 1 reads its left operand as a plain vector")


def _id_above(
    token: Token, values: list[list[str]], constants: dict[str, int], last: int, what: str
) -> Iterator[Breach]:
    """Refuse an id known to be too large: of a sum with a variable, its known terms."""
    if not values:
        return
    terms = " ".join(values[0]).split(" + ")
    known = [value for value in (_value(term.split(), constants) for term in terms) if value]
    if sum(known) > last:
        yield Breach(
            token.line, f"{what} {sum(known)} of {token.text}: the last free one is {last}"
        )


def _arguments(tokens: Sequence[Token], place: int) -> tuple[list[str], list[list[str]]]:
    """Give the texts in `<...>` and each argument in `(...)` that stand from a place on."""
    templates: list[str] = []
    if place < len(tokens) and tokens[place].text == "<":
        while tokens[place].text != ">":
            templates.append(tokens[place].text)
            place += 1
        place += 1
    values: list[list[str]] = [[]]
    if place >= len(tokens) or tokens[place].text != "(":
        return templates, []
    depth = 0
    for token in tokens[place:]:
        depth += (token.text in OPENING) - (token.text in CLOSING)
        if depth == 0:
            break
        if depth == 1 and token.text == ",":
            values.append([])
        elif (depth, token.text) != (1, "("):
            values[-1].append(token.text)
    return templates, values


def _constants(tokens: Sequence[Token]) -> dict[str, int]:
    """Give the integers that a file names; a name given two values is none."""
    found: dict[str, int] = {}
    twice = set()
    for place, token in enumerate(tokens):
        if token.text != "constexpr":
            continue
        end = next(n for n in range(place, len(tokens)) if tokens[n].text in (";", "{", "("))
        texts = [one.text for one in tokens[place:end]]
        if "=" not in texts:
            continue
        at = texts.index("=")
        end = next(n for n in range(place, len(tokens)) if tokens[n].text == ";")
        value = _value([one.text for one in tokens[place + at + 1 : end]], found)
        if value is None or texts[at - 1] in found:
            twice.add(texts[at - 1])
        else:
            found[texts[at - 1]] = value
    return {name: value for name, value in found.items() if name not in twice}


def _value(texts: Sequence[str], constants: dict[str, int]) -> int | None:
    """Work out an integer expression of literals and constants; None for any other."""
    text = " ".join(str(constants.get(part, part)) for part in texts)
    if not re.fullmatch(r"[\d\s+\-*/()]+", text):
        return None
    try:
        return _of_node(ast.parse(text.replace("/", "//"), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, TypeError):
        return None


def _of_node(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_of_node(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _of_node(node.left), _of_node(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.FloorDiv):
            return left // right
    raise TypeError(ast.dump(node))


def _mixtures(tokens: Sequence[Token]) -> Iterator[Breach]:
    """SyncAll takes cross-core ids for itself, and a queue takes event ids."""
    first: dict[str, Token] = {}
    for token in tokens:
        first.setdefault(token.text, token)
    for taker, others, what in (
        ("SyncAll", ("CrossCoreSetFlag", "CrossCoreWaitFlag"), "cross-core flags"),
        ("TQue", ("SetFlag", "WaitFlag"), "explicit event ids"),
    ):
        if taker in first and any(other in first for other in others):
            yield Breach(first[taker].line, f"{taker} beside {what}: it takes ids of its own")
