"""Running an AscendC kernel on the host: g++ compiles it against the emulator's headers into a
shared library, and a launch gives its results or the first fault.

The library is a built file of the cache, under the hash of everything it was made from."""

from __future__ import annotations

import ctypes
import hashlib
import operator
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, SupportsIndex

from spcomp.cache.built import built_file
from spcomp.errors import SpcompError

Kind = Literal["vector", "cube", "mix"]

HEADERS = Path(__file__).parent / "emulator"
FOLDER = "ascendc-emulator"
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-fno-gnu-unique", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-fsanitize=bounds", "-fsanitize-undefined-trap-on-error"),
)
"""No unique symbols and hidden ones otherwise: two kernels in one process share no state. No
contraction: the emulator rounds where the device does."""

WHOLE = '#include "kernel_operator.h"\n#include "host.h"\n'

HOST_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared")


class NoCompiler(SpcompError):
    """The host has no g++."""

    message = "the AscendC emulator needs g++, and there is none on the path."
    help = "install g++ 12 or newer, or leave the emulated checks out."


class KernelDoesNotCompile(SpcompError):
    """The compiler refused the kernel."""

    message = "the kernel '{entry}' does not compile against the emulator:\n{said}"
    help = "the emulator has only what the generator may use; correct the kernel or its template."


class EmulatorFault(SpcompError):
    """The kernel did what the device would not survive."""

    message = "the emulated kernel '{entry}' is faulty: {fault}."
    help = "correct the kernel; the values it left behind mean nothing."


class NotALaunch(SpcompError):
    """The call names buffers or sizes that no launch can have."""

    message = "the emulated launch of '{entry}' was given {problem}."
    help = "{way_out}"


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor in global memory: a contiguous NumPy array or a torch tensor on the host."""

    name: str
    array: Any
    read_only: bool = False


Argument = Buffer | int | float | bytes
"""What a kernel's parameter takes; `bytes` is a struct passed by value."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is launched, and how strictly it is judged.

    blocks: cube cores of a mix kernel, cores otherwise; ratio: vector cores per cube core of a mix
    kernel. descending: the last core gets the first turn. vector_in_order: as if the compiler put a
    barrier between vector instructions. keep_reserved_ub: 8 KiB of UB belong to the library.
    """

    kind: Kind = "vector"
    blocks: int = 1
    ratio: int = 2
    descending: bool = False
    vector_in_order: bool = False
    keep_reserved_ub: bool = True
    physical_ai_cores: int = 24


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a run without a fault did: instructions, ordering checks, and what it warns of."""

    instructions: int
    checks: int
    warnings: tuple[str, ...]


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("read_only", ctypes.c_int64),
    )


class _Argument(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int64),
        ("whole", ctypes.c_int64),
        ("fraction", ctypes.c_double),
        ("content", ctypes.c_char_p),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("tensor_count", ctypes.c_int64),
        ("tensors", ctypes.POINTER(_Tensor)),
        ("argument_count", ctypes.c_int64),
        ("arguments", ctypes.POINTER(_Argument)),
        ("kind", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("ratio", ctypes.c_int64),
        ("descending", ctypes.c_int64),
        ("vector_in_order", ctypes.c_int64),
        ("keep_reserved_ub", ctypes.c_int64),
        ("physical_ai_cores", ctypes.c_int64),
    )


class _Report(ctypes.Structure):
    _fields_ = (
        ("instructions", ctypes.c_int64),
        ("checks", ctypes.c_int64),
        ("fault", ctypes.c_char * 4096),
        ("warnings", ctypes.c_char * 4096),
    )


@dataclass(frozen=True, slots=True)
class EmulatedKernel:
    """A compiled kernel; `entry` is the function that a launch calls."""

    entry: str
    library: Path
    _symbol: Any

    def run(self, arguments: Sequence[Argument], launch: Launch | None = None) -> Statistics:
        """Run one launch; buffers that are not read only hold the results afterwards.

        Raises: EmulatorFault with the first fault; NotALaunch.
        """
        call, _keep = _call(self.entry, arguments, launch or Launch())
        report = _Report()
        if self._symbol(ctypes.byref(call), ctypes.byref(report)):
            fault = report.fault.decode("utf-8", "replace")
            raise EmulatorFault(entry=self.entry, fault=fault)
        warnings = report.warnings.decode("utf-8", "replace").splitlines()
        return Statistics(report.instructions, report.checks, tuple(warnings))


def compile_kernel(source: str, entry: str) -> EmulatedKernel:
    """Compile a kernel's source, or find it compiled; `entry` is its `__global__` function.

    Raises: NoCompiler, KernelDoesNotCompile, CacheNotWritable.
    """
    text = f'{source}\n#include "host.h"\nSPCOMP_EMULATED_ENTRY({entry})\n'
    library = _library(compiler(), text, entry)
    symbol = ctypes.CDLL(str(library)).spcomp_emulate
    symbol.argtypes = (ctypes.POINTER(_Launch), ctypes.POINTER(_Report))
    symbol.restype = ctypes.c_int
    return EmulatedKernel(entry, library, symbol)


def host_library(source: str) -> ctypes.CDLL:
    """Compile code of the host that knows no device, or find it compiled, and load it.

    Raises: NoCompiler, KernelDoesNotCompile, CacheNotWritable.
    """
    return ctypes.CDLL(str(_library(compiler(), source, "the tiling on the host", is_host=True)))


def compiler() -> str:
    """Give the path of g++.

    Raises: NoCompiler.
    """
    found = shutil.which("g++")
    if found is None:
        raise NoCompiler()
    return found


