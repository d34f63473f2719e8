"""A plan in the emulator: the host's tiling compiled by g++ says what is launched, and each launch
runs the generated kernel on the tensors' memory."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spcomp.backends.ascendc.calls import call_refusal
from spcomp.backends.ascendc.contexts.host import LENGTHS, STRIDES
from spcomp.backends.ascendc.emit import forms, tiling, tiling_header, tiling_source
from spcomp.backends.ascendc.emulate import (
    Argument,
    Buffer,
    EmulatedKernel,
    Launch,
    compile_kernel,
    host_library,
)
from spcomp.backends.ascendc.forms import TENSORS, Form
from spcomp.backends.base import Source
from spcomp.errors import Refused

AI_CORES = 2
"""Cores that are emulated: enough that work is spread, few enough to be quick."""

COMMENT = re.compile(r"^ *//.*$", re.MULTILINE)

FROM_TENSOR = {"b": 0, "h": 1, "s": 2}


@dataclass(frozen=True, slots=True)
class Step:
    """One launch of a call: which kernel on how many cores, its arguments' places, its tiling."""

    kernel: int
    blocks: int
    places: tuple[int, ...]
    tiling: bytes


class Host:
    """The host's tiling, compiled."""

    def __init__(self, source: Source, made: tuple[Form, ...]) -> None:
        context = tiling(source.plan, source.target, source.spec, made)
        self._forms = made
        header, text = tiling_header(context), tiling_source(context)
        library = host_library(text.replace(f'#include "{context.op}_tiling.h"', header))
        words = len(context.call_names)

        class Call(ctypes.Structure):
            _fields_ = (("words", ctypes.c_int64 * words),)

        class Platform(ctypes.Structure):
            _fields_ = (("ai_cores", ctypes.c_int32),)

        class Laid(ctypes.Structure):
            _fields_ = (
                ("kernel", ctypes.c_int32),
                ("blocks", ctypes.c_int32),
                ("buffers", ctypes.c_int64 * context.most_buffers),
                ("tiling", ctypes.c_uint8 * context.most_bytes),
            )

        self._call, self._platform, self._laid = Call, Platform, Laid
        self._refusal = library[f"{context.op}_refusal"]
        self._refusal.restype = ctypes.c_char_p
        self._workspace = library[f"{context.op}_workspace"]
        self._workspace.restype = ctypes.c_int64
        self._launches = library[f"{context.op}_launches"]
        self._launches.restype = ctypes.c_int64
        self.header = header

    def refusal(self, words: Sequence[int]) -> str:
        """Say why a call cannot run, or ""; words: lengths and strides, as the struct has them."""
        said = self._refusal(ctypes.byref(self._of(words)))
        return said.decode() if said else ""

    def workspace_bytes(self, words: Sequence[int], ai_cores: int) -> int:
        """Give the bytes a call needs beside its tensors."""
        platform = self._platform(ai_cores)
        return int(self._workspace(ctypes.byref(self._of(words)), ctypes.byref(platform)))

    def steps(self, words: Sequence[int], ai_cores: int) -> Iterator[Step]:
        """Yield the launches of a call in order."""
        call, platform = ctypes.byref(self._of(words)), ctypes.byref(self._platform(ai_cores))
        count = int(self._launches(call, platform, None, ctypes.c_int64(0)))
        laid = (self._laid * count)()
        self._launches(call, platform, laid, ctypes.c_int64(count))
        for one in laid:
            form = self._forms[one.kernel]
            yield Step(
                one.kernel,
                one.blocks,
                tuple(one.buffers)[: len(form.buffers)],
                bytes(one.tiling)[: form.struct_bytes],
            )

    def _of(self, words: Sequence[int]) -> Any:
        call = self._call()
        call.words[:] = list(words)
        return call


