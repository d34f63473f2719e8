"""Tunings as values: one of every status on a card, and one that the cost model ranked."""

from __future__ import annotations

from dataclasses import replace

from spcomp.autotune.record import Candidate, Kept, Row, Tuning
from tests.autotune.tuning import CALL

WARPS = (("attend_keys", (("block_k", 64), ("block_m", 128), ("stages", 3), ("warps", 4))),)
TILES = (("attend_keys", (("block_k", 32), ("block_m", 64), ("stages", 2), ("warps", 4))),)
MERGE = (("merge", (("block_p", 8), ("block_r", 4), ("stages", 1), ("warps", 2))),)


def measured(block: int = 512) -> Tuning:
    """Give a tuning on a card with a row of every status; hyper-parameters hold markup."""
    pattern = f"moba(block={block}, rule=a<b|c)"
    rows = (
        Row(Candidate(None, WARPS), "best", "timed", "", 1.0, 1.25, 0.01, 40, 1e-3, 4e-3, 0),
        Row(Candidate(None, ()), "ok", "timed", "", 1.0, 1.5, 0.02, 40, 1e-3, 4e-3, 0),
        Row(Candidate("gather", MERGE), "ok", "timed", "", 2.0, 3.5, 0.05, 20, 1e-3, 4e-3),
        Row(Candidate(None, TILES), "wrong", "compiled", "error 3.1e-02 > 4.0e-03 allowed",
            1.1, error=3.1e-2, allowed=4e-3),
        Row(Candidate("gather", ()), "failed", "emitted", "OutOfResources: shared memory", 2.0),
        Row(Candidate("gather", TILES), "timeout", "emitted", "no answer within 60 s", 2.0),
        Row(Candidate("query_major", ()), "refused", "emitted", "278528 bytes > 232448"),
        Row(Candidate(None, MERGE), "pruned", "emitted", "predicted 9.1 ms > 1.5 x 1.0 ms", 9.1),
        Row(Candidate("gather", WARPS), "skipped", "emitted", "the budget of 60 s was over", 2.1),
    )  # fmt: skip
    return Tuning(
        call=replace(CALL, pattern=pattern),
        rows=rows,
        is_partial=True,
        seed=7,
        elapsed_s=61.5,
        dense_ms=5.0,
        dense_by="torch's dense attention, measured",
        kept=Kept(4096, 0.9 + block / 10000, 0.8, 0.12, 0.25),
        notes=("a note <b>in bold</b>",),
        created="2026-11-25T08:00:00Z",
    )


def predicted() -> Tuning:
    """Give a tuning without a card."""
    rows = (
        Row(Candidate(None, ()), "best", "emitted", "", 1.0),
        Row(Candidate(None, MERGE), "ok", "emitted", "", 1.02),
    )
    return Tuning(
        call=replace(CALL, device="none"),
        rows=rows,
        is_partial=False,
        seed=0,
        elapsed_s=0.5,
        dense_ms=2.0,
        dense_by="the roofline of NVIDIA H100 (sm90)",
        notes=("ranked by the cost model, not timed",),
        created="2026-11-25T08:00:00Z",
    )
