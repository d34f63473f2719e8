"""What the language and the reference have and no kernel does yet, refused by name."""

from __future__ import annotations

from spcomp.errors import CannotLower
from spcomp.ir.nodes import Attend, Centre, Node, Permute, Score, Similar
from spcomp.ir.program import Program


def refuse_unmade(program: Program) -> None:
    """Refuse the stages, and the options of stages, that have no kernel.

    Raises: CannotLower, at the line of the first.
    """
    for node in program.stages():
        what = _unmade(node)
        if what:
            raise CannotLower(
                where=node.where,
                what=what,
                why="no kernel makes it yet",
                way_out="use backend='reference'.",
            )


def _unmade(node: Node) -> str:
    """Name what has no kernel; nothing where a stage has one."""
    if isinstance(node, Permute):
        return "a permutation of tokens"
    if isinstance(node, Centre):
        return "keys less their mean"
    if isinstance(node, Similar):
        return "the similarity of the tokens of a block"
    if isinstance(node, Score) and node.among is not None:
        return "a score among some units only"
    if isinstance(node, Score) and node.causal and node.begun:
        return "a score of units that have only begun"
    if isinstance(node, Attend) and node.quantise:
        return f"attention with products in {node.quantise}"
    if isinstance(node, Attend) and node.skips:
        return "attention that skips tiles"
    return ""
