"""What the vector unit lacks does not compile, and what it has compiles without a warning."""

from __future__ import annotations

import subprocess
from pathlib import Path

from spcomp.backends.ascendc.emulate import HEADERS

OPERANDS = """#include "kernel_operator.h"
using namespace AscendC;
extern LocalTensor<half> h;
extern LocalTensor<bfloat16_t> b;
extern LocalTensor<float> f;
extern LocalTensor<int16_t> i16;
extern LocalTensor<int32_t> i;
extern LocalTensor<uint32_t> u;
extern LocalTensor<uint16_t> u16;
extern LocalTensor<uint8_t> m;
extern LocalTensor<int64_t> wide;
extern uint64_t bits[2];
extern uint64_t kept;
constexpr auto rint_mode = RoundMode::CAST_RINT;
constexpr auto pick = SELMODE::VSEL_TENSOR_TENSOR_MODE;
"""

WRONG = (
    "Add(b, b, b, 64);",
    "Mul(b, b, b, 64, 1, BinaryRepeatParams());",
    "Adds(b, b, bfloat16_t(), 64);",
    "Sub(u, u, u, 64);",
    "Max(m, m, m, 64);",
    "Div(i, i, i, 64);",
    "Exp(i, i, 64);",
    "Exp(b, b, bits, 1, UnaryRepeatParams());",
    "Relu(i, i, 64);",
    "Add(f, f, h, 64);",
    "Adds(f, f, 1.0, 64);",
    "Muls(f, f, 2, 64);",
    "And(i, i, i, 64);",
    "Not(f, f, 64);",
    "Cast(b, h, rint_mode, 64);",
    "Cast(h, i, rint_mode, 64);",
    "Cast(f, f, rint_mode, 64);",
    "Cast(wide, f, rint_mode, 64);",
    "Duplicate(wide, int64_t{1}, 64);",
    "Duplicate(f, 1, 64);",
    "CreateVecIndex(u, uint32_t{0}, 64);",
    "Brcb(m, m, 1, {1, 8});",
    "ReduceMax(i, i, i, 64);",
    "ReduceSum(b, b, b, 64);",
    "WholeReduceMax(i, i, 64, 1, 1, 1, 8);",
    "BlockReduceSum(b, b, 1, 64, 1, 1, 8);",
    "Compare(m, b, b, CMPMODE::LT, 128);",
    "Compare(f, f, f, CMPMODE::LT, 128);",
    "CompareScalar(m, i16, int16_t{1}, CMPMODE::EQ, 128);",
    "Select(i, m, i, i, pick, 64);",
    "Select(f, f, f, f, pick, 64);",
    "Gather(m, m, u, 0, 64);",
    "Gather(f, f, i, 0, 64);",
    "GatherMask(wide, wide, uint8_t{1}, false, 0, {1, 1, 8, 0}, kept);",
    "GatherMask(f, f, u16, false, 0, {1, 1, 8, 0}, kept);",
    "Sort32(i, i, u, 1);",
    "Sort32(f, f, i, 1);",
    "Add(f, f, f, 64, 1, {1, 1, 1});",
    "auto sum = bfloat16_t() + bfloat16_t();",
)

RIGHT = (
    "Add(h, h, h, 64);",
    "Mul(i16, i16, i16, bits, 1, {1, 1, 1, 8, 8, 8});",
    "Adds(h, h, half(1.0F), 64);",
    "Muls(f, f, 2.0F, 64, 1, {1, 1, 8, 8});",
    "Exp(f, f, 64);",
    "Not(u16, u16, 64);",
    "Or(i16, i16, i16, 64);",
    "Cast(b, f, rint_mode, 64);",
    "Cast(f, h, RoundMode::CAST_NONE, 64, 1, {1, 1, 8, 4});",
    "Duplicate(f, 1.0F, 64);",
    "Duplicate(u16, uint16_t{1}, bits, 1, 1, 8);",
    "CreateVecIndex(i, 0, 64);",
    "Brcb(f, f, 1, {1, 8});",
    "ReduceMax(f, f, f, 64, true);",
    "ReduceSum(h, h, h, 64);",
    "WholeReduceMax(f, f, 64, 1, 1, 1, 8);",
    "WholeReduceSum(f, f, bits, 1, 1, 1, 8);",
    "BlockReduceMax(f, f, 1, 64, 1, 1, 8);",
    "Compare(m, f, f, CMPMODE::LT, 64);",
    "CompareScalar(m, i, 3, CMPMODE::EQ, 64);",
    "Select(f, m, f, f, pick, 64);",
    "Select(f, m, f, 0.0F, SELMODE::VSEL_TENSOR_SCALAR_MODE, 64);",
    "Gather(b, b, u, 0, 64);",
    "GatherMask(u, u, uint8_t{2}, true, 70, {1, 1, 8, 0}, kept);",
    "GatherMask(h, h, u16, false, 0, {1, 1, 8, 1}, kept);",
    "Sort32(f, f, u, 1);",
    "uint16_t lengths[4] = {32, 32, 32, 32}; "
    "MrgSort(f, MrgSortSrcList<float>(f, f, f, f), MrgSort4Info(lengths, false, 15, 1));",
    "half x = 1.0F; float y = x * 2 + half(3); x = half(y); kept += x < y ? 1 : 0;",
)


def diagnostics(folder: Path, calls: tuple[str, ...]) -> str:
    """What the compiler says of a function with one call a line."""
    lines = [*OPERANDS.splitlines(), "void all() {", *calls, "}", ""]
    source = folder / "calls.cpp"
    source.write_text("\n".join(lines))
    flags = ("-std=c++17", "-Wall", "-Wextra", "-fsyntax-only", f"-I{HEADERS}")
    command = ["g++", *flags, "-fmax-errors=0", str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_a_type_or_shape_of_call_the_hardware_lacks_does_not_compile(tmp_path: Path) -> None:
    said = diagnostics(tmp_path, WRONG)
    first = len(OPERANDS.splitlines()) + 2
    accepted = [call for line, call in enumerate(WRONG, first) if f"calls.cpp:{line}:" not in said]
    assert accepted == []


def test_right_calls_compile_without_a_warning(tmp_path: Path) -> None:
    assert diagnostics(tmp_path, RIGHT) == ""
