"""StreamingLLM: attention sinks and a window (arXiv:2309.17453)."""

from spcomp.dsl import attend, gather, pattern, sink, window


@pattern
def streaming_llm(q, k, v, *, sinks=4, recent=2044):
    """Each query reads the first `sinks` tokens and the `recent` tokens up to itself.

    The query's own key counts in `recent`, so a query sees at most sinks + recent keys; the
    official cache shows one key more, since it evicts after the step. Keys keep the positions they
    were rotated at; the official demo rotates them anew by their place in the cache, which the
    caller does before the call if the model needs it.

    sinks: tokens kept at the start. recent: tokens of the window.
    """
    kept = sink(sinks) | window(recent)
    return attend(q, gather(k, kept), gather(v, kept), mask="causal")
