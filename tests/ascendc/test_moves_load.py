"""LoadData: fractals from L1 to L0A and L0B, transposed or not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ascendc import models_moves as models
from tests.ascendc.harness import run
from tests.ascendc.probes_moves import PROBES, WrongUses, random_bytes, table_of

AREA = 32768  # bytes of each side: 64 fractals
FRACTALS = AREA // models.FRACTAL
CASES = 48

KERNEL = (
    PROBES
    + f"constexpr int64_t kArea = {AREA};"
    + """
template <class T>
void one(const Case& c, int64_t out_first, LocalTensor<T> l1, LocalTensor<T> l0, GM_ADDR src,
         GM_ADDR back, GM_ADDR out) {
    const int64_t all = kArea / sizeof(T);
    place(l1, gm<T>(src, all), 0, all);
    place(l0, gm<T>(back, all), 0, all);
    const LoadData2DParams params(c(2), c(3), c(4), 0, c(5), c(6) != 0, 0);
    LoadData(l0[c(8) / sizeof(T)], l1[c(7) / sizeof(T)], params);
    peek(gm<T>(out + out_first, all), 0, l0, all);
}
"""
)

BODY = """
    TPipe pipe;
    TBuf<TPosition::A1> l1;
    TBuf<TPosition::A2> l0a;
    TBuf<TPosition::B2> l0b;
    pipe.InitBuffer(l1, kArea);
    pipe.InitBuffer(l0a, kArea);
    pipe.InitBuffer(l0b, kArea);
    for (int i = 0; i < cases; ++i) {
        const Case c{gm<int32_t>(table, cases * 9), i * 9};
        const int64_t at = i * kArea;
        const LocalTensor<int8_t> l0 = c(0) == 0 ? l0a.Get<int8_t>() : l0b.Get<int8_t>();
        switch (c(1)) {
            case 1: one(c, at, l1.Get<int8_t>(), l0, src, back, out); break;
            case 2: one(c, at, l1.Get<half>(), l0.ReinterpretCast<half>(), src, back, out); break;
            case 4: one(c, at, l1.Get<float>(), l0.ReinterpretCast<float>(), src, back, out); break;
        }
    }
"""


def draw_case(rng: np.random.Generator, number: int) -> tuple[int, ...]:
    """side, size, start, repeat, srcStride, dstGap, transpose, offsets (L1, L0) in bytes."""
    side, size = number % 2, (2, 2, 1, 4)[number // 2 % 4]
    repeat, src_stride, dst_gap = (int(rng.integers(low, 5)) for low in (1, 0, 0))
    start = int(rng.integers(0, 8))
    transpose = size == 2 and number // 8 % 2
    at_l1 = int(rng.integers(0, 40)) * models.BLOCK
    at_l0 = int(rng.integers(0, 8)) * models.FRACTAL
    return (side, size, start, repeat, src_stride, dst_gap, int(transpose), at_l1, at_l0)


def test_fractals_arrive_where_the_model_says() -> None:
    rng = np.random.default_rng(5)
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
        _, size, start, repeat, src_stride, dst_gap, transpose, at_l1, at_l0 = case
        element = np.dtype(f"u{size}")
        want = back.copy()
        want[at_l0:] = models.load_2d(
            want[at_l0:].view(element),
            src[at_l1:].copy().view(element),
            start=start,
            repeat=repeat,
            src_stride=src_stride,
            dst_gap=dst_gap,
            transpose=bool(transpose),
        ).view(np.uint8)
        np.testing.assert_array_equal(seen, want, err_msg=f"case {case}")


WRONG = WrongUses(
    "cube",
    """
    TPipe pipe;
    TBuf<TPosition::A1> l1;
    TBuf<TPosition::A2> l0a;
    TBuf<TPosition::CO1> l0c;
    pipe.InitBuffer(l1, 65536);
    pipe.InitBuffer(l0a, 32768);
    pipe.InitBuffer(l0c, 4096);
    LocalTensor<half> x = l1.Get<half>();
    LocalTensor<half> a = l0a.Get<half>();
    place(x, gm<half>(src, 32768), 0, 32768);
    """,
)
WRONG.add("256 repeats", "LoadData(a, x, LoadData2DParams(0, 256, 1, 0, 0, false, 0));", "256")
WRONG.add("no repeats", "LoadData(a, x, LoadData2DParams(0, 0, 1, 0, 0, false, 0));", "repeatTimes")
WRONG.add(
    "transposing 32-bit elements",
    "LoadData(l0a.Get<float>(), l1.Get<float>(), LoadData2DParams(0, 1, 1, 0, 0, true, 0));",
    "ifTranspose needs elements of 16 bits",
)
WRONG.add(
    "a destination between fractals",
    "LoadData(a[16], x, LoadData2DParams(0, 1, 1, 0, 0, false, 0));",
    "dst starts at byte 32 of L0A",
)
WRONG.add(
    "a destination in L0C",
    "LoadData(l0c.Get<half>(), x, LoadData2DParams(0, 1, 1, 0, 0, false, 0));",
    "dst lies in L0C",
)
WRONG.add(
    "a source in L0",
    "LoadData(a, a, LoadData2DParams(0, 1, 1, 0, 0, false, 0));",
    "src lies in L0A",
)
WRONG.add(
    "a source past the end of L1's tensor",
    "LoadData(a, x, LoadData2DParams(126, 2, 2, 0, 0, false, 0));",
    "src needs the elements",
)
WRONG.add(
    "a destination past the end of L0's tensor",
    "LoadData(a, x, LoadData2DParams(0, 2, 1, 0, 63, false, 0));",
    "dst needs the elements",
)
WRONG.add(
    "counting down", "LoadData(a, x, LoadData2DParams(0, 1, 1, 0, 0, false, 1));", "addrMode 1"
)


@pytest.mark.parametrize("name", WRONG.names)
def test_a_wrong_load_is_reported(name: str) -> None:
    WRONG.check(name)
