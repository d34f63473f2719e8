"""Rows and block maps from compiled patterns on captured layers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spcomp.autotune import fidelity, survey
from spcomp.autotune.report.record import Mass, Row, Timing
from spcomp.capture import CapturedLayer


class Window:
    """The last 5 keys, by definition; halves the output, to tell it from the mask's own."""

    def to_mask(self, q: Tensor, k: Tensor, /) -> Tensor:
        own = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        key = torch.arange(k.shape[2])
        visible = (key <= own) & (own - key < 5)
        return visible.expand(q.shape[0], q.shape[1], -1, -1)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, /, *, scale: float | None = None) -> Tensor:
        return fidelity.dense_attention(q, k, v, scale=scale) * 0.5


def layers() -> list[CapturedLayer]:
    found = []
    for index in (3, 8):
        keys, values = torch.randn(2, 1, 2, 24, 8)
        found.append(CapturedLayer(index, torch.randn(1, 4, 24, 8), keys, values, 0.3))
    return found


def test_a_row_pools_the_layers_and_measures_the_output_that_really_came() -> None:
    operands, window = layers(), Window()
    timing = Timing("predicted", 1.0, None, 2.0, "sm90")
    row = survey.measure(
        survey.Candidate("window", None, 0.2, window),
        operands,
        perplexity=9.5,
        price=survey.Price(10, 20, timing),
        rung="compiled",
    )
    want = fidelity.Measurement()
    for one in operands:
        want.add(one.q, one.k, one.v, mask=window.to_mask(one.q, one.k), scale=0.3)
    known = want.result()
    assert row == Row(
        "window",
        None,
        0.2,
        Mass(known.mass_mean, known.mass_p5, known.mass_min_head),
        row.out_error,
        row.out_max_abs,
        known.density,
        9.5,
        10,
        20,
        timing,
        "compiled",
    )
    assert row.out_error == pytest.approx(0.5, abs=1e-6)
    assert known.out_error != pytest.approx(0.5, abs=1e-2)


def test_block_maps_come_from_the_mask_of_the_named_heads() -> None:
    layer = layers()[1]
    candidate = survey.Candidate("window", None, 0.2, Window())
    first, second = survey.block_maps(candidate, layer, (0, 3), block=8)
    assert [(m.layer, m.head, m.block) for m in (first, second)] == [(8, 0, 8), (8, 3, 8)]
    assert first.cells == ((1, 0, 0), (1, 1, 0), (0, 1, 1))


def test_the_environment_names_versions_and_the_commit_of_a_checkout_only(tmp_path: Path) -> None:
    found = survey.environment(None, 7)
    assert (found.card, found.seed) == (None, 7)
    assert torch.__version__.startswith(found.torch)
    assert survey._commit(tmp_path) is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert survey._commit(tmp_path) is None, "a checkout without a commit has no name"
    assert survey.installed("no-such-package-here") is None
