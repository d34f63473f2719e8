"""Generated kernels hold allowed AscendC alone; the emulator has exactly what is allowed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

from spcomp import compiler
from spcomp.backends.ascendc import BACKEND, allowed
from spcomp.backends.ascendc.cpp_tokens import KEYWORDS, Token, tokens_of
from spcomp.backends.ascendc.emit import forms
from spcomp.backends.ascendc.emulate import FLAGS, HEADERS
from spcomp.backends.ascendc.source_rules import breaches, require_allowed
from spcomp.backends.ascendc.targets import TARGETS
from spcomp.backends.base import Specialisation
from spcomp.dsl.pattern import Pattern
from spcomp.errors import CannotLower, Refused
from spcomp.ir.plan import Phase
from spcomp.patterns import (
    SHIPPED,
    block_topk,
    flexprefill,
    infllm_v2,
    minference,
    moba,
    nsa,
    quest,
    spargeattn,
    streaming_llm,
    xattention,
)
from tests.shipped import NO_KERNELS, assert_refused

TARGET = TARGETS["ascend910b"]
BY_BLOCK: dict[str, Callable[[int], Pattern]] = {
    "block_topk": lambda block: block_topk(block=block),
    "flexprefill": lambda block: flexprefill(block=block),
    "infllm_v2": lambda block: infllm_v2(block=block),
    "minference": lambda block: minference(block=block),
    "moba": lambda block: moba(block=block),
    "nsa": lambda block: nsa(block=block),
    "quest": lambda block: quest(page=block),
    "spargeattn": lambda block: spargeattn(block_k=block),
    "streaming_llm": lambda block: streaming_llm(recent=block),
    "xattention": lambda block: xattention(block=block),
}


# ---- every generated file ------------------------------------------------------------------------


def test_every_shipped_pattern_is_held_against_the_rules() -> None:
    assert set(BY_BLOCK) == set(SHIPPED)


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("name", BY_BLOCK)
def test_whatever_is_not_refused_holds_allowed_names_alone(name: str, block: int) -> None:
    read = 0
    for phase, dtype, dim in product(get_args(Phase), ("float16", "bfloat16"), (64, 80, 128, 256)):
        spec = Specialisation(dtype, dim, dim)
        try:
            plan = compiler.lower(
                BY_BLOCK[name](block), backend=BACKEND, target=TARGET, spec=spec, phase=phase
            )
        except (CannotLower, Refused):
            continue
        source = BACKEND.emit(plan, TARGET, spec)
        for file, form in zip(source.files, forms(plan, TARGET, spec), strict=True):
            assert not breaches(file.text, form.struct, [field.name for field in form.fields])
            read += 1
    assert bool(read) == (name not in NO_KERNELS["ascendc"])


@pytest.mark.parametrize("phase", get_args(Phase))
@pytest.mark.parametrize("name", NO_KERNELS["ascendc"])
def test_a_pattern_without_kernels_is_refused(name: str, phase: Phase) -> None:
    assert_refused(name, TARGET.name, phase)


# ---- what is refused -----------------------------------------------------------------------------

GOOD = """#pragma once
#include "kernel_operator.h"
#include "my_tiling.h"
// SyncThreads(); is a comment
/* so is
   Matmul */
