"""The stages of a pattern, one module a family. Nodes are frozen values; `where` is not
compared."""

from spcomp.ir.nodes.attend import Attend, Gather, Merge, Stream
from spcomp.ir.nodes.base import Node, children, rebuild, topological
from spcomp.ir.nodes.downsample import Downsample, State
from spcomp.ir.nodes.inputs import Argument, Captured, Input
from spcomp.ir.nodes.score import Score
from spcomp.ir.nodes.select import (
    Causal,
    Everything,
    Given,
    Intersect,
    Local,
    MaskMod,
    Region,
    Selection,
    Sink,
    TopK,
    Union,
)

__all__ = [
    "Argument",
    "Attend",
    "Captured",
    "Causal",
    "Downsample",
    "Everything",
    "Gather",
    "Given",
    "Input",
    "Intersect",
    "Local",
    "MaskMod",
    "Merge",
    "Node",
    "Region",
    "Score",
    "Selection",
    "Sink",
    "State",
    "Stream",
    "TopK",
    "Union",
    "children",
    "rebuild",
    "topological",
]

NODES: dict[str, type[Node]] = {
    cls.__name__: cls
    for cls in (
        Input,
        Captured,
        Argument,
        Downsample,
        State,
        Score,
        TopK,
        Given,
        Sink,
        Local,
        Causal,
        Everything,
        MaskMod,
        Union,
        Intersect,
        Region,
        Stream,
        Gather,
        Attend,
        Merge,
    )
}
