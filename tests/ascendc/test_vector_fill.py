"""Duplicate, CreateVecIndex and Brcb against NumPy."""

from __future__ import annotations

import pytest

from tests.ascendc.harness import EmulatorFault
from tests.ascendc.models_vector import Operand, brcb, create_index, duplicate, lanes_of
from tests.ascendc.vector_cases import (
    COUNT,
    DTYPES,
    Family,
    counted,
    difference,
    image_of,
    in_forms,
    leading,
    random_form,
    seeded,
)

MOVABLE = ("half", "int16_t", "uint16_t", "float", "int32_t", "uint32_t")
COUNTABLE = ("half", "int16_t", "float", "int32_t")


def filling(name: str, dtype: str) -> str:
    return in_forms(name, f"c.at<{dtype}>(0), c.scalar<{dtype}>()", "c.block(0), c.repeat(0)")


CALLS = {f"Duplicate {t}": filling("Duplicate", t) for t in MOVABLE}
CALLS |= {f"CreateVecIndex {t}": filling("CreateVecIndex", t) for t in COUNTABLE}
CALLS["Duplicate bfloat16_t"] = in_forms(
    "Duplicate",
    "c.at<bfloat16_t>(0), bfloat16_t::from_bits(c.extra(0))",
    "c.block(0), c.repeat(0)",
)
CALLS |= {
    f"Brcb {t}": f"Brcb(c.at<{t}>(0), c.at<{t}>(1), c.repeats(), {{c.block(0), c.repeat(0)}});"
    for t in (*MOVABLE, "bfloat16_t")
}
FAMILY = Family(CALLS)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("Duplicate", t) for t in (*MOVABLE, "bfloat16_t")]
    + [("CreateVecIndex", t) for t in COUNTABLE],
)
def test_fills_the_active_lanes(name: str, dtype: str) -> None:
    rng = seeded(name, dtype)
    kind = DTYPES[dtype]
    image = image_of(rng, dtype)
    for shape in (0, 1, 2) * 2:
        form = random_form(rng, shape, lanes_of(kind))
        block = 1 if form.kind == COUNT else int(rng.integers(1, 4))
        repeat = 8 if form.kind == COUNT else int(rng.integers(7 * block + 1, 32))
        target = Operand(32 * int(rng.integers(0, 50)), block, repeat)
        value = int(rng.integers(0, 40))
        extra = value if dtype == "bfloat16_t" else 8 * value
        got, _ = FAMILY.run(f"{name} {dtype}", image, form, [target], [extra])
        want = image.copy()
        model = duplicate if name == "Duplicate" else create_index
        model(want, form.lanes(lanes_of(kind)), kind, target, value)
        assert not difference(got, want)


@pytest.mark.parametrize("dtype", (*MOVABLE, "bfloat16_t"))
def test_one_element_fills_one_block(dtype: str) -> None:
    rng = seeded(dtype)
    image = image_of(rng, dtype)
    for repeats in (0, 1, 3, 7):
        block = int(rng.integers(1, 4))
        target = Operand(0, block, int(rng.integers(7 * block + 1, 40)))
        source = Operand(40960 + 32 * int(rng.integers(0, 9)))
        got, _ = FAMILY.run(f"Brcb {dtype}", image, leading(1, repeats), [target, source])
        want = image.copy()
        brcb(want, repeats, DTYPES[dtype], target, source)
        assert not difference(got, want)


def test_wrong_uses_are_reported() -> None:
    image = image_of(seeded("wrong"), "float")
    here, far = Operand(0), Operand(32768)
    for key, form, operands, extra, said in (
        ("CreateVecIndex half", counted(64), [here], 8 * 2040, "index 2049 is not exact"),
        ("CreateVecIndex int16_t", counted(32), [here], 8 * 32752, "does not fit the 16-bit"),
        ("Duplicate float", leading(64, 2), [Operand(0, 0)], 0, "block stride of dst is 0"),
        ("Duplicate float", leading(64, 256), [here], 0, "8 bits was given 256"),
        ("Duplicate float", counted(16384 + 1), [here], 0, "dst needs the elements"),
        ("Brcb float", leading(1, 256), [here, far], 0, "8 bits was given 256"),
        ("Brcb float", leading(1, 2), [Operand(0, 1, 4), far], 0, "two repeats write the same"),
        ("Brcb float", leading(1, 1), [Operand(0, 0, 8), far], 0, "block stride of dst is 0"),
        ("Brcb float", leading(1, 1), [here, Operand(4)], 0, "src starts at byte 4"),
        ("Brcb float", leading(1, 1), [here, Operand(32)], 0, "dst overlaps src"),
    ):
        with pytest.raises(EmulatorFault, match=said):
            FAMILY.run(key, image, form, operands, [extra])
