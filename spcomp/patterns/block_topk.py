"""Block top-k: mean-pooled blocks choose blocks, one list for the heads of a KV head."""

from spcomp.dsl import attend, downsample, gather, local, pattern, score, sink, topk


@pattern(open={"block": (64, 128, 256)})
def block_topk(q, k, v, *, block=128, budget=0.25, sinks=1, locals=2):
    """Each block of queries reads the best `budget` of all key blocks, the first and the nearest
    always.

    Queries and keys are pooled by mean over blocks of `block` tokens; scores are scaled by nothing,
    averaged over the query heads of a KV head, and one list serves them all. The plainest of the
    block-sparse family: what MInference's block-sparse heads do (arXiv:2407.02490), with a list a
    KV head and with forced blocks.

    block: tokens of a query and of a key block. budget: share of the key blocks kept, or a number
    of blocks when an int. sinks, locals: blocks always kept at the start, and up to the query's
    own; they count in the budget."""
    rows = downsample(q, block=block, by="mean")
    units = downsample(k, block=block, by="mean")
    amount = {"k": budget} if isinstance(budget, int) else {"fraction": budget}
    best = topk(
        score(rows, units, mask="causal", heads="group", reduce="mean"),
        always=sink(sinks) | local(locals),
        **amount,
    )
    return attend(q, gather(k, best), gather(v, best), mask="causal")
