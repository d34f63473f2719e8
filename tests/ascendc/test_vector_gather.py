"""Gather and GatherMask against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ascendc.harness import EmulatorFault
from tests.ascendc.models_vector import Bytes, Operand, gather, gather_mask, lanes_of
from tests.ascendc.vector_cases import (
    COUNT,
    DTYPES,
    IMAGE,
    Family,
    Form,
    counted,
    difference,
    image_of,
    in_forms,
    leading,
    random_form,
    seeded,
)

MOVABLE = ("half", "bfloat16_t", "int16_t", "uint16_t", "float", "int32_t", "uint32_t")

CALLS: dict[str, str] = {}
for t in MOVABLE:
    word = "uint16_t" if np.dtype(DTYPES[t]).itemsize == 2 else "uint32_t"
    tensors = f"c.at<{t}>(0), c.at<{t}>(1)"
    CALLS[f"Gather {t}"] = in_forms(
        "Gather", f"{tensors}, c.at<uint32_t>(2), uint32_t(c.extra(0))", "c.repeat(0)"
    )
    params = "{c.block(1), c.repeats(), c.repeat(1), c.repeat(2)}"
    rest = f"c.extra(1) != 0, uint32_t(c.count()), {params}, kept);"
    CALLS[f"GatherMask {t}"] = (
        f"if (c.extra(0) > 0) GatherMask({tensors}, uint8_t(c.extra(0)), {rest} "
        f"else GatherMask({tensors}, c.at<{word}>(2), {rest}"
    )
FAMILY = Family(CALLS)

OFFSETS = 32768


def with_offsets(rng: np.random.Generator, image: Bytes, size: int, reach: int) -> Bytes:
    """Byte offsets of random elements, some of them the same."""
    image = image.copy()
    offsets = size * rng.integers(0, reach // size, 4096)
    image[OFFSETS : OFFSETS + 4 * 4096] = offsets.astype(np.uint32).view(np.uint8)
    return image


@pytest.mark.parametrize("dtype", MOVABLE)
def test_gather_takes_elements_by_their_byte_offsets(dtype: str) -> None:
    rng = seeded("Gather", dtype)
    kind = np.dtype(DTYPES[dtype])
    image = with_offsets(rng, image_of(rng, dtype), kind.itemsize, 8000)
    for shape in (0, 1, 2) * 2:
        form = random_form(rng, shape, lanes_of(kind))
        target = Operand(0, 1, 8 if form.kind == COUNT else int(rng.integers(8, 30)))
        base = kind.itemsize * int(rng.integers(0, 50))
        operands = [target, Operand(20480), Operand(OFFSETS)]
        got, _ = FAMILY.run(f"Gather {dtype}", image, form, operands, [base])
        want = image.copy()
        gather(want, form.lanes(lanes_of(kind)), kind, target, 20480, OFFSETS, base)
        assert not difference(got, want)


@pytest.mark.parametrize("dtype", MOVABLE)
def test_fixed_patterns_pack_their_lanes(dtype: str) -> None:
    rng = seeded("pattern", dtype)
    kind = np.dtype(DTYPES[dtype])
    image = image_of(rng, dtype)
    for pattern in range(1, 8):
        for by_count in (False, True):
            width = int(rng.integers(1, 500)) if by_count else lanes_of(kind)
            repeats = int(rng.integers(1, 5))
            block = 1 if width > lanes_of(kind) else int(rng.integers(0, 4))
            src = Operand(20480, block, int(rng.integers(0, 40)))
            form = leading(width if by_count else 0, repeats)
            operands = [Operand(64), src]
            key = f"GatherMask {dtype}"
            got, kept = FAMILY.run(key, image, form, operands, [pattern, int(by_count)])
            want = image.copy()
            assert kept == gather_mask(want, kind, 64, src, pattern, width, repeats)
            assert not difference(got, want)


@pytest.mark.parametrize("dtype", MOVABLE)
def test_pattern_bits_pack_their_lanes(dtype: str) -> None:
    rng = seeded("bits", dtype)
    kind = np.dtype(DTYPES[dtype])
    image = image_of(rng, dtype)
    image[40960:] = rng.integers(0, 256, IMAGE - 40960)
    for by_count in (False, True) * 2:
        width = int(rng.integers(1, 300)) if by_count else lanes_of(kind)
        repeats = int(rng.integers(1, 5))
        src = Operand(20480, 1, int(rng.integers(0, 40)))
        pattern = Operand(40960, 1, int(rng.integers(0, 5)))
        form = leading(width if by_count else 0, repeats)
        operands = [Operand(64), src, pattern]
        got, kept = FAMILY.run(f"GatherMask {dtype}", image, form, operands, [0, int(by_count)])
        want = image.copy()
        assert kept == gather_mask(want, kind, 64, src, pattern, width, repeats)
        assert not difference(got, want)


WAYS = [Operand(0), Operand(20480), Operand(OFFSETS)]
COUNTER, PLAIN = [1, 1], [1, 0]


@pytest.mark.parametrize(
    ("key", "form", "operands", "extras", "said"),
    [
        ("Gather float", counted(64), WAYS, [2], "falls inside an element"),
        ("Gather half", counted(64), WAYS, [1], "falls inside an element"),
        ("Gather float", counted(64), WAYS, [60000], "src needs the elements"),
        ("Gather float", counted(64), [Operand(20480), *WAYS[1:]], [0], "dst overlaps src"),
        ("Gather float", counted(64), [Operand(OFFSETS), *WAYS[1:]], [0], "dst overlaps srcOffset"),
        ("Gather float", counted(64), [*WAYS[:2], Operand(40004)], [0], "srcOffset starts at"),
        ("Gather float", leading(65, 1), WAYS, [0], "the mask is 65"),
        ("Gather float", leading(64, 256), WAYS, [0], "8 bits was given 256"),
        ("Gather float", leading(64, 2), [Operand(0, 1, 4), *WAYS[1:]], [0], "two repeats write"),
        ("GatherMask float", leading(0, 1), WAYS, [8, 0], "there is no pattern 8"),
        ("GatherMask float", leading(64, 1), WAYS, PLAIN, "outside the counter mode it must be 0"),
        ("GatherMask float", leading(0, 65536), WAYS, PLAIN, "16 bits was given 65536"),
        ("GatherMask float", leading(0, 1), [Operand(20480), WAYS[1]], [1, 0], "dst overlaps"),
        ("GatherMask float", leading(0, 1), WAYS, PLAIN, "the stride of src1 is 8"),
        ("GatherMask float", leading(65, 1), [WAYS[0], Operand(0, 2)], COUNTER, "not modelled"),
        ("GatherMask float", leading(0, 1), [WAYS[0], Operand(4)], PLAIN, "src0 starts at byte 4"),
    ],
)
def test_a_wrong_use_is_reported(
    key: str, form: Form, operands: list[Operand], extras: list[int], said: str
) -> None:
    image = with_offsets(seeded(key), np.zeros(IMAGE, np.uint8), 4, 8000)
    with pytest.raises(EmulatorFault, match=said):
        FAMILY.run(key, image, form, operands, extras)
