"""The language of patterns: `@pattern`, one verb a stage, and selections as values."""

from spcomp.dsl.inputs import tensor
from spcomp.dsl.pattern import Pattern, PatternFunction, pattern
from spcomp.dsl.probing import (
    alike,
    column_sums,
    covered,
    diagonal_sums,
    diagonals,
    needed,
    per_head,
    probe,
    switch,
)
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
    "alike",
    "attend",
    "block_indices",
    "block_mask",
    "cached",
    "causal",
    "centre",
    "column_sums",
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
    "window",
]
