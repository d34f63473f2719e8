"""From tokens to units: pooling, and the state that keeps pooled units between decode steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spcomp.ir.nodes.base import Node

Pooling = Literal["mean", "max", "min", "minmax"]
POOLINGS: tuple[Pooling, ...] = ("mean", "max", "min", "minmax")


@dataclass(frozen=True, slots=True)
class Downsample(Node):
    """Pool the tokens of each unit into one vector, stored in the dtype of x.

    x [B,H,S,D] -> [B,H,U,D]; `minmax` gives a pair (max, min). Unit u covers the tokens u*stride …
    u*stride+block-1. With `tail="keep"` the last unit may be short and is pooled over its real
    tokens, U = ceil(S/stride) when stride == block; with `tail="drop"` only complete units exist, U
    = floor((S-block)/stride)+1; with `tail="pad"`, for means alone, the last unit is filled with
    zeros, so that its sum too is divided by `block`. Accumulated in float32 (float64
    inputs: in float64)."""

    x: Node
    block: int
    stride: int
    by: Pooling = "mean"
    tail: Literal["keep", "drop", "pad"] = "keep"


@dataclass(frozen=True, slots=True)
class Fold(Node):
    """Lay the vectors of `size` tokens side by side as one vector.

    x [B,H,S,D] -> [B,H,ceil(S/size),size*D], a view that no kernel stores; tokens past the end are
    zero. With `reverse` the last token of a unit comes first, so that the dot product of a reversed
    query unit and a key unit is the sum of one antidiagonal of their scores (XAttention,
    arXiv:2503.16428, section 2.1)."""

    x: Node
    size: int
    reverse: bool = False


@dataclass(frozen=True, slots=True)
class State(Node):
    """A downsampled value that is kept between calls instead of being made again.

    Its meaning is that of `value` over all tokens appended so far. A cache holds it: `append`
    changes only the units the new tokens touch, `close` seals a full unit, `rewind(n)` forgets the
    last n tokens, `snapshot` copies what `rewind` cannot remake. A call without a cache computes
    `value`."""

    value: Node
    name: str
