"""One launch of a plan: where every argument of its kernel comes from, and the launch itself once a
call's numbers are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spcomp.backends.triton.bind import bind
from spcomp.backends.triton.generated import Generated
from spcomp.backends.triton.launcher import INT32_MAX, Kernel, Shot, kernel_for
from spcomp.backends.triton.layouts import ALIGNMENT, Call, Layout
from spcomp.backends.triton.manifest import (
    ArgumentClass,
    axes_of,
    manifest_of,
    options_of,
    specialised,
)
from spcomp.ir.plan import Launch, Plan


@dataclass(slots=True)
class InterpretedShot:
    """One launch in Triton's interpreter; pointers: position, allocation, offset in bytes,
    dtype."""

    function: Any
    grid: int
    arguments: list[Any]
    pointers: Sequence[tuple[int, int, int, torch.dtype]]
    scratch_bytes = 0

    def fire(self, tensors: Sequence[Tensor]) -> None:
        """Run; tensors: the call's allocations."""
        arguments = self.arguments.copy()
        for position, place, offset, dtype in self.pointers:
            arguments[position] = view(tensors[place], offset, dtype)
        self.function[(self.grid,)](*arguments)


def view(tensor: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """Give what lies at a byte offset of a tensor, for use as a pointer."""
    if tensor.dtype != dtype:
        return tensor[offset:].view(dtype)
    if offset == 0:
        return tensor
    begin = tensor.storage_offset() + offset // tensor.element_size()
    return tensor.as_strided((1,), (1,), begin)


class Site:
    """A launch, the positions of its kernel's arguments, and their sources."""

    def __init__(
        self, launch: Launch, plan: Plan, generated: Generated, dtype: str, is_interpreted: bool
    ) -> None:
        self.launch = launch
        self.generated = generated
        self.binding = bind(launch, plan)
        self.at = {name: n for n, name in enumerate(generated.arg_names)}
        self.manifest = manifest_of(self.binding, plan, dtype)
        self.kernel: Kernel | None = None
        if is_interpreted:
            self.function = generated.function()
        else:
            self.kernel = kernel_for(generated, self.manifest, options_of(launch, generated))
        self._find_sources(plan)
        self.dtypes = [torch_dtype(plan, buffer, dtype) for _, _, buffer in self.pointers]

    def _find_sources(self, plan: Plan) -> None:
        """Sort the arguments: pointers, strides (position, buffer, axis, whether of the batch) and
        counts."""
        at, binding = self.at, self.binding
        named = [*binding.pointers, *((f"{t}_ptr", t) for t in binding.tables)]
        self.pointers = [(at[a], a, buffer) for a, buffer in named if a in at]
        strides = [
            (f"{prefix}_s{letter}", buffer, axis, letter == "b")
            for prefix, buffer, letters in binding.strides
            for axis, letter in enumerate(letters[: axes_of(plan, buffer)])
        ]
        for t in binding.tables:
            strides += [(f"{t}_stride_{n}", t, n, False) for n in range(axes_of(plan, t))]
        self.strides = [(at[n], buffer, axis, b) for n, buffer, axis, b in strides if n in at]
        self.buffers = list(dict.fromkeys(b for _, _, b in self.pointers))
        known = {p for p, *_ in (*self.pointers, *self.strides)}
        self.counts = [(p, name) for name, p in at.items() if p not in known]
        aligned_by = specialised(self.generated, self.manifest)
        self.owned = [
            [at[s] for s, pointer in aligned_by.items() if pointer == a and s in at]
            for _, a, _ in self.pointers
        ]
        self.last = [(at[a], a) for a in self.manifest.last if a in at]

    def shot(self, call: Call, device: int) -> Shot | InterpretedShot | None:
        """Give the launch for one slab of a call, compiled if its class is new; None when it has no
        programs."""
        grid = self.binding.grid(call)
        if grid == 0:
            return None
        held = {buffer: call.tensor(buffer) for buffer in self.buffers}
        layouts = [held[buffer] for _, _, buffer in self.pointers]
        arguments = self._arguments(call, held)
        if self.kernel is None:
            sources = zip(self.pointers, layouts, self.dtypes, strict=True)
            views = [(p, x.place, x.offset, dtype) for (p, _, _), x, dtype in sources]
            return InterpretedShot(self.function, grid, arguments, views)
        loaded = self.kernel.form(device, self._class(layouts, arguments))
        places = [
            (p, x.place, x.offset) for (p, _, _), x in zip(self.pointers, layouts, strict=True)
        ]
        return Shot(loaded, grid, arguments, places)

    def _arguments(self, call: Call, held: Mapping[str, Layout]) -> list[Any]:
        """Give all arguments, with 0 in place of pointers."""
        arguments: list[Any] = [0] * len(self.at)
        for position, buffer, axis, of_batch in self.strides:
            tensor = held[buffer]
            if not (of_batch and tensor.shape[axis] == 1):
                arguments[position] = tensor.strides[axis]
        counts = self.binding.scalars(call)
        for position, name in self.counts:
            arguments[position] = counts[name]
        return arguments

    def _class(self, layouts: Sequence[Layout], arguments: Sequence[Any]) -> ArgumentClass:
        aligned = []
        for (_, name, _), layout, owned in zip(self.pointers, layouts, self.owned, strict=True):
            bits = layout.misaligned + layout.offset
            for position in owned:
                bits |= arguments[position]
            if bits % ALIGNMENT == 0:
                aligned.append(name)
        wide: tuple[str, ...] = ()
        if max(arguments) > INT32_MAX:
            wide = tuple(n for n, p in self.at.items() if arguments[p] > INT32_MAX)
        ones = tuple([name for p, name in self.last if arguments[p] == 1])
        return ArgumentClass(tuple(aligned), wide, ones)


def torch_dtype(plan: Plan, buffer: str, dtype: str) -> torch.dtype:
    """Give the torch dtype of a buffer; dtype: of q, k and v."""
    declared = plan.buffer(buffer.partition("#")[0]).dtype
    found: torch.dtype = getattr(torch, dtype if declared == "data" else declared)
    return found
