"""DSA: sparse attention over tokens that a lightning indexer chooses (DeepSeek-V3.2,
arXiv:2512.02556)."""

from spcomp.dsl import attend, gather, pattern, score, tensor, topk


@pattern
def dsa(
    q,
    k,
    v,
    index_q: tensor("B Hi Sq Di"),
    index_k: tensor("B 1 Skv Di"),
    index_w: tensor("B Hi Sq"),
    *,
    k_tokens=2048,
):
    """Each query attends to the `k_tokens` tokens of the past that a small indexer scores highest.

    I(t,u) = sum_j w_tj ReLU(qI_tj . kI_u) over the heads j of the indexer, whose keys have one
    head; the weights are of either sign and come after the ReLU. All heads of q read the same
    tokens. A query with at most `k_tokens` tokens before it reads them all. Ties go to the earlier
    token, and exact zeros, which the ReLU makes common, tie. No gradient goes through the choice:
    index_q, index_k and index_w get none, as in the official training, where the indexer learns
    from a loss of its own.

    In the official code I carries a factor (Hi * Di)**-0.5. It is positive and the same for all
    tokens, so it changes no choice and is left out here.

    MLA is this pattern in its multi-query form: q [B,128,Sq,576] holds the absorbed queries and
    their rotary part, k [B,1,Skv,576] the latent and the rotary key, v = k[..., :512] is a view,
    and the scale is given at the call (192**-0.5 times mscale squared, not 576**-0.5).

    The caller makes the indexer's tensors. Their rotation is the caller's: DeepSeek-V3.2 puts the
    rotary channels first and, since the fix of 2025-11-17, rotates them in halves, not interleaved
    as in its attention. The Hadamard rotation of the official code is orthonormal, applied to both
    sides and cancels in the product, so it is left to the caller. The official kernels score in fp8
    (e4m3, a scale for each vector); here scores are float32 sums of products of the numbers given.
    What fp8 chooses is had by giving index_q and index_k rounded as it rounds them (after the
    Hadamard rotation, which matters then): scales are positive and pass through the ReLU, and with
    those of scale_fmt "ue8m0", powers of two, the rounded numbers are exact in bfloat16.

    k_tokens: tokens read by a query."""
    scores = score(index_q, index_k, activation="relu", weights=index_w, heads="all", reduce="sum")
    best = topk(scores, k=k_tokens)
    return attend(q, gather(k, best), gather(v, best), mask="causal")