class EmulatedExecutable:
    """A plan whose kernels are compiled for the emulator."""

    def __init__(
        self, source: Source, *, ai_cores: int = AI_CORES, descending: bool = False
    ) -> None:
        """ai_cores: that are emulated. descending: the last core begins."""
        self._ai_cores, self._descending = ai_cores, descending
        self._source = source
        self._forms = forms(source.plan, source.target, source.spec)

    @cached_property
    def _host(self) -> Host:
        return Host(self._source, self._forms)

    @cached_property
    def _kernels(self) -> list[EmulatedKernel]:
        """Compile the kernels, which takes seconds: not before a call that is not refused."""
        return [
            compile_kernel(_self_contained(file.text, self._host.header), form.name)
            for file, form in zip(self._source.files, self._forms, strict=True)
        ]

    def run(
        self, tensors: Mapping[str, Tensor], dims: Mapping[str, int], kept: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the plan (see `Executable.run`).

        Raises: Refused for lengths and strides no kernel takes; NoCompiler, KernelDoesNotCompile,
            EmulatorFault.
        """
        q, v = tensors["q"], tensors["v"]
        batch, heads, rows, _ = q.shape
        out = q.new_empty((batch, heads, rows, v.shape[3]))
        lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
        held = {"q": q, "k": tensors["k"], "v": v, "out": out, "lse": lse}
        strides = {
            f"{t}_{x}": held[t].stride(FROM_TENSOR[x]) for t, axes in STRIDES.items() for x in axes
        }
        refusal = call_refusal(self._source.plan, dims, strides)
        if refusal is not None:
            raise Refused(
                backend="ascendc",
                what=refusal.what,
                reason=refusal.reason,
                way_out=refusal.way_out,
            )
        words = [*(dims[name] for name in LENGTHS), *strides.values()]
        problem = self._host.refusal(words)
        assert not problem, f"the host's tiling refuses what the rules let through: {problem}"
        flat = {name: _memory(tensor) for name, tensor in held.items()}
        space = self._host.workspace_bytes(words, self._ai_cores)
        workspace = torch.zeros(max(1, space), dtype=torch.uint8)
        for step in self._host.steps(words, self._ai_cores):
            self._launch(step, flat, workspace)
        return out, lse

    def update(
        self,
        tensors: Mapping[str, Tensor],
        dims: Mapping[str, int],
        kept: Mapping[str, Tensor],
        begin: int,
    ) -> None:
        """Keep no state: plans with one are refused."""
        raise AssertionError("a plan with state is refused before it is built")

    def _launch(self, step: Step, tensors: Mapping[str, Tensor], workspace: Tensor) -> None:
        form = self._forms[step.kernel]
        arguments: list[Argument] = []
        ends = _ends(form, step, workspace.numel())
        for name, place in zip(form.buffers, step.places, strict=True):
            if place < 0:
                tensor = tensors[TENSORS[-place - 1]]
                arguments.append(Buffer(name, tensor, read_only=name in ("q", "k", "v")))
            else:
                arguments.append(Buffer(name, workspace[place : ends[place]]))
        arguments.append(step.tiling)
        launch = Launch(kind=form.kind, blocks=step.blocks, descending=self._descending)
        self._kernels[step.kernel].run(arguments, launch)


def _ends(form: Form, step: Step, whole: int) -> dict[int, int]:
    """Give where each buffer in the workspace ends: where the next one that the kernel uses begins.

    What the cores keep is the last part of the workspace."""
    begins = sorted(place for place in step.places if place >= 0)
    return dict(zip(begins, [*begins[1:], whole], strict=True))


def _memory(tensor: Tensor) -> Tensor:
    """Give the elements from a tensor's first to its last as one dense tensor over its memory."""
    if tensor.numel() == 0:
        return tensor.reshape(-1)
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((reach,), (1,))


def _self_contained(text: str, header: str) -> str:
    """Put the shared header into a kernel's file, since the emulator compiles one file; without the
    comments, so that kernels that differ there alone are compiled once."""
    lines = text.splitlines(keepends=True)
    mine = [
        n for n, line in enumerate(lines) if line.startswith("#include") and "_tiling.h" in line
    ]
    assert len(mine) == 1, "a kernel includes the tiling header once"
    lines[mine[0]] = header
    code = COMMENT.sub("", "".join(lines))
    return code.replace("#pragma once\n", "\n")  # a main file is no header
