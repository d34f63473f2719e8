"""Getting a kernel ready once for each class of its arguments, and launching it.

Triton's own `kernel[grid](...)` finds the class anew at each launch
and costs tens of microseconds; here a call that is known holds its kernels and its arguments
already."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from spcomp.backends.triton.generated import Generated
from spcomp.backends.triton.manifest import ArgumentClass, Manifest, signature_of
from spcomp.backends.triton.store import Form, obtain
from spcomp.errors import NotWarmedUp

INT32_MAX = (1 << 31) - 1


@dataclass(slots=True)
class Stats:
    """What launching has cost this process so far."""

    forms: int = 0  # kernels got ready for a class of arguments: compiled, or read from the cache
    prepared: int = 0  # calls whose shapes and strides were new


STATS = Stats()


@dataclass(slots=True)
class Loaded:
    """A compiled kernel on its device. `run` is Triton's launcher of it; in 3.6 and 3.7 it takes
    three grid sizes, stream, function, packed metadata, metadata for hooks, two hooks and the
    arguments, where a pointer may be an address."""

    kernel: Any
    run: Any
    function: Any
    packed: Any

    @property
    def scratch_bytes(self) -> int:
        """Give the global memory that each program asks the launch for."""
        return int(self.kernel.metadata.global_scratch_size)


@dataclass(frozen=True, slots=True)
class Lent:
    """Memory lent to the programs of a launch, in the form Triton's launcher takes."""

    address: int

    def data_ptr(self) -> int:
        """Give its address."""
        return self.address


@contextmanager
def lending(address: int) -> Iterator[None]:
    """Give the launches in this block the memory at an address for what their programs keep."""
    lent = Lent(address)
    variable = _allocator()
    token = variable.set(lambda size, alignment, stream: lent)
    try:
        yield
    finally:
        variable.reset(token)


@cache
def _allocator() -> Any:
    from triton.runtime import _allocation

    return _allocation._allocator


class Kernel:
    """A generated kernel and its compiled forms, one for each device and class."""

    def __init__(
        self, generated: Generated, manifest: Manifest, options: tuple[tuple[str, int], ...]
    ) -> None:
        self.generated = generated
        self.manifest = manifest
        self.options = options
        self._forms: dict[tuple[int, ArgumentClass], Loaded] = {}
        self._lock = threading.Lock()

    def form(self, device: int, chosen: ArgumentClass) -> Loaded:
        """Give the compiled form for a class, made at its first use, on the current device."""
        found = self._forms.get((device, chosen))
        if found is None:
            with self._lock:
                found = self._forms.get((device, chosen))
                if found is None:
                    found = self._load(chosen)
                    self._forms[device, chosen] = found
        return found

    def _load(self, chosen: ArgumentClass) -> Loaded:
        """Compile or read the form, and load it.

        Raises: NotWarmedUp inside the capture of a CUDA graph, where nothing can be loaded.
        """
        if is_capturing():
            raise NotWarmedUp(
                what=f"the kernel {self.generated.kernel} is not loaded for these strides and "
                "this alignment",
                more=", with tensors of the same layout",
            )
        STATS.forms += 1
        signature = signature_of(self.generated, self.manifest, chosen)
        kernel = obtain(Form(self.generated, signature, current_target(), self.options))
        run = kernel.run  # loads the binary
        return Loaded(kernel, run, kernel.function, kernel.packed_metadata)


@cache
def kernel_for(
    generated: Generated, manifest: Manifest, options: tuple[tuple[str, int], ...]
) -> Kernel:
    """Give the kernel of a generated file; equal text compiled by two patterns is one."""
    return Kernel(generated, manifest, options)


def is_capturing() -> bool:
    """Tell whether a CUDA graph is being captured on the current stream."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def current_target() -> Any:
    """Give Triton's target of the current device."""
    from triton.runtime import driver

    return driver.active.get_current_target()


def raw_stream(device: int) -> int:
    """Give the handle of the current stream of a device."""
    return int(_stream_reader()(device))


@cache
def _stream_reader() -> Any:
    from triton.runtime import driver

    return driver.active.get_current_stream


@cache
def processors(device: int) -> int:
    """Give the multiprocessors of a device; the interpreter is one."""
    import torch

    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device >= 0 else 1


@cache
def _runtime_knobs() -> Any:
    from triton import knobs

    return knobs.runtime


def hooks() -> tuple[Any, Any] | None:
    """Give the launch hooks a profiler has set, or None when there is none."""
    runtime = _runtime_knobs()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    is_set = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    return (enter, leave) if is_set else None


@dataclass(slots=True)
class Shot:
    """One launch with all its numbers known; pointers: position, allocation, offset in bytes."""

    loaded: Loaded
    grid: int
    arguments: list[Any]
    pointers: Sequence[tuple[int, int, int]]

    @property
    def scratch_bytes(self) -> int:
        """Give the global memory that its programs keep together."""
        return self.grid * self.loaded.scratch_bytes

    def fire(self, addresses: Sequence[int], stream: int, hooked: tuple[Any, Any] | None) -> None:
        """Launch on a stream; addresses: of the call's allocations."""
        arguments = self.arguments.copy()
        for position, place, offset in self.pointers:
            arguments[position] = addresses[place] + offset
        at = self.loaded
        noted, enter, leave = None, None, None
        if hooked is not None:
            enter, leave = hooked
            noted = at.kernel.launch_metadata((self.grid, 1, 1), stream, *arguments)
        at.run(self.grid, 1, 1, stream, at.function, at.packed, noted, enter, leave, *arguments)
