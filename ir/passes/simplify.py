"""Pass: stages that change nothing go."""

from __future__ import annotations

from dataclasses import replace

from spcomp.ir.nodes import Attend, Downsample, Merge, Node
from spcomp.ir.nodes.base import rebuild
from spcomp.ir.program import Program


def simplify(program: Program) -> Program:
    """Drop identity stages.

    Rewrite: downsample(x, block=1, by=mean|max|min) -> x;  merge(a) -> a;  merge(merge(a, b), c) ->
             merge(a, b, c);  merge(attend(...), sinks=s) -> attend(..., sinks=s)
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
        if len(flat) == 1 and node.sinks is None:
            return flat[0]
        if len(flat) == 1 and isinstance(flat[0], Attend):
            return replace(flat[0], sinks=node.sinks)
        return replace(node, parts=tuple(flat))
    return node