def _library(compiler: str, text: str, entry: str, *, is_host: bool = False) -> Path:
    flags = HOST_FLAGS if is_host else FLAGS
    command = (compiler, *flags)

    def make(library: Path) -> None:
        source = library.with_name("kernel.cpp")
        source.write_text(text)
        included = () if is_host else _precompiled(command, library.parent)
        _compile((*command, *included, str(source), "-o", str(library)), entry, library.parent)

    return built_file(FOLDER, f"{_digest(*command, text)}.so", make)


def _precompiled(command: Sequence[str], making: Path) -> tuple[str, ...]:
    """Give the options that begin a kernel with the emulator's headers, which are compiled once."""
    if "-include" in command:
        return ()  # the caller has compiled them himself

    def make(precompiled: Path) -> None:
        header = precompiled.with_suffix("")
        header.write_text(WHOLE)
        flags = [flag for flag in command if flag != "-shared"]
        whole = (*flags, "-x", "c++-header", str(header), "-o", str(precompiled))
        _compile(whole, "the emulator's headers", precompiled.parent)

    name = f"{_digest(*command)}.h.gch"
    precompiled = built_file(FOLDER, name, make)
    header = making / "emulator.h"
    header.write_text(WHOLE)  # what the compiler reads where it cannot use the compiled one
    try:  # under a name of our own it stays, whatever becomes of the cache meanwhile
        os.link(precompiled, f"{header}.gch")
    except OSError:
        return ()
    return ("-include", str(header))


def _compile(command: Sequence[str], entry: str, making: Path) -> None:
    plain = {**os.environ, "LC_ALL": "C"}  # messages in English and in ASCII
    whole = [*command, f"-I{HEADERS}"]
    done = subprocess.run(whole, capture_output=True, text=True, check=False, env=plain)
    if done.returncode:
        said = "\n".join(_errors(done.stderr, str(making)))
        raise KernelDoesNotCompile(entry=entry, said=said)


def _digest(compiler: str, *parts: str) -> str:
    """Hash what a file is made from, with the compiler's version and the headers."""
    key = hashlib.sha256()
    for part in (version_of(compiler), *parts, headers_digest()):
        key.update(part.encode() + b"\0")
    return key.hexdigest()[:32]


def _errors(said: str, making: str) -> list[str]:
    """Keep the compiler's first errors, without the folder that is gone by now."""
    lines = [line.replace(f"{making}/", "") for line in said.splitlines()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines)[:10]


def headers_digest() -> str:
    """Hash the emulator's headers, so that an edit of one makes every library anew."""
    digest = hashlib.sha256()
    for header in sorted(HEADERS.glob("*.h")):
        digest.update(header.name.encode() + b"\0" + header.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=4)
def version_of(compiler: str) -> str:
    """Give the first line that a compiler says of its version."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0]


def _call(entry: str, arguments: Sequence[Argument], launch: Launch) -> tuple[_Launch, object]:
    """Lay a call out for the library; the second value keeps alive what the first points to."""
    kinds = ("vector", "cube", "mix")
    if launch.kind not in kinds or launch.blocks < 1 or not 1 <= launch.ratio <= 2:
        raise NotALaunch(
            entry=entry,
            problem=f"kind={launch.kind!r}, blocks={launch.blocks}, ratio={launch.ratio}",
            way_out="the kind is vector, cube or mix, blocks at least 1, and the ratio 1 or 2.",
        )
    buffers = [argument for argument in arguments if isinstance(argument, Buffer)]
    tensors = (_Tensor * len(buffers))(*(_tensor(entry, buffer) for buffer in buffers))
    fields = (_Argument * len(arguments))()
    seen = 0
    for field, argument in zip(fields, arguments, strict=True):
        if isinstance(argument, Buffer):
            field.kind, field.whole, seen = 0, seen, seen + 1
        elif isinstance(argument, bytes):
            field.kind, field.whole, field.content = 3, len(argument), argument
        elif isinstance(argument, SupportsIndex):
            field.kind, field.whole = 1, _integer(entry, operator.index(argument))
        else:
            field.kind, field.fraction = 2, argument
    call = _Launch(
        *(len(buffers), tensors, len(arguments), fields),
        *(kinds.index(launch.kind), launch.blocks, launch.ratio, launch.descending),
        *(launch.vector_in_order, launch.keep_reserved_ub, launch.physical_ai_cores),
    )
    return call, (tensors, fields, arguments)


def _integer(entry: str, value: int) -> int:
    if -(2**63) <= value < 2**63:
        return value
    raise NotALaunch(
        entry=entry, problem=f"the integer {value}", way_out="pass integers of at most 64 bits."
    )


def _tensor(entry: str, buffer: Buffer) -> _Tensor:
    address, size = _memory(entry, buffer)
    return _Tensor(buffer.name.encode(), address, size, buffer.read_only)


def _memory(entry: str, buffer: Buffer) -> tuple[int, int]:
    array = buffer.array
    way_out = "pass a contiguous NumPy array or a contiguous torch tensor on the CPU."
    if hasattr(array, "data_ptr"):
        if array.device.type == "cpu" and array.is_contiguous():
            return int(array.data_ptr()), int(array.numel() * array.element_size())
        problem = f"'{buffer.name}' on {array.device} with strides {tuple(array.stride())}"
    elif hasattr(array, "__array_interface__"):
        if array.flags.c_contiguous and (buffer.read_only or array.flags.writeable):
            return int(array.ctypes.data), int(array.nbytes)
        problem = f"'{buffer.name}', an array that is not contiguous or cannot be written"
    else:
        problem = f"'{buffer.name}' as {type(array).__name__}"
    raise NotALaunch(entry=entry, problem=problem, way_out=way_out)
