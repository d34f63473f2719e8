"""Where tensors come from: the call's q, k, v, and tensors the pattern captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spcomp.ir.dims import Dim
from spcomp.ir.nodes.base import Node

Role = Literal["query", "key", "value"]


@dataclass(frozen=True, slots=True)
class Input(Node):
    """A tensor of the call: `query [B,Hq,Sq,D]`, `key [B,Hkv,Skv,D]` or `value [B,Hkv,Skv,Dv]`."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True)
class Captured(Node):
    """A tensor the pattern brought along: a table a mask_mod reads, an index list, a block mask.

    Its values are an input of the kernels; its shape and dtype are part of the pattern.
    """

    name: str
    dims: tuple[Dim, ...]
    dtype: str
