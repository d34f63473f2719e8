"""Compiling candidates before their turn, beside the process that measures.

The compiler of kernels needs no device, so several candidates are compiled at once while another is
timed. What comes out is in the cache of the measuring process when it asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from spcomp import api, arguments, compiler, processors
from spcomp.backends import registry
from spcomp.backends.base import default_schedule
from spcomp.dsl.pattern import Pattern
from spcomp.errors import SpcompError

MOST_AT_ONCE = 16
LEFT_FREE = 2  # processors for the process that measures and for its parent


class Ahead:
    """Candidates being compiled, by the backend's own processes.

    On a device whose kernels need no compiling, and where there is no processor to spare, nothing
    is done ahead and every candidate is compiled when it is tried."""

    def __init__(
        self, pattern: Pattern, backend: str, device: str, q: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """q, k, v: of the sample; what kernels are specialised on and the rows of q count here."""
        self._pattern, self._backend = pattern, registry.backend(backend)
        self._target = self._backend.target_of(device)
        self._spec = arguments.specialisation(q, k, v)
        self._phase = api.phase_of(q)
        self._workers = min(MOST_AT_ONCE, processors.usable() - LEFT_FREE)
        if not device.startswith("cuda"):
            self._workers = 0
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: dict[str, Future[Mapping[str, int]]] = {}

    def begin(self, candidates: Iterable[Mapping[str, Any]]) -> None:
        """Start compiling candidates, in this order."""
        if self._workers <= 0:
            return
        self._pool = ThreadPoolExecutor(self._workers)
        for candidate in candidates:
            job = self._pool.submit(self._compile, candidate)
            self._under_way[_name(candidate)] = job

    def take(self, candidate: Mapping[str, Any]) -> dict[str, int]:
        """Wait for a candidate that is being compiled. Gives what the compiler told as fields of a
        row; nothing where it was not compiled ahead, so that trying it says why."""
        job = self._under_way.pop(_name(candidate), None)
        if job is None or job.cancel():
            return {}
        try:
            return dict(job.result())
        except (SpcompError, OSError):
            return {}

    def _compile(self, candidate: Mapping[str, Any]) -> Mapping[str, int]:
        axes = {kernel: dict(values) for kernel, values in candidate["axes"]}
        schedule = default_schedule(self._backend, self._target, self._spec)
        plan = compiler.lower(
            self._pattern,
            backend=self._backend,
            target=self._target,
            spec=self._spec,
            phase=self._phase,
            order=candidate["order"],
            schedule=schedule.changed(axes),
        )
        source = compiler.emit(plan, self._backend, self._target, self._spec)
        return self._backend.compile_ahead(source)


def _name(candidate: Mapping[str, Any]) -> str:
    return repr((candidate["order"], sorted((k, sorted(a)) for k, a in candidate["axes"])))
