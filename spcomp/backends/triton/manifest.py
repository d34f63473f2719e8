"""What the arguments of a kernel are, and the classes of arguments it is compiled for.

A class says which tensors are aligned, which integers need 64 bits, and which tables have a last
stride of one; never a length."""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.backends.triton.generated import Generated
from spcomp.backends.triton.layouts import ALIGNMENT, Binding
from spcomp.ir.plan import Launch, Plan

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
FLOATS = ("scale", "scale_log2", "share")
CONSTANT = "constexpr"


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


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of one compiled form: Triton's type of each in order ("constexpr" for those
    that are 1), and which are multiples of 16."""

    types: tuple[tuple[str, str], ...]
    divisible: frozenset[str]

    def __str__(self) -> str:
        """Give it in one line, as the cache keeps it: `q_ptr *bf16/16, q_sb i32/16, sq i32`."""
        marks = ((n, t, f"/{ALIGNMENT}" if n in self.divisible else "") for n, t in self.types)
        return ", ".join(f"{name} {kind}{mark}" for name, kind, mark in marks)


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


def specialised(generated: Generated, manifest: Manifest) -> dict[str, str]:
    """Give the strides whose alignment a kernel is compiled for, with their pointers."""
    return {a: p for a, p in manifest.strides if a not in generated.unspecialised}


def signature_of(generated: Generated, manifest: Manifest, chosen: ArgumentClass) -> Signature:
    """Give the arguments of a kernel compiled for a class."""
    pointers, strides = dict(manifest.pointers), specialised(generated, manifest)
    types: list[tuple[str, str]] = []
    divisible = set()
    for name in generated.arg_names:
        if name in chosen.ones:
            types.append((name, CONSTANT))
            continue
        number = "i64" if name in chosen.wide else "i32"
        types.append((name, pointers.get(name, "fp32" if name in FLOATS else number)))
        if name in chosen.aligned or strides.get(name) in chosen.aligned:
            divisible.add(name)
    return Signature(tuple(types), frozenset(divisible))


def options_of(launch: Launch, generated: Generated) -> tuple[tuple[str, int], ...]:
    """Give the options of Triton's compiler for a launch and its kernel."""
    axes = dict(launch.axes)
    options = (("num_warps", axes["warps"]), ("num_stages", axes["stages"]))
    if generated.max_registers:
        return (*options, ("maxnreg", generated.max_registers))
    return options
