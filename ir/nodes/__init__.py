"""The stages of a pattern, one module a family. Nodes are frozen values; `where` is not
compared."""

from spcomp.ir.nodes.attend import Attend, Gather, Merge, Stream
from spcomp.ir.nodes.base import Node, children, rebuild, topological
from spcomp.ir.nodes.downsample import Downsample, Fold, State
from spcomp.ir.nodes.inputs import Argument, Captured, Input
from spcomp.ir.nodes.pairs import Covered, Diagonals, Switch
from spcomp.ir.nodes.probe import Alike, Needed, Probe, Sums
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
    "Alike",
    "Argument",
    "Attend",
    "Captured",
    "Causal",
    "Centre",
    "Covered",
    "Diagonals",
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
    "Needed",
    "Node",
    "Permute",
    "Probe",
    "Region",
    "Regroup",
    "Score",
    "Selection",
    "Similar",
    "Sink",
    "Softmax",
    "State",
    "Stream",
    "Sums",
    "Switch",
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
        Argument,
        Permute,
        Centre,
        Downsample,
        Fold,
        State,
        Score,
        Softmax,
        Regroup,
        Probe,
        Sums,
        Needed,
        Alike,
        TopK,
        TopP,
        Diagonals,
        Covered,
        Switch,
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
