"""Attention: the launches of one gathered stream in its loop order."""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.expr import Expr, symbols, tile_bounds
from spcomp.ir.launches import (
    AttendLaunch,
    AttendRule,
    GatherLaunch,
    InvertLaunch,
    KeysLaunch,
    ListLeaf,
    MergeLaunch,
    TilesLaunch,
    WarpsLaunch,
)
from spcomp.ir.lowering.builder import PlanBuilder, rows_of
from spcomp.ir.lowering.lists import ListRef, lower_list
from spcomp.ir.lowering.order import WS_LEAST, WS_ROWS, choose, sole_list, tile_sizes, without_list
from spcomp.ir.lowering.streams import StreamRef, lower_stream
from spcomp.ir.nodes import Attend, Captured, Gather, Region
from spcomp.ir.plan import LoopOrder


@dataclass(frozen=True, slots=True)
class Target:
    """Where an attend writes: buffer names, which may be one part of a stack (`parts#1`).

    sinks: the logits that join its softmax where it ends there, and is no part of a larger one."""

    out: str
    lse: str
    sinks: str = ""


@dataclass(frozen=True, slots=True)
class TileLists:
    """The buffers of a tile list and its heads."""

    tiles: str
    partial: str
    total: str
    heads: Dim
    batch: Dim
    capacity: Dim
    flags: tuple[str, ...]


def lower_attend(
    plan: PlanBuilder, node: Attend, part: Gather, target: Target, wanted: LoopOrder | None
) -> LoopOrder:
    """Add the launches of one gathered stream and give the loop order they take.

    Where it is the whole attend, `plan.made` tells its target: a later launch of the same slabs may
    read the lse, [B,Hq,R] f32 of the slab's rows, or [B,Hq,Sq] where the target is the result.
    """
    region = part.selection
    assert isinstance(region, Region)
    stream = lower_stream(plan, part)
    lists = [stream.listed(lower_list(plan, s)) for s in region.lists]
    choice = choose(plan, region, lists, wanted, stream.noun)
    plan.notes.append(f"{choice.order}: {choice.reason}")
    work = _Work(plan, node, region, stream, lists, target)
    {
        "query_major_ws": work.query_major_ws,
        "query_major": work.query_major,
        "key_major": work.key_major,
        "gather": work.gather,
    }[choice.order]()
    if len(node.streams) == 1:
        plan.made[node] = target
    return choice.order


