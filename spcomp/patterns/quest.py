"""Quest: query-aware pages (arXiv:2406.10774)."""

from spcomp.dsl import attend, cached, downsample, gather, own, pattern, score, topk


@pattern
def quest(q, k, v, *, page=16, budget=2048, heads="query"):
    """Each query reads the pages whose largest possible q·k is highest, and the page it stands in.

    Pages keep the elementwise minimum and maximum of their keys; the bound is sum_d max(q_d*max_d,
    q_d*min_d). The newest page is always read and counts in the budget, as in the official kernels;
    scores are float32, where those round them to float16, and layers 0 and 1 are the caller's
    choice (the paper keeps them dense).

    The authors' accuracy code differs from their kernels: it does not force the newest page, reads
    at least 3 pages, and drops a page when the last one is short although all tokens fit the
    budget.

    page: tokens of a page. budget: tokens read by a query; budget // page pages, at least one.
    heads: "query" gives each query head its own pages (the paper), "group" one list for the heads
    of a KV head by their mean score."""
    pages = cached(downsample(k, block=page, by="minmax"))
    best = topk(score(q, pages, mask="causal", heads=heads), k=max(1, budget // page), always=own())
    return attend(q, gather(k, best), gather(v, best), mask="causal")
