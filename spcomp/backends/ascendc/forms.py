"""What each launch of a plan becomes: its kernel's arguments, its tiling, and its context."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from spcomp.backends.ascendc.contexts.attend_gather import attend_gather_context
from spcomp.backends.ascendc.contexts.pool import pool_context
from spcomp.backends.ascendc.contexts.score import score_context
from spcomp.backends.ascendc.contexts.topk import topk_context
from spcomp.backends.ascendc.expr_text import dim_text, float_text, spans_text
from spcomp.backends.ascendc.spans import ranges_of
from spcomp.backends.base import Specialisation
from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.launches import GatherLaunch, PoolLaunch, ScoreLaunch, TopKLaunch
from spcomp.ir.plan import Launch, Plan, Slabs

WORKSPACE = "workspace"
"""In a list of buffers: what the cores of the launch keep for themselves."""

TENSORS = ("q", "k", "v", "out", "lse")
"""The tensors of a call, in the order the host numbers them."""

C_BYTES = {"int32_t": 4, "int64_t": 8, "float": 4}

Kind = Literal["vector", "mix"]
SYMBOLS = {name: name for name in dims.SYMBOLS}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a tiling struct; value: C++ over the lengths and strides of a call, R and R0."""

    c_type: str
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Form:
    """One launch. buffers: its kernel's arguments in order; context: of its template."""

    number: int
    name: str
    kernel: str
    kind: Kind
    is_in_slab: bool
    buffers: tuple[str, ...]
    fields: tuple[Field, ...]
    context: Any

    @property
    def struct(self) -> str:
        """Name the struct its tiling has."""
        return f"{self.name}_tiling"

    @property
    def struct_bytes(self) -> int:
        """Give the size of the struct: each field lies at a multiple of its own size."""
        end, largest = 0, 1
        for field in self.fields:
            size = C_BYTES[field.c_type]
            end, largest = -(-end // size) * size + size, max(largest, size)
        return -(-end // largest) * largest

    @property
    def workspace_bytes(self) -> int:
        """Bytes of global memory that one AI core keeps for itself."""
        return int(self.context.workspace_bytes) if WORKSPACE in self.buffers else 0


@dataclass(frozen=True, slots=True)
class Site:
    """A launch in its plan: what the functions below make a form from."""

    plan: Plan
    spec: Specialisation
    number: int
    op: str
    header: tuple[str, ...]
    is_in_slab: bool

    def named(self, kernel: str) -> dict[str, Any]:
        """Give what every context begins with."""
        name = f"{self.op}_{self.number:02d}_{kernel}"
        return {
            "header": self.header,
            "name": name,
            "struct": f"{name}_tiling",
            "tiling_header": f"{self.op}_tiling.h",
            "dtype": self.spec.dtype,
        }

    def form(
        self, launch: Launch, kind: Kind, buffers: Iterable[str], fields: Iterable[Field], made: Any
    ) -> Form:
        """Put a form together; made: the context."""
        return Form(
            number=self.number,
            name=f"{self.op}_{self.number:02d}_{launch.kernel}",
            kernel=launch.kernel,
            kind=kind,
            is_in_slab=self.is_in_slab,
            buffers=tuple(buffers),
            fields=tuple(fields),
            context=made,
        )

    def size(self, name: str, buffer: str, axis: int) -> Field:
        """Give a field that is the size of a buffer's axis."""
        return count(name, self.plan.buffer(buffer).dims[axis])

    def strides(self, prefix: str, buffer: str, axes: str) -> tuple[Field, ...]:
        """Give the stride fields of a buffer's leading axes: those of a call's tensor come with the
        call, scratch is dense."""
        if buffer in TENSORS:
            return tuple(Field("int64_t", f"{prefix}_{x}", f"{buffer}_{x}") for x in axes)
        shape = self.plan.buffer(buffer).dims
        return tuple(
            Field("int64_t", f"{prefix}_{x}", text(product(shape[n + 1 :])))
            for n, x in enumerate(axes)
        )


def forms_of(
    plan: Plan, spec: Specialisation, op: str, header: Callable[[Launch], tuple[str, ...]]
) -> tuple[Form, ...]:
    """Give the form of every launch; header: the first lines of a launch's file.

    The backend has refused before what cannot be built.
    """
    forms: list[Form] = []
    for step in plan.steps:
        for launch in step.launches if isinstance(step, Slabs) else (step,):
            is_in_slab = isinstance(step, Slabs)
            site = Site(plan, spec, len(forms), op, header(launch), is_in_slab)
            forms.append(FORMS[type(launch)](launch, site))
    return tuple(forms)


def text(dim: Dim) -> str:
    """Print a dim over the names that the host's functions have."""
    return dim_text(dim, SYMBOLS)


def product(shape: Iterable[Dim]) -> Dim:
    """Give the elements of a shape."""
    whole: Dim = 1
    for size in shape:
        whole = whole * size
    return whole


def count(name: str, dim: Dim) -> Field:
    """Give an int32 field that holds a dim."""
    return Field("int32_t", name, text(dim))


def _lengths(*names: str) -> tuple[Field, ...]:
    return tuple(Field("int32_t", name, name) for name in names)


def _pool(launch: PoolLaunch, s: Site) -> Form:
    fields = (
        s.size("B", launch.x_buf, 0),
        s.size("H", launch.x_buf, 1),
        s.size("S", launch.x_buf, 2),
        s.size("U", launch.out_buf, 2),
        *s.strides("x", launch.x_buf, "bhs"),
    )
    assert launch.by != "minmax", "refused before"
    made = pool_context(
        **s.named(launch.kernel),
        head_dim=s.spec.value_dim if launch.x_buf == "v" else s.spec.head_dim,
        block=launch.block,
        stride=launch.stride,
        by=launch.by,
    )
    return s.form(launch, "vector", (launch.x_buf, launch.out_buf), fields, made)


def _score(launch: ScoreLaunch, s: Site) -> Form:
    rule = launch.rule
    fields = (
        *_lengths("B", "Hq", "Hkv", "Sq", "Skv", "R0"),
        s.size("Nr", launch.scores_buf, 2),
        s.size("Nk", launch.scores_buf, 3),
        *s.strides("rows", launch.rows_buf, "bhs"),
        *s.strides("units", launch.units_buf, "bhs"),
    )
    made = score_context(
        **s.named(launch.kernel),
        head_dim=s.spec.head_dim,
        heads=rule.heads,
        reduce=rule.reduce,
        scale=float_text(rule.scale),
        granule=rule.granule,
        visible=spans_text(ranges_of(rule.visible)),
        forced=spans_text(ranges_of(rule.forced)),
    )
    buffers = (launch.rows_buf, launch.units_buf, launch.scores_buf, WORKSPACE)
    return s.form(launch, "mix", buffers, fields, made)


def _topk(launch: TopKLaunch, s: Site) -> Form:
    shape = s.plan.buffer(launch.scores_buf).dims
    fields = (
        count("lists", product(shape[:3])),
        count("units", shape[3]),
        count("k", launch.k),
        count("width", launch.width),
    )
    named = s.named(launch.kernel)
    del named["dtype"]  # scores are float, whatever q is
    made = topk_context(**named)
    buffers = (launch.scores_buf, launch.indices_buf, launch.counts_buf)
    return s.form(launch, "vector", buffers, fields, made)


def _gather(launch: GatherLaunch, s: Site) -> Form:
    lists = launch.list_buf
    scale = 1.0 / math.sqrt(s.spec.head_dim) if launch.rule.scale is None else launch.rule.scale
    fields = (
        *_lengths("B", "Hq", "Hkv"),
        s.size("Hl", lists, 1),
        *_lengths("Sq", "Skv", "R0", "R"),
        s.size("Nr", lists, 2),
        s.size("width", lists, 3),
        *s.strides("q", launch.q_buf, "bhs"),
        *s.strides("k", launch.k_buf, "bhs"),
        *s.strides("v", launch.v_buf, "bhs"),
        *s.strides("out", launch.out_buf, "bhs"),
        *s.strides("lse", launch.lse_buf, "bh"),
        Field("int32_t", "out_row0", "R0" if launch.out_buf in TENSORS else "0"),
        Field("float", "scale", float_text(scale)),
    )
    made = attend_gather_context(
        **s.named(launch.kernel),
        head_dim=s.spec.head_dim,
        value_dim=s.spec.value_dim,
        unit=launch.unit,
        granule=launch.granule,
        spans=spans_text(ranges_of(launch.rule.predicate)),
    )
    buffers = (
        *(launch.q_buf, launch.k_buf, launch.v_buf, lists, launch.count_buf),
        *(launch.out_buf, launch.lse_buf, WORKSPACE),
    )
    return s.form(launch, "mix", buffers, fields, made)


FORMS: dict[type[Launch], Callable[..., Form]] = {
    PoolLaunch: _pool,
    ScoreLaunch: _score,
    TopKLaunch: _topk,
    GatherLaunch: _gather,
}
