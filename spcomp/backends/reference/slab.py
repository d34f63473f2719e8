"""One slab of one call of a plan: its buffers and symbols, and how launches read and write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spcomp.backends.reference.expressions import Value
from spcomp.backends.reference.pooling import compute_dtype
from spcomp.ir import dims
from spcomp.ir.plan import Buffer, Plan

UNWRITTEN = -0x5A5A5A5A
"""What an integer no launch has written holds; a float that none has written is NaN."""


@dataclass(frozen=True, slots=True, eq=False)
class Slab:
    """Buffers by name, and the symbols of `ir/dims.py` with R and R0 of this slab.

    A scratch buffer whose dims name R holds the rows of this slab alone; every other buffer holds
    those of the whole call. `parts#1` names the second of a stack of results.
    """

    plan: Plan
    tensors: dict[str, Tensor]
    env: Mapping[str, int]

    @property
    def rows(self) -> int:
        """Query rows of this slab."""
        return self.env["R"]

    @property
    def begin(self) -> int:
        """Its first query row."""
        return self.env["R0"]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype scores, softmax and sums are computed in."""
        return compute_dtype(self.tensors["q"].dtype)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.tensors["q"].device

    def number(self, dim: dims.Dim) -> int:
        """Evaluate a dim for this slab."""
        return dims.evaluate(dim, self.env)

    def arange(self, count: int) -> Tensor:
        """Give 0 … count-1 where the call runs."""
        return torch.arange(count, device=self.device)

    def read(self, name: str) -> Tensor:
        """Give a whole buffer, or the named part of a stack."""
        base, _, part = name.partition("#")
        return self.tensors[base][int(part)] if part else self.tensors[base]

    def rows_of(self, name: str, granule: int = 1) -> Tensor:
        """Give the rows of a buffer [B,H,rows,…] that belong to this slab; a row serves `granule`
        queries."""
        tensor = self.read(name)
        if self._is_local(name):
            return tensor
        first = self.begin // granule
        return tensor[:, :, first : first + -(-self.rows // granule)]

    def write(self, name: str, value: Tensor) -> None:
        """Fill the rows of a buffer that belong to this slab."""
        target = self.rows_of(name)
        assert target.shape == value.shape, (name, target.shape, value.shape)
        target.copy_(value)

    def put(self, name: str, value: Tensor) -> None:
        """Fill a whole buffer."""
        target = self.tensors[name]
        assert target.shape == value.shape, (name, target.shape, value.shape)
        self.tensors[name] = value.to(target.dtype)

    def _is_local(self, name: str) -> bool:
        buffer = self.plan.buffer(name.partition("#")[0])
        return buffer.kind == "scratch" and any("R" in dims.symbols_of(d) for d in buffer.dims)

    def allocate(self, buffer: Buffer) -> Tensor:
        """Make a buffer that shows where it was not written."""
        shape = [self.number(d) for d in buffer.dims]
        dtype = self._dtype_of(buffer)
        fill = torch.nan if dtype.is_floating_point else UNWRITTEN
        return torch.full(shape, fill, dtype=dtype, device=self.device)

    def _dtype_of(self, buffer: Buffer) -> torch.dtype:
        if buffer.dtype == "data":
            return self.tensors["q"].dtype
        if buffer.dtype == "float32":
            return self.dtype  # float64 inputs are computed in float64 throughout
        named: torch.dtype = getattr(torch, buffer.dtype)
        return named

    def symbols(self, heads: int) -> dict[str, Value]:
        """Give b, h, Sq and Skv for expressions that broadcast to [B,heads,rows,keys]."""
        return {
            "b": self.arange(self.env["B"])[:, None, None, None],
            "h": self.arange(heads)[None, :, None, None],
            "Sq": self.env["Sq"],
            "Skv": self.env["Skv"],
        }


def spread(x: Tensor, heads: int) -> Tensor:
    """Carry what lists of shared heads say to more heads: [B,Hl,…] -> [B,heads,…]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def marked(entries: Tensor, counts: Tensor, width: int) -> Tensor:
    """Mark what the first `counts` of a row's entries name: [B,H,N,K] -> bool [B,H,N,width].

    A list never names one thing twice, which is checked.
    """
    valid = torch.arange(entries.shape[-1], device=entries.device) < counts[..., None]
    place = torch.where(valid, entries.long(), width)
    marks = torch.zeros(*entries.shape[:3], width + 1, dtype=torch.int64, device=entries.device)
    marks = marks.scatter_add(-1, place, torch.ones_like(place))[..., :width]
    assert int(marks.amax() if marks.numel() else 0) <= 1, "a list names an entry twice"
    return marks > 0
