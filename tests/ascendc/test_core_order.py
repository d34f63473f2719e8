"""The ordering analysis inside one core: which instructions need a flag or a barrier."""

import pytest

from spcomp.backends.ascendc.emulate import Launch
from tests.ascendc.cases import Cases, X
from tests.ascendc.harness import EmulatorFault

HEAD = """
TPipe pipe; UbBuf buf; pipe.InitBuffer(buf, 1024);
auto gx = Gm<float>(x); auto gy = Gm<float>(y); auto gw = Gm<float>(w);
auto t = buf.Get<float>();
"""

GOOD = {
    "load, compute, store": """
        Copy<PIPE_MTE2>(t, gx, 64); Order<HardEvent::MTE2_V>();
        Read<PIPE_V>(t, 0, 64); PipeBarrier<PIPE_V>(); Write<PIPE_V>(t, 64, 8);
        Order<HardEvent::MTE2_MTE3>(); Copy<PIPE_MTE3>(gy, t, 64);""",
    "write after read in one pipe starts in order": """
        Read<PIPE_V>(t, 0, 8); Write<PIPE_V>(t, 0, 8);""",
    "read and write of one instruction": "Copy<PIPE_V>(t, t, 64);",
    "windows of one instruction in one cell": """
        emulator::Instr i("Two", PIPE_V); i.write("a", t, 0, 1); i.write("a", t, 1, 1);
        i.read("b", t, 2, 1);""",
    "cells of 32 bytes are apart": "Write<PIPE_V>(t, 0, 8); Read<PIPE_MTE3>(t, 8, 8);",
    "a barrier covers its own pipe": "Write<PIPE_V>(t, 0, 8); PipeBarrier<PIPE_V>();"
    "Read<PIPE_V>(t, 0, 8);",
    "the full barrier covers all": """
        Copy<PIPE_MTE2>(t, gx, 8); PipeBarrier<PIPE_ALL>(); Read<PIPE_V>(t, 0, 8);
        Write<PIPE_MTE3>(gy, 0, 8);""",
    "flags carry what they have learnt": """
        Copy<PIPE_MTE2>(t, gx, 8); Order<HardEvent::MTE2_V>(); Order<HardEvent::V_MTE3>();
        Read<PIPE_MTE3>(t, 0, 8);""",
    "the scalar unit passes on what it waited for": """
        Write<PIPE_V>(t, 0, 16); Order<HardEvent::V_S>(); Read<PIPE_MTE3>(t, 0, 8);
        Copy<PIPE_MTE2>(t[8], gx, 8);""",
    "scalar access needs nothing of its own": "t.SetValue(0, 3.f); gy.SetValue(0, t.GetValue(0));"
    "DataCacheCleanAndInvalid<float, kWhole, kClean>(gy);",
    "set after wait again": "for (int i = 0; i < 20; ++i) Order<HardEvent::MTE2_V>(3);",
    "atomic adds commute": """
        Copy<PIPE_MTE2>(t, gx, 64); Order<HardEvent::MTE2_MTE3>(); SetAtomicAdd<float>();
        Copy<PIPE_MTE3>(gy, t, 64); Copy<PIPE_MTE3>(gy, t, 32); SetAtomicNone();""",
    "reserved ids": "Order<HardEvent::MTE2_V>(6);",
    "any number of readers": "Read<PIPE_V>(t, 0, 8); Read<PIPE_MTE3>(t, 0, 8); t[9].GetSize();",
}

