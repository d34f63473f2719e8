"""MInference: each head attends in the shape it was given offline, and finds the places for each
prompt (arXiv:2407.02490)."""

import spcomp.dsl.checks as check
from spcomp.dsl import (
    attend,
    column_sums,
    covered,
    diagonal_sums,
    diagonals,
    downsample,
    gather,
    pattern,
    per_head,
    probe,
    score,
    sink,
    softmax,
    topk,
    window,
)

KINDS = ("a_shape", "vertical_slash", "block_sparse")


@pattern
def minference(
    q,
    k,
    v,
    *,
    kind="vertical_slash",
    initial=1024,
    recent=4096,
    columns=1000,
    offsets=6096,
    blocks=100,
    last_q=64,
    block=64,
    sinks=30,
    nearest=100,
    variant="paper",
):
    """Each head attends in one of three shapes.

    "a_shape": the `initial` first keys and the `recent` last, the query's own included.
    "vertical_slash": the softmax of the last `last_q` queries is summed along its columns and along
    its diagonals; every query of the head reads the `columns` best keys and the `offsets` best
    distances t - u. The first `sinks` keys and the `nearest` distances are always among them.
    "block_sparse": each block of queries reads the `blocks` key blocks whose mean key its mean
    query matches best. None is forced, and a block competes once its last token is no later than
    the last query.

    variant="official" (microsoft/MInference) reads as the code does:
    - vertical-slash: lines here are one token wide, as the paper defines them and as the official
      search measures them; there each slash is covered by blocks of `block` keys and near ones are
      merged, so that these pairs and more are read, though no column after the last slash;
    - block-sparse: means here are over real tokens; there a short last block is divided by `block`
      too.
    Always different to the code:
    - The paper forces nothing; the code forces 30 keys and 100 distances, as here, but lets a
      budget below 100 take an arbitrary part of the distances. A budget below the forced set is an
      error here.
    - A-shape scales by the true head dimension; the code pads it to a power of two first.
    - Scores are float32, where the code rounds them to the dtype of q. Any batch; Sq != Skv is
      aligned bottom-right, where the code has one sequence with Sq = Skv.

    kind: one of `KINDS`, or the place in it of each head's shape, int32 [Hq]. initial, recent,
    columns, offsets, blocks: a number, or one for each head, int32 [Hq]. The offline choice for a
    model is read by `spcomp.calibrate.minference`. last_q: queries of the estimate. block: tokens
    of a block of "block_sparse". Defaults: what the official code takes for a head it has no entry
    for, and the A-shape and block budget of the paper."""
    check.choice("minference", "variant", variant, ("paper", "official"))
    as_code = variant == "official"
    last = softmax(score(probe(q, rows=last_q), k))
    keys = topk(column_sums(last), k=columns, always=sink(sinks))
    distances = topk(diagonal_sums(last), k=offsets, always=sink(nearest))
    lines = covered(keys, distances, block=block) if as_code else keys | diagonals(distances)
    means = (downsample(x, block=block, tail="pad" if as_code else "keep") for x in (q, k))
    best = topk(score(*means), k=blocks)
    shapes = (sink(initial) | window(recent), lines, best)
    if isinstance(kind, str):
        check.choice("minference", "kind", kind, KINDS)
    chosen = shapes[KINDS.index(kind)] if isinstance(kind, str) else per_head(kind, *shapes)
    return attend(q, gather(k, chosen), gather(v, chosen), mask="causal")
