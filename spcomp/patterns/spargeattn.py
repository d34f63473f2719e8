"""SpargeAttn: training-free block-sparse attention that trusts only blocks of like tokens
(arXiv:2502.18137)."""

from spcomp.dsl import (
    attend,
    centre,
    downsample,
    gather,
    pattern,
    permute,
    score,
    similar,
    sink,
    softmax,
    topk,
    topp,
)


@pattern
def spargeattn(
    q,
    k,
    v,
    *,
    tau=0.98,
    kappa=None,
    theta=0.6,
    lam=None,
    causal=False,
    attention_sink=False,
    int8=False,
    order=None,
    block_q=128,
    block_k=64,
):
    """Each block of queries reads the key blocks that hold a share `tau` of a map of block means,
    and every block whose mean cannot speak for its tokens.

    The keys lose their mean over all tokens. Blocks of queries and of keys are pooled by mean; the
    map is the softmax of their products over the key blocks that are alike. A row keeps its highest
    blocks while they together hold at most `tau` of it, one at least, and all key blocks that are
    not alike; query blocks that are not alike read everything. A block is alike when the mean
    cosine over all pairs of its tokens is above `theta`; a short last block never is. So a few
    rows, as in decode, are dense.

    Differences to the official code (thu-ml/SpargeAttn): under a causal mask no query sees a later
    key and the last query meets the last key, where its block map is aligned at the first and most
    of its kernels attend to the future inside a diagonal block; a row that sees nothing, which is
    possible in a causal pattern since no diagonal block is forced, gives 0, where it leaves memory
    unwritten; blocks are 128 x 64 everywhere, where it takes 64 x 128 on Hopper; the map and its
    sums are float32, where it rounds them to the dtype of q; one map serves any grouping of heads;
    a short last block of queries skips tiles by its real rows, where it never does or reads stale
    memory; one last tile of a row is exempt from skipping, where some of its kernels exempt two;
    values and their weights are not rounded to float8. Differences of both to the paper: likeness
    is the cosine, scores are divided by sqrt(D), and a skipped tile leaves the sum of weights too.

    tau: share of the map, from 0 to 1, or a float32 tensor with one for each query head. kappa: in
    its place, the share of all key blocks that a row keeps, rounded down. theta: a cosine from -1
    to 1, or a float32 tensor with one for each query or KV head. lam: skip a tile of pairs when in
    every row its highest logit is this many powers of two below the highest before it, a number or
    a tensor as theta; the official 50 skips next to nothing. causal: whether a query sees only the
    keys up to itself. attention_sink: always read the first key block. int8: take q·k from 8-bit
    numbers, one scale a block; attention then reads the keys without their mean, and is otherwise
    that of the keys as they are. order: a permutation of the tokens, int32 or int64 [S], in which
    blocks are cut, such as a Hilbert curve through a video (not causal; Sq = Skv). block_q,
    block_k: tokens of a query and of a key block."""
    if order is not None:
        q, k, v = (permute(x, order) for x in (q, k, v))
    keys = centre(k)
    alike_q = similar(q, block=block_q, least=theta)
    alike_k = similar(keys, block=block_k, least=theta)
    means = downsample(q, block=block_q), downsample(keys, block=block_k)
    blocks = softmax(score(*means, mask="begun" if causal else None, among=alike_k))
    best = (
        topp(blocks, p=tau, crossing="drop", least=1)
        if kappa is None
        else topk(blocks, fraction=kappa, round="down")
    )
    kept = best | ~alike_q | ~alike_k
    if attention_sink:
        kept = kept | sink(block_k)
    return attend(
        q,
        gather(keys if int8 else k, kept),
        gather(v, kept),
        mask="causal" if causal else None,
        tile=(block_q, block_k),
        skip=lam,
        quantise="int8" if int8 else None,
    )
