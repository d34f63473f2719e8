"""Fixpipe: L0C tiles leave row by row, rectified and converted on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.ascendc import models_moves as models
from tests.ascendc.harness import run
from tests.ascendc.probes_moves import PROBES, WrongUses, table_of

TILE = 16384  # values of L0C that a case can see
AREA = 8192  # elements of global memory likewise
CASES = 40
COLUMNS = 8

KERNEL = (
    PROBES
    + f"constexpr int64_t kTile = {TILE}; constexpr int64_t kArea = {AREA};"
    + """
template <class T, class U>
void one(const Case& c, int64_t first, LocalTensor<U> tile, GM_ADDR src, GM_ADDR out,
         QuantMode_t quant) {
    place(tile, gm<U>(src, kTile), 0, kTile);
    FixpipeParamsV220 params;
    params.nSize = c(1);
    params.mSize = c(2);
    params.srcStride = c(3);
    params.dstStride = c(4);
    params.reluEn = c(5) != 0;
    params.quantPre = quant;
    GlobalTensor<T> to = gm<T>(out, AREA_ALL);
    if (c(7) != 0) SetAtomicAdd<T>();
    Fixpipe(to[first + c(6)], tile, params);
    SetAtomicNone();
    PipeBarrier<PIPE_ALL>();
}
""".replace("AREA_ALL", str(CASES * AREA))
)

BODY = """
    TPipe pipe;
    TBuf<TPosition::CO1> buffer;
    pipe.InitBuffer(buffer, kTile * 4);
    for (int i = 0; i < cases; ++i) {
        const Case c{gm<int32_t>(table, cases * 8), i * 8};
        const int64_t at = i * kArea;
        switch (c(0)) {
            case 0: one<float>(c, at, buffer.Get<float>(), values, as_float, NoQuant); break;
            case 1: one<half>(c, at, buffer.Get<float>(), values, as_half, F322F16); break;
            case 2: one<bfloat16_t>(c, at, buffer.Get<float>(), values, as_bf16, F322BF16); break;
            case 3: one<int32_t>(c, at, buffer.Get<int32_t>(), counts, as_int, NoQuant); break;
        }
    }
