"""Where tensors come from: the call's q, k, v and what it brings beside them, and tensors the
pattern captured."""

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


ARGUMENT_DTYPES = ("data", "float32", "float16", "bfloat16", "int32")


@dataclass(frozen=True, slots=True)
class Argument(Node):
    """A tensor that each call brings beside q, k and v, such as learned gates.

    Each of `dims` is a number, a symbol of `ir/dims.py` or a name of the pattern's own
    (`dims.named`), which the call's tensors give a size; dtype is one of ARGUMENT_DTYPES, "data"
    being that of q. Dims [B,X,Sq,Y] make it a query side, [B,X,Skv,Y] a key side."""

    name: str
    dims: tuple[Dim, ...]
    dtype: str = "data"
