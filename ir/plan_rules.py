"""The rules of a plan: buffers are written before they are read, tiles fit lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.expr import Expr, Load, Sym, walk
from spcomp.ir.launches import (
    AttendLaunch,
    AttendRule,
    BlockScoresLaunch,
    GatherLaunch,
    KeysLaunch,
    MapRule,
    MergeLaunch,
    ScoreLaunch,
    ScoreRule,
    SelectLaunch,
    TilesLaunch,
    TopPLaunch,
)
from spcomp.ir.plan import Buffer, Launch, Plan, Slabs
from spcomp.ir.types import SINK_DTYPES

PlanRule = Callable[[Plan], list[str]]

_PAIR = frozenset({"b", "h", "q", "k", "Sq", "Skv"})
_TILE = frozenset({"b", "h", "q_lo", "q_hi", "k_lo", "k_hi", "Sq", "Skv"})
_UNIT = frozenset({"b", "h", "q_lo", "q_hi", "k", "Sq", "Skv"})
MOST_FLAGS = 7  # bits 24 to 30 of an entry of a tile list


def base(name: str) -> str:
    """Give the buffer that a part of a stack, such as `streams#1`, lies in."""
    return name.partition("#")[0]


def buffers_are_declared(plan: Plan) -> list[str]:
    """Hold when buffer names are unique and every launch touches declared buffers only."""
    names = [b.name for b in plan.buffers]
    problems = [
        f"the buffer '{n}' is declared twice" for n in dict.fromkeys(names) if names.count(n) > 1
    ]
    for launch in plan.launches():
        for name in launch.buffers():
            if base(name) not in names:
                problems.append(f"{launch.kernel} touches '{name}', which is not declared")
    problems += [
        f"'{n}' is returned but not declared" for n in (plan.out, plan.lse) if n not in names
    ]
    return problems


def reads_follow_writes(plan: Plan) -> list[str]:
    """Hold when what a launch reads is an input or was written by an earlier launch."""
    known = {b.name for b in plan.buffers if b.kind in ("input", "captured")}
    problems = []
    for launch in plan.launches():
        for name in launch.reads():
            if base(name) not in known and name not in known:
                problems.append(f"{launch.kernel} reads '{name}' before any launch writes it")
        known.update(n for written in launch.writes() for n in (written, base(written)))
    return problems


def inputs_are_not_written(plan: Plan) -> list[str]:
    """Hold when no launch writes an input."""
    fixed = {b.name for b in plan.buffers if b.kind in ("input", "captured")}
    return [
        f"{launch.kernel} writes the input '{name}'"
        for launch in plan.launches()
        for name in launch.writes()
        if base(name) in fixed
    ]


def writes_are_single(plan: Plan) -> list[str]:
    """Hold when one launch writes each buffer, or part of a stack; a scan works in place."""
    problems = []
    writers: dict[str, str] = {}
    for launch in plan.launches():
        for name in launch.writes():
            in_place = launch.kernel == "invert_scan" and writers.get(name) == "invert_count"
            if name in writers and not in_place:
                problems.append(f"{launch.kernel} writes '{name}' after {writers[name]} did")
            writers[name] = launch.kernel
    return problems


def results_are_written(plan: Plan) -> list[str]:
    """Hold when some launch writes each result and each scratch buffer."""
    written = {base(n) for launch in plan.launches() for n in launch.writes()}
    problems = [
        f"no launch writes the result '{n}'" for n in (plan.out, plan.lse) if n not in written
    ]
    for b in plan.buffers:
        if b.kind == "output" and b.name not in (plan.out, plan.lse):
            problems.append(f"the output '{b.name}' is not returned")
        if b.kind == "scratch" and b.name not in written:
            problems.append(f"no launch writes the scratch buffer '{b.name}'")
    return problems


def slab_dims_stay_in_slabs(plan: Plan) -> list[str]:
    """Hold when only launches inside slabs touch buffers sized by the rows of a slab."""
    inside = {id(x) for s in plan.steps if isinstance(s, Slabs) for x in s.launches}
    local = {b.name for b in plan.buffers if _reads_rows(b)}
    return [
        f"{launch.kernel} runs once a call and touches '{name}', which holds the rows of a slab"
        for launch in plan.launches()
        if id(launch) not in inside
        for name in launch.buffers()
        if base(name) in local
    ]


def _reads_rows(b: Buffer) -> bool:
    return any(dims.symbols_of(d) & {"R", "R0"} for d in b.dims)


def tiles_fit_lists(plan: Plan) -> list[str]:
    """Hold when tiles divide the granule and the unit of every list they are made from."""
    problems: list[str] = []
    made: dict[str, TilesLaunch] = {}
    for launch in plan.launches():
        if isinstance(launch, TilesLaunch):
            made[launch.tiles_buf] = launch
            problems += _leaf_faults(launch)
        elif isinstance(launch, AttendLaunch) and launch.tiles_buf in made:
            source = made[launch.tiles_buf]
            problems += [
                f"attend takes {axis} {launch.axis(axis)} and its tile list {source.axis(axis)}"
                for axis in ("block_q", "block_k")
                if launch.axis(axis) != source.axis(axis)
            ]
        elif isinstance(launch, GatherLaunch) and launch.list_buf in made:
            source = made[launch.list_buf]
            pair = (launch.granule, launch.unit)
            tile = (source.axis("block_q"), source.axis("block_k"))
            if pair != tile:
                problems.append(f"attend_gather reads tiles of {tile} as units of {pair}")
    return problems


def _leaf_faults(launch: TilesLaunch) -> Iterator[str]:
    counts = {len(launch.list_bufs), len(launch.count_bufs), len(launch.leaves)}
    if len(counts) > 1:
        yield "tiles has lists, counts and leaves of different numbers"
    if len(launch.leaves) > MOST_FLAGS:
        yield f"tiles joins {len(launch.leaves)} lists, and an entry has {MOST_FLAGS} flag bits"
    for n, leaf in enumerate(launch.leaves):
        for axis, size in (("block_q", leaf.granule), ("block_k", leaf.unit)):
            if size % launch.axis(axis):
                yield f"{axis} {launch.axis(axis)} of tiles does not divide {size} of list {n}"


def slabs_align(plan: Plan) -> list[str]:
    """Hold when a slab is a whole number of rows of every list made in it."""
    problems = []
    for step in plan.steps:
        if not isinstance(step, Slabs):
            continue
        if step.align < 1:
            problems.append(f"slabs align {step.align} is below 1")
            continue
        for launch in step.launches:
            for granule in _granules(launch):
                if step.align % granule:
                    problems.append(
                        f"slabs of a multiple of {step.align} rows split the {granule} rows "
                        f"of a list of {launch.kernel}"
                    )
    return problems


def _granules(launch: Launch) -> Iterator[int]:
    if isinstance(launch, GatherLaunch):
        yield launch.granule
    if isinstance(launch, TilesLaunch):
        yield launch.axis("block_q")
        yield from (leaf.granule for leaf in launch.leaves)
    if isinstance(launch, TopPLaunch):
        yield launch.granule
    if isinstance(launch, BlockScoresLaunch):
        yield launch.logits.granule
    rule = getattr(launch, "rule", None)
    if isinstance(rule, (ScoreRule, MapRule)):
        yield rule.granule


def dims_are_known(plan: Plan) -> list[str]:
    """Hold when every dim is a formula over the symbols of `ir/dims.py` and names of inputs."""
    known = set(dims.SYMBOLS)
    known.update(n for b in plan.buffers if b.kind == "input" for n in dims.names_of(b.dims))
    return [
        f"a dim of '{b.name}' reads the unknown symbol '{name}'"
        for b in plan.buffers
        for d in b.dims
        for name in sorted(dims.symbols_of(d) - known)
    ]


def expressions_fit_kernels(plan: Plan) -> list[str]:
    """Hold when each launch's expressions read only symbols and tables its kernel has."""
    problems = []
    for launch in plan.launches():
        for place, expr, allowed in _expressions(launch):
            read = {e.name for e in walk(expr) if isinstance(e, Sym)}
            problems += [
                f"{launch.kernel}.{place} reads '{n}', which its kernel does not know"
                for n in sorted(read - allowed)
            ]
            tables = set(getattr(launch, "table_bufs", ()))
            loaded = {e.tensor for e in walk(expr) if isinstance(e, Load)}
            problems += [
                f"{launch.kernel}.{place} reads the table '{n}', which the launch is not given"
                for n in sorted(loaded - tables)
            ]
    return problems


