"""DataCopy by count and by rows: into UB, out of it, within it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.ascendc import models_moves as models
from tests.ascendc.harness import run
from tests.ascendc.probes_moves import PROBES, WrongUses, random_bytes, table_of

AREA = 8192  # bytes that one case can see on either side
OPS = ("in", "out", "within")
CASES = 90

KERNEL = (
    PROBES
    + f"constexpr int64_t kArea = {AREA};"
    + """
template <class T>
void one(const Case& c, int64_t out_first, LocalTensor<T> a, LocalTensor<T> b, GM_ADDR src,
         GM_ADDR back, GM_ADDR out) {
    const int64_t all = kArea / sizeof(T);
    GlobalTensor<T> from = gm<T>(src, all);
    GlobalTensor<T> to = gm<T>(out + out_first, all);
    place(a, from, 0, all);
    place(b, gm<T>(back, all), 0, all);
    const int64_t at_src = c(7) / sizeof(T), at_dst = c(8) / sizeof(T);
    const uint32_t count = c(4) * 32 / sizeof(T);
    const DataCopyParams rows{c(3), c(4), c(5), c(6)};
    const bool by_count = c(2) == 0;
    if (c(0) == 0) {
        if (by_count) DataCopy(b[at_dst], from[at_src], count);
        else DataCopy(b[at_dst], from[at_src], rows);
        peek(to, 0, b, all);
    } else if (c(0) == 1) {
        if (by_count) DataCopy(to[at_dst], a[at_src], count);
        else DataCopy(to[at_dst], a[at_src], rows);
    } else {
        if (by_count) DataCopy(b[at_dst], a[at_src], count);
        else DataCopy(b[at_dst], a[at_src], rows);
        peek(to, 0, b, all);
    }
    PipeBarrier<PIPE_ALL>();
}
"""
)

BODY = """
    TPipe pipe;
    TBuf<TPosition::VECCALC> a, b;
    pipe.InitBuffer(a, kArea);
    pipe.InitBuffer(b, kArea);
    for (int i = 0; i < cases; ++i) {
        const Case c{gm<int32_t>(table, cases * 9), i * 9};
        const int64_t at = i * kArea;
        switch (c(1)) {
            case 1: one(c, at, a.Get<int8_t>(), b.Get<int8_t>(), src, back, out); break;
            case 2: one(c, at, a.Get<half>(), b.Get<half>(), src, back, out); break;
            case 4: one(c, at, a.Get<float>(), b.Get<float>(), src, back, out); break;
        }
    }
"""


def draw_case(rng: np.random.Generator, number: int) -> tuple[int, ...]:
    """op, element size, form, rows, blocks, both gaps in blocks, both offsets in bytes."""
    op, size, by_rows = number % 3, (1, 2, 4)[number // 3 % 3], number // 9 % 2
    room = AREA // models.BLOCK
    rows = int(rng.integers(1, 9)) if by_rows else 1
    blocks = int(rng.integers(1, room // rows // 4))
    gaps = [int(rng.integers(0, room // rows // 2 - blocks)) if by_rows else 0 for _ in "sd"]
    offsets = []
    for side, gap in enumerate(gaps):
        used = rows * blocks + (rows - 1) * gap
        # On chip an address is a whole number of blocks, in GM of elements.
        unit = size if side == (0 if op == 0 else 1 if op == 1 else -1) else models.BLOCK
        offsets.append(int(rng.integers(0, (room - used) * models.BLOCK // unit + 1)) * unit)
    return (op, size, by_rows, rows, blocks, *gaps, *offsets)


def test_copies_move_the_rows_the_model_says() -> None:
    rng = np.random.default_rng(1)
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
        op, _, _, rows, blocks, src_gap, dst_gap, at_src, at_dst = case
        want = (old if OPS[op] == "out" else back).copy()
        want[at_dst:] = models.copy_rows(
            want[at_dst:], src[at_src:], rows=rows, blocks=blocks, src_gap=src_gap, dst_gap=dst_gap
        )
        np.testing.assert_array_equal(seen, want, err_msg=f"case {case}")


ATOMIC = (
    PROBES
    + """
