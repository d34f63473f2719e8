"""spcomp, the compiler for sparse attention.

    import spcomp as sp
    from spcomp.patterns import block_topk

    attention = sp.compile(block_topk(block=128, budget=0.25))
    out = attention(q, k, v)

Importing spcomp needs no device and imports neither torch nor Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spcomp.dsl import (
    Pattern,
    alike,
    attend,
    block_indices,
    block_mask,
    cached,
    causal,
    centre,
    column_sums,
    covered,
    diagonal_sums,
    diagonals,
    downsample,
    everything,
    flex_block_mask,
    fold,
    gather,
    local,
    mask_mod,
    merge,
    needed,
    own,
    pattern,
    per_head,
    permute,
    probe,
    regroup,
    score,
    similar,
    sink,
    softmax,
    stream,
    switch,
    tensor,
    topk,
    topp,
    window,
)
from spcomp.errors import SpcompError
from spcomp.version import VERSION as __version__

if TYPE_CHECKING:
    from spcomp.api import Attention, compile
    from spcomp.kvcache import KVCache
    from spcomp.tuning import TuningReport, tune

_LATE = {
    "Attention": "spcomp.api",
    "compile": "spcomp.api",
    "KVCache": "spcomp.kvcache",
    "TuningReport": "spcomp.tuning",
    "tune": "spcomp.tuning",
}

__all__ = [
    "Attention",
    "KVCache",
    "Pattern",
    "SpcompError",
    "TuningReport",
    "__version__",
    "alike",
    "attend",
    "block_indices",
    "block_mask",
    "cached",
    "causal",
    "centre",
    "column_sums",
    "compile",
    "covered",
    "diagonal_sums",
    "diagonals",
    "downsample",
    "everything",
    "flex_block_mask",
    "fold",
    "gather",
    "local",
    "mask_mod",
    "merge",
    "needed",
    "own",
    "pattern",
    "per_head",
    "permute",
    "probe",
    "regroup",
    "score",
    "similar",
    "sink",
    "softmax",
    "stream",
    "switch",
    "tensor",
    "topk",
    "topp",
    "tune",
    "window",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name in _LATE:
        from importlib import import_module

        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module 'spcomp' has no attribute {name!r}")
