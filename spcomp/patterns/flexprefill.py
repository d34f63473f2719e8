"""FlexPrefill: for each head and prompt, block attention by pooled scores or by lines, as long as a
share of the mass needs (arXiv:2502.20766)."""

import spcomp.dsl.checks as check
from spcomp.dsl import (
    alike,
    attend,
    column_sums,
    diagonal_sums,
    diagonals,
    downsample,
    gather,
    needed,
    pattern,
    probe,
    regroup,
    score,
    sink,
    softmax,
    switch,
    topk,
    topp,
)


@pattern
def flexprefill(
    q,
    k,
    v,
    *,
    gamma=0.9,
    tau=0.1,
    min_budget=1024,
    max_budget=None,
    block=128,
    variant="paper",
):
    """Each head reads blocks of keys, chosen in one of two ways.

    The softmax of the last `block` queries is exact; from the same queries pooled to one and the
    mean keys of all blocks comes an estimate of it. Where both agree (the square root of their
    Jensen-Shannon divergence is below `tau`) the head is query-aware: the best entries of its whole
    block map, softmax of mean queries and mean keys, that hold `gamma` of the map. Otherwise it is
    vertical-slash: with n the fewest columns that hold `gamma` of the exact softmax, the ceil(n /
    block) best key blocks; the same for block diagonals. Both budgets are at least `min_budget` and
    at most `max_budget` tokens, in whole blocks. The first block and the own one are always read,
    and count; a query-aware head reads the lines of the least budget beside its map.

    The paper's two searches and its least budget for every head, by the code's means: forced blocks
    and the lines of query-aware heads are of the code alone. variant="official"
    (ByteDance-Seed/FlexPrefill) further reads as the code does:
    - query-aware: the entry that crosses `gamma` is dropped, not kept;
    - vertical-slash: x columns stay within `gamma`, and (x + 1) // 128 + 1 blocks are read, 128
      even where `block` is another number;
    - blocks of distances are counted from the largest, so they are whole block diagonals only where
      `block` divides the length.
    Always different to the code: it takes NaN for a distance where a block's mass underflows, and
    then vertical-slash, where 0 log 0 is 0 here; it attends densely up to 2 blocks or the least
    budget, where all blocks are chosen here anyway, but a query-aware head's; equal scores have no
    defined order there; any batch, and Sq != Skv aligned bottom-right, where the code has one
    sequence with Sq = Skv.

    gamma: share to hold. tau: bound of the distance; 0 makes every head vertical-slash. block:
    tokens of a block."""
    check.choice("flexprefill", "variant", variant, ("paper", "official"))
    sizes = {"block": block, "min_budget": min_budget, "max_budget": max_budget}
    for name, size in sizes.items():
        if size is not None:
            check.count("flexprefill", name, size, least=1, counts="tokens")
    least = -(-min_budget // block)
    most = None if max_budget is None else -(-max_budget // block)
    as_code = variant == "official"
    rule = {"crossing": "drop", "extra": 2, "per": 128} if as_code else {"per": block}

    last = probe(q, rows=block)
    exact = softmax(score(last, k))
    columns, distances = column_sums(exact), diagonal_sums(exact)
    by_key = regroup(columns, block=block)
    by_distance = regroup(distances, block=block, from_end=as_code)
    budget = {"p": gamma, "least": least, "most": most, **rule}
    needs = needed(columns, **budget), needed(distances, **budget)
    least_lines, lines = (
        topk(by_key, k=keys, always=sink(1)) | diagonals(topk(by_distance, k=far, always=sink(1)))
        for keys, far in ((least, least), needs)
    )

    means = downsample(k, block=block)
    pooled = softmax(score(downsample(last, block=block), means, mask=None))
    block_map = softmax(score(downsample(q, block=block), means))
    best = topp(block_map, p=gamma, crossing="drop" if as_code else "keep", over="map")
    chosen = switch(alike(pooled, by_key, below=tau), best | least_lines, lines)
    return attend(q, gather(k, chosen), gather(v, chosen), mask="causal")