class _Work:
    """One attend being lowered."""

    def __init__(
        self,
        plan: PlanBuilder,
        node: Attend,
        region: Region,
        stream: StreamRef,
        lists: list[ListRef],
        target: Target,
    ) -> None:
        self.plan, self.node, self.region = plan, node, region
        self.lists, self.target = lists, target
        self.keys = stream.keys
        self.inputs = {"q_buf": "q", "k_buf": stream.k, "v_buf": stream.v}
        tables = (*region.tables, *node.tables)
        self.tables = tuple(plan.captured(t) for t in tables if isinstance(t, Captured))
        self.sole = sole_list(region)
        self.narrowed = without_list(region.predicate) if self.sole else region.predicate

    # ---- orders ----

    def query_major(self) -> None:
        axes = self.plan.schedule.of("attend")
        block_q, block_k = tile_sizes(self.lists, axes["block_q"], axes["block_k"])
        made = self._tiles(block_q, block_k)
        self.plan.each_slab.append(
            AttendLaunch(
                stages=("gather", "attend"),
                axes=self.plan.axes("attend", **_tile(axes, block_q, block_k)),
                out_buf=self.target.out,
                lse_buf=self.target.lse,
                tiles_buf=made.tiles,
                partial_buf=made.partial,
                total_buf=made.total,
                rule=self._attend_rule(self.narrowed, made.flags),
                table_bufs=self.tables,
                sinks_buf=self.target.sinks,
                keys=self.keys,
                **self.inputs,
            )
        )

    def query_major_ws(self) -> None:
        plan, axes = self.plan, self.plan.schedule.of("attend_ws")
        step = axes["block_k"]
        block_q, block_k = tile_sizes(self.lists, axes["block_q"], step)
        # Heads of one list fill the rows that a short tile leaves; without them two programs share
        # a processor, and each has half the keys on chip.
        has_shared = self._heads("h" in symbols(self.region.predicate)) != dims.Hq
        heads = min(axes["heads"], WS_ROWS // block_q) if has_shared else 1
        if heads * block_q < WS_ROWS:
            step = block_k = min(block_k, WS_LEAST)
        counter = plan.scratch("work", (1,), "int32")
        made = self._tiles(block_q, block_k, counter)
        plan.each_slab.append(
            WarpsLaunch(
                stages=("gather", "attend"),
                axes=plan.axes("attend_ws", block_q=block_q, block_k=block_k, heads=heads),
                out_buf=self.target.out,
                lse_buf=self.target.lse,
                tiles_buf=made.tiles,
                partial_buf=made.partial,
                total_buf=made.total,
                counter_buf=counter,
                entries=step // block_k,
                rule=self._attend_rule(self.narrowed, made.flags),
                table_bufs=self.tables,
                sinks_buf=self.target.sinks,
                keys=self.keys,
                **self.inputs,
            )
        )

    def gather(self) -> None:
        plan = self.plan
        if self.sole:
            source = self.lists[0]
            listed = {"list_buf": source.indices, "count_buf": source.counts}
            granule, unit, width, heads = source.granule, source.unit, source.width, source.heads
            rule = self._attend_rule(self.narrowed, ())
        else:
            axes = plan.schedule.of("attend_gather")
            granule, unit = tile_sizes(self.lists, 16, axes["block_k"])
            made = self._tiles(granule, unit)
            listed = {"list_buf": made.tiles, "count_buf": made.total}
            width, heads = made.capacity, made.heads
            rule = self._attend_rule(self.narrowed, made.flags)
        splits = self._splits(granule, unit, width, heads) if plan.phase == "decode" else 1
        out, lse = self.target.out, self.target.lse
        if splits != 1:
            out = plan.scratch("parts", (splits, dims.B, dims.Hq, dims.R, dims.Dv), "float32")
            lse = plan.scratch("part_lse", (splits, dims.B, dims.Hq, dims.R), "float32")
        plan.each_slab.append(
            GatherLaunch(
                stages=("gather", "attend"),
                axes=plan.axes("attend_gather"),
                out_buf=out,
                lse_buf=lse,
                granule=granule,
                unit=unit,
                splits=splits,
                rule=rule,
                table_bufs=self.tables,
                sinks_buf=self.target.sinks if splits == 1 else "",
                **listed,
                keys=self.keys,
                **self.inputs,
            )
        )
        if splits != 1:
            self._merge(out, lse, splits, "", 0)

    def key_major(self) -> None:
        plan, source = self.plan, self.lists[0]
        head = (source.batch, source.heads)
        rows = plan.axis("invert_count", "rows")
        chunks = dims.ceildiv(dims.R, rows)
        prefix = plan.scratch("unit_prefix", (*head, source.count, chunks), "int32")
        unit_start = plan.scratch("unit_start", (*head, source.count + 1), "int32")
        tile_start = plan.scratch("tile_start", (*head, source.count + 1), "int32")
        entries = plan.scratch("entries", (*head, dims.R * source.width), "int32")
        axes = plan.axes("attend_keys")
        fixed = {"count": {}, "scan": {"block_m": dict(axes)["block_m"]}, "fill": {"rows": rows}}
        for step in ("count", "scan", "fill"):
            plan.each_slab.append(
                InvertLaunch(
                    stages=("gather",),
                    axes=plan.axes(f"invert_{step}", **fixed[step]),
                    step=step,
                    list_buf=source.indices,
                    count_buf=source.counts,
                    prefix_buf=prefix,
                    unit_start_buf=unit_start,
                    tile_start_buf=tile_start,
                    entries_buf=entries,
                    units=source.count,
                )
            )
        slots = (dims.B, dims.Hq, dims.R, source.width)
        part = plan.scratch("parts", (*slots, dims.Dv), "data")
        part_lse = plan.scratch("part_lse", slots, "float32")
        everywhere, somewhere, exact = tile_bounds(self.narrowed)
        plan.each_slab.append(
            KeysLaunch(
                stages=("gather", "attend"),
                axes=axes,
                part_buf=part,
                part_lse_buf=part_lse,
                entries_buf=entries,
                unit_start_buf=unit_start,
                tile_start_buf=tile_start,
                unit=source.unit,
                units=source.count,
                everywhere=everywhere,
                somewhere=somewhere,
                exact=exact,
                rule=self._attend_rule(self.narrowed, ()),
                table_bufs=self.tables,
                keys=self.keys,
                **self.inputs,
            )
        )
        self._merge(part, part_lse, source.width, source.counts, 3)

    # ---- pieces ----

    def _attend_rule(self, predicate: Expr, flags: tuple[str, ...]) -> AttendRule:
        return AttendRule(
            predicate=predicate,
            flags=flags,
            score_mod=self.node.score_mod,
            scale=self.node.scale,
        )

    def _merge(self, part: str, lse: str, parts: Dim, counts: str, axis: int) -> None:
        self.plan.each_slab.append(
            MergeLaunch(
                stages=("merge",),
                axes=self.plan.axes("merge", **(_FEW_ROWS if self.plan.phase == "decode" else {})),
                part_buf=part,
                part_lse_buf=lse,
                count_buf=counts,
                out_buf=self.target.out,
                lse_buf=self.target.lse,
                sinks_buf=self.target.sinks,
                parts=parts,
                part_axis=axis,  # type: ignore[arg-type]
            )
        )

    def _splits(self, granule: int, unit: int, width: Dim, heads: Dim) -> Dim:
        """Give the programs a list row is split over: enough to fill the card, one tile each at
        most."""
        axes = self.plan.schedule.of("attend_gather")
        if not self.plan.offers("merge"):
            return 1
        blocks = dims.Hq if heads == dims.Hq else dims.Hkv
        tiles = dims.ceildiv(width * unit, axes["block_k"])
        wanted = dims.ceildiv(axes["programs"], dims.B * blocks * rows_of(granule))
        return dims.largest(1, dims.least(tiles, wanted, axes["max_splits"]))

    def _tiles(self, block_q: int, block_k: int, counter: str = "") -> TileLists:
        plan, predicate = self.plan, self.region.predicate
        read = symbols(predicate)
        heads = self._heads("h" in read)
        has_batch = plan.is_packed or "b" in read or any(r.batch != 1 for r in self.lists)
        batch: Dim = dims.B if has_batch else 1
        plan.rows_multiple_of(block_q)
        capacity = self._capacity(predicate, block_k)
        shape = (batch, heads, rows_of(block_q))
        tiles = plan.scratch("tiles", (*shape, capacity), "int32")
        partial = plan.scratch("partial", shape, "int32")
        total = plan.scratch("total", shape, "int32")
        everywhere, somewhere, exact = tile_bounds(predicate)
        plan.each_slab.append(
            TilesLaunch(
                stages=("gather",),
                axes=plan.axes("tiles", block_q=block_q, block_k=block_k),
                list_bufs=tuple(r.indices for r in self.lists),
                count_bufs=tuple(r.counts for r in self.lists),
                leaves=tuple(ListLeaf(granule=r.granule, unit=r.unit) for r in self.lists),
                table_bufs=tuple(
                    plan.captured(t) for t in self.region.tables if isinstance(t, Captured)
                ),
                tiles_buf=tiles,
                partial_buf=partial,
                total_buf=total,
                counter_buf=counter,
                predicate=predicate,
                everywhere=everywhere,
                somewhere=somewhere,
                exact=exact,
                capacity=capacity,
                keys=self.keys,
            )
        )
        flags = () if self.sole else tuple(f"chosen{n}" for n in range(len(self.lists)))
        return TileLists(tiles, partial, total, heads, batch, capacity, flags)

    def _heads(self, by_query_head: bool) -> Dim:
        kinds = [r.heads for r in self.lists]
        if by_query_head or any(k not in (1, dims.Hkv) for k in kinds):
            return dims.Hq
        return dims.Hkv if dims.Hkv in kinds else 1

    def _capacity(self, predicate: Expr, block_k: int) -> Dim:
        every = dims.ceildiv(self.keys, block_k)
        if not self.sole:
            return every
        only = self.lists[0]
        return dims.least(every, only.width * (only.unit // block_k))


def _tile(axes: dict[str, int], block_q: int, block_k: int) -> dict[str, int]:
    """Give the axes of a tile that lists made smaller: fewer rows are held by fewer warps."""
    tile = {"block_q": block_q, "block_k": block_k}
    warps = axes.get("warps", 0)
    while warps > 4 and block_q * 8 < axes["block_q"] * warps:
        warps //= 2
    return {**tile, "warps": warps} if warps else tile


_FEW_ROWS = {"block_r": 1, "block_p": 16, "warps": 4}  # decode merges many splits of few rows
