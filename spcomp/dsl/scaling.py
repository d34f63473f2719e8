"""A pattern with another softmax scale: what the `scale=` of a call means."""

from __future__ import annotations

from dataclasses import replace

from spcomp.dsl.pattern import Pattern
from spcomp.ir.nodes import Attend, Node, Softmax
from spcomp.ir.nodes.base import rebuild


def with_scale(pattern: Pattern, scale: float) -> Pattern:
    """Give the pattern with another softmax scale.

    Probabilities it ranks by take it as well, unless they have a scale of their own."""

    def visit(node: Node) -> Node:
        changed = rebuild(node, visit)
        if isinstance(changed, Attend):
            return replace(changed, scale=scale)
        if isinstance(changed, Softmax) and changed.scale is None:
            return replace(changed, scale=scale)
        return changed

    return Pattern(replace(pattern.program, result=visit(pattern.program.result)), pattern.tensors)
