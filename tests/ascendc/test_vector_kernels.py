"""Two whole vector kernels: the softmax of rows, and the top k of a row of scores.

They show that the instructions fit together under queues and explicit barriers, with the results a
kernel author expects.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.ascendc.harness import EmulatorFault, run

SOFTMAX = """
  // One row of N scores at a time: load, subtract the maximum, exponentiate, divide by the sum.
  constexpr int32_t N = 192;
  TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  TQue<TPosition::VECOUT, 1> out;
  TBuf<TPosition::VECCALC> work, scratch, row_value;
  pipe.InitBuffer(in, 2, N * sizeof(half));
  pipe.InitBuffer(out, 2, N * sizeof(half));
  pipe.InitBuffer(work, N * sizeof(float));
  pipe.InitBuffer(scratch, 256);
  pipe.InitBuffer(row_value, 32 + 256);
  GlobalTensor<half> x, y;
  x.SetGlobalBuffer((__gm__ half*)scores, rows * N);
  y.SetGlobalBuffer((__gm__ half*)result, rows * N);
  LocalTensor<float> p = work.Get<float>(), tmp = scratch.Get<float>();
  LocalTensor<float> one = row_value.Get<float>(), block = one[8];
  for (int64_t row = GetBlockIdx(); row < rows; row += GetBlockNum()) {
    LocalTensor<half> loaded = in.AllocTensor<half>();
    DataCopy(loaded, x[row * N], N);
    in.EnQue(loaded);
    loaded = in.DeQue<half>();
    Cast(p, loaded, RoundMode::CAST_NONE, N);
    in.FreeTensor(loaded);
    PipeBarrier<PIPE_V>();
    ReduceMax(one, p, tmp, N);
    PipeBarrier<PIPE_V>();
    Brcb(block, one, 1, {1, 8});
    PipeBarrier<PIPE_V>();
    Sub(p, p, block, 64, N / 64, {1, 1, 0, 8, 8, 0});
    PipeBarrier<PIPE_V>();
    Exp(p, p, N);
    PipeBarrier<PIPE_V>();
    ReduceSum(one, p, tmp, N);
    PipeBarrier<PIPE_V>();
    Brcb(block, one, 1, {1, 8});
    PipeBarrier<PIPE_V>();
    Div(p, p, block, 64, N / 64, {1, 1, 0, 8, 8, 0});
    PipeBarrier<PIPE_V>();
    LocalTensor<half> stored = out.AllocTensor<half>();
    Cast(stored, p, RoundMode::CAST_RINT, N);
    out.EnQue(stored);
    stored = out.DeQue<half>();
    DataCopy(y[row * N], stored, N);
    out.FreeTensor(stored);
  }
"""

TOP_K = """
  // 128 scores in four groups of 32: sort the groups, merge them, keep the indices of the first K.
  constexpr uint32_t N = 128, K = 16;
  TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  TQue<TPosition::VECOUT, 1> out;
  TBuf<TPosition::VECCALC> numbers, pairs, merged;
  pipe.InitBuffer(pairs, N * 8);
  pipe.InitBuffer(merged, N * 8);
  pipe.InitBuffer(in, 1, N * sizeof(float));
  pipe.InitBuffer(out, 1, N * sizeof(uint32_t));
  pipe.InitBuffer(numbers, N * sizeof(int32_t));
  GlobalTensor<float> x;
  GlobalTensor<uint32_t> y;
  x.SetGlobalBuffer((__gm__ float*)scores, N);
  y.SetGlobalBuffer((__gm__ uint32_t*)result, K);
  LocalTensor<float> loaded = in.AllocTensor<float>();
  DataCopy(loaded, x, N);
  in.EnQue(loaded);
  loaded = in.DeQue<float>();
  LocalTensor<int32_t> index = numbers.Get<int32_t>();
  CreateVecIndex(index, 0, N);
  PipeBarrier<PIPE_V>();
  LocalTensor<float> sorted = pairs.Get<float>(), all = merged.Get<float>();
  Sort32(sorted, loaded, index.ReinterpretCast<uint32_t>(), N / 32);
  in.FreeTensor(loaded);
  BARRIER
  const uint16_t lengths[4] = {32, 32, 32, 32};
  MrgSort(all, MrgSortSrcList<float>(sorted, sorted[64], sorted[128], sorted[192]),
          MrgSort4Info(lengths, false, 15, 1));
  PipeBarrier<PIPE_V>();
  LocalTensor<uint32_t> kept = out.AllocTensor<uint32_t>();
  uint64_t count = 0;
  GatherMask(kept, all.ReinterpretCast<uint32_t>(), uint8_t{2}, true, 2 * K, {1, 1, 0, 0}, count);
  out.EnQue(kept);
  kept = out.DeQue<uint32_t>();
  DataCopy(y, kept, K);
  out.FreeTensor(kept);
"""


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_softmax_of_rows(blocks: int) -> None:
    scores = np.random.default_rng(7).normal(0, 3, (5, 192)).astype(np.float16)
    scores[2, 10:] = -np.inf
    got = run(
        SOFTMAX,
        {"scores": scores},
        {"result": np.zeros_like(scores)},
        blocks=blocks,
        scalars={"rows": 5},
    )["result"]
    wide = np.exp(scores.astype(np.float64) - scores.astype(np.float64).max(1, keepdims=True))
    np.testing.assert_allclose(got, wide / wide.sum(1, keepdims=True), rtol=1e-3, atol=1e-7)


def test_top_k_of_a_row_with_ties() -> None:
    scores = np.random.default_rng(8).integers(-9, 9, 128).astype(np.float32)
    body = TOP_K.replace("BARRIER", "PipeBarrier<PIPE_V>();")
    got = run(body, {"scores": scores}, {"result": np.zeros(16, np.uint32)})["result"]
    np.testing.assert_array_equal(got, np.argsort(-scores, kind="stable")[:16])


def test_a_barrier_left_out_is_reported() -> None:
    scores = np.arange(128, dtype=np.float32)
    with pytest.raises(EmulatorFault, match=r"MrgSort .* src1 reads .* PipeBarrier<PIPE_V>"):
        run(TOP_K.replace("BARRIER", ""), {"scores": scores}, {"result": np.zeros(16, np.uint32)})
