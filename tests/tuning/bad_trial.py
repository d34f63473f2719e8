"""A measuring process that does to each candidate what the test wrote down.

`BAD_TRIAL` names a folder with `fates.json`, a list: the fate of the first candidate, of the second
and so on, the last one of all others. Each candidate leaves a line in `tried`: the process, the
order and the axes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spcomp.errors import Refused
from spcomp.tuning.trial import main

TOLD = {"notes": ["a note of the process"], "kept": None, "dense_ms": None}


class BadBench:
    """Times that are read from a file, and every way to fail."""

    def __init__(self) -> None:
        self.folder = Path(os.environ["BAD_TRIAL"])
        self.fates = json.loads((self.folder / "fates.json").read_text())
        self.broken = False

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Fail here, when the fates say so."""
        if self.fates[0] == "no load":
            raise MemoryError("the sample does not fit")
        return TOLD

    def attempt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do the next fate."""
        with (self.folder / "tried").open("a+") as tried:
            tried.seek(0)
            number = len(tried.readlines())
            line = {"pid": os.getpid(), "order": request["order"], "axes": request["axes"]}
            tried.write(json.dumps(line) + "\n")
        return self.do(self.fates[min(number, len(self.fates) - 1)])

    def do(self, fate: Any) -> dict[str, Any]:
        """Answer, or do not."""
        figures = {"error": 1e-4, "allowed": 1e-3}
        if isinstance(fate, (int, float)):
            times = {"median_ms": float(fate), "spread_ms": 0.0, "runs": 20, "is_graphed": True}
            return {"status": "ok", "rung": "timed", **times, **figures}
        if fate == "babble":
            print("a library says hello", flush=True)
            os.write(1, b"and so does its C part\n")
            return self.do(9.0)
        if fate == "slow":
            time.sleep(0.5)
            return self.do(5.0)
        if fate == "hang":
            time.sleep(600)
        if fate == "abort":
            os.abort()
        if fate == "exit":
            print("the driver is gone", file=sys.stderr, flush=True)
            os._exit(7)
        if fate == "out of memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB.\nmore lines")
        if fate == "illegal access":
            self.broken = True
            raise RuntimeError("an illegal memory access was encountered")
        if fate == "refused":
            raise Refused(backend="triton", what="it", reason="no room", way_out="none.")
        assert fate == "wrong", fate
        return {
            "status": "wrong",
            "rung": "compiled",
            "reason": "error inf > 1.0e-03 allowed",
            "error": float("inf"),
            "allowed": 1e-3,
        }

    def is_broken(self) -> bool:
        """Tell what `illegal access` did."""
        return self.broken


if __name__ == "__main__":
    main(BadBench())
