"""The two products of attention, S = Q K^T and O = P V, from global memory to global memory."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ascendc import models_moves as models
from tests.ascendc.harness import EmulatorFault, run

# Both products as a kernel does them: every pipe apart, each dependency one flag. `skip` leaves
# one of them out.
ATTENTION = """
#define ORDER(number, event)                  \\
    if (skip != number) {                     \\
        SetFlag<HardEvent::event>(0);         \\
        WaitFlag<HardEvent::event>(0);        \\
    }

constexpr uint32_t kRight = 32768;  // elements of L0B

struct Stores {
    TPipe pipe;
    TBuf<TPosition::A1> left, right;
    TBuf<TPosition::A2> l0a;
    TBuf<TPosition::B2> l0b;
    TBuf<TPosition::CO1> l0c;
    Stores() {
        pipe.InitBuffer(left, 65536);
        pipe.InitBuffer(right, 262144);
        pipe.InitBuffer(l0a, 65536);
        pipe.InitBuffer(l0b, 65536);
        pipe.InitBuffer(l0c, 131072);
    }
};

template <class T>
GlobalTensor<T> gm(GM_ADDR base) {
    GlobalTensor<T> tensor;
    tensor.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(base));
    return tensor;
}

// A row-major matrix becomes NZ with `padded` rows to a column of blocks.
template <class T>
void load_nz(LocalTensor<T> dst, GlobalTensor<T> src, int64_t rows, int64_t padded, int64_t columns,
             int64_t row_stride) {
    Nd2NzParams params;
    params.nValue = rows;
    params.dValue = columns;
    params.srcDValue = row_stride;
    params.dstNzC0Stride = padded;
    params.dstNzNStride = 1;
    DataCopy(dst, src, params);
}

// Columns first .. first + depth of the left operand, NZ with m rows, as ZZ.
template <class T>
void load_left(LocalTensor<T> dst, LocalTensor<T> src, int64_t m, int64_t first, int64_t depth) {
    for (int64_t row = 0; row < m / 16; ++row) {
        const int64_t start = first / 16 * (m / 16) + row;
        LoadData(dst[row * depth * 16], src,
                 LoadData2DParams(start, depth / 16, m / 16, 0, 0, false, 0));
    }
}

// S [g, n] = Q [g, d] K [n, d] transposed. The NZ image of K is already ZN of its transpose.
template <class T>
void scores(Stores& s, GM_ADDR q, GM_ADDR k, GM_ADDR out, int64_t g, int64_t n, int64_t d,
            int64_t heads, int64_t skip) {
    const int64_t m = (g + 15) / 16 * 16;
    LocalTensor<T> left = s.left.Get<T>(), right = s.right.Get<T>();
    LocalTensor<T> l0a = s.l0a.Get<T>(), l0b = s.l0b.Get<T>();
    LocalTensor<float> l0c = s.l0c.Get<float>();
    load_nz(left, gm<T>(q), g, m, d, d);
    load_nz(right, gm<T>(k)[(heads - 1) * d], n, n, d, heads * d);
    ORDER(0, MTE2_MTE1)
    load_left(l0a, left, m, 0, d);
    const int64_t tile = n * d > kRight ? kRight / d : n;
    for (int64_t first = 0; first < n; first += tile) {
        if (tile == n) {
            LoadData(l0b, right, LoadData2DParams(0, n / 16 * (d / 16), 1, 0, 0, false, 0));
        } else {
            for (int64_t block = 0; block < d / 16; ++block) {
                const int64_t start = block * (n / 16) + first / 16;
                LoadData(l0b[block * tile * 16], right,
                         LoadData2DParams(start, tile / 16, 1, 0, 0, false, 0));
            }
        }
        ORDER(1, MTE1_M)
        Mmad(l0c, l0a, l0b, MmadParams(m, tile, d, 0, false, true));
        ORDER(2, M_FIX)
        Fixpipe(gm<float>(out)[first], l0c, FixpipeParamsV220(tile, g, m, n, false));
        ORDER(3, M_MTE1)
        ORDER(4, FIX_M)
    }
}

