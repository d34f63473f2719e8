"""Sort32 and MrgSort against NumPy's stable sort."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ascendc.harness import EmulatorFault
from tests.ascendc.models_vector import Bytes, Operand, descending, merge, sort32, store_pairs
from tests.ascendc.vector_cases import DTYPES, IMAGE, Family, difference, leading, seeded

REALS = ("half", "float")

CALLS: dict[str, str] = {}
for t in REALS:
    scores = f"c.at<{t}>(0), c.at<{t}>(1)"
    CALLS[f"Sort32 {t}"] = f"Sort32({scores}, c.at<uint32_t>(2), c.repeats());"
    CALLS[f"MrgSort {t}"] = (
        "MrgSort4Info info; "
        "for (int k = 0; k < 4; ++k) info.elementLengths[k] = c.extra(k); "
        "info.ifExhaustedSuspension = c.extra(4) != 0; "
        "info.validBit = c.extra(5); info.repeatTimes = c.repeats(); "
        f"LocalTensor<{t}> fourth = whole[c.extra(6)].ReinterpretCast<{t}>(); "
        f"MrgSort(c.at<{t}>(0), MrgSortSrcList<{t}>(c.at<{t}>(1), c.at<{t}>(2), c.at<{t}>(3), "
        "fourth), info);"
    )
FAMILY = Family(CALLS)


def scores_of(rng: np.random.Generator, dtype: str, count: int) -> np.ndarray:
    """Few values, so that ties are frequent; infinities of both signs among them."""
    scores = rng.integers(-6, 7, count).astype(DTYPES[dtype])
    scores[scores == 6] = np.inf
    scores[scores == -6] = -np.inf
    return scores


@pytest.mark.parametrize("dtype", REALS)
def test_groups_of_32_descend_and_equals_keep_their_order(dtype: str) -> None:
    rng = seeded("Sort32", dtype)
    for repeats in (0, 1, 2, 7):
        image = rng.integers(0, 256, IMAGE).astype(np.uint8)
        scores = scores_of(rng, dtype, 32 * 8).view(np.uint8)
        image[16384 : 16384 + len(scores)] = scores
        operands = [Operand(256), Operand(16384), Operand(32768 + 32)]
        got, _ = FAMILY.run(f"Sort32 {dtype}", image, leading(1, repeats), operands)
        want = image.copy()
        sort32(want, DTYPES[dtype], 256, 16384, 32768 + 32, repeats)
        assert not difference(got, want)


def with_lists(
    rng: np.random.Generator, dtype: str, places: list[int], lengths: list[int]
) -> Bytes:
    image = rng.integers(0, 256, IMAGE).astype(np.uint8)
    for place, length in zip(places, lengths, strict=True):
        scores = scores_of(rng, dtype, length)
        scores = scores[descending(scores)]
        store_pairs(image, place, scores, rng.integers(0, 2**32, length).astype(np.uint32))
    return image


def merging(
    dtype: str, image: Bytes, places: list[int], lengths: list[int], suspends: bool = False
) -> Bytes:
    used = len(places)
    all_places = places + [0] * (4 - used)
    extras = [*lengths, *[0] * (4 - used), int(suspends), 2**used - 1, all_places[3]]
    operands = [Operand(32768), *(Operand(place) for place in all_places[:3])]
    got, _ = FAMILY.run(f"MrgSort {dtype}", image, leading(1, 1), operands, extras)
    return got


@pytest.mark.parametrize("suspends", [False, True])
@pytest.mark.parametrize("used", [2, 3, 4])
@pytest.mark.parametrize("dtype", REALS)
def test_lists_merge_and_equals_come_from_the_earlier_list(
    dtype: str, used: int, suspends: bool
) -> None:
    rng = seeded("MrgSort", dtype, used, suspends)
    for _ in range(4):
        places = [8192 * int(k) for k in rng.permutation(4)[:used]]
        lengths = [int(n) for n in rng.integers(1, 200, used)]
        image = with_lists(rng, dtype, places, lengths)
        got = merging(dtype, image, places, lengths, suspends)
        want = image.copy()
        merge(want, DTYPES[dtype], 32768, places, lengths, suspends)
        assert not difference(got, want)


@pytest.mark.parametrize("dtype", REALS)
def test_repeats_merge_groups_of_four_adjacent_lists(dtype: str) -> None:
    rng = seeded("repeats", dtype)
    places = [8 * 32 * k for k in range(12)]
    image = with_lists(rng, dtype, places, [32] * 12)
    operands = [Operand(32768), *(Operand(place) for place in places[:3])]
    extras = [32, 32, 32, 32, 0, 15, places[3]]
    got, _ = FAMILY.run(f"MrgSort {dtype}", image, leading(1, 3), operands, extras)
    want = image.copy()
    for group in range(3):
        target = 32768 + 8 * 128 * group
        merge(want, DTYPES[dtype], target, places[4 * group : 4 * group + 4], [32] * 4)
    assert not difference(got, want)


LISTS = [Operand(32768), Operand(0), Operand(256), Operand(512)]
FOUR = [32, 32, 32, 32, 0, 15, 768]


@pytest.mark.parametrize(
    ("repeats", "operands", "extras", "said"),
    [
        (1, LISTS, [*FOUR[:5], 5, 768], "validBit is 5"),
        (1, LISTS, [0, *FOUR[1:]], "src1 has 0 pairs"),
        (1, LISTS, [4096, *FOUR[1:]], "src1 has 4096 pairs"),
        (1, LISTS, [65536, *FOUR[1:]], "16 bits was given 65536"),
        (256, LISTS, FOUR, "8 bits was given 256"),
        (2, LISTS, [31, *FOUR[1:]], "more than one repeat needs four equally long lists"),
        (2, [*LISTS[:3], Operand(544)], FOUR, "more than one repeat needs"),
        (2, LISTS, [*FOUR[:4], 1, *FOUR[5:]], "more than one repeat needs"),
        (1, LISTS, [*FOUR[:5], 7, *FOUR[6:]], "list 4 has .* pairs, but validBit leaves it out"),
        (2, LISTS, [*FOUR[:5], 7, 768], "more than one repeat needs"),
        (1, [Operand(224), *LISTS[1:]], FOUR, "dst overlaps src1"),
        (1, [Operand(4), *LISTS[1:]], FOUR, "dst starts at byte 4"),
        (1, [LISTS[0], Operand(4), *LISTS[2:]], FOUR, "src1 starts at byte 4"),
        (1, [Operand(65536 - 512), *LISTS[1:]], FOUR, "dst needs the elements"),
    ],
)
def test_a_wrong_merge_is_reported(
    repeats: int, operands: list[Operand], extras: list[int], said: str
) -> None:
    with pytest.raises(EmulatorFault, match=said):
        FAMILY.run(
            "MrgSort float", np.zeros(IMAGE, np.uint8), leading(1, repeats), operands, extras
        )


def test_a_list_that_rises_and_a_score_without_order_are_reported() -> None:
    image = np.zeros(IMAGE, np.uint8)
    image.view(np.float32)[2 * 7] = 1.0
    with pytest.raises(EmulatorFault, match="the scores of src1 rise at pair 7"):
        FAMILY.run("MrgSort float", image, leading(1, 1), LISTS, FOUR)
    image.view(np.float32)[2 * 7] = np.nan
    with pytest.raises(EmulatorFault, match="score 7 of src1 is NaN"):
        FAMILY.run("MrgSort float", image, leading(1, 1), LISTS, FOUR)


@pytest.mark.parametrize(
    ("operands", "repeats", "said"),
    [
        ([Operand(32), Operand(16384), Operand(32768)], 1, "dst starts at byte 32 .* 256"),
        ([Operand(0), Operand(16384 + 32), Operand(32768)], 1, "src0 starts at .* 128"),
        ([Operand(0), Operand(16384), Operand(32768 + 4)], 1, "src1 starts at .* 32"),
        ([Operand(0), Operand(128), Operand(32768)], 1, "dst overlaps src0"),
        ([Operand(0), Operand(16384), Operand(128)], 1, "dst overlaps src1"),
        ([Operand(0), Operand(16384), Operand(32768)], 256, "8 bits was given 256"),
        ([Operand(0), Operand(65536 - 128), Operand(32768)], 2, "src0 needs the elements 0 to 64"),
    ],
)
def test_a_wrong_sort_is_reported(operands: list[Operand], repeats: int, said: str) -> None:
    with pytest.raises(EmulatorFault, match=said):
        FAMILY.run("Sort32 float", np.zeros(IMAGE, np.uint8), leading(1, repeats), operands)


def test_a_score_without_order_is_not_sorted() -> None:
    image = np.zeros(IMAGE, np.uint8)
    image.view(np.float32)[4096 + 9] = np.nan
    operands = [Operand(0), Operand(16384), Operand(32768)]
    with pytest.raises(EmulatorFault, match="score 9 of src0 is NaN"):
        FAMILY.run("Sort32 float", image, leading(1, 1), operands)