def _expressions(launch: Launch) -> Iterator[tuple[str, Expr, frozenset[str]]]:
    rule = getattr(launch, "rule", None)
    if isinstance(rule, ScoreRule):
        yield "visible", rule.visible, _UNIT
        yield "forced", rule.forced, _UNIT
    if isinstance(rule, MapRule):
        yield "visible", rule.visible, _UNIT
    if isinstance(launch, BlockScoresLaunch):
        yield "logits", launch.logits.visible, _UNIT
    if isinstance(launch, TopPLaunch):
        yield "forced", launch.forced, _UNIT
    if isinstance(rule, AttendRule):
        yield "predicate", rule.predicate, _PAIR | set(rule.flags)
        if rule.score_mod is not None:
            yield "score_mod", rule.score_mod, _PAIR | {"score"}
    if isinstance(launch, TilesLaunch):
        flags = frozenset(f"chosen{n}" for n in range(len(launch.leaves)))
        yield "predicate", launch.predicate, _PAIR | flags
        yield "everywhere", launch.everywhere, _TILE | flags
        yield "somewhere", launch.somewhere, _TILE | flags
    if isinstance(launch, KeysLaunch):
        yield "everywhere", launch.everywhere, _TILE
        yield "somewhere", launch.somewhere, _TILE