using namespace AscendC;
constexpr int32_t kTwo = 2;
constexpr int32_t kSix = 3 * kTwo;
constexpr const char* kText = "Axpy(a)";
template <class T>
__aicore__ inline T Twice(T value) { return value + value; }
struct Pair {
    int32_t left, right[2];
};
__aicore__ inline void Run(const my_tiling& tiling, [[maybe_unused]] GM_ADDR x, int32_t slot) {
    LocalTensor<float> a, b;
    const GlobalTensor<half>& from = Find();
    Pair pair = {tiling.rows, {0, 1}};
    SetFlag<HardEvent::V_MTE2>(kTwo + slot);
    a.GetValue(pair.right[slot] * kTwo);
    if (pair.left * kTwo > pair.right[0]) Add(a, a, b, Twice(kTwo));
    %s
}
"""
LINE = GOOD[: GOOD.index("%s")].count("\n") + 1
FIELDS = ("rows",)


def of(statement: str) -> list[tuple[int, str]]:
    text = GOOD.replace("const GlobalTensor<half>& from = Find();", "").replace("%s", statement)
    return [(breach.line, breach.what) for breach in breaches(text, "my_tiling", FIELDS)]


def test_a_file_in_the_generators_style_is_allowed() -> None:
    assert of("") == []


def test_a_declaration_does_not_allow_what_it_is_made_from() -> None:
    found = breaches(GOOD.replace("%s", ""), "my_tiling", FIELDS)
    assert [breach.what for breach in found] == ["'Find' is neither declared here nor allowed"]


WRONG = {
    "Axpy(a, b, 1.0f, 64);": "'Axpy'",
    "Matmul<float, float, float> product;": "'Matmul'",
    "SoftMax(a, b);": "'SoftMax'",
    "LoadDataWithTranspose(a, b);": "'LoadDataWithTranspose'",
    "SetMaskCount();": "'SetMaskCount'",
    "ib_set_stub(1);": "'ib_set_stub'",
    "std::min(1, 2);": "'std'",
    "uint128_t wide;": "'uint128_t'",
    "AscendC::Transpose(a, b);": "'Transpose'",
    "if (slot < KERNEL_TYPE_MIX_AIC_1_3) return;": "'KERNEL_TYPE_MIX_AIC_1_3'",
    "pair.left = pair.left * V_MTE2;": "'V_MTE2'",
    "SetFlag<HardEvent::V_FIX>(0);": "'V_FIX' is no value of HardEvent",
    "Cast(a, b, RoundMode::CAST_HYBRID, 64);": "'CAST_HYBRID' is no value of RoundMode",
    "a.SetShapeInfo(b);": "the member 'SetShapeInfo'",
    "pair.left = tiling.columns;": "the member 'columns'",
    "#define kReserved 0": "the directive '#define kReserved 0'",
    '#include "lib/matmul_intf.h"': "the directive",
    '#include "matmul_intf.h"': "the header 'matmul_intf.h'",
    "SetFlag<HardEvent::V_MTE2>(kSix);": "event id 6 of SetFlag: the last free one is 5",
    "WaitFlag<HardEvent::V_MTE2>(2 * kTwo + slot + 3);": "event id 7 of WaitFlag",
    "CrossCoreSetFlag<2, PIPE_FIX>(kSix + 5);": "cross-core id 11 of CrossCoreSetFlag",
    "CrossCoreWaitFlag(15);": "cross-core id 15 of CrossCoreWaitFlag: the last free one is 10",
    "CrossCoreSetFlag<2, PIPE_S>(0);": "CrossCoreSetFlag waits for one pipe",
    "CrossCoreSetFlag<2, PIPE_ALL>(0);": "CrossCoreSetFlag waits for one pipe",
    "PipeBarrier<PIPE_S>();": "PipeBarrier<PIPE_S>",
    "MmadParams(1, slot, 16, 0, false, true);": "Mmad with m = 1",
    "MmadParams(kTwo - 1, slot, 16, 0, false, true);": "Mmad with m = 1",
    "CrossCoreWaitFlag(0); SyncAll<true>();": "SyncAll beside cross-core flags",
    "TQue<TPosition::VECIN, 1> queue;": "TQue beside explicit event ids",
}


@pytest.mark.parametrize("statement", WRONG)
def test_what_is_not_allowed_is_refused_with_its_line_and_name(statement: str) -> None:
    found = of(statement)
    assert found[0][1].startswith(WRONG[statement])
    assert {line for line, _ in found} == {LINE}


def test_a_kernel_that_breaks_a_rule_is_our_own_fault() -> None:
    said = r"02_score\.h:2: 'Axpy' is neither declared here nor allowed"
    with pytest.raises(AssertionError, match=said):
        require_allowed("02_score.h", "using namespace AscendC;\nAxpy();\n", "my_tiling", ())


# ---- the emulator has exactly this ---------------------------------------------------------------


def preprocessed() -> str:
    """Give the emulator's headers with their macros expanded, without what they include."""
    command = ["g++", *FLAGS, "-E", "-x", "c++", str(HEADERS / "kernel_operator.h")]
    whole = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kept, ours = [], False
    for line in whole.splitlines():
        mark = re.match(r'# \d+ "([^"]*)"', line)
        if mark:
            ours = Path(mark[1]).parent == HEADERS
        elif ours:
            kept.append(line)
    return "\n".join(kept)


