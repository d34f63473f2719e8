"""The language of patterns: `@pattern`, one verb a stage, and selections as values."""

from spcomp.dsl.pattern import Pattern, PatternFunction, pattern
from spcomp.dsl.ranking import regroup, score, softmax, topk, topp
from spcomp.dsl.selections import (
    block_indices,
    block_mask,
    causal,
    everything,
    flex_block_mask,
    local,
    mask_mod,
    own,
    sink,
    window,
)
from spcomp.dsl.tokens import centre, permute, similar
from spcomp.dsl.verbs import attend, cached, downsample, fold, gather, merge, stream

__all__ = [
    "Pattern",
    "PatternFunction",
    "attend",
    "block_indices",
    "block_mask",
    "cached",
    "causal",
    "centre",
    "downsample",
    "everything",
    "flex_block_mask",
    "fold",
    "gather",
    "local",
    "mask_mod",
    "merge",
    "own",
    "pattern",
    "permute",
    "regroup",
    "score",
    "similar",
    "sink",
    "softmax",
    "stream",
    "topk",
    "topp",
    "window",
]
