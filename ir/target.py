"""What a chip offers, as data. Backends fill the table; nothing here knows one of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """Capacities and rates of one chip.

    shared_bytes: on-chip memory one program may use. tflops: dense matrix rate by dtype, in
    TFLOP/s. bandwidth_tbs: device memory, TB/s; l2_tbs: level-2 cache, TB/s. launch_us: cost of one
    launch in a graph."""

    name: str
    title: str
    backend: str
    arch: str
    warp_size: int
    multiprocessors: int
    shared_bytes: int
    registers: int
    tflops: tuple[tuple[str, float], ...]
    bandwidth_tbs: float
    l2_tbs: float
    launch_us: float = 3.0

    def rate(self, dtype: str) -> float:
        """Give the matrix rate of a dtype in TFLOP/s; unknown dtypes take the slowest."""
        table = dict(self.tflops)
        return table.get(dtype, min(table.values()))