"""

OUTPUTS = ("as_float", "as_half", "as_bf16", "as_int")


def draw_case(rng: np.random.Generator, number: int) -> tuple[int, ...]:
    """output, nSize, mSize, srcStride, dstStride, relu, offset in elements, atomic."""
    columns = int(rng.integers(1, 9)) * 16
    rows = int(rng.integers(1, 50))
    src_stride = (-(-rows // 16) + int(rng.integers(0, 3))) * 16
    dst_stride = columns + int(rng.integers(0, 20))
    flags = number // 4 % 2, number // 8 % 2
    return (number % 4, columns, rows, src_stride, dst_stride, flags[0], number % 7, flags[1])


def test_tiles_leave_as_rows() -> None:
    rng = np.random.default_rng(6)
    cases = [draw_case(rng, number) for number in range(CASES)]
    # Halves of small integers and steps that make ties for both 16-bit types, and an overflow.
    values = (rng.integers(-4000, 4000, TILE) * np.float32(2.0**-3)).astype(np.float32)
    values[::7] = rng.normal(0, 100, values[::7].size).astype(np.float32)
    values[::501] = 1e6
    counts = rng.integers(-(2**31), 2**31, TILE, np.int32)
    old: dict[str, NDArray[Any]] = {
        "as_float": rng.integers(-9, 9, CASES * AREA).astype(np.float32),
        "as_half": rng.integers(-9, 9, CASES * AREA).astype(np.float16),
        "as_bf16": models.to_bf16(rng.integers(-9, 9, CASES * AREA).astype(np.float32)),
        "as_int": rng.integers(-(2**31), 2**31, CASES * AREA, np.int32),
    }
    got = run(
        BODY,
        {"table": table_of(cases), "values": values, "counts": counts},
        old,
        kind="cube",
        scalars={"cases": CASES},
        globals=KERNEL,
    )
    want = {name: array.copy() for name, array in old.items()}
    for number, case in enumerate(cases):
        kind, columns, rows, src_stride, dst_stride, relu, first, atomic = case
        name = OUTPUTS[kind]
        span = slice(number * AREA + first, (number + 1) * AREA)
        before = want[name][span]
        shown = models.widen(before, "bf16") if name == "as_bf16" else before
        stored = models.fixpipe(
            np.full(before.size, np.nan, np.float64),
            counts.astype(np.float64) if name == "as_int" else values.astype(np.float64),
            columns=columns,
            rows=rows,
            src_stride=src_stride,
            dst_stride=dst_stride,
            relu=bool(relu),
        )
        touched = ~np.isnan(stored)
        fresh = convert(stored[touched], name)
        if atomic and name == "as_bf16":
            fresh = models.to_bf16(shown[touched] + models.widen(fresh, "bf16"))
        elif atomic:
            with np.errstate(over="ignore"):
                fresh = before[touched] + fresh
        before[touched] = fresh
    for name in OUTPUTS:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def convert(values: np.ndarray, name: str) -> np.ndarray:
    """What the store keeps of each value; rounding is to nearest even, overflow to infinity."""
    if name == "as_bf16":
        return models.to_bf16(values.astype(np.float32))
    with np.errstate(over="ignore"):
        return values.astype({"as_float": np.float32, "as_half": np.float16}.get(name, np.int32))


WRONG = WrongUses(
    "cube",
    """
    TPipe pipe;
    TBuf<TPosition::CO1> l0c;
    TBuf<TPosition::A1> l1;
    pipe.InitBuffer(l0c, 65536);
    pipe.InitBuffer(l1, 4096);
    LocalTensor<float> x = l0c.Get<float>();
    place(x, gm<float>(src, 8192), 0, 8192);
    GlobalTensor<float> to = gm<float>(out, 16384);
    GlobalTensor<half> halves = gm<half>(out, 32768);
    FixpipeParamsV220 p(16, 16, 16, 16, false);
    """,
)
WRONG.add("ragged columns", "p.nSize = 24; Fixpipe(to, x, p);", "nSize is 24")
WRONG.add("no columns", "p.nSize = 0; Fixpipe(to, x, p);", "nSize is 0")
WRONG.add("too many columns", "p.nSize = 4096; p.dstStride = 4096; Fixpipe(to, x, p);", "4095")
WRONG.add("no rows", "p.mSize = 0; Fixpipe(to, x, p);", "mSize is 0")
WRONG.add("too many rows", "p.mSize = 8193; p.srcStride = 8208; Fixpipe(to, x, p);", "8192")
WRONG.add("a source stride below the rows", "p.mSize = 20; Fixpipe(to, x, p);", "srcStride is 16")
WRONG.add(
    "a source stride in single rows", "p.srcStride = 20; Fixpipe(to, x, p);", "srcStride is 20"
)
WRONG.add("rows that overlap", "p.dstStride = 8; Fixpipe(to, x, p);", "dstStride is 8")
WRONG.add(
    "half without conversion", "Fixpipe(halves, x, p);", "quantPre is NoQuant; these element types"
)
WRONG.add("float with conversion", "p.quantPre = F322F16; Fixpipe(to, x, p);", "need NoQuant")
WRONG.add("the other conversion", "p.quantPre = F322BF16; Fixpipe(halves, x, p);", "need F322F16")
WRONG.add("a unit flag", "p.unitFlag = 3; Fixpipe(to, x, p);", "unitFlag is 3")
WRONG.add("several matrices", "p.ndNum = 2; Fixpipe(to, x, p);", "ndNum is 2")
WRONG.add("a source in L1", "Fixpipe(to, l1.Get<float>(), p);", "src lies in L1")
WRONG.add("a misaligned source", "Fixpipe(to, x[8], p);", "src starts at byte 32 of L0C")
WRONG.add("rows past the end of GM", "Fixpipe(to[16384 - 255], x, p);", "'out'")
WRONG.add("storing what was never written", "Fixpipe(to, x[8192], p);", "nothing has written")


@pytest.mark.parametrize("name", WRONG.names)
def test_a_wrong_fixpipe_is_reported(name: str) -> None:
    WRONG.check(name)
