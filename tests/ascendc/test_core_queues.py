"""Queues and event ids: who owns a buffer, and the order a queue brings."""

import pytest

from spcomp.backends.ascendc.emulate import Launch
from tests.ascendc.cases import Cases
from tests.ascendc.harness import EmulatorFault

HEAD = """
TPipe pipe; TQue<TPosition::VECIN, 1> in; TQue<TPosition::VECOUT, 1> out;
pipe.InitBuffer(in, 2, 256); pipe.InitBuffer(out, 1, 256);
auto gx = Gm<float>(x); auto gy = Gm<float>(y);
"""

GOOD = {
    "pipeline": HEAD
    + """
        for (int i = 0; i < 8; ++i) {
          auto a = in.AllocTensor<float>(); Copy<PIPE_MTE2>(a, gx[i * 8], 8); in.EnQue(a);
          auto b = in.DeQue<float>(); auto c = out.AllocTensor<float>();
          Copy<PIPE_V>(c, b, 8); in.FreeTensor(b); out.EnQue(c);
          auto d = out.DeQue<float>(); Copy<PIPE_MTE3>(gy[i * 8], d, 8); out.FreeTensor(d);
        }""",
    "buffers take turns": HEAD
    + """
        auto a = in.AllocTensor<float>(); in.EnQue(a); auto b = in.DeQue<float>(); in.FreeTensor(b);
        auto c = in.AllocTensor<float>(); in.EnQue(c); c = in.DeQue<float>(); in.FreeTensor(c);
        Want(a.byte_offset() != c.byte_offset());""",
    "depth 2 keeps its order": """
        TPipe pipe; TQue<TPosition::VECIN, 2> q; pipe.InitBuffer(q, 2, 32);
        auto a = q.AllocTensor<float>(); auto b = q.AllocTensor<float>(); q.EnQue(b); q.EnQue(a);
        auto c = q.DeQue<float>(); auto d = q.DeQue<float>();
        Want(c.byte_offset() == b.byte_offset());
        q.FreeTensor(c); q.FreeTensor(d);""",
    "in place": """
        TPipe pipe; TQue<TPosition::VECIN, 0> q; pipe.InitBuffer(q, 1, 32); LocalTensor<float> a, b;
        q.AllocTensor(a); q.EnQue(a); q.DeQue(b); q.FreeTensor(b);""",
    "freed bytes are NaN": """
        TPipe pipe; TQue<TPosition::VECIN, 1> q; pipe.InitBuffer(q, 1, 32); auto gx = Gm<float>(x);
        auto a = q.AllocTensor<float>(); Copy<PIPE_MTE2>(a, gx, 8); q.EnQue(a);
        a = q.DeQue<float>(); q.FreeTensor(a); a = q.AllocTensor<float>();
        { emulator::Instr i("Look", PIPE_MTE2); i.own_pipe_in_order();
          float v = *i.read("src", a, 7, 1); Want(v != v); }
        q.FreeTensor(a);""",
    "freed without a queue": HEAD + "auto a = in.AllocTensor<float>(); in.FreeTensor(a);",
    "event ids are given and taken back": """
        TPipe pipe; auto a = pipe.AllocEventID<HardEvent::MTE2_V>();
        auto b = GetTPipePtr()->AllocEventID<HardEvent::MTE2_V>();
        auto c = pipe.AllocEventID<HardEvent::V_MTE2>();
        Want(a == 0 && b == 1 && c == 0 && pipe.FetchEventID<HardEvent::MTE2_V>() == 2);
        Want(pipe.FetchEventID(HardEvent::MTE2_V) == 2);
        pipe.ReleaseEventID<HardEvent::MTE2_V>(a);
        Want(pipe.FetchEventID<HardEvent::MTE2_V>() == 0);""",
    "a fixed id beside a queue": HEAD + "Order<HardEvent::MTE2_V>(0);",
}

