"""Tensors on their way to the measuring process keep values, strides and alignment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spcomp.tuning import sample

WHOLE = torch.arange(2 * 3 * 8 * 10, dtype=torch.float32).reshape(2, 3, 8, 10)
LAYOUTS: dict[str, Tensor] = {
    "dense": WHOLE,
    "swapped": WHOLE.transpose(1, 2),
    "sliced and misaligned": WHOLE[:, :, 1:, 3:9],
    "expanded": WHOLE[:, :1].expand(2, 5, 8, 10),
    "bfloat16": WHOLE.bfloat16()[..., 1:],
    "bool": WHOLE > 100,
    "int64 table": torch.arange(5),
    "empty": WHOLE[:, :, :0],
    "scalar": torch.tensor(3.5),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tensor_arrives_as_it_left(name: str, tmp_path: Path) -> None:
    left = LAYOUTS[name]
    sample.save(tmp_path / "tensors", {"x": left})
    arrived = sample.load(tmp_path / "tensors", "cpu")["x"]
    assert torch.equal(arrived, left)
    assert arrived.dtype == left.dtype
    assert arrived.stride() == left.stride()
    if left.numel():
        assert arrived.data_ptr() % 16 == left.data_ptr() % 16


def test_the_digest_tells_values_names_dtypes_and_layouts_apart() -> None:
    x = torch.zeros(4, 4)
    others = [
        {"y": x},
        {"x": x + 1},
        {"x": x.half()},
        {"x": x.reshape(2, 8)},
        {"x": torch.zeros(4, 8)[:, :4]},
        {"x": x, "y": x},
        {},
    ]
    digests = [sample.digest_of(tensors) for tensors in ({"x": x}, *others)]
    assert len(set(digests)) == len(digests)
    assert sample.digest_of({"x": x.clone()}) == digests[0]
    assert digests[-1] == ""


def test_a_random_sample_follows_its_seed_and_leaves_torchs_generator_alone() -> None:
    shape = {"B": 1, "Hq": 2, "Hkv": 1, "Sq": 3, "Skv": 5, "D": 4, "Dv": 6}
    before = torch.get_rng_state()
    q, k, v = sample.random_sample(shape, "float16", "cpu", 7)
    again = sample.random_sample(shape, "float16", "cpu", 7)
    other = sample.random_sample(shape, "float16", "cpu", 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(x.shape) for x in (q, k, v)] == [(1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 6)]
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), again, strict=True))
    assert not torch.equal(q, other[0])
