"""Memory of a core and global memory: capacity, placement, alignment, bounds, undefined data."""

import numpy as np
import pytest

from spcomp.backends.ascendc.emulate import Launch
from tests.ascendc.cases import PROBES, Cases
from tests.ascendc.harness import EmulatorFault, run

HEAD = """
TPipe pipe; UbBuf buf; pipe.InitBuffer(buf, 1024);
auto gx = Gm<float>(x); auto gy = Gm<float>(y); auto t = buf.Get<float>();
"""

GOOD = {
    "all of UB that belongs to the kernel": "TPipe p; UbBuf b; p.InitBuffer(b, 188160);"
    "b.Get<int8_t>(188160);",
    "sizes round up to 32 bytes": """
        TPipe p; UbBuf a, b; p.InitBuffer(a, 1); p.InitBuffer(b, 33);
        Want(a.Get<int8_t>().GetSize() == 32 && b.Get<int8_t>().byte_offset() == 32);
        Want(b.Get<float>().GetSize() == 16);""",
    "offsets and views": HEAD
    + """
        t.SetValue(10, 2.5f); auto u = t[8].ReinterpretCast<uint32_t>();
        Want(u.GetValue(2) == 0x40200000u && u.GetSize() == 248);
        Want(buf.GetWithOffset<float>(4, 32).GetValue(2) == 2.5f);""",
    "nothing written is a NaN": HEAD
    + """
        emulator::Instr i("Look", PIPE_V); float v = *i.read("src", t, 255, 1);
        Want(v != v);""",
    "empty windows touch nothing": HEAD
    + "Read<PIPE_V>(t, 256, 0); Write<PIPE_MTE2>(t, 0, 0); Read<PIPE_MTE2>(gx, 64, 0);",
    "an allocator starts at the first byte": """
        LocalMemAllocator<Hardware::UB> ub; auto a = ub.Alloc<TPosition::VECIN, float>(10);
        auto b = ub.Alloc<half, 16>();
        Want(a.GetSize() == 10 && b.byte_offset() == 64);""",
    "an address inside a tensor keeps its tensor": """
        GlobalTensor<float> part; part.SetGlobalBuffer((__gm__ float*)x + 60, 4);
        Want(part[2].GetValue(1) == 63.f);""",
    "narrow members hold what they say": """
        emulator::Narrow<uint8_t> a = 255; emulator::Narrow<uint16_t> b{65535};
        Want(a + b == 65790);""",
}

FAULTY = {
    "UB overflow": (
        "TPipe p; UbBuf a, b; p.InitBuffer(a, 100000); p.InitBuffer(b, 88192);",
        "TPipe overflows UB: VECCALC 100000 + VECCALC 88192 = 188192 bytes, and it has 188160",
    ),
    "a store of the other kind of core": (
        "TPipe p; TBuf<TPosition::A1> b; p.InitBuffer(b, 32);",
        "TPipe overflows L1: A1 32 = 32 bytes, and it has 0",
    ),
    "two owners of one store": (
        "TPipe p; UbBuf b; p.InitBuffer(b, 32); LocalMemAllocator<Hardware::UB> a;"
        "a.Alloc<float, 8>();",
        "LocalMemAllocator gives out UB, which TPipe gives out already",
    ),
    "misaligned operand": (
        HEAD + 'emulator::Instr i("Op", PIPE_V); i.at("dst", t[1], {emulator::Store::UB}, 32);',
        "Op on pipe V: dst starts at byte 4 of UB, which is no multiple of 32",
    ),
    "wrong store": (
        HEAD + 'emulator::Instr i("Op", PIPE_MTE2);'
        'i.at("dst", t, {emulator::Store::L1, emulator::Store::L0C}, 32);',
        "dst lies in UB and has to lie in L1 or L0C",
    ),
    "a tensor nobody allocated": (
        "LocalTensor<float> t; Read<PIPE_V>(t, 0, 1);",
        "src is a tensor nobody has allocated",
    ),
    "longer than the tensor": (
        HEAD + "Write<PIPE_V>(buf.Get<float>(8), 4, 5);",
        "dst needs the elements 4 to 9 of a tensor of 8 elements",
    ),
    "before the tensor": (HEAD + "Read<PIPE_V>(t[8], -1, 1);", "src needs the elements -1 to 0"),
    "an offset past the end": (
        HEAD + "t[257];",
        "element 257 is past the end of a tensor of 256 elements",
    ),
    "a TBuf too short": (
        HEAD + "buf.GetWithOffset<float>(8, 1000);",
        "the bytes 1000 to 1032 of a TBuf of 1024",
    ),
    "a TBuf without bytes": ("TPipe p; UbBuf b; b.Get<float>();", "InitBuffer is missing"),
    "uninitialised scalar read": (
        HEAD + "t.SetValue(0, 1.f); t.GetValue(1);",
        "reads byte 4 of UB, which nothing has written",
    ),
    "undefined after an instruction": (
        HEAD + '{emulator::Instr i("Op", PIPE_S); i.write("d", t, 0, 8);'
        'i.write_undefined("d", t, 4, 4);}'
        "t.GetValue(3); t.GetValue(4);",
        "reads byte 16 of UB, which nothing has written",
    ),
    "GM overrun": (
        HEAD + "Read<PIPE_MTE2>(gx, 60, 5);",
        "Read on pipe MTE2: src reads the bytes 240 to 260 of 'x', which has 256",
    ),
    "GM before the tensor": (HEAD + "Read<PIPE_MTE2>(gx, -1, 1);", "the bytes -4 to 0 of 'x'"),
    "far outside, into a neighbour": (
        HEAD + "int64_t far = ((__gm__ uint8_t*)y - (__gm__ uint8_t*)x) / 4; gx.GetValue(far);",
        "of 'x', which has 256",
    ),
    "a scalar between two elements": (
        "auto g = Gm<float>(x + 2); g.GetValue(0);",
        "the tensor starts at byte 2, which is no multiple of its element",
    ),
    "a negative offset": (
        HEAD + "int64_t none = -1; Read<PIPE_MTE2>(gx[8][none * 9], 0, 4);",
        "src reads the bytes -4 to 12 of 'x'",
    ),
    "an offset no tensor has": (
        HEAD + "gx[uint64_t{1} << 62];",
        "GlobalTensor: the offset 4611686018427387904 lies in no tensor",
    ),
    "an index no tensor has": (
        HEAD + "gx.GetValue(uint64_t{1} << 62);",
        "which no tensor has",
    ),
    "an address between tensors": (
        "GlobalTensor<float> g; g.SetGlobalBuffer((__gm__ float*)x + 4096);",
        "belongs to no tensor of the call",
    ),
    "GM without a buffer": (
        "GlobalTensor<float> g; g.GetValue(0);",
        "a GlobalTensor without SetGlobalBuffer",
    ),
    "an input written": (HEAD + "gx.SetValue(0, 1.f);", "writes 'x', which is read only"),
    "narrow, 8 bits": (
        "int64_t n = 256; emulator::Narrow<uint8_t> a = n; (void)a;",
        "a parameter of 8 bits was given 256; it holds 0 to 255",
    ),
    "narrow, below zero": (
        "emulator::Narrow<uint16_t> a = int64_t(which) - 1000; (void)a;",
        "of 16 bits was given -",
    ),
    "a second TPipe": ("TPipe a; TPipe b;", "this core has one already"),
    "no TPipe": ("GetTPipePtr();", "this core has no TPipe"),
}

