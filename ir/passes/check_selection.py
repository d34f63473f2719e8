"""Pass: selections that cannot be what the user means are refused at his line."""

from __future__ import annotations

from spcomp.errors import ForcedSetTooLarge, NegativeCount
from spcomp.ir.nodes import Local, Sink, TopK, TopP
from spcomp.ir.program import Program
from spcomp.ir.units import rows_ranking, units_ranked


def check_selection(program: Program) -> Program:
    """Check k >= 0 and that no forced set is larger than its k.

    k is clamped at run time to the candidates there are, so only what is wrong for every length is
    refused.

    Rewrite: none.
    Needs:   infer_types.
    Gives:   every TopK can keep its forced set.
    Raises:  ForcedSetTooLarge, NegativeCount.
    """
    for node in program.stages():
        if isinstance(node, TopK):
            _check(node)
    return program


def _check(node: TopK) -> None:
    if not isinstance(node.k, int):
        return
    if node.k < 0:
        raise NegativeCount(
            where=node.where, verb="topk", name="k", value=node.k, least=0, counts="units to keep"
        )
    forced = sum(a.count for a in node.always if isinstance(a, (Sink, Local)))
    if forced > node.k:
        parts = " + ".join(
            f"{a.count} {type(a).__name__.lower()}"
            for a in node.always
            if isinstance(a, (Sink, Local))
        )
        units = units_ranked(node.scores)
        raise ForcedSetTooLarge(
            where=node.where,
            k=node.k,
            units="blocks" if units.block > 1 else "tokens",
            parts=parts,
            forced=forced,
        )


def straddle(node: TopK | TopP) -> int:
    """Give the units a row may have to keep beyond k, because its queries stand in several units.

    A row of `granule` queries covers at most ceil((granule - 1) / unit) + 1 units, of which `Local`
    counts one."""
    granule, unit = rows_ranking(node.scores).stride, units_ranked(node.scores).stride
    has_local = any(isinstance(a, Local) for a in node.always)
    return -(-(granule - 1) // unit) if has_local else 0
