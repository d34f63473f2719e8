"""Several cores: who they are, flags between them, SyncAll, deadlock, and the data cache."""

import pytest

from spcomp.backends.ascendc.emulate import Launch
from tests.ascendc.cases import Cases
from tests.ascendc.harness import EmulatorFault

MIX = Launch(kind="mix", blocks=2)

# The cube core of each AI core writes 16 floats, its two vector cores read them.
HEAD = """
auto gx = Gm<float>(x); auto gy = Gm<float>(y); auto gw = Gm<float>(w);
auto mine = gw[(ASCEND_IS_AIC ? GetBlockIdx() : GetBlockIdx() / GetTaskRatio()) * 16];
TPipe pipe; UbBuf ub; TBuf<TPosition::CO1> l0c;
if ASCEND_IS_AIC { pipe.InitBuffer(l0c, 256); } else { pipe.InitBuffer(ub, 256); }
"""
PRODUCE = "Write<PIPE_FIX>(mine, 0, 16);"
CONSUME = "Read<PIPE_MTE2>(mine, GetSubBlockIdx() * 8, 8);"


def split(cube: str, vector: str) -> str:
    return f"{HEAD} if ASCEND_IS_AIC {{ {cube} }} else {{ {vector} }}"


GOOD = {
    "indices": """
        Want(GetBlockNum() == 2);
        if ASCEND_IS_AIV { Want(GetBlockIdx() % 2 == GetSubBlockIdx() && GetTaskRatio() == 2); }
        else { Want(GetBlockIdx() <= 1 && GetTaskRatio() == 1 && GetSubBlockIdx() == 0); }""",
    "mode 2, cube to vector": split(
        f"{PRODUCE} CrossCoreSetFlag<2, PIPE_FIX>(0);", f"CrossCoreWaitFlag(0); {CONSUME}"
    ),
    "mode 2, there and back": split(
        f"for (int i = 0; i < 5; ++i) {{ {PRODUCE} CrossCoreSetFlag<2, PIPE_FIX>(0);"
        "CrossCoreWaitFlag(1); }",
        f"for (int i = 0; i < 5; ++i) {{ CrossCoreWaitFlag(0); {CONSUME}"
        "CrossCoreSetFlag<2, PIPE_MTE2>(1); }",
    ),
    "mode 2, vector to cube": split(
        "CrossCoreWaitFlag(3); Read<PIPE_MTE2>(mine, 0, 16);",
        "Write<PIPE_MTE3>(mine, GetSubBlockIdx() * 8, 8); CrossCoreSetFlag<2, PIPE_MTE3>(3);",
    ),
    "mode 1, vector cores of one AI core": split(
        "",
        "Write<PIPE_MTE3>(mine, GetSubBlockIdx() * 8, 8); CrossCoreSetFlag<1, PIPE_MTE3>(2);"
        "CrossCoreWaitFlag(2); Read<PIPE_MTE2>(mine, 8 - GetSubBlockIdx() * 8, 8);",
    ),
    "mode 1, one AI core alone": split(
        "", "if (GetBlockIdx() < 2) { CrossCoreSetFlag<1, PIPE_V>(2); CrossCoreWaitFlag(2); }"
    ),
    "the scalar unit sees its own writes": split(
        "mine.SetValue(0, 1.f); mine.SetValue(1, 2.f); Want(mine.GetValue(1) == 2.f);"
        "DataCacheCleanAndInvalid<float, kLine, kClean>(mine);",
        "",
    ),
    "mode 0, every vector core": split(
        "",
        "Write<PIPE_MTE3>(gw, GetBlockIdx() * 8, 8); CrossCoreSetFlag<0, PIPE_MTE3>(2);"
        "CrossCoreWaitFlag(2); Read<PIPE_MTE2>(gw, 0, 32);",
    ),
    "SyncAll of every core": split(
        "Write<PIPE_FIX>(gw, GetBlockIdx() * 16, 16); SyncAll<false>();Read<PIPE_MTE2>(gw, 0, 32);",
        "SyncAll<false>(); Read<PIPE_MTE2>(gw, 0, 32);",
    ),
    "SyncAll of the vector cores": split(
        "",
        "for (int i = 0; i < 3; ++i) { Write<PIPE_MTE3>(gw, GetBlockIdx() * 8, 8); SyncAll<true>();"
        "Read<PIPE_MTE2>(gw, 0, 32); SyncAll(); }",
    ),
    "cores read what nobody writes": split(
        "Read<PIPE_MTE2>(gw, 0, 16);", "Read<PIPE_MTE2>(gw, 0, 16);"
    ),
    "atomic adds of several cores": split(
        "", "SetAtomicAdd<float>(); Write<PIPE_MTE3>(gw, 0, 8); SetAtomicNone();"
    ),
    "a scalar read after an invalidate": split(
        f"{PRODUCE} CrossCoreSetFlag<2, PIPE_FIX>(0);",
        "CrossCoreWaitFlag(0); DataCacheCleanAndInvalid<float, kWhole, kClean>(mine);"
        "mine.GetValue(3);",
    ),
    "a scalar read after one line's invalidate": split(
        f"{PRODUCE} CrossCoreSetFlag<2, PIPE_FIX>(0);",
        "CrossCoreWaitFlag(0); DataCacheCleanAndInvalid<float, kLine, kClean>(mine[3]);"
        "mine.GetValue(0);",
    ),
    "a cleaned scalar write": split(
        "mine.SetValue(0, 1.f); DataCacheCleanAndInvalid<float, kLine, kClean>(mine);"
        "CrossCoreSetFlag<2, PIPE_FIX>(0);",
        "CrossCoreWaitFlag(0); Read<PIPE_MTE2>(mine, 0, 1);",
    ),
    "the declared kind": split("", "")
    + "KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2); InitSocState();",
}

