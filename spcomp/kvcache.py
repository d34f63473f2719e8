"""A key/value cache that keeps a pattern's state between decode steps.

The state (such as Quest's page minima and maxima) is brought up to date for the tokens an append
touches, never made again from the start. Keys and values stay, so what `rewind` forgets can be
remade from them.

Inside torch.compile a cache's methods run outside the graph, which is cut there: how many tokens
are held is a number of Python that changes with each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spcomp import call_tensors
from spcomp.errors import CannotLower, ShapeMismatch
from spcomp.ir import dims
from spcomp.ir.nodes import Downsample, State
from spcomp.ir.types import role_of
from spcomp.ir.units import Units, units_of

if TYPE_CHECKING:
    from spcomp.api import Attention


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_the_graph(method: Callable[..., Any], *arguments: Any) -> Any:
    return method(*arguments)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a cache held at one moment; `KVCache.restore` goes back to it."""

    length: int


@dataclass(slots=True)
class KVCache:
    """Keys [B,Hkv,capacity,D] and values [B,Hkv,capacity,Dv] of one layer, and the state its
    pattern reads."""

    attention: Attention
    k: Tensor
    v: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)
    length: int = 0
    _units: dict[str, Units] = field(default_factory=dict, repr=False)

    @classmethod
    def empty(
        cls,
        attention: Attention,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cuda",
    ) -> KVCache:
        """Make an empty cache for `capacity` tokens.

        Raises: CannotLower for a pattern that takes keys beside k and v, which it would not keep.
        """
        for argument in attention.takes:
            if dims.Skv in argument.dims:
                raise CannotLower(
                    where=argument.where,
                    what=f"a cache for the tensor {argument.name} {call_tensors.form_of(argument)}",
                    why="it keeps keys and values alone",
                    way_out="keep its keys yourself and call the compiled pattern with k and v.",
                )

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        k = new(batch, kv_heads, capacity, head_dim)
        v = new(batch, kv_heads, capacity, value_dim or head_dim)
        states: dict[str, Tensor] = {}
        for node in attention.pattern.program.stages():
            if isinstance(node, State):
                assert isinstance(node.value, Downsample)
                units = int(units_of(node).count(capacity))
                width = (value_dim or head_dim) if role_of(node) == "value" else head_dim
                names = ("max", "min") if node.value.by == "minmax" else ("max",)
                for name in names:
                    states[f"{node.name}.{name}"] = new(batch, kv_heads, units, width)
        return cls(attention, k, v, states)

    @property
    def capacity(self) -> int:
        """The tokens it has room for."""
        return int(self.k.shape[2])

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens k [B,Hkv,n,D], v [B,Hkv,n,Dv] and bring the state up to date.

        Raises: ShapeMismatch when they do not fit the cache or its capacity.
        """
        if torch.compiler.is_compiling():
            _outside_the_graph(self._append, k, v)
        else:
            self._append(k, v)

    def _append(self, k: Tensor, v: Tensor) -> None:
        n = int(k.shape[2])
        for name, new, held in (("k", k, self.k), ("v", v, self.v)):
            expected = [held.shape[0], held.shape[1], n, held.shape[3]]
            if list(new.shape) != expected:
                raise ShapeMismatch(
                    left=f"{name} with shape {list(new.shape)}",
                    right=f"the cache's {name} with shape {list(held.shape)}",
                    problem=f"{expected} is needed",
                    way_out="append tokens of the cache's batch, KV heads and head dimension.",
                )
        if self.length + n > self.capacity:
            raise ShapeMismatch(
                left=f"{n} tokens to append",
                right=f"a cache of {self.capacity} that holds {self.length}",
                problem=f"{self.length + n} do not fit",
                way_out="make the cache with a larger capacity.",
            )
        begin, self.length = self.length, self.length + n
        self.k[:, :, begin : self.length].copy_(k)
        self.v[:, :, begin : self.length].copy_(v)
        self._update(begin)

    def close(self) -> None:
        """Seal the open unit; a unit pooled from its tokens so far already is what sealing
        gives."""

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` tokens, such as rejected drafts.

        Raises: ShapeMismatch when it holds fewer.
        """
        if torch.compiler.is_compiling():
            _outside_the_graph(self._rewind, tokens)
        else:
            self._rewind(tokens)

    def _rewind(self, tokens: int) -> None:
        if not 0 <= tokens <= self.length:
            raise ShapeMismatch(
                left=f"{tokens} tokens to forget",
                right=f"a cache that holds {self.length}",
                problem="there are not that many",
                way_out="rewind at most what was appended.",
            )
        self.length -= tokens
        if tokens and self.length:
            self._update(self.length - 1)

    def snapshot(self) -> Snapshot:
        """Note the moment. Appends write behind it only, so the length is all that is needed."""
        return Snapshot(self.length)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a moment noted before; tokens appended since are forgotten."""
        self.rewind(self.length - snapshot.length)

    def tensors(self) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Give keys, values and state of the tokens held."""
        units = self.units()
        kept = {n: t[:, :, : int(units[n].count(self.length))] for n, t in self.states.items()}
        return self.k[:, :, : self.length], self.v[:, :, : self.length], kept

    def units(self) -> dict[str, Units]:
        """Give the units each state is in."""
        if not self._units:
            nodes = [n for n in self.attention.pattern.program.stages() if isinstance(n, State)]
            self._units = {
                s: units_of(n) for n in nodes for s in self.states if s.startswith(f"{n.name}.")
            }
        return self._units

    def _update(self, begin: int) -> None:
        if not self.states:
            return
        k, v, kept = self.tensors()
        self.attention.update_state(k, v, kept, begin)

    def attend(
        self,
        q: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        **tensors: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend with q [B,Hq,n,D], the queries of the last n tokens held, over all of them.

        tensors: what the pattern takes beside q, k and v, for these n queries.
        """
        if torch.compiler.is_compiling():
            out, lse = _outside_the_graph(self._attend, q, scale, tensors)
        else:
            out, lse = self._attend(q, scale, tensors)
        return (out, lse) if return_lse else out

    def _attend(
        self, q: Tensor, scale: float | None, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        k, v, kept = self.tensors()
        return self.attention.attend_kept(q, k, v, kept, scale=scale, **tensors)
