"""Where the buffers of one call lie: sizes, strides and offsets as plain integers.

Scratch shares one allocation. Its rows are padded so that their strides are multiples of 16 at
every length: a kernel compiled for aligned rows then fits the next length too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from spcomp.ir import dims
from spcomp.ir.dims import Dim, Env
from spcomp.ir.passes.place_buffers import ALIGN_BYTES, ITEM_BYTES, slab_align, slab_sizer
from spcomp.ir.plan import SCRATCH_LIMIT_BYTES, Plan

Number = int | float
ALIGNMENT = 16  # bytes of a pointer, elements of a stride: what Triton specialises on


@dataclass(slots=True)
class Layout:
    """One tensor of a call, without its memory. `place` numbers the call's allocations.

    strides in elements; offset in bytes from the start of the allocation's tensor; misaligned: the
    bytes by which that start misses a multiple of 16."""

    place: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int
    offset: int = 0
    misaligned: int = 0

    def stride(self) -> tuple[int, ...]:
        """Give the strides, as a tensor does."""
        return self.strides

    def __getitem__(self, part: int) -> Layout:
        """Give one part of a stack."""
        offset = self.offset + part * self.strides[0] * self.item_bytes
        return Layout(
            self.place, self.shape[1:], self.strides[1:], self.item_bytes, offset, self.misaligned
        )

    def from_row(self, row: int) -> Layout:
        """Give the list [B,H,Nr,...] without its first rows."""
        batch, heads, rows, *rest = self.shape
        offset = self.offset + row * self.strides[2] * self.item_bytes
        shape = (batch, heads, rows - row, *rest)
        return Layout(self.place, shape, self.strides, self.item_bytes, offset, self.misaligned)


@dataclass(frozen=True, slots=True)
class Call:
    """One slab of one call: layouts by buffer name, and the symbols with R and R0 of this slab."""

    tensors: Mapping[str, Layout]
    env: Mapping[str, int]

    def tensor(self, name: str) -> Layout:
        """Give a buffer, or the named part of a stack (`parts#1`)."""
        base, _, part = name.partition("#")
        found = self.tensors[base]
        return found[int(part)] if part else found

    def list_group(self, name: str) -> int:
        """Give the query heads that share a list."""
        return self.env["Hq"] // self.tensors[name].shape[1]


@dataclass(frozen=True, slots=True)
class Binding:
    """Arguments of one launch: pointers by buffer, strides by dimension letters, counts by
    formula."""

    pointers: tuple[tuple[str, str], ...]
    strides: tuple[tuple[str, str, str], ...]
    scalars: Callable[[Call], dict[str, Number]]
    grid: Callable[[Call], int]
    tables: tuple[str, ...] = ()


def layout_of(
    place: int, shape: tuple[int, ...], strides: tuple[int, ...], misaligned: int, item_bytes: int
) -> Layout:
    """Give the layout of a tensor of the caller; an odd stride of a dimension of one is dropped,
    except for the last."""
    if 1 in shape:
        outer = zip(shape[:-1], strides[:-1], strict=True)
        strides = (*[0 if n == 1 and s % ALIGNMENT else s for n, s in outer], strides[-1])
    return Layout(place, shape, strides, item_bytes, 0, misaligned)


def contiguous(shape: tuple[int, ...], padded_axis: int = -1) -> tuple[int, ...]:
    """Give the strides of a dense tensor; that of `padded_axis` is rounded up to a multiple of
    16."""
    strides, step = [], 1
    for axis in range(len(shape) - 1, -1, -1):
        if axis == padded_axis:
            step = -(-step // ALIGNMENT) * ALIGNMENT
        strides.append(step)
        step *= shape[axis]
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class Room:
    """One buffer that a call makes: its sizes by their number among the shelf's, and the axis whose
    stride is padded."""

    name: str
    state: str
    sizes: tuple[int, ...]
    padded_axis: int
    item_bytes: int


class Shelf:
    """The scratch of a plan and the rows of its slabs, for any lengths."""

    def __init__(self, plan: Plan, bindings: Iterable[Binding], element_bytes: int) -> None:
        strided = strided_axes(plan, bindings)
        self.element_bytes = element_bytes
        unlike = list(dict.fromkeys(d for b in plan.scratch() for d in b.dims))
        self._sizes = [dims.evaluator(d) for d in unlike]
        number = {d: n for n, d in enumerate(unlike)}
        self.rooms = [
            Room(
                b.name,
                b.state,
                tuple(number[d] for d in b.dims),
                padded_axis(b.dims, strided.get(b.dims, 0)),
                item_bytes(b.dtype, element_bytes),
            )
            for b in plan.scratch()
        ]
        self._align = slab_align(plan)
        self._rows = slab_sizer(plan)

    def place(
        self, env: Env, arena: int, kept: Mapping[str, Layout]
    ) -> tuple[int, dict[str, Layout], int]:
        """Give the rows of a slab, the layout of every scratch buffer, and the bytes they take.

        arena: the number of their allocation; kept: layouts of state that a cache holds. One slab
        if all of it fits the limit. Slabs are made smaller where padding would lead past it."""
        rows = -(-env["Sq"] // self._align) * self._align
        limit = SCRATCH_LIMIT_BYTES
        while True:
            placed, total = self._lay_out({**env, "R": min(rows, env["Sq"]), "R0": 0}, arena, kept)
            if total <= SCRATCH_LIMIT_BYTES or rows == self._align:
                return rows, placed, total
            rows = self._rows(env, self.element_bytes, limit)
            limit = limit * 15 // 16

    def _lay_out(
        self, env: Env, arena: int, kept: Mapping[str, Layout]
    ) -> tuple[dict[str, Layout], int]:
        placed: dict[str, Layout] = {}
        sizes = [size(env) for size in self._sizes]
        end = 0
        for room in self.rooms:
            if room.state in kept:
                placed[room.name] = kept[room.state]
                continue
            shape = tuple([sizes[n] for n in room.sizes])
            strides = contiguous(shape, room.padded_axis)
            placed[room.name] = Layout(arena, shape, strides, room.item_bytes, end)
            taken = shape[0] * strides[0] * room.item_bytes
            end += -(-taken // ALIGN_BYTES) * ALIGN_BYTES
        return placed, end


def item_bytes(dtype: str, element_bytes: int) -> int:
    """Give the bytes of an element of a buffer."""
    return element_bytes if dtype == "data" else int(ITEM_BYTES[dtype])


def strided_axes(plan: Plan, bindings: Iterable[Binding]) -> dict[tuple[Dim, ...], int]:
    """Give, by dimensions, how many leading axes every kernel takes the stride of.

    Kernels hold the axes behind those to be dense. Buffers of the same dimensions may share their
    strides in a kernel, so they are laid out alike."""
    found: dict[tuple[Dim, ...], int] = {}
    for binding in bindings:
        for _, name, letters in binding.strides:
            base, _, part = name.partition("#")
            shape = plan.buffer(base).dims
            axes = min(len(letters) + bool(part), len(shape) - 1)
            found[shape] = min(axes, found.get(shape, axes))
    return found


def padded_axis(shape: tuple[Dim, ...], strided: int) -> int:
    """Give the last axis with a stride of its own, where the dense run behind it depends on a
    length; -1 where nothing need be padded."""
    run = shape[strided:]
    fixed = {"D", "Dv"}
    depends = any(dims.symbols_of(d) - fixed for d in run)
    return strided - 1 if strided and depends else -1
