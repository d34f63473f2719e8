"""Contexts of the host's tiling: the header that kernels share, and its formulas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from spcomp.backends.ascendc.calls import call_rules
from spcomp.backends.ascendc.forms import TENSORS, WORKSPACE, Field, Form, product, text
from spcomp.backends.base import Specialisation
from spcomp.ir.passes.place_buffers import ITEM_BYTES, slab_align
from spcomp.ir.plan import SCRATCH_LIMIT_BYTES, Plan

LENGTHS = ("B", "Hq", "Hkv", "Sq", "Skv")
PLACE_ALIGN = 512
"""Bytes: rows of global memory that begin here load fastest."""

STRIDES = {"q": "bhs", "k": "bhs", "v": "bhs", "out": "bhs", "lse": "bh"}


@dataclass(frozen=True, slots=True)
class Rule:
    """A call that cannot run: the condition in C++, and the sentence that says why."""

    broken: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Scratch:
    """A scratch buffer: its name, its shape for a comment, its bytes in C++."""

    name: str
    shape: str
    bytes: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """A launch as the host sees it. places: its buffers, as `launch.buffers` holds them."""

    number: int
    name: str
    what: str
    struct: str
    maker: str
    fields: tuple[Field, ...]
    is_in_slab: bool
    cores: str
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TilingContext:
    """Variables of `ascendc/host/tiling.h.jinja`, `tiling.cpp.jinja` and of what calls them."""

    header: tuple[str, ...]
    op: str
    head_dim: int
    value_dim: int
    call_fields: tuple[str, ...]
    call_names: tuple[str, ...]
    tensors: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    most_buffers: int
    most_bytes: int
    row_align: int
    scratch_limit: int
    scratch: tuple[Scratch, ...]
    rules: tuple[Rule, ...]
    core_bytes: int
    place_align: int


def tiling_context(
    plan: Plan, spec: Specialisation, op: str, forms: tuple[Form, ...], header: tuple[str, ...]
) -> TilingContext:
    """Make the context of the host's tiling."""
    strides = [", ".join(f"{t}_{x}" for x in axes) for t, axes in STRIDES.items()]
    names = (*LENGTHS, *(f"{t}_{x}" for t, axes in STRIDES.items() for x in axes))
    return TilingContext(
        header=header,
        op=op,
        head_dim=spec.head_dim,
        value_dim=spec.value_dim,
        call_fields=(", ".join(LENGTHS), *strides),
        call_names=names,
        tensors=TENSORS,
        kernels=tuple(map(_kernel, forms)),
        most_buffers=max(len(form.buffers) for form in forms),
        most_bytes=max(form.struct_bytes for form in forms),
        row_align=slab_align(plan),
        scratch_limit=SCRATCH_LIMIT_BYTES,
        scratch=tuple(
            Scratch(
                b.name,
                f"[{', '.join(map(str, b.dims))}]",
                f"{text(product(b.dims))} * {_item_bytes(b.dtype, spec)}",
            )
            for b in plan.scratch()
        ),
        rules=tuple(_rules(plan)),
        core_bytes=max(form.workspace_bytes for form in forms),
        place_align=PLACE_ALIGN,
    )


def _item_bytes(dtype: str, spec: Specialisation) -> int:
    return spec.element_bytes if dtype == "data" else int(ITEM_BYTES[dtype])


def _kernel(form: Form) -> Kernel:
    return Kernel(
        number=form.number,
        name=form.name,
        what=f"{form.kernel}({', '.join(form.buffers)})",
        struct=form.struct,
        maker=f"Tiling{form.number:02d}",
        fields=form.fields,
        is_in_slab=form.is_in_slab,
        cores=f"{'cube' if form.kind == 'mix' else 'vector'}_cores",
        places=tuple(map(_place, form.buffers)),
    )


def _place(buffer: str) -> str:
    if buffer in TENSORS:
        return f"int64_t{{-{TENSORS.index(buffer) + 1}}}"
    return "at.cores" if buffer == WORKSPACE else f"at.{buffer}"


def _rules(plan: Plan) -> Iterable[Rule]:
    least = "Sq < 1 || Skv < 1 || B < 1 || Hq < 1 || Hkv < 1"
    yield Rule(least, "a call needs at least one row, key, batch item and head")
    yield Rule("Hq % Hkv != 0", "the query heads are no multiple of the key and value heads")
    for rule in call_rules(plan):
        figure = rule.figure if isinstance(rule.figure, str) else text(rule.figure)
        too_much = f"{figure} > {rule.most}"
        # No figure is negative, so there is nothing to ask where the least is 0.
        wrong = f"({figure} < {rule.least} || {too_much})" if rule.least else too_much
        yield Rule(
            f"{text(rule.where)} > 1 && {wrong}",
            f"{rule.subject}: {rule.reason}",
        )
