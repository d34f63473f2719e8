"""InfLLM-V2: NSA's selection without its parameters, in MiniCPM4.1 (OpenBMB, arXiv:2509.24663)."""

from spcomp.dsl import (
    attend,
    cached,
    downsample,
    gather,
    local,
    pattern,
    regroup,
    score,
    sink,
    softmax,
    topk,
)


@pattern
def infllm_v2(
    q, k, v, *, block=64, k_blocks=96, sinks=1, window=2048, kernel=32, stride=16, coarse=4
):
    """Each query reads the first block, the blocks of its window and those of best mean keys.

    Keys are pooled by mean over `kernel` tokens every `stride` (K1), and over `coarse` times as
    many (K2); incomplete windows are left out. A window of K1 counts exp(s1 - lse(s2)), s = q·mean
    / sqrt(D): a probability but for its divisor, which is the cheap sum over K2. These are summed
    over the heads of a group, and a block has the highest of the windows that touch it. One softmax
    over the tokens of the blocks kept, one list for the heads of a group; nothing but q, k and v to
    train, and no gradient through the choice.

    Where paper and official code (OpenBMB/infllmv2_cuda_impl) disagree, the code holds, which
    MiniCPM4.1 was trained with: the window holds window // block + 1 blocks, the query's own
    included, so that no key of the last `window` is missed (the paper counts window // block); the
    highest is taken over the 5 windows that touch a block (the paper's formula lacks the shift by
    one window).

    Differences to the official code: scores stay float32 up to the top-k, where it rounds them to
    the dtype of q, and ties (common, as neighbours may share their best window) go to the lower
    block. A query that sees no window of K2 (t < 127) divides by 1, where it gets infinities; both
    read every block there. The group may have any size, where it asks for 16. It hides one window
    more from every query if Sq % 16 == 15 (Sq % 64 == 63 for K2); here a window is seen from its
    last token on, in decode too. Below 8192 keys (`dense_len`) the model attends densely, which is
    the caller's to decide. Models that score keys without rotation (`use_nope`) are not covered.

    block: tokens of a key block. k_blocks: blocks read by a query, forced ones included: the
    official topk + window_size // block_size. sinks: blocks always read at the start (init_blocks).
    window: tokens before the query that are always read. kernel, stride: tokens of a window of K1,
    and between two. coarse: how much wider K2 is; 1 makes the sum exact, as the first MiniCPM4 had
    it."""
    narrow = downsample(k, block=kernel, stride=stride, tail="drop")
    wide = downsample(k, block=coarse * kernel, stride=coarse * stride, tail="drop")
    fine, normaliser = score(q, cached(narrow, name="k1")), score(q, cached(wide, name="k2"))
    blocks = regroup(softmax(fine, over=normaliser, heads="group"), block=block, by="max")
    forced = sink(sinks) | local(window // block + 1)
    best = topk(blocks, k=k_blocks, always=forced)
    return attend(q, gather(k, best), gather(v, best), mask="causal")