FAULTY = {
    "MTE2 to V": ("Copy<PIPE_MTE2>(t, gx, 64); Read<PIPE_V>(t, 0, 8);", "a flag MTE2_V is missing"),
    "V to MTE3": (
        "Write<PIPE_V>(t, 0, 8); Copy<PIPE_MTE3>(gy, t, 8);",
        "Copy on pipe MTE3: src reads the 32 bytes of UB at 0, which Write of AIV 0 (instruction 1 "
        "of pipe V) writes and may not have finished: a flag V_MTE3 is missing",
    ),
    "MTE3 to MTE2, write after read": (
        "Read<PIPE_MTE3>(t, 0, 8); Copy<PIPE_MTE2>(t, gx, 8);",
        "reads and may not have finished: a flag MTE3_MTE2 is missing",
    ),
    "V to V, read after write": (
        "Write<PIPE_V>(t, 0, 8); Read<PIPE_V>(t, 7, 1);",
        "PipeBarrier<PIPE_V> is missing",
    ),
    "V to V, write after write": (
        "Write<PIPE_V>(t, 0, 8); Write<PIPE_V>(t, 0, 8);",
        "PipeBarrier<PIPE_V> is missing",
    ),
    "MTE2 to MTE2": (
        "Copy<PIPE_MTE2>(t, gx, 8); Copy<PIPE_MTE2>(t, gx, 8);",
        "PipeBarrier<PIPE_MTE2> is missing",
    ),
    "V to S": ("Write<PIPE_V>(t, 0, 8); t.GetValue(0);", "a flag V_S is missing"),
    "S to V": ("t.SetValue(0, 1.f); Read<PIPE_V>(t, 0, 1);", "a flag S_V is missing"),
    "the flag before the write covers nothing": (
        "SetFlag<HardEvent::V_MTE3>(0); Write<PIPE_V>(t, 0, 8); WaitFlag<HardEvent::V_MTE3>(0);"
        "Read<PIPE_MTE3>(t, 0, 8);",
        "a flag V_MTE3 is missing",
    ),
    "a flag of another pair": (
        "Copy<PIPE_MTE2>(t, gx, 8); Order<HardEvent::MTE2_MTE3>(); Read<PIPE_V>(t, 0, 8);",
        "a flag MTE2_V is missing",
    ),
    "GM, store to load": (
        "Write<PIPE_MTE3>(gw, 0, 8); Copy<PIPE_MTE2>(t, gw, 8);",
        "src reads 'w' at byte 0, which Write of AIV 0 (instruction 1 of pipe MTE3) writes",
    ),
    "GM, store over store": (
        "Write<PIPE_MTE3>(gw, 4, 8); Write<PIPE_MTE3>(gw, 0, 5);",
        "dst writes 'w' at byte 16, which",
    ),
    "GM, a plain read of unordered atomic adds": (
        "SetAtomicAdd<float>(); Write<PIPE_MTE3>(gw, 0, 8); SetAtomicNone();"
        "Read<PIPE_MTE2>(gw, 7, 1);",
        "a flag MTE3_MTE2 is missing",
    ),
    "wait without set": (
        "WaitFlag<HardEvent::MTE2_V>(0);",
        "WaitFlag<MTE2_V>(0): nothing has set it, so the core would hang",
    ),
    "set twice": (
        "SetFlag<HardEvent::MTE2_V>(0); SetFlag<HardEvent::MTE2_V>(0);",
        "SetFlag<MTE2_V>(0): it is set already; WaitFlag is missing",
    ),
    "flag left set": (
        "SetFlag<HardEvent::MTE2_V>(1);",
        "end of kernel: the flag MTE2_V(1) is still set; WaitFlag is missing",
    ),
    "id out of range": ("Order<HardEvent::MTE2_V>(8);", "the id 8 is not from 0 to 7"),
    "event of the other kind of core": (
        "Order<HardEvent::MTE1_M>();",
        "SetFlag<MTE1_M>: this core has no such event",
    ),
    "barrier of the scalar pipe": ("PipeBarrier<PIPE_S>();", "the scalar pipe takes no barrier"),
    "barrier of the other kind of core": ("PipeBarrier<PIPE_M>();", "this core has no pipe M"),
    "pipe of the other kind of core": (
        "Write<PIPE_M>(t, 0, 8);",
        "Write on pipe M: this core has no pipe M",
    ),
    "atomic add left on": ("SetAtomicAdd<float>();", "SetAtomicNone is missing"),
    "atomic add of another type": (
        "SetAtomicAdd<int32_t>(); Write<PIPE_MTE3>(gw, 0, 8);",
        "dst has another element type than SetAtomicAdd",
    ),
}

CASES = Cases(
    {name: HEAD + body for name, body in GOOD.items()}
    | {name: HEAD + body for name, (body, _) in FAULTY.items()}
)


@pytest.mark.parametrize("name", GOOD)
def test_ordered_kernels_pass(name: str) -> None:
    CASES.run(name)


@pytest.mark.parametrize("name", FAULTY)
def test_missing_order_is_reported(name: str) -> None:
    with pytest.raises(EmulatorFault) as found:
        CASES.run(name)
    assert "AIV 0: " in str(found.value)
    assert FAULTY[name][1] in str(found.value)


def test_values_follow_program_order() -> None:
    results, statistics = CASES.run("atomic adds commute")
    assert (results["y"][:32] == 2 * X[:32]).all()
    assert (results["y"][32:] == X[32:]).all()
    assert statistics.instructions == 3
    assert statistics.checks > 0


def test_vector_in_order_is_a_way_to_launch() -> None:
    CASES.run("V to V, read after write", Launch(vector_in_order=True))


def test_reserved_ids_and_shared_ids_are_warned_of() -> None:
    _, statistics = CASES.run("reserved ids")
    assert statistics.warnings == (
        "SetFlag<MTE2_V>(6): the ids 6 and 7 are reserved",
        "WaitFlag<MTE2_V>(6): the ids 6 and 7 are reserved",
    )
