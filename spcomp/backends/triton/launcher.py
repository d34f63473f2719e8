"""Compiling a kernel once for each class of its arguments, and launching it.

A class says which tensors are aligned, which integers need 64 bits, and which tables have a last
stride of one; never a length. Triton's own `kernel[grid](...)` finds the class anew at each launch
and costs tens of microseconds; here a call that is known holds its kernels and its arguments
already."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from spcomp.backends.triton.layouts import Binding
from spcomp.ir.plan import Plan

TRITON_TYPES = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "bool": "i1",
}
FLOATS = ("scale", "scale_log2")
INT32_MAX = (1 << 31) - 1
DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(slots=True)
class Stats:
    """What launching has cost this process so far."""

    compiled: int = 0  # kernels asked of Triton's compiler, its own cache on disk included
    prepared: int = 0  # calls whose shapes and strides were new


STATS = Stats()


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the arguments of a kernel are; arguments that are not named here are counts.

    pointers: argument and Triton type; strides: argument and the pointer argument it belongs to;
    last: strides of a table's last axis, which one is a class of."""

    pointers: tuple[tuple[str, str], ...]
    strides: tuple[tuple[str, str], ...]
    last: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ArgumentClass:
    """What a compiled kernel may rely on: names of arguments.

    aligned: pointers that are, with all strides of their tensor, multiples of 16; wide: integers
    past 32 bits; ones: table strides that are 1."""

    aligned: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()


def manifest_of(binding: Binding, plan: Plan, dtype: str) -> Manifest:
    """Read the manifest of a launch off its binding; dtype: of q, k and v."""
    named = [*binding.pointers, *((f"{t}_ptr", t) for t in binding.tables)]
    owner = {buffer: argument for argument, buffer in reversed(named)}
    strides, last = [], []
    for prefix, buffer, letters in binding.strides:
        axes = range(axes_of(plan, buffer))
        inner = [
            f"{prefix}_s{x}" for x, axis in zip(letters, axes, strict=False) if axis < axes[-1]
        ]
        strides += [(name, owner[buffer]) for name in inner]
    for table in binding.tables:
        *outer, final = [f"{table}_stride_{n}" for n in range(axes_of(plan, table))]
        strides += [(name, f"{table}_ptr") for name in outer]
        last.append(final)
    return Manifest(
        tuple((argument, pointer_type(plan, buffer, dtype)) for argument, buffer in named),
        tuple(strides),
        tuple(last),
    )


def axes_of(plan: Plan, buffer: str) -> int:
    """Count the axes of a buffer, or of one part of a stack (`parts#1`)."""
    base, _, part = buffer.partition("#")
    return len(plan.buffer(base).dims) - bool(part)


def pointer_type(plan: Plan, buffer: str, dtype: str) -> str:
    """Give Triton's type of a pointer to a buffer."""
    declared = plan.buffer(buffer.partition("#")[0]).dtype
    return "*" + TRITON_TYPES[dtype if declared == "data" else declared]


def best_class(manifest: Manifest) -> ArgumentClass:
    """Give the class of dense tensors of a usual size."""
    return ArgumentClass(tuple(a for a, _ in manifest.pointers), (), manifest.last)


def specialised(function: Any, manifest: Manifest) -> dict[str, str]:
    """Give the strides whose alignment a kernel is compiled for, with their pointers."""
    free = {p.name for p in getattr(function, "params", ()) if p.do_not_specialize}
    return {a: pointer for a, pointer in manifest.strides if a not in free}


def compile_kernel(
    function: Any,
    manifest: Manifest,
    chosen: ArgumentClass,
    target: Any,
    options: Mapping[str, int],
) -> Any:
    """Compile a `@triton.jit` function for one class of arguments; gives Triton's compiled
    kernel."""
    import triton

    pointers, strides = dict(manifest.pointers), specialised(function, manifest)
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, name in enumerate(function.arg_names):
        if name in chosen.ones:
            signature[name], constants[(index,)] = "constexpr", 1
            continue
        number = "i64" if name in chosen.wide else "i32"
        signature[name] = pointers.get(name, "fp32" if name in FLOATS else number)
        if name in chosen.aligned or strides.get(name) in chosen.aligned:
            attributes[(index,)] = DIVISIBLE
    source = triton.compiler.ASTSource(
        fn=function, signature=signature, constexprs=constants, attrs=attributes
    )
    return triton.compile(source, target=target, options=dict(options))


@dataclass(slots=True)
class Loaded:
    """A compiled kernel on its device. `run` is Triton's launcher of it; in 3.6 and 3.7 it takes
    three grid sizes, stream, function, packed metadata, metadata for hooks, two hooks and the
    arguments, where a pointer may be an address."""

    kernel: Any
    run: Any
    function: Any
    packed: Any


class Kernel:
    """A generated kernel and its compiled forms, one for each device and class."""

    def __init__(
        self, function: Any, manifest: Manifest, options: tuple[tuple[str, int], ...]
    ) -> None:
        self.function = function
        self.manifest = manifest
        self.options = options
        self.specialised = specialised(function, manifest)
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
        STATS.compiled += 1
        kernel = compile_kernel(
            self.function, self.manifest, chosen, current_target(), dict(self.options)
        )
        run = kernel.run  # loads the binary
        return Loaded(kernel, run, kernel.function, kernel.packed_metadata)


@cache
def kernel_for(function: Any, manifest: Manifest, options: tuple[tuple[str, int], ...]) -> Kernel:
    """Give the kernel of a generated function; equal text compiled by two patterns is one."""
    return Kernel(function, manifest, options)


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
