"""Arithmetic and bit instructions in every form, against NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.ascendc.harness import EmulatorFault
from tests.ascendc.models_vector import BINARY, UNARY, Operand, Values, elementwise, lanes_of
from tests.ascendc.vector_cases import (
    COUNT,
    DTYPES,
    Family,
    Form,
    counted,
    difference,
    image_of,
    in_forms,
    leading,
    random_form,
    seeded,
    with_bits,
)

NUMBERS = ("half", "float", "int16_t", "int32_t")
REALS = ("half", "float")
BITS = ("int16_t", "uint16_t")
TYPES = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Max", "Min"), NUMBERS),
    **dict.fromkeys(("Adds", "Muls", "Maxs", "Mins"), NUMBERS),
    **dict.fromkeys(("Div", "Exp", "Ln", "Sqrt", "Abs", "Relu", "Reciprocal"), REALS),
    **dict.fromkeys(("And", "Or", "Not"), BITS),
}


def call(name: str, dtype: str) -> str:
    dst, src = f"c.at<{dtype}>(0)", f"c.at<{dtype}>(1)"
    if name in BINARY:
        return in_forms(name, f"{dst}, {src}, c.at<{dtype}>(2)", "c.binary()")
    if name in UNARY:
        return in_forms(name, f"{dst}, {src}", "c.unary()")
    return in_forms(name, f"{dst}, {src}, c.scalar<{dtype}>()", "c.unary()")


ALL = [(name, dtype) for name, types in TYPES.items() for dtype in types]
FAMILY = Family({f"{name} {dtype}": call(name, dtype) for name, dtype in ALL})


def random_operand(rng: np.random.Generator, offset: int, form: Form, *, source: bool) -> Operand:
    """Strides at which the repeats of a destination do not meet."""
    if form.kind == COUNT:
        return Operand(offset)
    block = int(rng.integers(0 if source else 1, 4))
    least = 0 if source else 7 * block + 1
    return Operand(offset, block, int(rng.integers(least, 32)))


def meaning(name: str, scalar: Values) -> Callable[..., Values]:
    if name in BINARY:
        return BINARY[name]
    if name in UNARY:
        return UNARY[name]
    return lambda values: BINARY[name.removesuffix("s")](values, scalar)


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_lanes_compute_and_all_other_bytes_stay(name: str, dtype: str) -> None:
    rng = seeded(name, dtype)
    kind = np.dtype(DTYPES[dtype])
    image = image_of(rng, dtype)
    sources = 2 if name in BINARY else 1
    if name == "Ln":
        image = np.abs(image.view(kind)).view(np.uint8)
    for shape in (0, 1, 2) * 2:
        form = random_form(rng, shape, lanes_of(kind))
        places = [int(k) * 16384 + 32 * int(rng.integers(0, 40)) for k in rng.permutation(3)]
        operands = [
            random_operand(rng, place, form, source=k > 0)
            for k, place in enumerate(places[: 1 + sources])
        ]
        scalar = int(rng.integers(-24, 25)) * (8 if kind.kind == "i" else 1)
        got, _ = FAMILY.run(f"{name} {dtype}", image, form, operands, [scalar])
        want = image.copy()
        lanes = form.lanes(lanes_of(kind))
        compute = meaning(name, np.array(scalar / 8).astype(kind))
        elementwise(want, lanes, kind, operands[0], kind, operands[1:], compute)
        approximate = name in ("Exp", "Ln")
        floats = kind if kind.kind == "f" else None
        assert not difference(got, want, floats, ulps=1 if approximate else 0)


def test_repeats_add_onto_one_place_when_dst_and_src1_stand_still() -> None:
    for name, dtype in (("Add", "float"), ("Max", "half"), ("Mul", "float"), ("Min", "int32_t")):
        kind = np.dtype(DTYPES[dtype])
        image = image_of(seeded(name), dtype)
        operands = [Operand(0, 1, 0), Operand(4096, 1, 8), Operand(0, 1, 0)]
        form = leading(lanes_of(kind) - 3, 5)
        got, _ = FAMILY.run(f"{name} {dtype}", image, form, operands)
        want = image.copy()
        lanes = form.lanes(lanes_of(kind))
        elementwise(want, lanes, kind, operands[0], kind, operands[1:], BINARY[name])
        assert not difference(got, want, kind if kind.kind == "f" else None), name


def test_a_destination_may_be_either_source_in_place() -> None:
    image = image_of(seeded("in place"), "float")
    for first, second in ((0, 8192), (8192, 0), (0, 0)):
        for form in (counted(300), leading(40, 3)):
            operands = [Operand(0), Operand(first), Operand(second)]
            got, _ = FAMILY.run("Sub float", image, form, operands)
            want = image.copy()
            lanes = form.lanes(64)
            elementwise(want, lanes, "f4", operands[0], "f4", operands[1:], BINARY["Sub"])
            assert not difference(got, want)


def test_no_repeat_and_no_element_do_nothing() -> None:
    image = image_of(seeded("nothing"), "float")
    for form in (counted(0), leading(64, 0), with_bits((1, 0), 0)):
        got, _ = FAMILY.run("Add float", image, form, [Operand(0), Operand(4096), Operand(8192)])
        assert not difference(got, image)


def test_poison_stays_visible_in_max_and_min() -> None:
    image = np.zeros(65536, np.uint8)
    image.view(np.float32)[:64] = np.nan
    for name in ("Max", "Min"):
        for first, second in ((0, 4096), (4096, 0)):
            operands = [Operand(8192), Operand(first), Operand(second)]
            got, _ = FAMILY.run(f"{name} float", image, counted(64), operands)
            assert np.isnan(got.view(np.float32)[2048 : 2048 + 64]).all()


FAR = (Operand(4096), Operand(8192))


@pytest.mark.parametrize(
    ("key", "form", "operands", "said"),
    [
        ("Add float", leading(65, 1), (Operand(0), *FAR), "the mask is 65; .* lanes 1 to 64"),
        ("Add half", leading(129, 1), (Operand(0), *FAR), "the mask is 129; .* lanes 1 to 128"),
        ("Add float", leading(0, 1), (Operand(0), *FAR), "the mask is 0"),
        ("Add float", with_bits((0, 0), 1), (Operand(0), *FAR), "no bit of the mask is set"),
        ("Add float", with_bits((1, 1), 1), (Operand(0), *FAR), r"mask\[1\] is not 0"),
        ("Add float", leading(64, 256), (Operand(0), *FAR), "8 bits was given 256"),
        ("Add float", leading(64, 1), (Operand(0, 256), *FAR), "8 bits was given 256"),
        ("Add float", leading(64, 1), (Operand(0), Operand(0, 1, 256), FAR[0]), "given 256"),
        ("Exp float", leading(64, 1), (Operand(0, 65536), *FAR), "16 bits was given 65536"),
        ("Exp float", leading(64, 2), (Operand(0, 1, 300), *FAR), "8 bits was given 300"),
        ("Add float", counted(-1), (Operand(0), *FAR), "count is -1"),
        ("Add float", counted(64), (Operand(16), *FAR), "dst starts at byte 16 .* multiple of 32"),
        ("Add float", counted(64), (Operand(0), Operand(4100), FAR[1]), "src0 starts at byte 4100"),
        ("Adds half", counted(64), (Operand(0), Operand(4098)), "src starts at byte 4098"),
        ("Add float", counted(65), (Operand(65536 - 256), *FAR), "dst needs the elements 0 to 65"),
        ("Add float", leading(64, 3), (Operand(0), Operand(65024), FAR[0]), "src0 needs .* 128"),
        ("Add float", leading(64, 2), (Operand(0, 0), *FAR), "block stride of dst is 0"),
        ("Add float", leading(64, 2), (Operand(0, 1, 7), *FAR), "two repeats write the same bytes"),
        ("Add float", leading(64, 2), (Operand(0, 1, 0), *FAR), "two repeats write the same bytes"),
        ("Add float", leading(64, 2), (Operand(0, 1, 0), FAR[0], Operand(0)), "two repeats"),
        ("Div float", leading(64, 2), (Operand(0, 1, 0), FAR[0], Operand(0, 1, 0)), "two repeats"),
        ("Add float", counted(64), (Operand(0), Operand(32), FAR[0]), "dst and src0 overlap"),
        ("Add float", counted(64), (Operand(32), FAR[0], Operand(0)), "dst and src1 overlap"),
        ("Add float", leading(64, 2), (Operand(256), Operand(0), FAR[0]), "dst and src0 overlap"),
        ("Add float", leading(64, 2), (Operand(0), Operand(0, 1, 0), FAR[0]), "src0 overlap"),
        ("Sub float", leading(64, 1), (Operand(0), FAR[0], Operand(0, 0)), "src1 overlap"),
        ("Exp float", leading(64, 1), (Operand(0), Operand(32, 0)), "dst and src overlap"),
        (
            "Add float",
            leading(64, 3),
            (Operand(0, 1, 0), Operand(0), Operand(0, 1, 0)),
            "dst overlaps src0",
        ),
    ],
)
def test_a_wrong_use_is_reported(
    key: str, form: Form, operands: tuple[Operand, ...], said: str
) -> None:
    with pytest.raises(EmulatorFault, match=said):
        FAMILY.run(key, image_of(seeded(key), key.split()[1]), form, operands)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("Add int16_t", (32767, 1)),
        ("Mul int16_t", (200, 200)),
        ("Sub int32_t", (-(2**31), 1)),
        ("Mul int32_t", (2**16, 2**15)),
    ],
)
def test_a_result_too_large_for_the_integer_type_is_reported(
    key: str, values: tuple[int, int]
) -> None:
    kind = np.dtype(DTYPES[key.split()[1]])
    image = np.zeros(65536, kind).view(np.uint8)[:65536]
    image[4096 : 4096 + kind.itemsize] = np.array([values[0]], kind).view(np.uint8)
    image[8192 : 8192 + kind.itemsize] = np.array([values[1]], kind).view(np.uint8)
    with pytest.raises(EmulatorFault, match="does not fit the"):
        FAMILY.run(key, image, counted(16), (Operand(0), *FAR))
