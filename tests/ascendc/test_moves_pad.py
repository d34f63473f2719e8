"""DataCopyPad: ragged rows into UB with their padding, and exact rows out of it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ascendc import models_moves as models
from tests.ascendc.harness import run
from tests.ascendc.probes_moves import PROBES, WrongUses, random_bytes, table_of

AREA = 4096
CASES = 96
COLUMNS = 11
VALUE = 7  # the padding value, as a bit pattern

KERNEL = (
    PROBES
    + f"constexpr int64_t kArea = {AREA}; constexpr int kValue = {VALUE};"
    + """
template <class T>
void one(const Case& c, int64_t out_first, LocalTensor<T> x, GM_ADDR src, GM_ADDR back,
         GM_ADDR out) {
    const int64_t all = kArea / sizeof(T);
    GlobalTensor<T> from = gm<T>(src, all);
    GlobalTensor<T> to = gm<T>(out + out_first, all);
    const int64_t at_gm = c(9) / sizeof(T), at_ub = c(10) / sizeof(T);
    const DataCopyExtParams rows{c(2), c(3), c(4), c(5), 0};
    if (c(0) == 0) {
        place(x, gm<T>(back, all), 0, all);
        const DataCopyPadExtParams<T> pad{c(6) != 0, c(7), c(8), T(kValue)};
        DataCopyPad(x[at_ub], from[at_gm], rows, pad);
        peek(to, 0, x, all);
    } else {
        place(x, from, 0, all);
        DataCopyPad(to[at_gm], x[at_ub], rows);
    }
    PipeBarrier<PIPE_ALL>();
}
"""
)

BODY = """
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, kArea);
    for (int i = 0; i < cases; ++i) {
        const Case c{gm<int32_t>(table, cases * 11), i * 11};
        const int64_t at = i * kArea;
        switch (c(1)) {
            case 1: one<int8_t>(c, at, buffer.Get<int8_t>(), src, back, out); break;
            case 2: one<int16_t>(c, at, buffer.Get<int16_t>(), src, back, out); break;
            case 4: one<int32_t>(c, at, buffer.Get<int32_t>(), src, back, out); break;
        }
    }
