"""XAttention: block-sparse attention with antidiagonal scoring (arXiv:2503.16428)."""

from spcomp.dsl import (
    attend,
    fold,
    gather,
    local,
    pattern,
    regroup,
    score,
    sink,
    softmax,
    topp,
)


@pattern
def xattention(q, k, v, *, block=128, stride=16, threshold=0.9, sinks=1, locals=1):
    """Each block of queries reads the fewest key blocks that hold `threshold` of an estimated map.

    The map has one entry for each tile of stride x stride pairs: the sum of the tile's
    antidiagonal, divided by stride and sqrt(D), under a softmax over the tiles a row of tiles sees.
    A block's score is the sum of its entries. A tile on the diagonal holds pairs of the future;
    they count in the score and are never attended.

    Differences to the official code (mit-han-lab/x-attention): it forces the first block and the
    diagonal one as here (the paper forces none), but in the first chunk of a prompt it keeps one
    block more than the threshold asks, and so its mask depends on the chunk size; it aligns Sq !=
    Skv by padded lengths, here the last query meets the last key; it sums unscaled products in the
    dtype of q, here in float32.

    block: tokens of a query and of a key block. stride: tokens of a tile. threshold: share of the
    map to hold, or a float32 tensor with one for each query head. sinks, locals: blocks always kept
    at the start, and up to the query's own."""
    tiles = score(fold(q, size=stride, reverse=True), fold(k, size=stride), scale=1 / stride)
    blocks = regroup(softmax(tiles), block=block, rows=block)
    best = topp(blocks, p=threshold, always=sink(sinks) | local(locals))
    return attend(q, gather(k, best), gather(v, best), mask="causal")