def group(tokens: list[Token], place: int, ends: str) -> int:
    """Give the place of the bracket that closes the one at `place`."""
    depth = 0
    for at in range(place, len(tokens)):
        depth += (tokens[at].text == ends[0]) - (tokens[at].text == ends[1])
        if depth == 0:
            return at
    raise AssertionError("a bracket without its end")


def statements(tokens: list[Token]) -> Iterator[tuple[list[Token], list[Token]]]:
    """Yield what stands at one level: the head of each declaration, and what is in its braces."""
    head: list[Token] = []
    place = 0
    while place < len(tokens):
        token = tokens[place]
        if token.text in "({[":
            end = group(tokens, place, {"(": "()", "{": "{}", "[": "[]"}[token.text])
            if token.text == "{":
                yield head, tokens[place + 1 : end]
                head = []
            else:
                head += [token, tokens[end]]
            place = end
        elif token.text == ";":
            if head:
                yield head, []
            head = []
        elif token.text == ":" and head and head[-1].text in ("public", "private"):
            yield [head[-1]], []
            head = []
        else:
            head.append(token)
        place += 1


def name_of(head: list[Token]) -> tuple[str, str]:
    """Give what a declaration declares: its kind (enum, class, name) and its name."""
    texts = [token.text for token in head]
    while texts[:2] == ["template", "<"]:
        depth = 0
        for at, text in enumerate(texts):
            depth += (text == "<") - (text == ">")
            if at > 1 and depth == 0:
                break
        texts = texts[at + 1 :]
    for kind in ("enum", "struct", "class"):
        if texts[:1] == [kind]:
            rest = [text for text in texts[1:] if text not in ("class", "struct")]
            return ("enum" if kind == "enum" else "class"), rest[0]
    if texts[:1] == ["using"]:
        return "name", texts[1]
    end = next((n for n, text in enumerate(texts) if text in ("(", "=")), len(texts))
    return "name", texts[end - 1]


def test_the_emulator_has_what_is_allowed_and_nothing_else() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    names: set[str] = set()
    enums: dict[str, set[str]] = {}
    methods: dict[str, set[str]] = {}
    for head, body in statements(tokens_of(preprocessed())):
        if [token.text for token in head] != ["namespace", "AscendC"]:
            continue
        for inner, content in statements(body):
            if inner[0].text == "namespace":
                assert [token.text for token in inner] == ["namespace", "emulator"]
                continue
            kind, name = name_of(inner)
            if name in KEYWORDS:
                continue  # static_assert
            names.add(name)
            if kind == "enum":
                enums[name] = set(values_of(content))
            elif kind == "class" and content:
                methods[name] = set(public_names(name, content))
    unscoped = {"pipe_t": allowed.PIPES, "KernelType": allowed.KERNEL_KINDS}
    assert enums == {**allowed.ENUMS, **unscoped}
    assert {name: found for name, found in methods.items() if found} == allowed.METHODS
    classes_and_more = allowed.TYPES | allowed.ENUMS.keys() | allowed.ALIASES.keys()
    assert names == allowed.FUNCTIONS | classes_and_more | allowed.CONSTANTS


def values_of(content: list[Token]) -> Iterator[str]:
    """Yield the values of an enumeration."""
    place, is_next = 0, True
    while place < len(content):
        if is_next:
            yield content[place].text
        is_next = content[place].text == ","
        place = group(content, place, "()") + 1 if content[place].text == "(" else place + 1


def public_names(owner: str, content: list[Token]) -> Iterator[str]:
    """Yield the functions and types that a class offers in the device's way of writing."""
    is_public = False
    for head, _ in statements(content):
        if head[0].text in ("public", "private"):
            is_public = head[0].text == "public"
            continue
        _, name = name_of(head)
        if is_public and name[0].isupper() and name != owner:
            yield name


def test_qualifiers_and_macros_are_the_ones_the_emulator_defines() -> None:
    defined = re.findall(
        r"^#define (\w+)", (HEADERS / "kernel_operator.h").read_text(), re.MULTILINE
    )
    assert set(defined) == allowed.QUALIFIERS | allowed.MACROS
