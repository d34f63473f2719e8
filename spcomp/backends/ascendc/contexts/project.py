"""Context of the files around the kernels: launches, driver, operator of torch, build, read-me."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spcomp.backends.ascendc.contexts.host import STRIDES, TilingContext
from spcomp.backends.ascendc.forms import TENSORS, Field, Form
from spcomp.backends.base import Source

INPUTS = ("q", "k", "v")
TORCH_DTYPES = {"float16": "at::kHalf", "bfloat16": "at::kBFloat16"}
DECODE_ROWS = 16
"""At most this many query rows are the phase decode."""


@dataclass(frozen=True, slots=True)
class BufferArgument:
    """A buffer among a kernel's arguments."""

    name: str
    is_read_only: bool


@dataclass(frozen=True, slots=True)
class ShownField:
    """A field of a tiling struct; shown: C++ that gives it as int64_t or float."""

    name: str
    shown: str


@dataclass(frozen=True, slots=True)
class ProjectKernel:
    """A kernel as what launches it sees it."""

    number: int
    name: str
    kind: str
    struct: str
    buffers: tuple[BufferArgument, ...]
    fields: tuple[ShownField, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectContext:
    """Variables of the templates in `ascendc/project`."""

    header: tuple[str, ...]
    op: str
    title: str
    arch: str
    rung: str
    dtype: str
    torch_dtype: str
    head_dim: int
    value_dim: int
    is_decode: bool
    decode_rows: int
    kernels: tuple[ProjectKernel, ...]
    tensors: tuple[str, ...]
    strides: Mapping[str, str]
    call_names: tuple[str, ...]
    most_buffers: int
    most_cores: int


def project_context(
    source: Source,
    tiling: TilingContext,
    forms: Iterable[Form],
    header: tuple[str, ...],
    rung: str,
) -> ProjectContext:
    """Make the context; tiling: of the same forms."""
    return ProjectContext(
        header=header,
        op=tiling.op,
        title=source.target.title,
        arch=source.target.arch,
        rung=rung,
        dtype=source.spec.dtype,
        torch_dtype=TORCH_DTYPES[source.spec.dtype],
        head_dim=source.spec.head_dim,
        value_dim=source.spec.value_dim,
        is_decode=source.plan.phase == "decode",
        decode_rows=DECODE_ROWS,
        kernels=tuple(map(_kernel, forms)),
        tensors=TENSORS,
        strides=STRIDES,
        call_names=tiling.call_names,
        most_buffers=tiling.most_buffers,
        most_cores=source.target.multiprocessors,
    )


def _kernel(form: Form) -> ProjectKernel:
    return ProjectKernel(
        number=form.number,
        name=form.name,
        kind=form.kind,
        struct=form.struct,
        buffers=tuple(BufferArgument(name, name in INPUTS) for name in form.buffers),
        fields=tuple(map(_shown, form.fields)),
    )


def _shown(field: Field) -> ShownField:
    is_whole = field.c_type != "float"
    value = f"tiling.{field.name}"
    return ShownField(field.name, f"int64_t{{{value}}}" if is_whole else value)