// O [g, d] = P [g, n] V [n, d], over n in steps that fit L0B.
template <class T>
void values(Stores& s, GM_ADDR p, GM_ADDR v, GM_ADDR out, int64_t g, int64_t n, int64_t d,
            int64_t heads, int64_t skip, QuantMode_t quant) {
    const int64_t m = (g + 15) / 16 * 16;
    LocalTensor<T> left = s.left.Get<T>(), right = s.right.Get<T>();
    LocalTensor<T> l0a = s.l0a.Get<T>(), l0b = s.l0b.Get<T>();
    LocalTensor<float> l0c = s.l0c.Get<float>();
    load_nz(left, gm<T>(p), g, m, n, n);
    load_nz(right, gm<T>(v)[(heads - 1) * d], n, n, d, heads * d);
    ORDER(0, MTE2_MTE1)
    const int64_t step = n * d > kRight ? kRight / d : n;
    for (int64_t first = 0; first < n; first += step) {
        load_left(l0a, left, m, first, step);
        for (int64_t block = 0; block < step / 16; ++block) {
            LoadData(l0b[block * d * 16], right,
                     LoadData2DParams(first / 16 + block, d / 16, n / 16, 0, 0, true, 0));
        }
        ORDER(1, MTE1_M)
        Mmad(l0c, l0a, l0b, MmadParams(m, d, step, 0, false, first == 0));
        ORDER(3, M_MTE1)
    }
    ORDER(2, M_FIX)
    FixpipeParamsV220 params(d, g, m, d, false);
    params.quantPre = quant;
    Fixpipe(gm<T>(out), l0c, params);
}
"""

ATTENTION_BODY = """
    Stores s;
    const bool is_half = kind == 0;
    if (product == 0) {
        if (is_half) scores<half>(s, left, right, out, g, n, d, heads, skip);
        else scores<bfloat16_t>(s, left, right, out, g, n, d, heads, skip);
    } else {
        if (is_half) values<half>(s, left, right, out, g, n, d, heads, skip, F322F16);
        else values<bfloat16_t>(s, left, right, out, g, n, d, heads, skip, F322BF16);
    }
"""


def attention(
    product: str, kind: str, g: int, n: int, d: int, heads: int = 2, skip: int = -1
) -> tuple[np.ndarray, np.ndarray]:
    """Run one product of one head; gives what the kernel stored and what the model says."""
    rng = np.random.default_rng(n + d)
    left = models.draw_operand(rng, kind, g, d if product == "scores" else n)
    right = models.draw_operand(rng, kind, n, heads * d).reshape(n, heads, d)
    a, b = models.widen(left, kind), models.widen(right[:, -1], kind)
    if product == "scores":
        want = models.mmad(np.zeros((g, n), np.float32), a, b.T)
    else:
        exact = models.mmad(np.zeros((g, d), np.float32), a, b)
        want = models.to_bf16(exact) if kind == "bf16" else exact.astype(np.float16)
    scalars = {
        "product": ("scores", "values").index(product),
        "kind": ("half", "bf16").index(kind),
        "g": g,
        "n": n,
        "d": d,
        "heads": heads,
        "skip": skip,
    }
    got = run(
        ATTENTION_BODY,
        {"left": left, "right": right},
        {"out": np.zeros_like(want)},
        kind="cube",
        scalars=scalars,
        globals=ATTENTION,
    )["out"]
    return got, want


@pytest.mark.parametrize("product", ["scores", "values"])
@pytest.mark.parametrize("kind", ["half", "bf16"])
@pytest.mark.parametrize("n", [64, 128, 256, 512])
@pytest.mark.parametrize("d", [64, 128])
def test_attention_product_is_the_models_to_the_last_bit(
    product: str, kind: str, n: int, d: int
) -> None:
    # 20 of 32 rows, so that the padding rows of the left operand hold nothing.
    got, want = attention(product, kind, 20, n, d)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("g", [1, 5, 16, 64])
def test_attention_products_take_any_group(g: int) -> None:
    for product in ("scores", "values"):
        got, want = attention(product, "half", g, 128, 64)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("product", "skip", "words"),
    [
        ("scores", 0, "a flag MTE2_MTE1 is missing"),
        ("scores", 1, "a flag MTE1_M is missing"),
        ("scores", 2, "a flag M_FIX is missing"),
        ("scores", 3, "LoadData on pipe MTE1: dst writes"),
        ("scores", 4, "a flag FIX_M is missing"),
        ("values", 0, "a flag MTE2_MTE1 is missing"),
        ("values", 1, "a flag MTE1_M is missing"),
        ("values", 2, "a flag M_FIX is missing"),
        ("values", 3, "LoadData on pipe MTE1: dst writes"),
    ],
)
def test_a_missing_flag_is_reported(product: str, skip: int, words: str) -> None:
    with pytest.raises(EmulatorFault) as caught:
        attention(product, "half", 20, 512, 128, skip=skip)
    assert words in str(caught.value)
