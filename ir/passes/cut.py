"""Pass: the program becomes a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from spcomp.ir import dims
from spcomp.ir.launches import MergeLaunch
from spcomp.ir.lowering.attend import Target, lower_attend
from spcomp.ir.lowering.builder import PlanBuilder
from spcomp.ir.lowering.unmade import refuse_unmade_stages
from spcomp.ir.nodes import Argument, Attend, Captured, Gather, Merge, Node
from spcomp.ir.plan import Buffer, LoopOrder, Phase, Plan
from spcomp.ir.program import Program
from spcomp.ir.schedule import Schedule


def cut(
    program: Program,
    phase: Phase,
    schedule: Schedule,
    wanted: LoopOrder | None = None,
    heads: tuple[int, int] = (0, 0),
    is_packed: bool = False,
) -> Plan:
    """Cut a program into launches; values that cross a cut become typed buffers. heads: Hq and Hkv
    where they are known, which tells whose the lists are that the user gave. is_packed: sequences
    lie one behind the other; scratch has a batch axis all the same, as long as the longest.

    Rewrite: attend(q, gather(s, region(p, [topk(score(a, b))]))) -> pool; select; tiles; attend
             (query-major)
                                                                 -> pool; select; invert;
                                                                 attend_keys; merge  (key-major)
                                                                 -> pool; score; topk;
                                                                 attend_gather; merge   (decode)
    Needs:   infer_masks, check_selection; a schedule with the axes of every kernel.
    Gives:   each stage in exactly one launch; a Gather shares its Attend's launch; scratch bounded
             by slabs.
    Raises:  CannotLower.
    """
    refuse_unmade_stages(program)
    plan = PlanBuilder(phase, schedule, heads, is_packed=is_packed)
    rows = plan.whole((dims.B, dims.Hq, dims.Sq))
    plan.buffers["out"] = Buffer("out", (*rows, dims.Dv), "data", "output")
    plan.buffers["lse"] = Buffer("lse", rows, "float32", "output")
    for node in program.arguments():
        plan.argument(node)
    order = _lower(plan, program.result, Target("out", "lse"), wanted)
    return Plan(
        program.title(),
        phase,
        order,
        tuple(plan.buffers.values()),
        plan.steps(),
        "out",
        "lse",
        tuple(plan.notes),
    )


Piece: TypeAlias = "tuple[Attend, Gather] | Merge"
"""One gathered stream of an attend, or a result of its own that gates join."""


def _lower(plan: PlanBuilder, result: Node, target: Target, wanted: LoopOrder | None) -> LoopOrder:
    """Add the launches of a result and give the loop order of its last attend."""
    target = replace(target, sinks=_sinks(plan, result))
    if isinstance(result, Merge) and result.by == "gates":
        return _joined(plan, list(result.parts), target, wanted, result.gates)
    pieces = _pieces(result)
    if len(pieces) > 1:
        return _joined(plan, pieces, target, wanted, None)
    if isinstance(pieces[0], Merge):
        return _lower(plan, pieces[0], target, wanted)
    return lower_attend(plan, *pieces[0], target, wanted)


def _pieces(result: Node) -> list[Piece]:
    """List what is joined by LSE: the gathered streams, and results joined by gates."""
    if isinstance(result, Merge):
        if result.by == "gates":
            return [result]
        return [piece for part in result.parts for piece in _pieces(part)]
    assert isinstance(result, Attend)
    return [(result, part) for part in result.streams if isinstance(part, Gather)]


def _sinks(plan: PlanBuilder, result: Node) -> str:
    """Declare the sinks of the softmax that gives a result; "" where it has none."""
    assert isinstance(result, (Attend, Merge))
    return plan.captured(result.sinks) if isinstance(result.sinks, Captured) else ""


def _joined(
    plan: PlanBuilder,
    pieces: Sequence[Piece | Node],
    target: Target,
    wanted: LoopOrder | None,
    gates: Node | None,
) -> LoopOrder:
    """Lower each piece to its place in a stack of results, and join them by gates or by LSE."""
    count = len(pieces)
    parts = plan.scratch("streams", (count, dims.B, dims.Hq, dims.R, dims.Dv), "float32")
    lses = plan.scratch("stream_lse", (count, dims.B, dims.Hq, dims.R), "float32")
    order: LoopOrder = "query_major"
    for number, piece in enumerate(pieces):
        place = Target(f"{parts}#{number}", f"{lses}#{number}")
        if isinstance(piece, Node):
            order = _lower(plan, piece, place, wanted)
        else:
            order = lower_attend(plan, *piece, place, wanted)
    named = {"gates_buf": _gates(plan, gates)} if gates is not None else {}
    plan.each_slab.append(
        MergeLaunch(
            stages=("merge",),
            axes=plan.axes("merge"),
            part_buf=parts,
            part_lse_buf=lses,
            out_buf=target.out,
            lse_buf=target.lse,
            sinks_buf=target.sinks,
            parts=count,
            part_axis=0,
            **named,
        )
    )
    return order


def _gates(plan: PlanBuilder, node: Node) -> str:
    assert isinstance(node, (Argument, Captured)), node
    return node.name if isinstance(node, Argument) else plan.captured(node)
