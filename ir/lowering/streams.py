"""Streams: the buffers an attend reads its keys and values from, tokens or pooled units."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spcomp.errors import CannotLower
from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.lowering.builder import PlanBuilder
from spcomp.ir.lowering.lists import ListRef
from spcomp.ir.lowering.sides import pooled
from spcomp.ir.nodes import Downsample, Gather, Input, Node, State, Stream
from spcomp.ir.units import TOKENS, units_of


@dataclass(frozen=True, slots=True)
class StreamRef:
    """Buffers of a stream: k [B,Hkv,keys,D] and v [B,Hkv,keys,Dv]; `stride` tokens lie between the
    first tokens of two entries."""

    k: str
    v: str
    keys: Dim
    stride: int

    @property
    def noun(self) -> str:
        """What an entry is called in an error."""
        return "tokens" if self.keys == dims.Skv else "entries"

    def listed(self, ref: ListRef) -> ListRef:
        """Give a list whose units are counted in entries of the stream; `infer_masks` lets none
        through whose units are not a whole number of them."""
        return replace(ref, unit=ref.unit // self.stride)


def lower_stream(plan: PlanBuilder, part: Gather) -> StreamRef:
    """Give the buffers of a gathered stream, adding the launches that pool it once.

    Raises: CannotLower for what only the reference backend pools, or nobody.
    """
    stream = part.stream
    assert isinstance(stream, Stream)
    units = units_of(stream.k)
    if units != TOKENS:
        if plan.is_packed:
            raise CannotLower(
                where=part.where,
                what="attention over pooled units of packed sequences",
                why="no kernel counts the units of each sequence there",
                way_out="use backend='reference', or call the pattern on a batch.",
            )
        for side in (stream.k, stream.v):
            _check_pooling(side)
    k, v = (pooled(plan, side).main for side in (stream.k, stream.v))
    return StreamRef(k, v, units.count(dims.Skv), units.stride)


def _check_pooling(side: Node) -> None:
    value = side.value if isinstance(side, State) else side
    assert isinstance(value, Downsample), value
    if value.by == "minmax":
        raise CannotLower(
            where=value.where,
            what="a minmax pair in the place of one tensor",
            why="only score() reads a pair",
            way_out="pool it by mean, max or min.",
        )
    if not isinstance(value.x, Input):
        raise CannotLower(
            where=value.where,
            what="a downsample() of a downsample() as a stream",
            why="no kernel pools units again",
            way_out="use backend='reference', or pool the tokens once.",
        )
