"""Every operand of every vector instruction takes part in the ordering analysis, lane by lane.

Operands whose values decide where data goes must hold data, since no NaN would show the mistake.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from tests.ascendc.harness import EmulatorFault
from tests.ascendc.models_vector import Operand
from tests.ascendc.vector_cases import IMAGE, Family, counted


@dataclass(frozen=True)
class Call:
    """A call on operands at fixed bytes: the destination at 0, the others from 8192 on."""

    text: str
    reads: tuple[tuple[str, int], ...]


A, B, C = 8192, 16384, 24576
F0, FA, FB, FC = (f"whole[{byte}].ReinterpretCast<float>()" for byte in (0, A, B, C))
U0, UB = "whole[0]", f"whole[{B}].ReinterpretCast<uint32_t>()"
BOTH, ONE = (("src0", A), ("src1", B)), (("src", A),)

CALLS = {
    "binary": Call(f"Add({F0}, {FA}, {FB}, 64);", BOTH),
    "scalar": Call(f"Muls({F0}, {FA}, 1.0F, 64);", ONE),
    "unary": Call(f"Exp({F0}, {FA}, 64);", ONE),
    "cast": Call(f"Cast({F0}.ReinterpretCast<half>(), {FA}, RoundMode::CAST_RINT, 64);", ONE),
    "duplicate": Call(f"Duplicate({F0}, 1.0F, 64);", ()),
    "index": Call(f"CreateVecIndex({F0}, 1.0F, 64);", ()),
    "brcb": Call(f"Brcb({F0}, {FA}, 1, {{1, 8}});", ONE),
    "whole max": Call(f"WholeReduceMax({F0}, {FA}, 64, 1, 1, 1, 8);", ONE),
    "whole sum": Call(f"WholeReduceSum({F0}, {FA}, 64, 1, 1, 1, 8);", ONE),
    "block sum": Call(f"BlockReduceSum({F0}, {FA}, 1, 64, 1, 1, 8);", ONE),
    "max": Call(f"ReduceMax({F0}, {FA}, {FB}, 64, true);", ONE),
    "sum": Call(f"ReduceSum({F0}, {FA}, {FB}, 64);", ONE),
    "compare": Call(f"Compare({U0}, {FA}, {FB}, CMPMODE::LT, 64);", BOTH),
    "compare scalar": Call(f"CompareScalar({U0}, {FA}, 0.0F, CMPMODE::LT, 64);", (("src0", A),)),
    "select": Call(
        f"Select({F0}, whole[{C}], {FA}, {FB}, SELMODE::VSEL_TENSOR_TENSOR_MODE, 64);",
        (*BOTH, ("selMask", C)),
    ),
    "gather": Call(f"Gather({F0}, {FA}, {UB}, 0, 64);", (("src", A), ("srcOffset", B))),
    "gather mask": Call(
        f"GatherMask({F0}, {FA}, {UB}, false, 0, {{1, 1, 8, 1}}, kept);",
        (("src0", A), ("src1Pattern", B)),
    ),
    "sort": Call(f"Sort32({F0}, {FA}, {UB}, 1);", BOTH),
    "merge": Call(
        "uint16_t lengths[4] = {4, 4, 0, 0}; "
        f"MrgSort({F0}, MrgSortSrcList<float>({FA}, {FB}, {FA}, {FB}), "
        "MrgSort4Info(lengths, false, 3, 1));",
        (("src1", A), ("src2", B)),
    ),
}
# The scratch of a reduction is written, not read.
SCRATCH = [("max", "the scratch tensor", B), ("sum", "the scratch tensor", B)]

DIRTY = "Duplicate(whole[c.extra(0)].ReinterpretCast<float>(), 0.0F, 8); "
BARRIER = "if (c.extra(1) != 0) PipeBarrier<PIPE_V>(); "
MASKED = (
    f"Add({F0}, {FA}, {FB}, 8, 2, {{1, 1, 1, 16, 16, 16}});",
    f"uint64_t mask[2] = {{0xFF0000, 0}}; Exp({F0}, {FA}, mask, 1, {{1, 1, 8, 8}});",
)
FRESH = "TBuf<TPosition::VECCALC> spare; pipe.InitBuffer(spare, 1024); "
FRESH_U32, FRESH_F = "spare.Get<uint32_t>()", "spare.Get<float>()"
UNWRITTEN = {
    "gather offsets": f"Gather({F0}, {FA}, {FRESH_U32}, 0, 64);",
    "gather mask bits": f"GatherMask({F0}, {FA}, {FRESH_U32}, false, 0, {{1, 1, 8, 1}}, kept);",
    "sort scores": f"Sort32({F0}, {FRESH_F}, {UB}, 1);",
    "sort indices": f"Sort32({F0}, {FA}, {FRESH_U32}, 1);",
    "merge list": CALLS["merge"].text.replace(f"({FA}, ", f"({FRESH_F}, "),
}
FAMILY = Family(
    {name: DIRTY + BARRIER + call.text for name, call in CALLS.items()}
    | {f"masked {n}": DIRTY + text for n, text in enumerate(MASKED)}
    | {name: FRESH + text for name, text in UNWRITTEN.items()}
)
READS = [(name, operand, at) for name, call in CALLS.items() for operand, at in call.reads]
WRITES = [(name, "dst", 0) for name in CALLS] + SCRATCH


def run(name: str, dirty: int, barrier: bool = False) -> None:
    image = np.zeros(IMAGE, np.uint8)
    image[B : B + 256] = 0 if name in ("gather", "merge") else 1
    form, operands = counted(1), [Operand(0)]
    FAMILY.run(name, image, form, operands, [dirty, int(barrier)])


@pytest.mark.parametrize(("name", "operand", "at"), READS)
def test_reading_what_may_still_be_written_is_reported(name: str, operand: str, at: int) -> None:
    with pytest.raises(EmulatorFault, match=rf"{operand} reads .* PipeBarrier<PIPE_V> is missing"):
        run(name, at)
    run(name, at, barrier=True)


@pytest.mark.parametrize(("name", "operand", "at"), WRITES)
def test_writing_what_may_still_be_written_is_reported(name: str, operand: str, at: int) -> None:
    with pytest.raises(EmulatorFault, match=rf"{operand} writes .* PipeBarrier<PIPE_V> is missing"):
        run(name, at)
    run(name, at, barrier=True)


@pytest.mark.parametrize(
    ("name", "touched", "free"),
    [
        ("masked 0", (0, 512, A, A + 512, B, B + 512), (32, 480, A + 32, A + 544, B + 256)),
        ("masked 1", (64, A + 64), (0, 32, 96, A, A + 32, A + 96)),
    ],
)
def test_lanes_outside_the_mask_are_not_touched(
    name: str, touched: tuple[int, ...], free: tuple[int, ...]
) -> None:
    for at in free:
        run(name, at)
    for at in touched:
        with pytest.raises(EmulatorFault, match="PipeBarrier<PIPE_V> is missing"):
            run(name, at)


@pytest.mark.parametrize("name", UNWRITTEN)
def test_offsets_patterns_and_sort_keys_must_have_been_written(name: str) -> None:
    with pytest.raises(EmulatorFault, match="which nothing has written"):
        run(name, 0)
