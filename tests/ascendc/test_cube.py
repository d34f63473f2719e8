"""Mmad: every lane against the model, and its wrong uses."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ascendc import models_moves as models
from tests.ascendc.harness import run
from tests.ascendc.probes_moves import PROBES, WrongUses, table_of

KINDS = ("half", "bf16", "float", "int8")
CASES = 48
LEFT, RIGHT, TILE = 8192, 8192, 8192  # elements of A, of B and of C that a case can use

MMAD = (
    PROBES
    + f"constexpr int64_t kLeft = {LEFT}, kRight = {RIGHT}, kTile = {TILE};"
    + """
template <class C, class T>
void one(const Case& c, int64_t number, LocalTensor<C> tile, LocalTensor<T> left,
         LocalTensor<T> right, GM_ADDR a, GM_ADDR b, GM_ADDR old, GM_ADDR out) {
    place(left, gm<T>(a + number * kLeft * 4, kLeft), 0, kLeft);
    place(right, gm<T>(b + number * kRight * 4, kRight), 0, kRight);
    place(tile, gm<C>(old, kTile), 0, kTile);
    Mmad(tile, left, right, MmadParams(c(1), c(2), c(3), 0, false, c(4) != 0));
    peek(gm<C>(out + number * kTile * 4, kTile), 0, tile, kTile);
}
"""
)

MMAD_BODY = """
    TPipe pipe;
    TBuf<TPosition::A2> l0a;
    TBuf<TPosition::B2> l0b;
    TBuf<TPosition::CO1> l0c;
    pipe.InitBuffer(l0a, kLeft * 4);
    pipe.InitBuffer(l0b, kRight * 4);
    pipe.InitBuffer(l0c, kTile * 4);
    LocalTensor<float> sums = l0c.Get<float>();
    for (int i = 0; i < cases; ++i) {
        const Case c{gm<int32_t>(table, cases * 5), i * 5};
        switch (c(0)) {
            case 0: one(c, i, sums, l0a.Get<half>(), l0b.Get<half>(), a, b, old, out); break;
            case 1:
                one(c, i, sums, l0a.Get<bfloat16_t>(), l0b.Get<bfloat16_t>(), a, b, old, out);
                break;
            case 2: one(c, i, sums, l0a.Get<float>(), l0b.Get<float>(), a, b, old, out); break;
            case 3:
                one(c, i, l0c.Get<int32_t>(), l0a.Get<int8_t>(), l0b.Get<int8_t>(), a, b, old, out);
                break;
        }
    }
