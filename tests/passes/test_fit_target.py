"""Plans that do not fit on chip are refused with both figures."""

from __future__ import annotations

import pytest

from spcomp.ir.passes.fit_target import (
    Refusal,
    fit_target,
    on_chip_bytes,
    padded,
    tile_widths,
)
from spcomp.ir.target import Target
from tests.ir.programs import LOWERED, plan_of


def target(shared_bytes: int) -> Target:
    return Target(
        name="card",
        title="a card",
        backend="none",
        arch="none",
        warp_size=32,
        multiprocessors=1,
        shared_bytes=shared_bytes,
        registers=65536,
        tflops=(("float16", 1.0),),
        bandwidth_tbs=1.0,
        l2_tbs=1.0,
    )


@pytest.mark.parametrize(("dim", "wide"), [(1, 16), (16, 16), (17, 32), (80, 128), (128, 128)])
def test_dims_are_padded_to_a_power_of_two(dim: int, wide: int) -> None:
    assert padded(dim) == wide


@pytest.mark.parametrize(
    ("dim", "widths"),
    [(80, (128, 0)), (256, (256, 0)), (257, (256, 16)), (500, (512, 0)), (512, (512, 0)),
     (576, (512, 64)), (580, (512, 128))],
)  # fmt: skip
def test_wide_heads_lie_in_two_tiles_where_that_is_less(dim: int, widths: tuple[int, int]) -> None:
    assert tile_widths(dim) == widths


def test_a_program_holds_its_queries_and_the_keys_and_values_in_flight() -> None:
    assert on_chip_bytes((64, 32, 2), 80, 16, 2) == (64 * 128 + 2 * 32 * (128 + 16)) * 2


def test_a_plan_that_fits_to_the_byte_is_not_refused() -> None:
    needed = on_chip_bytes((64, 64, 2), 128, 128, 2)
    plan = plan_of("streaming_llm")
    assert fit_target(plan, target(needed), 128, 128, 2) is None
    assert fit_target(plan, target(needed - 1), 128, 128, 2) == Refusal(
        "attend with 64 rows, 64 keys and 2 stages",
        "at head dimensions 128 and 128 of 2 bytes it needs 81920 bytes on chip, "
        "and card has 81919",
        "take smaller tiles or fewer stages, or use backend='reference'.",
    )


@pytest.mark.parametrize("name", LOWERED)
def test_every_order_is_checked(name: str) -> None:
    found = fit_target(plan_of(name), target(1), 64, 64, 2)
    assert found is not None
    first = {launch.kernel for launch in plan_of(name).launches() if launch.axes}
    assert found.what.split()[0] in first - {"pool", "tiles", "merge"}
