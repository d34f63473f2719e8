"""What the tests of `sp.tune` share: small tensors, and tunings whose process follows a script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import spcomp as sp
from spcomp.patterns import block_topk
from spcomp.tuning import worker

SHAPE = {"B": 1, "Hq": 2, "Hkv": 1, "Sq": 130, "Skv": 200, "D": 16, "Dv": 16}
MODULE = "tests.tuning.bad_trial"


def tensors(
    rows: int = 130, keys: int = 200, dim: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw q, k and v on the CPU: two query heads over one."""
    q, k, v = (torch.randn(1, h, n, dim).to(dtype) for h, n in ((2, rows), (1, keys), (1, keys)))
    return q, k, v


class Fates:
    """A folder where the fates of candidates are written down, and who was tried."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setenv("BAD_TRIAL", str(folder))
        monkeypatch.setattr(worker, "TRIAL", MODULE)

    def are(self, *fates: Any) -> None:
        """Write the fates down and forget who was tried."""
        (self.folder / "fates.json").write_text(json.dumps(fates))
        (self.folder / "tried").unlink(missing_ok=True)

    @property
    def tried(self) -> list[dict[str, Any]]:
        """The candidates that were tried, in their order."""
        path = self.folder / "tried"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def tune(self, pattern: Any = None, **options: Any) -> sp.TuningReport:
        """Tune block_topk over 64-blocks in the scripted process."""
        given: dict[str, Any] = {"shape": SHAPE, "backend": "triton", "dtype": "float32", **options}
        made = block_topk(block=64) if pattern is None else pattern
        return sp.tune(made, folder=self.folder / "records", orders=("query_major",), **given)


def candidate_of(tried: dict[str, Any]) -> tuple[Any, ...]:
    """Give a tried line in the form of a `Candidate`."""
    axes = tuple((kernel, tuple(map(tuple, values))) for kernel, values in tried["axes"])
    return tried["order"], axes