CUBE = {
    "every store of a cube core": """
        TPipe p; TBuf<TPosition::A1> l1; TBuf<TPosition::A2> l0a; TBuf<TPosition::B2> l0b;
        TBuf<TPosition::CO1> l0c; TBuf<TPosition::C2> bias;
        p.InitBuffer(l1, 524032); p.InitBuffer(l0a, 65536); p.InitBuffer(l0b, 65536);
        p.InitBuffer(l0c, 131072); p.InitBuffer(bias, 1024);
        Want(l0b.Get<half>().store() == emulator::Store::L0B);""",
    "L0C overflow": "LocalMemAllocator<Hardware::L0C> c; c.Alloc<float, 32769>();",
    "no UB": "LocalMemAllocator<Hardware::UB> c; c.Alloc<float, 1>();",
    "a scalar look at L1": """
        TPipe p; TBuf<TPosition::B1> b; p.InitBuffer(b, 32); b.Get<float>().SetValue(0, 1.f);""",
}

CASES = Cases(GOOD | {name: body for name, (body, _) in FAULTY.items()})
CUBE_CASES = Cases(CUBE, Launch(kind="cube"))


@pytest.mark.parametrize("name", GOOD)
def test_good_use_passes(name: str) -> None:
    CASES.run(name)


@pytest.mark.parametrize("name", FAULTY)
def test_wrong_use_is_reported(name: str) -> None:
    with pytest.raises(EmulatorFault) as found:
        CASES.run(name)
    assert FAULTY[name][1] in str(found.value)


def test_stores_of_a_cube_core() -> None:
    CUBE_CASES.run("every store of a cube core")
    for name, said in {
        "L0C overflow": "AIC 0: LocalMemAllocator overflows L0C: Alloc 131104 = 131104 bytes",
        "no UB": "overflows UB: Alloc 32 = 32 bytes, and it has 0",
        "a scalar look at L1": "the tensor lies in L1 and has to lie in UB",
    }.items():
        with pytest.raises(EmulatorFault) as found:
            CUBE_CASES.run(name)
        assert said in str(found.value)


def test_reserved_ub_can_be_given_back() -> None:
    with pytest.raises(EmulatorFault, match="and it has 188160"):
        CASES.run("UB overflow")
    CASES.run("UB overflow", Launch(keep_reserved_ub=False))


def test_a_fault_leaves_the_library_usable() -> None:
    for _ in range(3):
        with pytest.raises(EmulatorFault):
            CASES.run("GM overrun", Launch(blocks=3))
        CASES.run("offsets and views")


def test_empty_tensors_and_scalars_arrive() -> None:
    body = "Want(n == -5 && f == 1.5f); GlobalTensor<half> g; g.SetGlobalBuffer((__gm__ half*)e);"
    given = {"e": np.zeros(0, np.float16)}
    assert run(body, given, {}, scalars={"n": -5, "f": 1.5}, globals=PROBES) == {}