template <class T>
void add(GM_ADDR src, GM_ADDR out) {
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, 256);
    LocalTensor<T> x = buffer.Get<T>();
    GlobalTensor<T> to = gm<T>(out, 64);
    DataCopy(x, gm<T>(src, 64), 64);
    PipeBarrier<PIPE_ALL>();
    SetAtomicAdd<T>();
    DataCopy(to, x, 32);
    DataCopyPad(to[32], x[32], DataCopyExtParams{1, 24 * sizeof(T), 0, 0, 0});
    SetAtomicNone();
    PipeBarrier<PIPE_ALL>();
    DataCopyPad(to[56], x[48], DataCopyExtParams{1, 8 * sizeof(T), 0, 0, 0});
}
"""
)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int16"])
def test_atomic_copies_add_to_global_memory(dtype: str) -> None:
    rng = np.random.default_rng(2)
    # Integers of all sizes, whose sums wrap; floats whose sums are exact.
    most = 2**31 if dtype.startswith("int") else 50
    old: NDArray[Any] = rng.integers(-most, most, 64).astype(dtype)
    new: NDArray[Any] = rng.integers(-most, most, 64).astype(dtype)
    body = """
    switch (kind) {
        case 0: add<float>(src, out); break;
        case 1: add<half>(src, out); break;
        case 2: add<int32_t>(src, out); break;
        case 3: add<int16_t>(src, out); break;
    }
    """
    kind = ("float32", "float16", "int32", "int16").index(dtype)
    got = run(body, {"src": new}, {"out": old}, scalars={"kind": kind}, globals=ATOMIC)["out"]
    want = old + new
    want[56:] = new[48:56]
    np.testing.assert_array_equal(got, want)


WRONG = WrongUses(
    "vector",
    """
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, 4096);
    LocalTensor<half> x = buffer.Get<half>();
    GlobalTensor<half> a = gm<half>(src, 4096);
    GlobalTensor<half> to = gm<half>(out, 4096);
    """,
    gm_bytes=8192,
)
WRONG.add("a ragged count", "DataCopy(x, a, 100);", "100 elements are 200 bytes")
WRONG.add("no elements", "DataCopy(x, a, 0);", "0 elements")
WRONG.add("a misaligned chip address", "DataCopy(x[8], a, 16);", "dst starts at byte 16 of UB")
WRONG.add("too many rows", "DataCopy(x, a, DataCopyParams{4096, 1, 0, 0});", "blockCount is 4096")
WRONG.add("no rows", "DataCopy(x, a, DataCopyParams{0, 1, 0, 0});", "blockCount is 0")
WRONG.add("rows without blocks", "DataCopy(x, a, DataCopyParams{2, 0, 0, 0});", "blockLen is 0")
WRONG.add("a gap of 17 bits", "DataCopy(x, a, DataCopyParams{2, 1, 65536, 0});", "65536")
WRONG.add("a copy past the end of UB's tensor", "DataCopy(x[2032], a, 32);", "dst needs")
WRONG.add(
    "a read past the end of GM", "DataCopy(x, a[4080], 32);", "src reads the bytes 8160 to 8224"
)
WRONG.add(
    "rows past the end of GM",
    "DataCopy(x, a, DataCopyParams{3, 1, 200, 0});",
    "of 'src', which has 8192",
)
WRONG.add("storing what was never written", "DataCopy(to, x, 16);", "nothing has written")
WRONG.add(
    "storing a copy of what was never written",
    "DataCopy(x, a, 16); PipeBarrier<PIPE_ALL>(); DataCopy(x[1024], x, 32);"
    "PipeBarrier<PIPE_ALL>(); DataCopy(to, x[1024], 32);",
    "src reads byte 2080 of UB, which nothing has written",
)
WRONG.add(
    "global memory between two elements",
    "GlobalTensor<half> odd; odd.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(src + 1), 16);"
    "DataCopy(x, odd, 16);",
    "src starts at byte 1 of its tensor",
)
WRONG.add(
    "a load of the cube on a vector core",
    "LoadData(x, x, LoadData2DParams(0, 1, 1, 0, 0, false, 0));",
    "this core has no pipe MTE1",
)
WRONG.add(
    "a write to an input",
    "DataCopy(x, a, 16); PipeBarrier<PIPE_ALL>(); DataCopy(a, x, 16);",
    "which is read only",
)
WRONG.add(
    "overlap within UB",
    "DataCopy(x, a, 256); PipeBarrier<PIPE_ALL>(); DataCopy(x[16], x, 32);",
    "overlaps src",
)
WRONG.add(
    "a store that does not wait for the load",
    "DataCopy(x, a, 16); DataCopy(to, x, 16);",
    "a flag MTE2_MTE3 is missing",
)
WRONG.add(
    "Nd2Nz into UB",
    "DataCopy(x, a, Nd2NzParams{1, 16, 16, 0, 16, 16, 1, 0});",
    "dst lies in UB and has to lie in L1",
)


@pytest.mark.parametrize("name", WRONG.names)
def test_a_wrong_copy_is_reported(name: str) -> None:
    WRONG.check(name)


def test_rows_that_interleave_within_ub_are_no_overlap() -> None:
    body = """
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, 256);
    LocalTensor<float> x = buffer.Get<float>();
    DataCopy(x, gm<float>(src, 64), 64);
    PipeBarrier<PIPE_ALL>();
    DataCopy(x[8], x, DataCopyParams{4, 1, 1, 1});
    PipeBarrier<PIPE_ALL>();
    DataCopy(gm<float>(out, 64), x, 64);
    """
    src = np.arange(64, dtype=np.float32)
    got = run(body, {"src": src}, {"out": np.zeros(64, np.float32)}, globals=PROBES)["out"]
    want = src.reshape(4, 2, 8).copy()
    want[:, 1] = want[:, 0]
    np.testing.assert_array_equal(got, want.ravel())