def merges_join_stacks(plan: Plan) -> list[str]:
    """Hold when a merge's number of parts is the length of its stack along the part axis."""
    problems = []
    declared = {b.name: b for b in plan.buffers}
    for launch in plan.launches():
        if not isinstance(launch, MergeLaunch) or base(launch.part_buf) not in declared:
            continue
        length: Dim = declared[base(launch.part_buf)].dims[launch.part_axis]
        if length != launch.parts:
            problems.append(
                f"merge joins {launch.parts} parts of '{launch.part_buf}', which has {length}"
            )
    return problems


def sinks_end_a_softmax(plan: Plan) -> list[str]:
    """Hold when sinks are one captured logit a head, read by a launch that writes the results or
    what gates join: a part of a softmax would count them once too often."""
    problems = []
    declared = {b.name: b for b in plan.buffers}
    merges = [x for x in plan.launches() if isinstance(x, MergeLaunch) and x.gates_buf]
    ends = {plan.out, *(base(x.part_buf) for x in merges)}
    for launch in plan.launches():
        name = getattr(launch, "sinks_buf", "")
        if not name or name not in declared:
            continue
        if not ends & {base(written) for written in launch.writes()}:
            problems.append(f"{launch.kernel} reads the sinks '{name}' and writes a part alone")
        buffer = declared[name]
        if buffer.kind != "captured" or len(buffer.dims) != 1 or buffer.dtype not in SINK_DTYPES:
            problems.append(f"{launch.kernel} takes '{name}' for sinks, which is no list of logits")
    return problems


def streams_have_their_length(plan: Plan) -> list[str]:
    """Hold when an attend counts as many entries as its k and v have, and its tile list as many."""
    problems = []
    declared = {b.name: b for b in plan.buffers}
    made = {x.tiles_buf: x.keys for x in plan.launches() if isinstance(x, TilesLaunch)}
    for launch in plan.launches():
        if not isinstance(launch, (AttendLaunch, GatherLaunch, KeysLaunch)):
            continue
        lengths = {n: declared[n].dims[2] for n in (launch.k_buf, launch.v_buf) if n in declared}
        listed = getattr(launch, "tiles_buf", "") or getattr(launch, "list_buf", "")
        if listed in made:
            lengths[listed] = made[listed]
        problems += [
            f"{launch.kernel} counts {launch.keys} entries, and '{name}' {length}"
            for name, length in lengths.items()
            if length != launch.keys
        ]
    return problems


def gates_fit_parts(plan: Plan) -> list[str]:
    """Hold when gates lie along the last axis of a tensor, one for each part of a stack."""
    problems = []
    declared = {b.name: b for b in plan.buffers}
    for launch in plan.launches():
        if not isinstance(launch, MergeLaunch) or launch.gates_buf not in declared:
            continue
        held = declared[launch.gates_buf].dims
        if len(held) != 4 or held[3] != launch.parts or launch.part_axis != 0 or launch.count_buf:
            problems.append(
                f"merge joins {launch.parts} parts by '{launch.gates_buf}' of {list(held)}"
            )
    return problems


def weights_fit_rows(plan: Plan) -> list[str]:
    """Hold when the weights of scores are one number for each head and query that is scored."""
    problems = []
    declared = {b.name: b for b in plan.buffers}
    for launch in plan.launches():
        if not isinstance(launch, (SelectLaunch, ScoreLaunch)):
            continue
        if launch.weights_buf not in declared or launch.rows_buf not in declared:
            continue
        held, rows = (declared[n].dims for n in (launch.weights_buf, launch.rows_buf))
        if held != rows[:3] or launch.rule.granule != 1:
            problems.append(
                f"{launch.kernel} scores rows {list(rows)} of {launch.rule.granule} queries by the "
                f"weights '{launch.weights_buf}' of {list(held)}"
            )
    return problems


RULES_PLAN: dict[str, PlanRule] = {
    rule.__name__: rule
    for rule in (
        buffers_are_declared,
        reads_follow_writes,
        inputs_are_not_written,
        writes_are_single,
        results_are_written,
        slab_dims_stay_in_slabs,
        tiles_fit_lists,
        slabs_align,
        dims_are_known,
        expressions_fit_kernels,
        merges_join_stacks,
        sinks_end_a_softmax,
        streams_have_their_length,
        gates_fit_parts,
        weights_fit_rows,
    )
}
