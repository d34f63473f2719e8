"""Pass: stages that change nothing go."""

from __future__ import annotations

from spcomp.ir.nodes import Downsample, Merge, Node
from spcomp.ir.nodes.base import rebuild
from spcomp.ir.program import Program


def simplify(program: Program) -> Program:
    """Drop identity stages.

    Rewrite: downsample(x, block=1, by=mean|max|min) -> x;  merge(a) -> a;  merge(merge(a, b), c) ->
             merge(a, b, c)
    Needs:   nothing.
    Gives:   no identity stage left.
    """
    seen: dict[Node, Node] = {}

    def simpler(node: Node) -> Node:
        if node not in seen:
            seen[node] = _one(rebuild(node, simpler))
        return seen[node]

    return Program(program.name, program.parameters, simpler(program.result), where=program.where)


def _one(node: Node) -> Node:
    if isinstance(node, Downsample) and node.block == node.stride == 1 and node.by != "minmax":
        return node.x
    if isinstance(node, Merge) and node.by == "lse":
        flat: list[Node] = []
        for part in node.parts:
            nested = isinstance(part, Merge) and part.by == "lse"
            flat.extend(part.parts if nested else (part,))  # type: ignore[attr-defined]
        return flat[0] if len(flat) == 1 else Merge(tuple(flat), where=node.where)
    return node