FAULTY = {
    "missing FreeTensor": (
        HEAD + "for (int i = 0; i < 3; ++i) { auto a = in.AllocTensor<float>(); in.EnQue(a);"
        "in.DeQue<float>(); }",
        "AllocTensor: the VECIN queue has no free buffer among its 2; FreeTensor is missing",
    ),
    "DeQue of an empty queue": (HEAD + "in.DeQue<float>();", "DeQue: the VECIN queue is empty"),
    "EnQue beyond the depth": (
        HEAD + "auto a = in.AllocTensor<float>(); auto b = in.AllocTensor<float>(); in.EnQue(a);"
        "in.EnQue(b);",
        "EnQue: the VECIN queue of depth 1 holds 1 tensors already; DeQue is missing",
    ),
    "EnQue twice": (
        HEAD + "auto a = in.AllocTensor<float>(); in.EnQue(a); in.DeQue<float>(); in.EnQue(a);",
        "the tensor of the VECIN queue is out of the queue and not freed",
    ),
    "EnQue of another queue's tensor": (
        HEAD + "auto a = in.AllocTensor<float>(); out.EnQue(a);",
        "EnQue: the tensor does not come from this VECOUT queue",
    ),
    "freed while in the queue": (
        HEAD + "auto a = in.AllocTensor<float>(); in.EnQue(a); in.FreeTensor(a);",
        "FreeTensor: the tensor of the VECIN queue is in the queue",
    ),
    "freed twice": (
        HEAD + "auto a = in.AllocTensor<float>(); in.FreeTensor(a); in.FreeTensor(a);",
        "is freed already",
    ),
    "used after FreeTensor": (
        HEAD + "auto a = in.AllocTensor<float>(); in.FreeTensor(a); Write<PIPE_MTE2>(a, 0, 8);",
        "dst is used after FreeTensor",
    ),
    "used between EnQue and DeQue": (
        HEAD + "auto a = in.AllocTensor<float>(); Copy<PIPE_MTE2>(a, gx, 8); in.EnQue(a);"
        "Read<PIPE_V>(a, 0, 8);",
        "a flag MTE2_V is missing",
    ),
    "written by another pipe than the queue's": (
        HEAD + "auto a = in.AllocTensor<float>(); Write<PIPE_V>(a, 0, 8); in.EnQue(a);"
        "a = in.DeQue<float>(); Read<PIPE_MTE3>(a, 0, 8);",
        "a flag V_MTE3 is missing",
    ),
    "a vector barrier is not the queue's": (
        HEAD + "auto a = out.AllocTensor<float>(); Write<PIPE_V>(a, 0, 8); Read<PIPE_V>(a, 0, 8);",
        "PipeBarrier<PIPE_V> is missing",
    ),
    "left in the queue": (
        HEAD + "auto a = in.AllocTensor<float>(); in.EnQue(a);",
        "end of kernel: a tensor of the VECIN queue is still in the queue; DeQue is missing",
    ),
    "left allocated": (
        HEAD + "in.AllocTensor<float>();",
        "end of kernel: a tensor of the VECIN queue is not freed; FreeTensor is missing",
    ),
    "more than eight buffers": (
        "TPipe pipe; TQue<TPosition::VECIN, 1> a, b; pipe.InitBuffer(a, 6, 32);"
        "pipe.InitBuffer(b, 3, 32);",
        "the VECIN queues hold 9 buffers together; the most is 8",
    ),
    "a queue of the other kind of core": (
        "TPipe pipe; TQue<TPosition::A2, 1> a; pipe.InitBuffer(a, 1, 32);",
        "this core has no pipe MTE1 for a A2 queue",
    ),
    "a queue without buffers": (
        "TPipe pipe; TQue<TPosition::VECIN, 1> a; a.AllocTensor<float>();",
        "the VECIN queue has no buffers; InitBuffer is missing",
    ),
    "InitBuffer twice": (HEAD + "pipe.InitBuffer(in, 1, 32);", "has its buffers already"),
    "too many event ids": (
        "TPipe p; for (int i = 0; i < 7; ++i) p.AllocEventID<HardEvent::V_S>();",
        "AllocEventID<V_S>: every id from 0 to 5 is taken",
    ),
    "an id nobody gave": (
        "TPipe p; p.ReleaseEventID<HardEvent::V_S>(2);",
        "AllocEventID did not give this id",
    ),
}

CUBE = {
    "cube queues": """
        TPipe p; TQue<TPosition::A1, 1> a1; TQue<TPosition::A2, 1> a2; TQue<TPosition::CO1, 1> c;
        p.InitBuffer(a1, 2, 512); p.InitBuffer(a2, 2, 512); p.InitBuffer(c, 1, 1024);
        auto gx = Gm<float>(x); auto gy = Gm<float>(y);
        auto s = a1.AllocTensor<float>(); Copy<PIPE_MTE2>(s, gx, 64); a1.EnQue(s);
        s = a1.DeQue<float>(); auto t = a2.AllocTensor<float>(); Copy<PIPE_MTE1>(t, s, 64);
        a1.FreeTensor(s); a2.EnQue(t); t = a2.DeQue<float>();
        auto u = c.AllocTensor<float>(); Copy<PIPE_M>(u, t, 64); a2.FreeTensor(t); c.EnQue(u);
        u = c.DeQue<float>(); Copy<PIPE_FIX>(gy, u, 64); c.FreeTensor(u);""",
}

CASES = Cases(GOOD | {name: body for name, (body, _) in FAULTY.items()})


@pytest.mark.parametrize("name", GOOD)
def test_good_use_passes(name: str) -> None:
    CASES.run(name)


@pytest.mark.parametrize("name", FAULTY)
def test_wrong_use_is_reported(name: str) -> None:
    with pytest.raises(EmulatorFault) as found:
        CASES.run(name)
    assert FAULTY[name][1] in str(found.value)


def test_queues_of_the_cube_bring_order() -> None:
    results, _ = Cases(CUBE, Launch(kind="cube")).run("cube queues")
    assert results["y"].tolist() == list(range(64))


def test_a_fixed_id_beside_a_queue_is_warned_of() -> None:
    _, statistics = CASES.run("a fixed id beside a queue")
    assert statistics.warnings == (
        "SetFlag<MTE2_V>(0): a VECIN queue takes ids of this event too; use AllocEventID",
    )