"""


def draw_case(rng: np.random.Generator, number: int) -> tuple[int, ...]:
    """op, size, rows, row bytes, gaps (src, dst), isPad, left, right, offsets (GM, UB) in bytes."""
    op, size = number % 2, (1, 2, 4)[number // 2 % 3]
    pads = op == 0 and number // 6 % 3 > 0
    is_pad = op == 0 and number // 6 % 3 == 2
    most = models.BLOCK // size
    left, right = (int(rng.integers(0, most + 1)) if pads else 0 for _ in range(2))
    rows = int(rng.integers(1, 9))
    row_bytes = int(rng.integers(1, 200 // size)) * size
    gm_gap = int(rng.integers(0, 100 // size)) * size
    ub_gap = int(rng.integers(0, 5))
    at_gm = int(rng.integers(0, 300 // size)) * size
    at_ub = int(rng.integers(0, 10)) * models.BLOCK
    gaps = (gm_gap, ub_gap) if op == 0 else (ub_gap, gm_gap)
    return (op, size, rows, row_bytes, *gaps, int(is_pad), left, right, at_gm, at_ub)


def test_padded_copies_agree_with_the_model() -> None:
    rng = np.random.default_rng(3)
    cases = [draw_case(rng, number) for number in range(CASES)]
    src, back = random_bytes(rng, AREA), random_bytes(rng, AREA)
    before = random_bytes(rng, CASES * AREA)
    got = run(
        BODY,
        {"table": table_of(cases), "src": src, "back": back},
        {"out": before},
        scalars={"cases": CASES},
        globals=KERNEL,
    )["out"].reshape(CASES, AREA)
    for case, seen, old in zip(cases, got, before.reshape(CASES, AREA), strict=True):
        op, size, rows, row_bytes, src_gap, dst_gap, is_pad, left, right, at_gm, at_ub = case
        element = np.dtype(f"u{size}")
        if op == 0:
            want = back.copy()
            want[at_ub:] = models.pad_in(
                want[at_ub:].view(element),
                src[at_gm:].copy().view(element),
                rows=rows,
                row_bytes=row_bytes,
                src_gap_bytes=src_gap,
                dst_gap_blocks=dst_gap,
                is_pad=bool(is_pad),
                left=left,
                right=right,
                value=element.type(VALUE),
            ).view(np.uint8)
        else:
            want = old.copy()
            want[at_gm:] = models.pad_out(
                want[at_gm:],
                src[at_ub:],
                rows=rows,
                row_bytes=row_bytes,
                src_gap_blocks=src_gap,
                dst_gap_bytes=dst_gap,
            )
        np.testing.assert_array_equal(seen, want, err_msg=f"case {case}")


WRONG = WrongUses(
    "vector",
    """
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, 8192);
    LocalTensor<half> x = buffer.Get<half>();
    LocalTensor<int64_t> wide = buffer.Get<int64_t>();
    GlobalTensor<half> a = gm<half>(src, 8192);
    GlobalTensor<half> to = gm<half>(out, 8192);
    using Pad = DataCopyPadExtParams<half>;
    const Pad none;
    const DataCopyPadExtParams<int64_t> one{true, 0, 1, 1};
    """,
    gm_bytes=16384,
)
WRONG.add("too many rows", "DataCopyPad(x, a, DataCopyExtParams{4096, 2, 0, 0, 0}, none);", "4095")
WRONG.add(
    "a row of 2 MiB", "DataCopyPad(x, a, DataCopyExtParams{1, 2097152, 0, 0, 0}, none);", "2097151"
)
WRONG.add("an empty row", "DataCopyPad(x, a, DataCopyExtParams{1, 0, 0, 0, 0}, none);", "blockLen")
WRONG.add("half an element", "DataCopyPad(x, a, DataCopyExtParams{1, 5, 0, 0, 0}, none);", "splits")
WRONG.add(
    "a gap of half an element",
    "DataCopyPad(x, a, DataCopyExtParams{2, 4, 3, 0, 0}, none);",
    "the gap in global memory is 3 bytes",
)
WRONG.add(
    "padding of more than a block",
    "DataCopyPad(x, a, DataCopyExtParams{1, 2, 0, 0, 0}, Pad{true, 0, 17, 0});",
    "at most 32 B, 16 elements",
)
WRONG.add(
    "padding that does not fit its field",
    "DataCopyPad(x, a, DataCopyExtParams{1, 2, 0, 0, 0}, Pad{true, 256, 0, 0});",
    "256",
)
WRONG.add(
    "a 64-bit padding value",
    "DataCopyPad(wide, gm<int64_t>(src, 8), DataCopyExtParams{1, 8, 0, 0, 0}, one);",
    "64-bit type can only be 0",
)
WRONG.add(
    "a misaligned chip address",
    "DataCopyPad(x[1], a, DataCopyExtParams{1, 2, 0, 0, 0}, none);",
    "dst starts at byte 2 of UB",
)
WRONG.add(
    "rows past the end of GM",
    "DataCopyPad(x, a, DataCopyExtParams{9, 32, 2048, 0, 0}, none);",
    "of 'src', which has 16384",
)
WRONG.add(
    "rows past the end of UB",
    "DataCopyPad(x, a, DataCopyExtParams{9, 32, 0, 32, 0}, none);",
    "dst needs the elements",
)
WRONG.add(
    "storing undefined padding",
    "DataCopyPad(x, a, DataCopyExtParams{1, 4, 0, 0, 0}, Pad{false, 0, 14, 0});"
    "PipeBarrier<PIPE_ALL>(); DataCopy(to, x, 16);",
    "nothing has written",
)
WRONG.add(
    "storing rows that were never written",
    "DataCopyPad(x, a, DataCopyExtParams{1, 4, 0, 0, 0}, none);"
    "PipeBarrier<PIPE_ALL>(); DataCopyPad(to, x, DataCopyExtParams{2, 4, 0, 0, 0});",
    "nothing has written",
)

WRONG.add(
    "a reserved field that is set",
    "DataCopyPad(x, a, DataCopyExtParams{1, 2, 0, 0, 1}, none);",
    "the reserved field is 1",
)


@pytest.mark.parametrize("name", WRONG.names)
def test_a_wrong_padded_copy_is_reported(name: str) -> None:
    WRONG.check(name)