"""


def test_products_agree_with_the_model_lane_by_lane() -> None:
    rng = np.random.default_rng(7)
    old = rng.integers(-9, 9, TILE, np.int32)
    a, b = np.zeros((CASES, LEFT * 4), np.uint8), np.zeros((CASES, RIGHT * 4), np.uint8)
    cases, operands = [], []
    for number in range(CASES):
        kind = number % 4
        m, n, k = int(rng.integers(2, 65)), int(rng.integers(1, 97)), int(rng.integers(1, 65))
        if number // 4 % 3 == 0:
            m, n, k = (-(-size // 32) * 32 for size in (m, n, k))
        left = models.draw_operand(rng, KINDS[kind], m, k)
        right = models.draw_operand(rng, KINDS[kind], n, k)
        image = models.to_fractals(left, column_major_blocks=False).view(np.uint8)
        a[number, : image.size] = image
        image = models.to_fractals(right, column_major_blocks=True).view(np.uint8)
        b[number, : image.size] = image
        cases.append((kind, m, n, k, number // 16 % 2))
        operands.append((models.widen(left, KINDS[kind]), models.widen(right.T, KINDS[kind])))
    got = run(
        MMAD_BODY,
        {"table": table_of(cases), "a": a, "b": b, "old": old},
        {"out": np.zeros((CASES, TILE), np.int32)},
        kind="cube",
        scalars={"cases": CASES},
        globals=MMAD,
    )["out"]
    for case, (left, right), seen in zip(cases, operands, got, strict=True):
        kind, m, n, _, from_zero = case
        accumulator = np.dtype(np.int32 if KINDS[kind] == "int8" else np.float32)
        start = models.from_l0c(old.view(accumulator), m, n)
        want = models.mmad(np.zeros_like(start) if from_zero else start, left, right)
        shown = models.from_l0c(seen.view(accumulator), m, n)
        np.testing.assert_array_equal(shown, want, err_msg=f"case {case}")
        high, wide = -(-m // 16) * 16, -(-n // 16) * 16
        whole = models.from_l0c(seen, high, wide).copy()
        whole[:m, :n] = -1
        assert (whole == -1).all(), f"lanes beyond m and n are defined in case {case}"
        np.testing.assert_array_equal(seen[high * wide :], old[high * wide :])


WRONG = WrongUses(
    "cube",
    """
    TPipe pipe;
    TBuf<TPosition::A1> l1;
    TBuf<TPosition::A2> l0a;
    TBuf<TPosition::B2> l0b;
    TBuf<TPosition::CO1> l0c;
    pipe.InitBuffer(l1, 8192);
    pipe.InitBuffer(l0a, 8192);
    pipe.InitBuffer(l0b, 8192);
    pipe.InitBuffer(l0c, 16384);
    LocalTensor<half> x = l1.Get<half>(), a = l0a.Get<half>(), b = l0b.Get<half>();
    LocalTensor<float> c = l0c.Get<float>();
    GlobalTensor<half> zeros = gm<half>(src, 4096);
    GlobalTensor<float> to = gm<float>(out, 16384);
    place(a, zeros, 0, 1024);
    place(b, zeros, 0, 1024);
    MmadParams p(32, 32, 32, 0, false, true);
    """,
)
WRONG.add("a single row", "p.m = 1; Mmad(c, a, b, p);", "m is 1, which makes the cube read A")
WRONG.add("no rows", "p.m = 0; Mmad(c, a, b, p);", "m is 0; it must be 1 to 4095")
WRONG.add("no columns", "p.n = 0; Mmad(c, a, b, p);", "n is 0; it must be 1 to 4095")
WRONG.add("too deep", "p.k = 4096; Mmad(c, a, b, p);", "k is 4096; it must be 1 to 4095")
WRONG.add("more rows than the field holds", "p.m = 65536; Mmad(c, a, b, p);", "65536")
WRONG.add("a unit flag", "p.unitFlag = 2; Mmad(c, a, b, p);", "unitFlag is 2")
WRONG.add("the bias table", "p.cmatrixSource = true; Mmad(c, a, b, p);", "cmatrixSource is true")
WRONG.add("a right operand in L0A", "Mmad(c, a, a, p);", "filter lies in L0A")
WRONG.add("a left operand in L1", "Mmad(c, x, b, p);", "fm lies in L1")
WRONG.add("a result in L0A", "Mmad(l0a.Get<float>(), a, b, p);", "dst lies in L0A")
WRONG.add("a result between fractals", "Mmad(c[128], a, b, p);", "dst starts at byte 512 of L0C")
WRONG.add("an operand between fractals", "Mmad(c, a[16], b, p);", "fm starts at byte 32 of L0A")
WRONG.add("a result past the end", "p.n = 2048; p.m = 32; Mmad(c, a, b, p);", "filter needs")
WRONG.add("a left tile that was never loaded", "Mmad(c, a[1024], b, p);", "fm reads a tile")
WRONG.add("a right tile that was never loaded", "Mmad(c, a, b[1024], p);", "filter reads a tile")
WRONG.add(
    "deeper than loaded",
    "p.m = 16; p.k = 80; Mmad(c, a, b, p);",
    "fm reads row 0, of whose 80 elements along k only 64",
)
WRONG.add(
    "a sum over rows that were never loaded",
    "DataCopy(x, zeros, Nd2NzParams{1, 20, 16, 0, 16, 32, 1, 0}); PipeBarrier<PIPE_ALL>();"
    "LoadData(b, x, LoadData2DParams(0, 2, 1, 0, 0, true, 0)); PipeBarrier<PIPE_ALL>();"
    "p.n = 16; Mmad(c, a, b, p);",
    "filter reads column 0, of whose 32 elements along k only 20",
)
WRONG.add(
    "adding to what was never written",
    "p.cmatrixInitVal = false; Mmad(c, a, b, p);",
    "dst adds to row 0, column 0",
)
WRONG.add(
    "adding without a barrier",
    "Mmad(c, a, b, p); p.cmatrixInitVal = false; Mmad(c, a, b, p);",
    "PipeBarrier<PIPE_M> is missing",
)
WRONG.add(
    "storing a lane beyond n",
    "p.n = 24; Mmad(c, a, b, p); PipeBarrier<PIPE_ALL>();"
    "Fixpipe(to, c, FixpipeParamsV220(32, 32, 32, 32, false));",
    "src reads byte",
)
WRONG.add(
    "storing a padding row",
    "DataCopy(x, zeros, Nd2NzParams{1, 5, 32, 0, 32, 16, 1, 0}); PipeBarrier<PIPE_ALL>();"
    "LoadData(a, x, LoadData2DParams(0, 2, 1, 0, 0, false, 0)); PipeBarrier<PIPE_ALL>();"
    "p.m = 16; Mmad(c, a, b, p); PipeBarrier<PIPE_ALL>();"
    "Fixpipe(to, c, FixpipeParamsV220(32, 6, 16, 32, false));",
    "src reads byte 320 of L0C, which nothing has written",
)


@pytest.mark.parametrize("name", WRONG.names)
def test_a_wrong_product_is_reported(name: str) -> None:
    WRONG.check(name)


def test_large_tiles_add_up_without_a_barrier() -> None:
    body = """
    TPipe pipe;
    TBuf<TPosition::A2> l0a;
    TBuf<TPosition::B2> l0b;
    TBuf<TPosition::CO1> l0c;
    pipe.InitBuffer(l0a, 4096);
    pipe.InitBuffer(l0b, 8192);
    pipe.InitBuffer(l0c, 16384);
    LocalTensor<half> a = l0a.Get<half>(), b = l0b.Get<half>();
    LocalTensor<float> c = l0c.Get<float>();
    place(a, gm<half>(src, 4096), 0, 512);
    place(b, gm<half>(src, 4096), 0, 1280);
    Mmad(c, a, b, MmadParams(32, 80, 16, 0, false, true));
    Mmad(c, a, b, MmadParams(32, 80, 16, 0, false, false));
    PipeBarrier<PIPE_ALL>();
    Fixpipe(gm<float>(out, 2560), c, FixpipeParamsV220(80, 32, 32, 80, false));
    """
    src = np.ones(4096, np.float16)
    out = np.zeros((32, 80), np.float32)
    got = run(body, {"src": src}, {"out": out}, kind="cube", globals=PROBES)["out"]
    np.testing.assert_array_equal(got, np.full_like(out, 32))
