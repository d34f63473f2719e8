"""Reductions to one value per repeat, per block and per call, against NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.ascendc.harness import EmulatorFault
from tests.ascendc.models_vector import (
    Bytes,
    Operand,
    block_reduce,
    lanes_of,
    reduce_all,
    whole_reduce,
)
from tests.ascendc.vector_cases import (
    BITS,
    COUNT,
    DTYPES,
    IMAGE,
    MASK,
    Family,
    Form,
    counted,
    difference,
    image_of,
    leading,
    random_form,
    seeded,
)

REALS = ("half", "float")
ORDERS = ("ORDER_VALUE_INDEX", "ORDER_INDEX_VALUE", "ORDER_ONLY_VALUE", "ORDER_ONLY_INDEX")


def masked(call: str, *, repeat_first: bool = False) -> str:
    """The call with `MASK` replaced by leading lanes or by bits."""
    lanes = "c.repeats(), {}" if repeat_first else "{}, c.repeats()"
    by_count, by_bits = lanes.format("int32_t(c.count())"), lanes.format("c.mask()")
    return (
        f"if (c.form() == {MASK}) {call.replace('MASK', by_count)} "
        f"else {call.replace('MASK', by_bits)}"
    )


def whole(kind: str, dtype: str, order: str = "") -> str:
    strides = "c.repeat(0), c.block(1), c.repeat(1)"
    last = f", ReduceOrder::{order}" if order else ""
    return masked(f"WholeReduce{kind}(c.at<{dtype}>(0), c.at<{dtype}>(1), MASK, {strides}{last});")


def block(kind: str, dtype: str) -> str:
    strides = "c.repeat(0), c.block(1), c.repeat(1)"
    call = f"BlockReduce{kind}(c.at<{dtype}>(0), c.at<{dtype}>(1), MASK, {strides});"
    return masked(call, repeat_first=True)


def every(kind: str, dtype: str) -> str:
    tensors = f"c.at<{dtype}>(0), c.at<{dtype}>(1), c.at<{dtype}>(2)"
    index = "" if kind == "Sum" else ", c.extra(0) != 0"
    rest = masked(f"Reduce{kind}({tensors}, MASK, c.repeat(1){index});")
    return (
        f"if (c.form() == {COUNT}) Reduce{kind}({tensors}, int32_t(c.count()){index}); else {rest}"
    )


CALLS = {
    f"Whole{kind} {t} {order}": whole(kind, t, order)
    for kind in ("Max", "Min")
    for t in REALS
    for order in ORDERS
}
CALLS |= {f"WholeSum {t}": whole("Sum", t) for t in REALS}
CALLS |= {f"Block{kind} {t}": block(kind, t) for kind in ("Max", "Sum") for t in REALS}
CALLS |= {f"{kind} {t}": every(kind, t) for kind in ("Max", "Min", "Sum") for t in REALS}
FAMILY = Family(CALLS)
REFUSED = ("WholeMax half ORDER_ONLY_INDEX", "WholeMin half ORDER_ONLY_INDEX")


def whole_numbers(rng: np.random.Generator, dtype: str) -> Bytes:
    """Small whole numbers: sums are exact in any order, and equal values are frequent."""
    kind = np.dtype(DTYPES[dtype])
    return rng.integers(-9, 10, IMAGE // kind.itemsize).astype(kind).view(np.uint8)


def source(rng: np.random.Generator, form: Form) -> Operand:
    if form.kind == COUNT:
        return Operand(32768)
    return Operand(32768, int(rng.integers(0, 4)), int(rng.integers(0, 30)))


@pytest.mark.parametrize("key", [k for k in CALLS if k.startswith("Whole") and k not in REFUSED])
def test_each_repeat_gives_one_result(key: str) -> None:
    rng = seeded(key)
    kind, dtype, *order = key.removeprefix("Whole").split()
    image = whole_numbers(rng, dtype)
    width = lanes_of(DTYPES[dtype])
    for shape in (MASK, BITS) * 3:
        form = random_form(rng, shape, width)
        target = Operand(32 * int(rng.integers(0, 9)), 1, int(rng.integers(1, 20)))
        src = source(rng, form)
        got, _ = FAMILY.run(key, image, form, [target, src])
        want = image.copy()
        arguments = (form.lanes(width), DTYPES[dtype], target.offset, target.repeat, src, kind)
        whole_reduce(want, *arguments, *order)
        assert not difference(got, want)


@pytest.mark.parametrize("key", [k for k in CALLS if k.startswith("Block")])
def test_each_block_gives_one_result(key: str) -> None:
    rng = seeded(key)
    kind, dtype = key.removeprefix("Block").split()
    image = whole_numbers(rng, dtype)
    width = lanes_of(DTYPES[dtype])
    for shape in (MASK, BITS) * 3:
        form = random_form(rng, shape, width)
        target = Operand(32 * int(rng.integers(0, 9)), 1, int(rng.integers(1, 20)))
        src = source(rng, form)
        got, _ = FAMILY.run(key, image, form, [target, src])
        want = image.copy()
        block_reduce(
            want, form.lanes(width), DTYPES[dtype], target.offset, target.repeat, src, kind
        )
        assert not difference(got, want)


def scratch_bytes(dtype: str, repeats: int, with_index: bool) -> int:
    """Two elements a repeat in whole blocks; with the index the same for two levels more."""
    size = np.dtype(DTYPES[dtype]).itemsize
    total = 0
    for _ in range(3 if with_index else 1):
        total += -(-2 * repeats * size // 32) * 32
        repeats = -(-2 * repeats * size // 256)
    return total


@pytest.mark.parametrize(
    ("key", "with_index"),
    [(f"{kind} {t}", i) for kind in ("Max", "Min") for t in REALS for i in (False, True)]
    + [(f"Sum {t}", False) for t in REALS],
)
def test_all_lanes_give_one_result(key: str, with_index: bool) -> None:
    rng = seeded(key, with_index)
    kind, dtype = key.split()
    image = whole_numbers(rng, dtype)
    width = lanes_of(DTYPES[dtype])
    for shape in (COUNT, MASK, BITS) * 2:
        form = random_form(rng, shape, width, most=3000)
        src = replace(source(rng, form), block=1)  # this instruction has no block stride
        for target in (Operand(0), Operand(4096)):  # the second lies in the scratch
            got, _ = FAMILY.run(key, image, form, [target, src, Operand(4096)], [int(with_index)])
            want = image.copy()
            repeats = -(-form.count // width) if form.kind == COUNT else form.repeats
            end = 4096 + scratch_bytes(dtype, repeats, with_index)
            arguments = (form.lanes(width), DTYPES[dtype], target.offset, src, (4096, end))
            reduce_all(want, *arguments, kind, with_index)
            assert not difference(got, want)


@pytest.mark.parametrize("dtype", REALS)
def test_a_sum_of_fractions_is_close(dtype: str) -> None:
    kind = np.dtype(DTYPES[dtype])
    image = image_of(seeded("sum", dtype), dtype)
    got, _ = FAMILY.run(f"Sum {dtype}", image, counted(1000), [*HERE, Operand(4096)])
    values = image.view(kind)[32768 // kind.itemsize :][:1000].astype(np.float64)
    error = abs(float(got.view(kind)[0]) - values.sum())
    assert error <= np.finfo(kind).eps * np.abs(values).sum()


HERE = [Operand(0, 1, 1), Operand(32768)]


def test_poison_wins() -> None:
    image = np.zeros(IMAGE, np.uint8)
    image.view(np.float32)[8192 + 5] = np.nan
    for key in ("Max float", "Min float"):
        got, _ = FAMILY.run(key, image, counted(64), [*HERE, Operand(4096)], [1])
        assert np.isnan(got.view(np.float32)[0])
        assert got.view(np.uint32)[1] == 5


@pytest.mark.parametrize(
    ("key", "form", "operands", "said"),
    [
        ("WholeSum float", leading(64, 2), [Operand(0, 1, 0), HERE[1]], "two repeats write"),
        ("WholeSum float", leading(65, 1), HERE, "the mask is 65"),
        ("WholeSum float", leading(-1, 1), HERE, "the mask is -1"),
        ("WholeSum float", leading(64, 256), HERE, "8 bits was given 256"),
        ("WholeSum float", leading(64, 1), [Operand(4), HERE[1]], "dst starts at byte 4"),
        ("WholeSum float", leading(64, 2), [Operand(32768, 1, 1), HERE[1]], "dst overlaps src"),
        ("WholeMax half ORDER_ONLY_INDEX", leading(64, 1), HERE, "not modelled"),
        ("BlockSum half", leading(64, 3), [Operand(65520 - 16, 1, 1), HERE[1]], "dst needs"),
        ("BlockMax half", leading(64, 1), [HERE[0], Operand(32770)], "src starts at byte 32770"),
        ("Sum float", counted(64), [*HERE, Operand(32768)], "the scratch tensor overlaps src"),
        ("Sum float", counted(64), [*HERE, Operand(IMAGE - 32 + 8)], "scratch tensor starts at"),
        ("Max float", counted(8000), [*HERE, Operand(IMAGE - 512)], "the scratch tensor needs"),
        ("Max float", counted(64), [Operand(32800), HERE[1], Operand(0)], "dst overlaps src"),
    ],
)
def test_a_wrong_use_is_reported(key: str, form: Form, operands: list[Operand], said: str) -> None:
    with pytest.raises(EmulatorFault, match=said):
        FAMILY.run(key, image_of(seeded(key), key.split()[1]), form, operands)
