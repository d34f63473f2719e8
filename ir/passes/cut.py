"""Pass: the program becomes a plan."""

from __future__ import annotations

from spcomp.errors import CannotLower
from spcomp.ir import dims
from spcomp.ir.launches import MergeLaunch
from spcomp.ir.lowering.attend import Target, lower_attend
from spcomp.ir.lowering.builder import PlanBuilder
from spcomp.ir.lowering.unmade import refuse_unmade
from spcomp.ir.nodes import Attend, Gather, Merge, Node
from spcomp.ir.plan import Buffer, LoopOrder, Phase, Plan
from spcomp.ir.program import Program
from spcomp.ir.schedule import Schedule


def cut(
    program: Program,
    phase: Phase,
    schedule: Schedule,
    wanted: LoopOrder | None = None,
    heads: tuple[int, int] = (0, 0),
) -> Plan:
    """Cut a program into launches; values that cross a cut become typed buffers. heads: Hq and Hkv
    where they are known, which tells whose the lists are that the user gave.

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
    refuse_unmade(program)
    plan = PlanBuilder(phase, schedule, heads)
    plan.buffers["out"] = Buffer("out", (dims.B, dims.Hq, dims.Sq, dims.Dv), "data", "output")
    plan.buffers["lse"] = Buffer("lse", (dims.B, dims.Hq, dims.Sq), "float32", "output")
    pieces = _pieces(program.result)
    if len(pieces) == 1:
        order = lower_attend(plan, *pieces[0], Target("out", "lse"), wanted)
    else:
        order = _merged(plan, pieces, wanted)
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


def _pieces(result: Node) -> list[tuple[Attend, Gather]]:
    """List the gathered streams whose softmaxes are joined."""
    if isinstance(result, Merge):
        if result.by != "lse":
            raise CannotLower(
                where=result.where,
                what="a merge by gates",
                why="no kernel computes it yet",
                way_out="use backend='reference', or merge by LSE.",
            )
        return [piece for part in result.parts for piece in _pieces(part)]
    assert isinstance(result, Attend)
    return [(result, part) for part in result.streams if isinstance(part, Gather)]


def _merged(
    plan: PlanBuilder, pieces: list[tuple[Attend, Gather]], wanted: LoopOrder | None
) -> LoopOrder:
    count = len(pieces)
    parts = plan.scratch("streams", (count, dims.B, dims.Hq, dims.R, dims.Dv), "float32")
    lses = plan.scratch("stream_lse", (count, dims.B, dims.Hq, dims.R), "float32")
    order: LoopOrder = "query_major"
    for number, (node, part) in enumerate(pieces):
        target = Target(f"{parts}#{number}", f"{lses}#{number}")
        order = lower_attend(plan, node, part, target, wanted)
    plan.each_slab.append(
        MergeLaunch(
            stages=("merge",),
            axes=plan.axes("merge"),
            part_buf=parts,
            part_lse_buf=lses,
            out_buf="out",
            lse_buf="lse",
            parts=count,
            part_axis=0,
        )
    )
    return order
