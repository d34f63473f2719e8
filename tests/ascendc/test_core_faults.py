"""Fifteen faults seeded into two right kernels: softmax(Q K^T) on cube and vector cores, and an
addition with queues. Each has to be reported for what it is."""

from __future__ import annotations

import numpy as np
import pytest

from spcomp.backends.ascendc.emulate import Launch, Statistics
from tests.ascendc.harness import Array, EmulatorFault, run, run_counted

BLOCKS, ROWS, KEYS, DIM = 3, 16, 32, 16

# KEEP(n, ...) is left out and SEED(n, ...) put in where fault n is wanted.
GLOBALS = """
#define KEEP(fault, ...) if (which != fault) { __VA_ARGS__; }
#define SEED(fault, ...) if (which == fault) { __VA_ARGS__; }

void score(GM_ADDR q, GM_ADDR k, GM_ADDR s, int64_t which) {
  TPipe pipe;
  TBuf<TPosition::A1> l1q_buf, l1k_buf;
  TBuf<TPosition::A2> l0a_buf;
  TBuf<TPosition::B2> l0b_buf;
  TBuf<TPosition::CO1> l0c_buf;
  pipe.InitBuffer(l1q_buf, 512);
  pipe.InitBuffer(l1k_buf, 1024);
  pipe.InitBuffer(l0a_buf, 512);
  pipe.InitBuffer(l0b_buf, 1024);
  pipe.InitBuffer(l0c_buf, 2048);
  auto l1q = l1q_buf.Get<half>(), l1k = l1k_buf.Get<half>();
  auto l0a = l0a_buf.Get<half>(), l0b = l0b_buf.Get<half>();
  auto l0c = l0c_buf.Get<float>();
  GlobalTensor<half> gq, gk;
  GlobalTensor<float> gs;
  gq.SetGlobalBuffer((__gm__ half*)q + GetBlockIdx() * 256);
  gk.SetGlobalBuffer((__gm__ half*)k + GetBlockIdx() * 512);
  gs.SetGlobalBuffer((__gm__ float*)s + GetBlockIdx() * 512);

  DataCopy(l1q, gq, Nd2NzParams{1, 16, 16, 0, 16, 16, 1, 0});
  DataCopy(l1k, gk, Nd2NzParams{1, 32, 16, 0, 16, 32, 1, 0});
  SetFlag<HardEvent::MTE2_MTE1>(0);
  WaitFlag<HardEvent::MTE2_MTE1>(0);
  LoadData(l0a, l1q, LoadData2DParams{0, 1, 1, 0, 0, false, 0});
  LoadData(l0b, l1k, LoadData2DParams{0, 2, 1, 0, 0, false, 0});
  SetFlag<HardEvent::MTE1_M>(0);
  KEEP(13, WaitFlag<HardEvent::MTE1_M>(0))
  Mmad(l0c, l0a, l0b, MmadParams{16, 32, 16, 0, false, true});
  SEED(13, WaitFlag<HardEvent::MTE1_M>(0))
  SetFlag<HardEvent::M_FIX>(0);
  WaitFlag<HardEvent::M_FIX>(0);
  Fixpipe<float, float, CFG_ROW_MAJOR>(gs, l0c, FixpipeParamsV220(32, 16, 16, 32, false));
  KEEP(9, (CrossCoreSetFlag<2, PIPE_FIX>(0)))
}

void softmax(GM_ADDR s, GM_ADDR out, int64_t which) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> tile_buf, one_buf, work_buf;
  pipe.InitBuffer(tile_buf, which == 1 ? 188160 : 1024);
  pipe.InitBuffer(one_buf, 64);
  pipe.InitBuffer(work_buf, 256);
  auto tile = tile_buf.Get<float>(), one = one_buf.Get<float>(), work = work_buf.Get<float>();
  GlobalTensor<float> gs, go;
  int64_t first = GetBlockIdx() * 256;
  gs.SetGlobalBuffer((__gm__ float*)s + first);
  go.SetGlobalBuffer((__gm__ float*)out);

  KEEP(14, CrossCoreWaitFlag(0))
  DataCopy(tile, gs, which == 3 ? 100 : 256);
  KEEP(15, SetFlag<HardEvent::MTE2_V>(0); WaitFlag<HardEvent::MTE2_V>(0))
  for (int row = 0; row < 8; ++row) {
    auto line = tile[row * 32];
    ReduceMax(one, line, work, 32);
    SetFlag<HardEvent::V_S>(0);
    WaitFlag<HardEvent::V_S>(0);
    float most = one.GetValue(0);
    Adds(line, line, -most, 32);
    PipeBarrier<PIPE_V>();
    Exp(which == 2 ? line[1] : line, line, which == 2 ? 31 : 32);
    PipeBarrier<PIPE_V>();
    ReduceSum(one[8], line, work, 32);
    SetFlag<HardEvent::V_S>(0);
    WaitFlag<HardEvent::V_S>(0);
    Muls(line, line, 1.0f / one.GetValue(8), 32);
    SetFlag<HardEvent::S_V>(0);
    WaitFlag<HardEvent::S_V>(0);
  }
  KEEP(12, SetFlag<HardEvent::V_MTE3>(0); WaitFlag<HardEvent::V_MTE3>(0))
  DataCopy(go[which == 6 ? first + 8 : first], tile, 256);
  SEED(14, CrossCoreWaitFlag(0))
}

void add(GM_ADDR x, GM_ADDR y, GM_ADDR z, int64_t which) {
  TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  TQue<TPosition::VECOUT, 1> out;
  TBuf<TPosition::VECCALC> buf;
  pipe.InitBuffer(in, 2, 256);
  pipe.InitBuffer(out, 1, 256);
  pipe.InitBuffer(buf, 256);
  GlobalTensor<float> gx, gy, gz;
  gx.SetGlobalBuffer((__gm__ float*)x + GetBlockIdx() * 256);
  gy.SetGlobalBuffer((__gm__ float*)y);
  gz.SetGlobalBuffer((__gm__ float*)z + GetBlockIdx() * 256);
  auto added = buf.Get<float>();
  DataCopy(added, gy, 64);
  KEEP(7, SetFlag<HardEvent::MTE2_V>(2))
  KEEP(11, WaitFlag<HardEvent::MTE2_V>(2))
  Adds(added, added, 0.0f, 64);
  PipeBarrier<PIPE_V>();
  for (int i = 0; i < 4; ++i) {
    auto a = in.AllocTensor<float>();
    DataCopy(a, gx[i * 64], 64);
    KEEP(5, in.EnQue(a))
    a = in.DeQue<float>();
    auto c = out.AllocTensor<float>();
    Add(c, a, added, 64);
    KEEP(4, in.FreeTensor(a))
    out.EnQue(c);
    c = out.DeQue<float>();
    DataCopy(gz[i * 64], c, 64);
    out.FreeTensor(c);
  }
  SEED(8, SetFlag<HardEvent::V_S>(1); SetFlag<HardEvent::V_S>(1))
  SEED(10, SetFlag<HardEvent::V_MTE2>(1))
  SEED(11, WaitFlag<HardEvent::MTE2_V>(2))
}
"""

