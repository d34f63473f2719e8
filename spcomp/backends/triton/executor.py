"""Running a plan: one allocation for all scratch, slabs of query rows, one launch after the other.

What a call needs beside memory is worked out once for its shapes, strides and alignment, and kept.
Nothing here waits for the device. Memory comes from torch's allocator, so a call captures into a
CUDA graph after warm-up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spcomp.backends.base import Source
from spcomp.backends.triton import generated, launcher
from spcomp.backends.triton.layouts import Call, Layout, Shelf, contiguous, item_bytes, layout_of
from spcomp.backends.triton.sites import Site
from spcomp.ir import dims
from spcomp.ir.launches import PoolLaunch, TilesLaunch
from spcomp.ir.plan import Launch, Slabs

MOST_PREPARED = 256  # calls of different shapes that are kept ready

Traits: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], int]
Key: TypeAlias = tuple[int, tuple[str, ...], tuple[str, ...], tuple[Traits, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call for given shapes, strides and alignment: its launches and what it allocates.

    lent_at: where in the arena the memory begins that programs keep, -1 when none does."""

    shots: tuple[Any, ...]
    out: tuple[int, ...]
    lse: tuple[int, ...]
    arena_bytes: int
    lent_at: int


class TritonExecutable:
    """A plan whose kernels are read; each is got ready at the first call of its class."""

    def __init__(self, source: Source) -> None:
        self.plan = plan = source.plan
        self.element_bytes = source.spec.element_bytes
        self.is_interpreted = source.target.arch == "interpreter"
        texts = iter(source.files)
        self.once: list[Site] = []
        self.each_slab: list[Site] = []
        for step in plan.steps:
            launches = step.launches if isinstance(step, Slabs) else (step,)
            place = self.each_slab if isinstance(step, Slabs) else self.once
            for launch in launches:
                kernel = generated.read(launch.kernel, next(texts).text)
                place.append(Site(launch, plan, kernel, source.spec.dtype, self.is_interpreted))
        bindings = [site.binding for site in (*self.once, *self.each_slab)]
        self.shelf = Shelf(plan, bindings, self.element_bytes)
        self.states = {b.name: b.state for b in plan.buffers if b.state}
        self.items = {b.name: item_bytes(b.dtype, self.element_bytes) for b in plan.buffers}
        self.results = [
            (name, tuple(dims.evaluator(d) for d in plan.buffer(name).dims))
            for name in (plan.out, plan.lse)
        ]
        self.cuts = {id(s): self._captured_lists(s.launch) for s in self.each_slab}
        self._prepared: dict[Key, Prepared] = {}

    def run(
        self, tensors: Mapping[str, Tensor], env: Mapping[str, int], kept: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the plan on the tensors' device and current stream (see `Executable.run`)."""
        given = [*tensors.values(), *kept.values()]
        q = given[0]
        device = q.get_device()
        key = (device, tuple(tensors), tuple(kept), traits(given), self._longest(env))
        with _on_device(q, device):
            prepared = self._prepared.get(key) or self._remember(key, env)
            # `new_empty` costs the host a quarter less than `torch.empty` with a device.
            out = q.new_empty(prepared.out)
            lse = q.new_empty(prepared.lse, dtype=torch.float32)
            given += out, lse
            if prepared.arena_bytes:
                given.append(q.new_empty((prepared.arena_bytes,), dtype=torch.uint8))
            if prepared.lent_at < 0:
                self._fire(prepared.shots, given, device)
            else:
                with launcher.lending(given[-1].data_ptr() + prepared.lent_at):
                    self._fire(prepared.shots, given, device)
        return out, lse

    def update(
        self,
        tensors: Mapping[str, Tensor],
        env: Mapping[str, int],
        kept: Mapping[str, Tensor],
        begin: int,
    ) -> None:
        """Bring the state buffers up to date for the tokens from `begin` on (see
        `Executable.update`)."""
        given = [*tensors.values(), *kept.values()]
        device = given[0].get_device()
        held, states = self._layouts(tuple(tensors), tuple(kept), traits(given))
        with _on_device(given[0], device):
            shots = []
            for site in self.once:
                launch = site.launch
                if not self._is_kept(launch, kept):
                    continue
                assert isinstance(launch, PoolLaunch)
                written = {n: states[self.states[n]] for n in launch.writes()}
                units = {
                    "tokens": env["Skv"],
                    "unit_begin": max(0, (begin - launch.block) // launch.stride + 1),
                    "unit_end": written[launch.out_buf].shape[2],
                }
                shots.append(site.shot(Call({**held, **written}, {**env, **units}), device))
            self._fire([s for s in shots if s is not None], given, device)

    def _fire(self, shots: Iterable[Any], given: Sequence[Tensor], device: int) -> None:
        if self.is_interpreted:
            for shot in shots:
                shot.fire(given)
            return
        addresses = [t.data_ptr() for t in given]
        stream, hooked = launcher.raw_stream(device), launcher.hooks()
        for shot in shots:
            shot.fire(addresses, stream, hooked)

    def _remember(self, key: Key, env: Mapping[str, int]) -> Prepared:
        """Prepare a call and keep it. All others go when there are too many: lengths that grow step
        by step, as in decoding, are not seen again."""
        prepared = self._prepare(key, env)
        if len(self._prepared) >= MOST_PREPARED:
            self._prepared.clear()
        self._prepared[key] = prepared
        return prepared

    def _prepare(self, key: Key, env: Mapping[str, int]) -> Prepared:
        launcher.STATS.prepared += 1
        device, names, kept_names, all_traits, _ = key
        env = {**env, "processors": launcher.processors(device)}
        held, kept = self._layouts(names, kept_names, all_traits)
        place = len(all_traits)
        shapes: list[tuple[int, ...]] = []
        for name, sizes in self.results:
            shape = tuple([size(env) for size in sizes])
            strides = contiguous(shape)
            if self.plan.is_packed and len(shape) == 4:  # allocated as [Tq,Hq,Dv], read as [1,Hq,…]
                _, heads, tokens, width = shape
                strides = (tokens * heads * width, width, heads * width, 1)
                shapes.append((tokens, heads, width))
            else:
                shapes.append(shape)
            held[name] = Layout(place + len(shapes) - 1, shape, strides, self.items[name])
        rows, scratch, arena_bytes = self.shelf.place(env, place + 2, kept)
        held |= scratch
        whole = Call(held, {**env, "R": min(rows, env["Sq"]), "R0": 0})
        shots = [s.shot(whole, device) for s in self.once if not self._is_kept(s.launch, kept)]
        for begin in range(0, env["Sq"], rows):
            here = {**env, "R": min(rows, env["Sq"] - begin), "R0": begin}
            shots += [s.shot(Call(self._cut(s, held, begin), here), device) for s in self.each_slab]
        fired = tuple(s for s in shots if s is not None)
        lent_bytes, lent_at = max((s.scratch_bytes for s in fired), default=0), -1
        if lent_bytes:
            lent_at = arena_bytes  # a multiple of what any buffer is aligned to
            arena_bytes += lent_bytes
        return Prepared(fired, shapes[0], shapes[1], arena_bytes, lent_at)

    def _longest(self, env: Mapping[str, int]) -> tuple[int, ...]:
        """Give the lengths that packed tensors do not show."""
        return (env["Sq"], env["Skv"]) if self.plan.is_packed else ()

    def _layouts(
        self, names: tuple[str, ...], kept_names: tuple[str, ...], all_traits: Sequence[Traits]
    ) -> tuple[dict[str, Layout], dict[str, Layout]]:
        """Give the layouts of what the caller brought: inputs by buffer, state by its name."""
        items = [self.items.get(n, 1) for n in names] + [self.element_bytes] * len(kept_names)
        made = [
            layout_of(n, *what, item)
            for n, (what, item) in enumerate(zip(all_traits, items, strict=True))
        ]
        cut = len(names)
        return (
            dict(zip(names, made[:cut], strict=True)),
            dict(zip(kept_names, made[cut:], strict=True)),
        )

    def _cut(self, site: Site, held: dict[str, Layout], begin: int) -> Mapping[str, Layout]:
        """Lists the user gave are for the whole call: give the slab's part of them."""
        lists = self.cuts[id(site)]
        if begin == 0 or not lists:
            return held
        return {**held, **{name: held[name].from_row(begin // g) for name, g in lists}}

    def _captured_lists(self, launch: Launch) -> list[tuple[str, int]]:
        given = given_lists(launch)
        return [(n, g) for n, g in given if self.plan.buffer(n).kind == "captured"]

    def _is_kept(self, launch: Launch, kept: Mapping[str, object]) -> bool:
        return isinstance(launch, PoolLaunch) and self.states.get(launch.out_buf, "") in kept


def traits(tensors: Sequence[Tensor]) -> tuple[Traits, ...]:
    """Give what a call is prepared for: shape, strides and misalignment in bytes of each tensor."""
    return tuple([(t.shape, t.stride(), t.data_ptr() % 16) for t in tensors])


def given_lists(launch: Launch) -> list[tuple[str, int]]:
    """Name the list buffers a launch reads, with the query rows of each list row."""
    if isinstance(launch, TilesLaunch):
        pairs = zip(launch.list_bufs, launch.count_bufs, launch.leaves, strict=True)
        return [(n, leaf.granule) for a, b, leaf in pairs for n in (a, b)]
    names = [getattr(launch, n, "") for n in ("list_buf", "count_buf")]
    return [(n, getattr(launch, "granule", 1)) for n in names if n]


def _on_device(q: Tensor, device: int) -> AbstractContextManager[Any]:
    """Make the tensors' device the current one for the launches, if it is not."""
    if device < 0 or device == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(q.device)
