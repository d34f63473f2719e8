"""MoBA: mixture of block attention (Moonshot AI, arXiv:2502.13189)."""

from spcomp.dsl import attend, downsample, gather, own, pattern, score, topk


@pattern
def moba(q, k, v, *, block=512, k_blocks=8):
    """Each query of each head reads its own block and those whose mean key it matches best.

    The gate is q·mean(k), without a scale, in float32, on means stored in the dtype of k; only
    past, complete blocks compete, the own block is always kept and counts in `k_blocks` (the
    paper's top-k). One softmax over all of them.

    Differences to the official code (MoonshotAI/MoBA): with k_blocks=1 the meaning is the own block
    alone, where its fast path returns full causal attention; ties go to the lower block, where its
    order is unspecified; grouped queries need no repeated keys; Sq != Skv keeps the sparse meaning,
    where it turns dense.

    block: tokens of a key block. k_blocks: blocks read by a query, its own included.
    """
    means = downsample(k, block=block, by="mean")
    best = topk(score(q, means, mask="causal"), k=k_blocks, always=own())
    return attend(q, gather(k, best), gather(v, best), mask="causal")
