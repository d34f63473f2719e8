"""Time a function on a CUDA device: the median of runs, each with a cold level-2 cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from spcomp.errors import SpcompError

DENSE_KERNELS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""torch's dense kernels, the fastest on a new card first."""

COLD_BYTES = 256 * 1024 * 1024
"""Written before each run: several times the level-2 cache of any card we know."""

MOST_RUNS = 500
"""Of a short function: emptying the cache before each run takes longer than the run itself."""


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds on the device: median, distance between the quartiles, and how many runs."""

    median_ms: float
    spread_ms: float
    runs: int


def time_ms(
    function: Callable[[], object], *, warm_up: int = 5, least_runs: int = 20, span_ms: float = 200
) -> Times:
    """Time a function on the current CUDA device by events around it.

    The first ``warm_up`` runs (compilation among them) do not count. As many runs follow as take
    about ``span_ms``, ``least_runs`` in any case and no more than MOST_RUNS or that. What the host
    spends before the first launch of a run is outside the figure; what it spends between launches
    is inside.
    """
    for _ in range(warm_up):
        function()
    cold = torch.empty(COLD_BYTES, dtype=torch.int8, device="cuda")
    once = _run(function, cold, 1)[0]
    runs = max(least_runs, min(MOST_RUNS, int(span_ms / max(once, 1e-3))))
    found = sorted(_run(function, cold, runs))
    quartiles = statistics.quantiles(found, n=4)
    return Times(statistics.median(found), quartiles[2] - quartiles[0], runs)


def _run(function: Callable[[], object], cold: torch.Tensor, runs: int) -> list[float]:
    marks = [(_mark(), _mark()) for _ in range(runs)]
    for start, stop in marks:
        cold.zero_()
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in marks]


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def graphed(function: Callable[[], object]) -> Callable[[], object] | None:
    """Capture a function in a CUDA graph and give its replay: the device's work without the host's.

    A call that decodes is mostly launches, and whoever decodes in earnest captures them. None where
    the function cannot be captured.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except (RuntimeError, SpcompError):
        torch.cuda.synchronize()
        return None
    return graph.replay


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """Give torch's dense causal attention of the same call, aligned bottom-right, on the fastest
    kernel it has; q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv]."""
    rows, keys = q.shape[2], k.shape[2]
    mask = None if rows in (1, keys) else _lower_right(rows, keys)

    def run() -> Tensor:
        with sdpa_kernel(list(DENSE_KERNELS), set_priority=True):
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=rows == keys and rows > 1, enable_gqa=True
            )

    return run


def _lower_right(rows: int, keys: int) -> Any:
    # Imported where it is needed: it brings torch's compiler with it, seconds of a fresh process.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(rows, keys)
