"""Running a plan: buffers, slabs of query rows, and one kernel launch after the other.

Nothing here waits for the device. Buffers come from torch's allocator, so a call captures into a CUDA graph after warm-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spcomp.backends.base import Source
from spcomp.backends.triton.bind import Binding, Call, bind
from spcomp.backends.triton.modules import kernel_of
from spcomp.ir import dims
from spcomp.ir.launches import PoolLaunch
from spcomp.ir.passes.place_buffers import slab_rows
from spcomp.ir.plan import Buffer, Launch, Slabs


@dataclass(frozen=True, slots=True)
class Ready:
    """A launch with its kernel and binding."""

    launch: Launch
    kernel: Any
    names: tuple[str, ...]
    binding: Binding
    options: dict[str, int]

    def run(self, call: Call) -> None:
        """Launch on the current stream."""
        programs = self.binding.grid(call)
        if programs == 0:
            return
        values = self.binding.arguments(call)
        arguments = [values[name] for name in self.names]
        self.kernel[(programs,)](*arguments, **self.options)


class TritonExecutable:
    """A plan whose kernels are imported; Triton compiles each at its first launch."""

    def __init__(self, source: Source) -> None:
        self.plan = source.plan
        self.element_bytes = source.spec.element_bytes
        interpreted = source.target.arch == "interpreter"
        texts = iter(source.files)
        self.once: list[Ready] = []
        self.each_slab: list[Ready] = []
        for step in self.plan.steps:
            launches = step.launches if isinstance(step, Slabs) else (step,)
            place = self.each_slab if isinstance(step, Slabs) else self.once
            place.extend(self._ready(n, next(texts).text, interpreted) for n in launches)
        self.shapes = {b.name: tuple(dims.evaluator(d) for d in b.dims) for b in self.plan.buffers}
        self.states = {b.name: b.state for b in self.plan.buffers if b.state}

    def _ready(self, launch: Launch, text: str, interpreted: bool) -> Ready:
        kernel = kernel_of(launch.kernel, text)
        axes = dict(launch.axes)
        options = {} if interpreted else {"num_warps": axes["warps"], "num_stages": axes["stages"]}
        return Ready(launch, kernel, tuple(kernel.arg_names), bind(launch, self.plan), options)

    def run(
        self, tensors: Mapping[str, Tensor], env: Mapping[str, int], kept: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the plan on the tensors' device and current stream (see `Executable.run`)."""
        with _on_device(tensors["q"]):
            return self._run(tensors, env, kept)

    def update(
        self,
        tensors: Mapping[str, Tensor],
        env: Mapping[str, int],
        kept: Mapping[str, Tensor],
        begin: int,
    ) -> None:
        """Bring the state buffers up to date for the tokens from `begin` on (see `Executable.update`)."""
        with _on_device(tensors["k"]):
            for ready in self.once:
                launch = ready.launch
                if not self._is_kept(launch, kept):
                    continue
                assert isinstance(launch, PoolLaunch)
                units = {
                    "tokens": env["Skv"],
                    "unit_begin": begin // launch.stride,
                    "unit_end": -(-env["Skv"] // launch.stride),
                }
                written = {n: kept[self.states[n]] for n in launch.writes()}
                ready.run(Call({**tensors, **written}, {**env, **units}))

    def _run(
        self, tensors: Mapping[str, Tensor], env: Mapping[str, int], kept: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        rows = slab_rows(self.plan, env, self.element_bytes)
        whole = {**env, "R": min(rows, env["Sq"]), "R0": 0}
        held = dict(tensors)
        for buffer in self.plan.buffers:
            if buffer.kind in ("scratch", "output"):
                known = kept.get(buffer.state) if buffer.state else None
                held[buffer.name] = self._new(buffer, whole, tensors["q"]) if known is None else known
        for ready in self.once:
            if not self._is_kept(ready.launch, kept):
                ready.run(Call(held, whole))
        for begin in range(0, env["Sq"], rows):
            self._slab(held, env, begin, min(rows, env["Sq"] - begin))
        return held[self.plan.out], held[self.plan.lse]

    def _slab(self, held: Mapping[str, Tensor], env: Mapping[str, int], begin: int, rows: int) -> None:
        """Run the launches of one slab; lists the user gave are for the whole call, so they are cut here."""
        here = {**env, "R": rows, "R0": begin}
        for ready in self.each_slab:
            tensors = held if begin == 0 else self._cut_lists(ready.launch, held, begin)
            ready.run(Call(tensors, here))

    def _cut_lists(
        self, launch: Launch, held: Mapping[str, Tensor], begin: int
    ) -> Mapping[str, Tensor]:
        given = {
            name: held[name][:, :, begin // granule :]
            for name, granule in given_lists(launch)
            if self.plan.buffer(name).kind == "captured"
        }
        return {**held, **given} if given else held

    def _is_kept(self, launch: Launch, kept: Mapping[str, Tensor]) -> bool:
        return isinstance(launch, PoolLaunch) and self.states.get(launch.out_buf, "") in kept

    def _new(self, buffer: Buffer, env: Mapping[str, int], q: Tensor) -> Tensor:
        shape = [size(env) for size in self.shapes[buffer.name]]
        dtype = q.dtype if buffer.dtype == "data" else getattr(torch, buffer.dtype)
        return torch.empty(shape, dtype=dtype, device=q.device)


def given_lists(launch: Launch) -> list[tuple[str, int]]:
    """Name the list buffers a launch reads, with the query rows of each list row."""
    if hasattr(launch, "leaves"):
        pairs = zip(launch.list_bufs, launch.count_bufs, launch.leaves, strict=True)
        return [(n, leaf.granule) for a, b, leaf in pairs for n in (a, b)]
    names = [getattr(launch, n, "") for n in ("list_buf", "count_buf")]
    return [(n, getattr(launch, "granule", 1)) for n in names if n]


def _on_device(q: Tensor) -> AbstractContextManager[Any]:
    """Make the tensors' device the current one for the launches, if it is not."""
    if q.device.type != "cuda" or q.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(q.device)
