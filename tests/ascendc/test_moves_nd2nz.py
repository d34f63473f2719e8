"""DataCopy with Nd2NzParams: row-major matrices become columns of blocks in L1."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ascendc import models_moves as models
from tests.ascendc.harness import run
from tests.ascendc.probes_moves import PROBES, WrongUses, random_bytes, table_of

AREA = 32768
CASES = 36
COLUMNS = 11

KERNEL = (
    PROBES
    + f"constexpr int64_t kArea = {AREA};"
    + """
template <class T>
void one(const Case& c, int64_t out_first, LocalTensor<T> x, GM_ADDR src, GM_ADDR back,
         GM_ADDR out) {
    const int64_t all = kArea / sizeof(T);
    place(x, gm<T>(back, all), 0, all);
    const Nd2NzParams params{c(1), c(2), c(3), c(4), c(5), c(6), c(7), c(8)};
    DataCopy(x[c(10) / sizeof(T)], gm<T>(src, all)[c(9) / sizeof(T)], params);
    peek(gm<T>(out + out_first, all), 0, x, all);
}
"""
)

BODY = """
    TPipe pipe;
    TBuf<TPosition::B1> buffer;
    pipe.InitBuffer(buffer, kArea);
    for (int i = 0; i < cases; ++i) {
        const Case c{gm<int32_t>(table, cases * 11), i * 11};
        const int64_t at = i * kArea;
        switch (c(0)) {
            case 1: one<int8_t>(c, at, buffer.Get<int8_t>(), src, back, out); break;
            case 2: one<half>(c, at, buffer.Get<half>(), src, back, out); break;
            case 4: one<float>(c, at, buffer.Get<float>(), src, back, out); break;
        }
    }
"""


def draw_case(rng: np.random.Generator, number: int) -> tuple[int, ...]:
    """size, the eight fields of Nd2NzParams in order, offsets (GM, L1) in bytes."""
    size = (1, 2, 4)[number % 3]
    c0 = models.BLOCK // size
    matrices = int(rng.integers(1, 4)) if number // 3 % 2 else 1
    rows, columns = int(rng.integers(1, 20)), int(rng.integers(1, 4 * c0))
    src_row = columns + int(rng.integers(0, 20))
    src_matrix = rows * src_row + int(rng.integers(0, 20))
    dst_row = int(rng.integers(1, 3))
    dst_c0 = rows * dst_row + int(rng.integers(0, 5))
    dst_matrix = (-(-columns // c0) * dst_c0 + int(rng.integers(0, 3))) * c0
    if matrices == 1:
        src_matrix = dst_matrix = 0
    at_gm, at_l1 = int(rng.integers(0, 50)) * size, int(rng.integers(0, 9)) * models.BLOCK
    strides = (src_matrix, src_row, dst_c0, dst_row, dst_matrix)
    return (size, matrices, rows, columns, *strides, at_gm, at_l1)


def test_matrices_become_columns_of_blocks() -> None:
    rng = np.random.default_rng(4)
    cases = [draw_case(rng, number) for number in range(CASES)]
    src, back = random_bytes(rng, AREA), random_bytes(rng, AREA)
    got = run(
        BODY,
        {"table": table_of(cases), "src": src, "back": back},
        {"out": np.zeros(CASES * AREA, np.uint8)},
        kind="cube",
        scalars={"cases": CASES},
        globals=KERNEL,
    )["out"].reshape(CASES, AREA)
    for case, seen in zip(cases, got, strict=True):
        size, matrices, rows, columns, src_matrix, src_row, dst_c0, dst_row, dst_matrix = case[:9]
        element = np.dtype(f"u{size}")
        want = back.copy()
        want[case[10] :] = models.nd2nz(
            want[case[10] :].view(element),
            src[case[9] :].copy().view(element),
            matrices=matrices,
            rows=rows,
            columns=columns,
            src_matrix=src_matrix,
            src_row=src_row,
            dst_c0=dst_c0,
            dst_row=dst_row,
            dst_matrix=dst_matrix,
        ).view(np.uint8)
        np.testing.assert_array_equal(seen, want, err_msg=f"case {case}")


WRONG = WrongUses(
    "cube",
    """
    TPipe pipe;
    TBuf<TPosition::A1> buffer;
    pipe.InitBuffer(buffer, 65536);
    LocalTensor<half> x = buffer.Get<half>();
    GlobalTensor<half> a = gm<half>(src, 8192);
    """,
    gm_bytes=16384,
)
WRONG.add(
    "a row stride of 17 bits",
    "DataCopy(x, a, Nd2NzParams{1, 2, 16, 0, 65536, 16, 1, 0});",
    "65536",
)
WRONG.add("too many rows", "DataCopy(x, a, Nd2NzParams{1, 16385, 16, 0, 16, 16, 1, 0});", "nValue")
WRONG.add("no rows", "DataCopy(x, a, Nd2NzParams{1, 0, 16, 0, 16, 16, 1, 0});", "nValue")
WRONG.add("no columns", "DataCopy(x, a, Nd2NzParams{1, 16, 0, 0, 16, 16, 1, 0});", "dValue")
WRONG.add("no row stride", "DataCopy(x, a, Nd2NzParams{1, 16, 16, 0, 0, 16, 1, 0});", "srcDValue")
WRONG.add(
    "a column stride beyond its range",
    "DataCopy(x, a, Nd2NzParams{1, 16, 16, 0, 16, 16385, 1, 0});",
    "dstNzC0Stride",
)
WRONG.add(
    "no distance between rows",
    "DataCopy(x, a, Nd2NzParams{1, 16, 16, 0, 16, 16, 0, 0});",
    "dstNzNStride",
)
WRONG.add(
    "columns closer than the rows are many",
    "DataCopy(x, a, Nd2NzParams{1, 20, 32, 0, 32, 16, 1, 0});",
    "already written",
)
WRONG.add(
    "a stride to a matrix that is not there",
    "DataCopy(x, a, Nd2NzParams{1, 16, 16, 256, 16, 16, 1, 0});",
    "there is one matrix; they must be 0",
)
WRONG.add(
    "matrices that do not start on a block",
    "DataCopy(x, a, Nd2NzParams{2, 16, 16, 256, 16, 16, 1, 257});",
    "dstNzMatrixStride",
)
WRONG.add(
    "rows past the end of GM",
    "DataCopy(x, a, Nd2NzParams{1, 65, 128, 0, 128, 80, 1, 0});",
    "of 'src', which has 16384",
)
WRONG.add(
    "blocks past the end of L1's tensor",
    "DataCopy(x, a, Nd2NzParams{1, 16, 128, 0, 128, 300, 1, 0});",
    "dst needs the elements",
)
WRONG.add(
    "a negative row",
    "DataCopy(x, a[-128], Nd2NzParams{1, 16, 16, 0, 16, 16, 1, 0});",
    "src reads the bytes -256",
)


WRONG.add("a plain store on a cube core", "DataCopy(gm<half>(out, 64), x, 16);", "no pipe MTE3")


@pytest.mark.parametrize("name", WRONG.names)
def test_a_wrong_nd2nz_is_reported(name: str) -> None:
    WRONG.check(name)
