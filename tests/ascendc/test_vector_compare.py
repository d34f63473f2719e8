"""Compare, CompareScalar and Select against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from spcomp.backends.ascendc.emulate import Launch
from tests.ascendc.harness import EmulatorFault
from tests.ascendc.models_vector import Bytes, Operand, compare, lanes_of, select
from tests.ascendc.vector_cases import (
    COUNT,
    DTYPES,
    IMAGE,
    Family,
    Form,
    counted,
    difference,
    in_forms,
    leading,
    random_form,
    seeded,
    with_bits,
)

REALS = ("half", "float")
MODES = ("LT", "GT", "EQ", "LE", "GE", "NE")
TENSORS, SPR, SCALAR = "VSEL_TENSOR_TENSOR_MODE", "VSEL_CMPMASK_SPR", "VSEL_TENSOR_SCALAR_MODE"

CALLS: dict[str, str] = {}
for t in (*REALS, "int32_t"):
    first = f"c.at<uint8_t>(0), c.at<{t}>(1)"
    mode = "static_cast<CMPMODE>(c.extra(1))"
    CALLS[f"Compare {t}"] = in_forms("Compare", f"{first}, c.at<{t}>(2), {mode}", "c.binary()")
    CALLS[f"CompareScalar {t}"] = in_forms(
        "CompareScalar", f"{first}, c.scalar<{t}>(), {mode}", "c.unary()"
    )
for t in REALS:
    for u in ("uint8_t", "uint32_t"):
        first = f"c.at<{t}>(0), c.at<{u}>(3), c.at<{t}>(1)"
        for mode in (TENSORS, SPR, SCALAR):
            other = f"c.scalar<{t}>()" if mode == SCALAR else f"c.at<{t}>(2)"
            call = in_forms("Select", f"{first}, {other}, SELMODE::{mode}", "c.binary()")
            CALLS[f"Select {t} {u} {mode}"] = call
CALLS["Select scalar as tensor"] = (
    f"Select(c.at<float>(0), c.at<uint8_t>(3), c.at<float>(1), 1.0F, SELMODE::{TENSORS}, 64);"
)
CALLS["Select tensor as scalar"] = (
    "Select(c.at<float>(0), c.at<uint8_t>(3), c.at<float>(1), c.at<float>(2), "
    f"SELMODE::{SCALAR}, 64);"
)
CALLS["Select of nothing written"] = (
    "TBuf<TPosition::VECCALC> fresh; pipe.InitBuffer(fresh, 256); "
    "Select(c.at<float>(0), fresh.Get<uint8_t>(), c.at<float>(1), c.at<float>(2), "
    f"SELMODE::{TENSORS}, 64);"
)
FAMILY = Family(CALLS)


def frequent_ties(rng: np.random.Generator, dtype: str) -> Bytes:
    kind = np.dtype(DTYPES[dtype])
    return rng.integers(-3, 4, IMAGE // kind.itemsize).astype(kind).view(np.uint8)


def whole_repeats(rng: np.random.Generator, shape: int, width: int) -> Form:
    """The forms a comparison takes: a multiple of 256 bytes, and no lane left out."""
    repeats = int(rng.integers(1, 6))
    ones = 2**64 - 1
    forms = (
        counted(width * repeats),
        leading(width, repeats),
        with_bits((ones, ones if width > 64 else 0), repeats),
    )
    return forms[shape]


def strided(rng: np.random.Generator, form: Form, offset: int) -> Operand:
    if form.kind == COUNT:
        return Operand(offset)
    return Operand(offset, int(rng.integers(0, 4)), int(rng.integers(0, 30)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", [k for k in CALLS if k.startswith("Compare")])
def test_bit_i_is_the_answer_of_lane_i(key: str, mode: str) -> None:
    if "int32" in key and mode != "EQ":
        with pytest.raises(EmulatorFault, match="int32 compares with EQ alone"):
            FAMILY.run(key, np.zeros(IMAGE, np.uint8), counted(64), FAR, [0, MODES.index(mode)])
        return
    rng = seeded(key, mode)
    dtype = key.split()[1]
    image = frequent_ties(rng, dtype)
    width = lanes_of(DTYPES[dtype])
    for shape in (0, 1, 2) * 2:
        form = whole_repeats(rng, shape, width)
        a, b = strided(rng, form, 16384), strided(rng, form, 40960)
        operands = [Operand(96), a] + ([] if "Scalar" in key else [b])
        value = int(rng.integers(-2, 3))
        got, _ = FAMILY.run(key, image, form, operands, [8 * value, MODES.index(mode)])
        want = image.copy()
        other = value if "Scalar" in key else b
        compare(want, form.lanes(width), DTYPES[dtype], 96, a, other, mode)
        assert not difference(got, want)


@pytest.mark.parametrize("key", [k for k in CALLS if k.startswith("Select") and "VSEL" in k])
def test_bit_one_takes_the_first_source(key: str) -> None:
    rng = seeded(key)
    _, dtype, _, mode = key.split()
    image = rng.integers(0, 256, IMAGE).astype(np.uint8)
    image[16384:] = frequent_ties(rng, dtype)[16384:]
    width = lanes_of(DTYPES[dtype])
    for shape in (0, 1, 2) * 2:
        form = random_form(rng, shape, width)
        block = 1 if form.kind == COUNT else int(rng.integers(1, 3))
        target = Operand(0, block, 8 if form.kind == COUNT else int(rng.integers(15, 20)))
        a, b = strided(rng, form, 20480), strided(rng, form, 40960)
        value = int(rng.integers(-2, 3))
        got, _ = FAMILY.run(key, image, form, [target, a, b, Operand(12288)], [8 * value])
        want = image.copy()
        other = value if mode == SCALAR else b
        lanes = form.lanes(width)
        select(want, lanes, DTYPES[dtype], target, 12288, a, other, shared=mode == SPR)
        assert not difference(got, want)


FAR = [Operand(0), Operand(16384), Operand(40960), Operand(12288)]
TENSOR_KEY, SCALAR_KEY = f"Select float uint8_t {TENSORS}", f"Select float uint8_t {SCALAR}"


@pytest.mark.parametrize(
    ("key", "form", "operands", "said"),
    [
        ("Compare float", counted(100), FAR, "100 elements are no multiple of 256 bytes"),
        ("Compare half", counted(64), FAR, "64 elements are no multiple of 256 bytes"),
        ("CompareScalar float", counted(32), FAR, "32 elements are no multiple"),
        ("Compare float", leading(63, 2), FAR, "the mask leaves lanes out"),
        ("Compare float", leading(64, 256), FAR, "8 bits was given 256"),
        ("Compare float", counted(64), [Operand(16384), *FAR[1:]], "dst overlaps src0"),
        ("Compare float", counted(64), [Operand(40960), *FAR[1:]], "dst overlaps src1"),
        ("Compare float", counted(64), [Operand(8), *FAR[1:]], "dst starts at byte 8"),
        (TENSOR_KEY, counted(64), [Operand(16416), *FAR[1:]], "dst and src0 overlap"),
        (TENSOR_KEY, counted(64), [Operand(41184), *FAR[1:]], "dst and src1 overlap"),
        (TENSOR_KEY, counted(512), [Operand(12288), *FAR[1:]], "dst overlaps selMask"),
        (TENSOR_KEY, counted(64), [*FAR[:3], Operand(12289)], "selMask starts at byte 12289"),
        (SCALAR_KEY, leading(64, 2), [Operand(0, 0), *FAR[1:]], "block stride of dst is 0"),
        ("Select scalar as tensor", counted(1), FAR, "asks for a tensor"),
        ("Select tensor as scalar", counted(1), FAR, "asks for a scalar"),
        ("Select of nothing written", counted(1), FAR, "which nothing has written"),
    ],
)
def test_a_wrong_use_is_reported(key: str, form: Form, operands: list[Operand], said: str) -> None:
    with pytest.raises(EmulatorFault, match=said):
        FAMILY.run(key, np.zeros(IMAGE, np.uint8), form, operands)


def test_select_without_the_reserved_buffer_is_reported() -> None:
    image = np.zeros(IMAGE, np.uint8)
    own_all = Launch(keep_reserved_ub=False)
    for key in (TENSOR_KEY, SCALAR_KEY):
        with pytest.raises(EmulatorFault, match="the reserved 8 KiB of UB"):
            FAMILY.run(key, image, counted(64), FAR, launch=own_all)
    FAMILY.run(f"Select float uint8_t {SPR}", image, counted(64), FAR, launch=own_all)