FAULTY = {
    "missing wait": (
        split(f"{PRODUCE} CrossCoreSetFlag<2, PIPE_FIX>(0);", f"{CONSUME} CrossCoreWaitFlag(0);"),
        "nothing between the two cores orders them",
    ),
    "set before the write": (
        split(f"CrossCoreSetFlag<2, PIPE_FIX>(0); {PRODUCE}", f"CrossCoreWaitFlag(0); {CONSUME}"),
        "nothing between the two cores orders them",
    ),
    "set on a pipe that knows nothing": (
        split(f"{PRODUCE} CrossCoreSetFlag<2, PIPE_MTE2>(0);", f"CrossCoreWaitFlag(0); {CONSUME}"),
        "nothing between the two cores orders them",
    ),
    "reuse without a flag back": (
        split(
            f"{PRODUCE} CrossCoreSetFlag<2, PIPE_FIX>(0); PipeBarrier<PIPE_FIX>();"
            f"{PRODUCE} CrossCoreSetFlag<2, PIPE_FIX>(0);",
            f"CrossCoreWaitFlag(0); {CONSUME} CrossCoreWaitFlag(0); {CONSUME}",
        ),
        "nothing between the two cores orders them",
    ),
    "one vector core of two sets": (
        split(
            "CrossCoreWaitFlag(0);", "if (GetSubBlockIdx() == 0) CrossCoreSetFlag<2, PIPE_MTE3>(0);"
        ),
        "deadlock: no core can go on; AIC 0 waits in CrossCoreWaitFlag(0); AIC 1 waits in",
    ),
    "never signalled": (
        split("", "CrossCoreWaitFlag(7);"),
        "AIV 0 waits in CrossCoreWaitFlag(7); AIV 1 waits in CrossCoreWaitFlag(7); AIV 2 waits",
    ),
    "not every core at SyncAll": (
        split("", "if (GetBlockIdx() != 1) SyncAll<true>();"),
        "AIV 0 waits in SyncAll<true>; AIV 2 waits",
    ),
    "mode 1 orders no other AI core": (
        split(
            "",
            "Write<PIPE_MTE3>(gw, GetBlockIdx() * 8, 8); CrossCoreSetFlag<1, PIPE_MTE3>(2);"
            "CrossCoreWaitFlag(2); Read<PIPE_MTE2>(gw, 0, 32);",
        ),
        "nothing between the two cores orders them",
    ),
    "a count left": (
        split("CrossCoreSetFlag<2, PIPE_FIX>(4);", ""),
        "end of kernel: AIV 0 has a cross-core flag 4 that no CrossCoreWaitFlag took",
    ),
    "a partner that never sets": (
        split("", "if (GetSubBlockIdx() == 1) CrossCoreSetFlag<2, PIPE_MTE3>(4);"),
        "end of kernel: AIV 1 set the cross-core flag 4, and not every partner did",
    ),
    "sixteen sets": (
        split("for (int i = 0; i < 16; ++i) CrossCoreSetFlag<2, PIPE_FIX>(4);", ""),
        "has more than 15 sets of this id outstanding",
    ),
    "an id out of range": (split("CrossCoreSetFlag<2, PIPE_FIX>(16);", ""), "not from 0 to 15"),
    "mode 1 on a cube core": (split("CrossCoreSetFlag<1, PIPE_FIX>(1);", ""), "for vector cores"),
    "another kind declared": (
        split("", "") + "KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_1);",
        "declares another kind of cores than the launch, which is mix 1:2",
    ),
    "two cores write one place": (
        split("", "Write<PIPE_MTE3>(gw, GetSubBlockIdx(), 8);"),
        "nothing between the two cores orders them",
    ),
    "a stale scalar read": (
        split(
            f"{PRODUCE} CrossCoreSetFlag<2, PIPE_FIX>(0);",
            "CrossCoreWaitFlag(0); mine.GetValue(3);",
        ),
        "through the data cache after Write of AIC",
    ),
    "invalidated too early": (
        split(
            f"{PRODUCE} CrossCoreSetFlag<2, PIPE_FIX>(0);",
            "DataCacheCleanAndInvalid<float, kWhole, kClean>(mine); CrossCoreWaitFlag(0);"
            "mine.GetValue(3);",
        ),
        "DataCacheCleanAndInvalid is missing",
    ),
    "another line invalidated": (
        split(
            f"{PRODUCE} CrossCoreSetFlag<2, PIPE_FIX>(0);",
            "CrossCoreWaitFlag(0); DataCacheCleanAndInvalid<float, kLine, kClean>(mine[16]);"
            "mine.GetValue(3);",
        ),
        "DataCacheCleanAndInvalid is missing",
    ),
    "a scalar write not cleaned": (
        split(
            "mine.SetValue(0, 1.f); CrossCoreSetFlag<2, PIPE_FIX>(0); CrossCoreWaitFlag(1);"
            "DataCacheCleanAndInvalid<float, kLine, kClean>(mine);",
            "CrossCoreWaitFlag(0); Read<PIPE_MTE2>(mine, 5, 1); CrossCoreSetFlag<2, PIPE_MTE2>(1);",
        ),
        "has written with SetValue and not cleaned",
    ),
    "a scalar write left dirty": (
        split("mine.SetValue(0, 1.f);", ""),
        "end of kernel: line",
    ),
    "two cores share a line": (
        split(
            "",
            "gw.SetValue(GetBlockIdx(), 1.f); SyncAll();"
            "DataCacheCleanAndInvalid<float, kWhole, kClean>(gw);",
        ),
        "line 0 (64 B) of 'w', which AIV",
    ),
}
CASES = Cases(GOOD | {name: body for name, (body, _) in FAULTY.items()}, MIX)
PURE = Cases(
    {
        "flags": "CrossCoreSetFlag<0, PIPE_MTE3>(0);",
        "SyncAll": "SyncAll();",
        "SyncAll declared": "KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0); SyncAll();",
    }
)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("name", GOOD)
def test_ordered_cores_pass(name: str, descending: bool) -> None:
    CASES.run(name, Launch(kind="mix", blocks=2, descending=descending))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("name", FAULTY)
def test_missing_order_is_reported(name: str, descending: bool) -> None:
    with pytest.raises(EmulatorFault) as found:
        CASES.run(name, Launch(kind="mix", blocks=2, descending=descending))
    assert FAULTY[name][1] in str(found.value)


def test_one_vector_core_per_cube_core() -> None:
    CASES.run("mode 2, there and back", Launch(kind="mix", blocks=3, ratio=1))


def test_pure_kinds_have_no_flags_between_cores() -> None:
    for name in ("flags", "SyncAll"):
        with pytest.raises(EmulatorFault, match="declare a MIX kind"):
            PURE.run(name, Launch(blocks=2))
    PURE.run("SyncAll declared", Launch(blocks=48))
    with pytest.raises(EmulatorFault, match="49 blocks are launched on 48 cores"):
        PURE.run("SyncAll declared", Launch(blocks=49))


@pytest.mark.parametrize(("descending", "first"), [(False, "AIV 1: "), (True, "AIV 2: ")])
def test_cores_take_turns_in_the_order_asked_for(descending: bool, first: str) -> None:
    with pytest.raises(EmulatorFault, match=first):
        CASES.run("two cores write one place", Launch("mix", 2, descending=descending))