FAULTS = {
    1: ("UB overflow", "TPipe overflows UB: VECCALC 188160 + VECCALC 64 = 188224 bytes"),
    2: ("misaligned operand", "Exp on pipe V: dst starts at byte 4 of UB"),
    3: ("100-element copy", "DataCopy on pipe MTE2"),
    6: ("GM overrun", "of 'out', which has 6144"),
    9: ("never-signalled cross-core flag", "AIV 0 waits in CrossCoreWaitFlag(0); AIV 1 waits in"),
    12: ("missing V_MTE3", "which Muls of AIV"),
    13: ("late MTE1_M", "Mmad on pipe M"),
    14: ("missing cross-core wait", "nothing between the two cores orders them"),
    15: ("missing MTE2_V before the softmax", "a flag MTE2_V is missing"),
}
QUEUE_FAULTS = {
    4: (
        "missing FreeTensor",
        "the VECIN queue has no free buffer among its 2; FreeTensor is missing",
    ),
    5: ("DeQue of an empty queue", "DeQue: the VECIN queue is empty; EnQue is missing"),
    7: ("wait without set", "WaitFlag<MTE2_V>(2): nothing has set it, so the core would hang"),
    8: ("double set", "SetFlag<V_S>(1): it is set already; WaitFlag is missing"),
    10: ("flag left set", "end of kernel: the flag V_MTE2(1) is still set; WaitFlag is missing"),
    11: (
        "missing MTE2_V",
        "Adds on pipe V: src reads the 32 bytes of UB at 768, which DataCopy of AIV 0",
    ),
}


def attend(fault: int, descending: bool = False) -> tuple[Array, Array, Statistics]:
    rng = np.random.default_rng(3)
    q = rng.normal(size=(BLOCKS, ROWS, DIM)).astype(np.float16)
    k = rng.normal(size=(BLOCKS, KEYS, DIM)).astype(np.float16)
    shape = (BLOCKS, ROWS, KEYS)
    results, statistics = run_counted(
        "if ASCEND_IS_AIC { score(q, k, s, which); } else { softmax(s, out, which); }",
        {"q": q, "k": k},
        {"s": np.full(shape, np.nan, np.float32), "out": np.zeros(shape, np.float32)},
        Launch(kind="mix", blocks=BLOCKS, descending=descending),
        scalars={"which": fault},
        globals=GLOBALS,
    )
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(1, 2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return results["out"], weights / weights.sum(-1, keepdims=True), statistics


def add(fault: int, blocks: int = 2) -> tuple[Array, Array]:
    x, y = np.arange(blocks * 256, dtype=np.float32), np.arange(64, dtype=np.float32)
    given, wanted = {"x": x, "y": y}, {"z": np.zeros_like(x)}
    body = "add(x, y, z, which);"
    scalars = {"which": fault}
    result = run(body, given, wanted, blocks=blocks, scalars=scalars, globals=GLOBALS)
    return result["z"], x + np.tile(y, blocks * 4)


@pytest.mark.parametrize("descending", [False, True])
def test_the_right_kernels_pass(descending: bool) -> None:
    got, want, statistics = attend(0, descending)
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert statistics.checks > 1000
    assert statistics.warnings == ()
    np.testing.assert_array_equal(*add(0))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda n: FAULTS[n][0])
def test_a_fault_in_the_mix_kernel_is_reported(fault: int, descending: bool) -> None:
    with pytest.raises(EmulatorFault) as found:
        attend(fault, descending)
    assert FAULTS[fault][1] in str(found.value)


@pytest.mark.parametrize("fault", QUEUE_FAULTS, ids=lambda n: QUEUE_FAULTS[n][0])
def test_a_fault_in_the_queue_kernel_is_reported(fault: int) -> None:
    with pytest.raises(EmulatorFault) as found:
        add(fault)
    assert QUEUE_FAULTS[fault][1] in str(found.value)
