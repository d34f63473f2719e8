"""The measuring process, but for its second candidate: that one corrupts the device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spcomp.tuning.trial import CardBench, main


class PoisonBench(CardBench):
    """`BAD_TRIAL` names a folder that counts the candidates of all processes."""

    def attempt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Read far beyond a tensor in place of the second candidate."""
        with (Path(os.environ["BAD_TRIAL"]) / "tried").open("a+") as tried:
            tried.seek(0)
            number = len(tried.readlines())
            tried.write("one\n")
        if number == 1:
            far = torch.tensor([1 << 30], device=self.device)
            torch.zeros(4, device=self.device)[far].sum().item()
        return super().attempt(request)


if __name__ == "__main__":
    main(PoisonBench())
