"""Cast between all pairs of types in all round modes, and the bits of half and bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.ascendc.harness import EmulatorFault
from tests.ascendc.models_vector import Operand, cast, from_bfloat16, lanes_of, load, store
from tests.ascendc.vector_cases import (
    COUNT,
    DTYPES,
    IMAGE,
    Family,
    counted,
    difference,
    image_of,
    in_forms,
    leading,
    random_form,
    seeded,
)

EVERY = ("NONE", "RINT", "FLOOR", "CEIL", "ROUND", "TRUNC", "ODD")
WHOLE = EVERY[:6]
MODES = {
    ("half", "float"): ("NONE",),
    ("bfloat16_t", "float"): ("NONE",),
    ("float", "half"): EVERY,
    ("float", "bfloat16_t"): EVERY[1:6],
    ("float", "int32_t"): WHOLE,
    ("half", "int32_t"): WHOLE,
    ("bfloat16_t", "int32_t"): WHOLE,
    ("int32_t", "float"): WHOLE,
}


def key_of(src: str, dst: str, mode: str) -> str:
    return f"{src} {dst} {mode}"


def call(src: str, dst: str, mode: str) -> str:
    arguments = f"c.at<{dst}>(0), c.at<{src}>(1), RoundMode::CAST_{mode}"
    return in_forms("Cast", arguments, "c.unary()")


ALL = [(src, dst, mode) for (src, dst), modes in MODES.items() for mode in modes]
REFUSED = [(src, dst, m) for (src, dst), modes in MODES.items() for m in set(EVERY) - set(modes)]
FAMILY = Family({key_of(*each): call(*each) for each in (*ALL, *sorted(REFUSED))})


def awkward(src: str, dst: str, count: int) -> NDArray[np.uint8]:
    """Ties, their neighbours, subnormals, limits and infinities of the result type, then random."""
    rng = seeded(src, dst)
    if src == "int32_t":
        limits = np.array([0, 2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**31 - 1, -(2**31)], np.int32)
        return np.resize(
            np.concatenate([limits, rng.integers(-(2**31), 2**31, count).astype(np.int32)]), count
        ).view(np.uint8)
    if dst == "int32_t":
        special = np.array([0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 0.49, -0.51, 3.75, -3.75])
        numbers = np.concatenate([special, rng.normal(0, 3000, count)])[:count]
    else:
        step = 2.0 ** (-10 if dst == "half" else -7)
        ties = [
            s * (1 + step * (n + f)) for s in (1, -1) for n in (0, 1) for f in (0.5, 0.499, 0.51)
        ]
        tiny = [n * 2.0**-26 for n in range(-9, 10)]
        large = [65504, 65519, 65520, 65535, -65519, -65520, 70000, 1e30, -1e30, 3.3e38]
        limits_of = [np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-45, 5.9e-8]
        special = np.array([*ties, *tiny, *large, *limits_of])
        spread = rng.normal(0, 1, count) * 2.0 ** rng.integers(-30, 20, count)
        numbers = np.concatenate([special, spread])[:count]
    single = numbers.astype(np.float32)
    if src == "half":
        with np.errstate(over="ignore"):
            return single.astype(np.float16).view(np.uint8)
    if src == "bfloat16_t":
        return (single.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return single.view(np.uint8)


@pytest.mark.parametrize(("src", "dst", "mode"), ALL)
def test_every_mode_rounds_as_arithmetic_says(src: str, dst: str, mode: str) -> None:
    wide, narrow = DTYPES[src], DTYPES[dst]
    widest = max(np.dtype(wide).itemsize, np.dtype(narrow).itemsize)
    rng = seeded(src, dst, mode)
    image = image_of(rng, "float")
    raw = awkward(src, dst, 4096)
    image[32768 : 32768 + len(raw)] = raw
    for shape in (0, 1, 2):
        form = random_form(rng, shape, 256 // widest)
        from_wide, to_wide = (np.dtype(t).itemsize == widest for t in (wide, narrow))
        target = Operand(
            1024,
            int(rng.integers(1, 3)) if to_wide and form.kind != COUNT else 1,
            int(rng.integers(15, 24)) if form.kind != COUNT else 8,
        )
        source = Operand(
            32768,
            int(rng.integers(0, 3)) if from_wide and form.kind != COUNT else 1,
            int(rng.integers(0, 12)) if form.kind != COUNT else 8,
        )
        got, _ = FAMILY.run(key_of(src, dst, mode), image, form, [target, source])
        want = image.copy()
        for repeat, on in form.lanes(256 // widest):
            values = load(image, wide, source.addresses(wide, repeat, on))
            if src == "bfloat16_t":
                values = from_bfloat16(values)
            result = cast(values, dst, f"CAST_{mode}")
            store(want, target.addresses(narrow, repeat, on), result)
        assert not difference(got, want)


def test_all_halves_survive_a_trip_through_float() -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    for first in range(0, 65536, 8192):
        halves = every[first : first + 8192]
        image = np.zeros(IMAGE, np.uint8)
        image[: 2 * 8192] = halves.view(np.uint8)
        place = [Operand(16384), Operand(0)]
        out, _ = FAMILY.run(key_of("half", "float", "NONE"), image, counted(8192), place)
        single = out[16384 : 16384 + 4 * 8192].view(np.float32)
        np.testing.assert_array_equal(single, halves.astype(np.float32))
        place = [Operand(0), Operand(16384)]
        back, _ = FAMILY.run(key_of("float", "half", "NONE"), out, counted(8192), place)
        np.testing.assert_array_equal(back[: 2 * 8192].view(np.float16), halves)


def test_random_float_bits_round_to_half_as_numpy_rounds() -> None:
    bits = seeded("bits").integers(0, 2**32, 8192, dtype=np.uint64).astype(np.uint32)
    image = np.zeros(IMAGE, np.uint8)
    image[: 4 * 8192] = bits.view(np.uint8)
    place = [Operand(32768), Operand(0)]
    out, _ = FAMILY.run(key_of("float", "half", "RINT"), image, counted(8192), place)
    with np.errstate(over="ignore"):
        want = bits.view(np.float32).astype(np.float16)
    np.testing.assert_array_equal(out[32768 : 32768 + 2 * 8192].view(np.float16), want)


@pytest.mark.parametrize(("src", "dst", "mode"), sorted(REFUSED))
def test_a_mode_the_pair_of_types_lacks_is_reported(src: str, dst: str, mode: str) -> None:
    with pytest.raises(EmulatorFault, match=r"round mode .* does not exist"):
        FAMILY.run(key_of(src, dst, mode), image_of(seeded(0), src), counted(64), WAYS)


WAYS = [Operand(0), Operand(32768)]


def test_a_value_without_an_integer_is_reported() -> None:
    for value in (np.nan, np.inf, 2.0**31, -(2.0**31) - 256):
        image = np.zeros(IMAGE, np.uint8)
        image.view(np.float32)[8192] = value
        with pytest.raises(EmulatorFault, match="has no int32"):
            FAMILY.run(key_of("float", "int32_t", "RINT"), image, counted(8), WAYS)


def test_wrong_uses_are_reported() -> None:
    image = image_of(seeded(1), "float")
    to_half, to_float = key_of("float", "half", "RINT"), key_of("half", "float", "NONE")
    lanes = lanes_of(np.float32)
    for key, form, operands, said in (
        (to_half, leading(lanes, 1), [Operand(0, 2, 4), WAYS[1]], "dst, the narrower operand"),
        (to_float, leading(lanes, 1), [Operand(0), Operand(32768, 2, 4)], "src, the narrower"),
        (to_half, leading(lanes + 1, 1), WAYS, "the mask is 65"),
        (to_half, leading(lanes, 2), [Operand(0, 1, 3), WAYS[1]], "two repeats write the same"),
        (to_half, counted(128), [Operand(0), Operand(0)], "dst and src overlap"),
        (to_float, counted(128), [Operand(0), Operand(256)], "dst and src overlap"),
        (to_float, counted(128), [Operand(8), WAYS[1]], "dst starts at byte 8"),
    ):
        with pytest.raises(EmulatorFault, match=said):
            FAMILY.run(key, image, form, operands)
