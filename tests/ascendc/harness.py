"""A short way to run a few lines of AscendC in the emulator."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from spcomp.backends.ascendc.emulate import (
    Argument,
    Buffer,
    EmulatedKernel,
    EmulatorFault,
    KernelDoesNotCompile,
    Kind,
    Launch,
    Statistics,
    compile_kernel,
)

__all__ = ["EmulatorFault", "KernelDoesNotCompile", "kernel", "run", "run_counted"]

Array = np.ndarray


def run(
    body: str,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
    *,
    kind: Kind = "vector",
    blocks: int = 1,
    ratio: int = 2,
    scalars: Mapping[str, int | float] | None = None,
    descending: bool = False,
    globals: str = "",
) -> dict[str, Array]:
    """Run `void kernel(GM_ADDR <inputs and outputs>, <scalars>)` and give the outputs.

    outputs: shape, dtype and initial value of each. An int scalar is an int64_t parameter, a float
    one a float. Raises: EmulatorFault.
    """
    launch = Launch(kind=kind, blocks=blocks, ratio=ratio, descending=descending)
    return run_counted(body, inputs, outputs, launch, scalars=scalars, globals=globals)[0]


def run_counted(
    body: str,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
    launch: Launch,
    *,
    scalars: Mapping[str, int | float] | None = None,
    globals: str = "",
) -> tuple[dict[str, Array], Statistics]:
    scalars = dict(scalars or {})
    results = {name: np.array(value, order="C") for name, value in outputs.items()}
    contiguous = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
    arguments: list[Argument] = [Buffer(n, a, read_only=True) for n, a in contiguous.items()]
    arguments += [Buffer(name, array) for name, array in results.items()]
    arguments += scalars.values()
    types = tuple("float" if isinstance(v, float) else "int64_t" for v in scalars.values())
    names = (*inputs, *outputs)
    compiled = kernel(body, names, tuple(zip(types, scalars, strict=True)), globals)
    return results, compiled.run(arguments, launch)


@lru_cache(maxsize=256)
def kernel(
    body: str,
    tensors: tuple[str, ...],
    scalars: tuple[tuple[str, str], ...] = (),
    globals: str = "",
) -> EmulatedKernel:
    parameters = [f"[[maybe_unused]] GM_ADDR {name}" for name in tensors]
    parameters += [f"[[maybe_unused]] {kind} {name}" for kind, name in scalars]
    source = f"""#include "kernel_operator.h"
using namespace AscendC;
{globals}
extern "C" __global__ __aicore__ void kernel({", ".join(parameters)}) {{
{body}
}}
"""
    return compile_kernel(source, "kernel")
