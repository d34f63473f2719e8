"""The stages of a pattern, one module a family. Nodes are frozen values; `where` is not
compared."""

from spcomp.ir.nodes.attend import Attend, Gather, Merge, Stream
from spcomp.ir.nodes.base import Node, children, rebuild, topological
from spcomp.ir.nodes.downsample import Downsample, Fold, State
from spcomp.ir.nodes.inputs import Captured, Input
from spcomp.ir.nodes.score import Regroup, Score, Softmax
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
    TopP,
    Union,
)
from spcomp.ir.nodes.tokens import Centre, Permute, Similar

__all__ = [
    "Attend",
    "Captured",
    "Causal",
    "Centre",
    "Downsample",
    "Everything",
    "Fold",
    "Gather",
    "Given",
    "Input",
    "Intersect",
    "Local",
    "MaskMod",
    "Merge",
    "Node",
    "Permute",
    "Region",
    "Regroup",
    "Score",
    "Selection",
    "Similar",
    "Sink",
    "Softmax",
    "State",
    "Stream",
    "TopK",
    "TopP",
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
        Permute,
        Centre,
        Downsample,
        Fold,
        State,
        Score,
        Softmax,
        Regroup,
        TopK,
        TopP,
        Given,
        Sink,
        Local,
        Causal,
        Everything,
        MaskMod,
        Similar,
        Union,
        Intersect,
        Region,
        Stream,
        Gather,
        Attend,
        Merge,
    )
}
