"""NSA: native sparse attention, three branches under learned gates (DeepSeek, arXiv:2502.11089)."""

from spcomp.dsl import (
    attend,
    cached,
    downsample,
    gather,
    local,
    merge,
    pattern,
    regroup,
    score,
    sink,
    softmax,
    stream,
    tensor,
    topk,
)


@pattern
def nsa(
    q,
    k,
    v,
    gates: tensor("B Hq Sq 3"),
    *,
    block=64,
    k_blocks=16,
    sinks=1,
    locals=2,
    window=512,
    kernel=32,
    stride=16,
):
    """Each query attends to window means of the past, to the blocks they point at, and nearby.

    Compressed: keys and values are pooled by mean over `kernel` tokens every `stride`, incomplete
    windows left out, and attended as if they were tokens; a query that sees none gets 0. Selected:
    the probabilities of that attention are summed over the heads of a group, and a block counts
    each window by the tokens they share over `stride`; the `k_blocks` best are read, one list for
    the heads of a group, no gradient through the choice. Window: the last `window` keys. The result
    is gates[..., 0] * compressed + gates[..., 1] * selected + gates[..., 2] * window, the gates (a
    sigmoid of the hidden state, in the paper) being the caller's. The LSE is that of all three
    together.

    Where sources disagree: equation 9 as printed gives a block the windows before it, every
    implementation those that overlap it (as here); a window of w keys counts the query's own, where
    the Triton library XunhaoLai/native-sparse-attention-triton reads w + 1 in prefill; the paper
    pools by a learned map and gives each branch a k and a v of its own, where public code shares
    them, and so does this, with the mean of keys as they come (rotated or not). A learned map is
    not covered.

    fla-org's code (flash-linear-attention, native-sparse-attention) is this with kernel=64,
    stride=64 and, in native-sparse-attention, sinks=0 and locals=1. It gives forced blocks the
    score 1 a head, so that a block of exactly that probability ties with them, and its kernels
    read the next power of two of `k_blocks`; here forced blocks come first and k_blocks is exact.
    Ties go to the lower block.

    block: tokens of a key block. k_blocks: blocks read by a query, forced ones included. sinks,
    locals: blocks always read at the start, and up to the query's own. window: keys of the window.
    kernel, stride: tokens of a compressed window, and between two."""
    keys = cached(downsample(k, block=kernel, stride=stride, tail="drop"), name="k_compressed")
    values = cached(downsample(v, block=kernel, stride=stride, tail="drop"), name="v_compressed")
    compressed = attend(q, stream(keys, values), mask="causal")
    blocks = regroup(softmax(score(q, keys), heads="group"), block=block)
    best = topk(blocks, k=k_blocks, always=sink(sinks) | local(locals))
    selected = attend(q, gather(k, best), gather(v, best), mask="causal")
    near = attend(q, k, v, mask=local(window))
    return merge(compressed, selected, near, gates=gates)
