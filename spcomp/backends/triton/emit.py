"""From launches to source: each launch class has one function that fills its template's context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import spcomp.backends.triton.contexts.attend as attend
import spcomp.backends.triton.contexts.invert as invert
import spcomp.backends.triton.contexts.maps as maps
import spcomp.backends.triton.contexts.pool as pool
import spcomp.backends.triton.contexts.select as select
import spcomp.backends.triton.contexts.tiles as tiles
from spcomp.backends.base import Source, SourceFile, Specialisation
from spcomp.backends.triton.contexts.attend_ws import warps_context
from spcomp.backends.triton.contexts.base import CapturedArg
from spcomp.backends.triton.expr_text import gluon_text, to_triton
from spcomp.codegen.header import digest_of, header
from spcomp.codegen.render import register_filter, render
from spcomp.ir import dims
from spcomp.ir.dim_exprs import expr_of
from spcomp.ir.expr import Expr
from spcomp.ir.launches import (
    AttendLaunch,
    BlockScoresLaunch,
    BlockSumsLaunch,
    GatherLaunch,
    InvertLaunch,
    KeysLaunch,
    MapRule,
    MergeLaunch,
    PartsLaunch,
    PoolLaunch,
    RowLseLaunch,
    ScoreLaunch,
    SelectLaunch,
    TilesLaunch,
    TopKLaunch,
    TopPLaunch,
    WarpsLaunch,
)
from spcomp.ir.plan import Launch, Plan
from spcomp.ir.plan_rules import base
from spcomp.ir.target import Target

register_filter("triton", to_triton)
register_filter("gluon_text", gluon_text)


Attending: TypeAlias = AttendLaunch | GatherLaunch | KeysLaunch


@dataclass(frozen=True, slots=True)
class Setting:
    """What every context of a plan shares."""

    plan: Plan
    spec: Specialisation
    is_interpreted: bool
    header: tuple[str, ...]

    @property
    def is_float32(self) -> bool:
        """Whether dots must be IEEE."""
        return self.spec.dtype == "float32"

    def width(self, name: str) -> int:
        """Give the last dim of a buffer, a constant of every kernel that reads it."""
        return dims.evaluate(self.plan.buffer(name).dims[-1], self.spec.constants())

    def dtype(self, name: str) -> str:
        """Give the dtype of a buffer."""
        declared = self.plan.buffer(name).dtype
        return self.spec.dtype if declared == "data" else declared

    @property
    def is_packed(self) -> bool:
        """Whether sequences are packed."""
        return self.plan.is_packed

    def is_packed_out(self, out_buf: str) -> bool:
        """Tell whether an output is a packed result, and no scratch with a batch axis."""
        return self.is_packed and out_buf == self.plan.out

    def unit_count(self, buffer: str, axis: int) -> Expr:
        """Give the units of a packed sequence, by the buffer that has room for the longest."""
        if not self.is_packed:
            return select.NONE
        dim = self.plan.buffer(buffer).dims[axis]
        return expr_of(dims.Skv if dim == dims.Tk else dim)

    def item_k(self, k: dims.Dim) -> Expr:
        """Give what a packed sequence keeps, where it depends on its length."""
        return expr_of(k) if self.is_packed and dims.symbols_of(k) else select.NONE

    def inputs(self, names: tuple[str, ...]) -> tuple[CapturedArg, ...]:
        """Give the captured tensors of a launch as kernel arguments."""
        return tuple(CapturedArg(n, len(self.plan.buffer(n).dims)) for n in dict.fromkeys(names))


def emit(plan: Plan, target: Target, spec: Specialisation) -> Source:
    """Render every launch of a plan."""
    files = tuple(
        SourceFile(number, launch.kernel, _render(plan, launch, target, spec))
        for number, launch in enumerate(plan.launches())
    )
    return Source(plan, spec, target, files)


def _render(plan: Plan, launch: Launch, target: Target, spec: Specialisation) -> str:
    axes = ", ".join(f"{k}={v}" for k, v in launch.axes)
    name = plan.pattern.partition("(")[0]
    command = (
        f"spcomp show {name} --at source --phase {plan.phase} --target {target.name} "
        f"--dtype {spec.dtype} --head-dim {spec.head_dim}"
    )
    lines = header(
        plan.pattern, digest_of(plan.pattern), f"{plan.order} / {launch.kernel}: {axes}", command
    )
    setting = Setting(plan, spec, target.arch == "interpreter", lines)
    context = CONTEXTS[type(launch)](launch, setting)
    return render(f"triton/kernels/{launch.kernel}.py.jinja", context)


def _pool(launch: PoolLaunch, s: Setting) -> object:
    return pool.pool_context(
        header=s.header,
        by=launch.by,
        head_dim=s.width(launch.x_buf),
        block=launch.block,
        stride=launch.stride,
        unit_tile=launch.axis("unit_tile"),
        token_tile=launch.axis("token_tile"),
        is_interpreted=s.is_interpreted,
        is_packed=s.is_packed,
        is_of_queries=launch.x_buf == "q",
    )


def _scored(launch: SelectLaunch | ScoreLaunch, s: Setting) -> dict[str, Any]:
    """Give what the kernels that score share."""
    rule = launch.rule
    return {
        "header": s.header,
        "head_dim": s.width(launch.rows_buf),
        "block_u": launch.axis("block_u"),
        "granule": rule.granule,
        "is_bound": bool(launch.low_buf),
        "reduction": "none" if rule.heads == "query" else rule.reduce,
        "is_relu": rule.activation == "relu",
        "has_weights": bool(launch.weights_buf),
        "visible": rule.visible,
        "forced": rule.forced,
        "is_packed": s.is_packed,
        "has_packed_rows": s.is_packed and launch.rows_buf == "q",
        "has_packed_units": s.is_packed and launch.units_buf == "k",
        "unit_count": s.unit_count(launch.units_buf, 2),
        "is_float32": s.dtype(launch.rows_buf) == "float32",
        "is_interpreted": s.is_interpreted,
    }


def _select(launch: SelectLaunch, s: Setting) -> object:
    return select.select_context(
        block_r=launch.axis("block_r"), item_k=s.item_k(launch.k), **_scored(launch, s)
    )


def _score(launch: ScoreLaunch, s: Setting) -> object:
    return select.score_context(num_stages=launch.axis("stages"), **_scored(launch, s))


def _topk(launch: TopKLaunch, s: Setting) -> object:
    return select.topk_context(
        header=s.header,
        block_u=launch.axis("block_u"),
        is_packed=s.is_packed,
        unit_count=s.unit_count(launch.scores_buf, 3),
        item_k=s.item_k(launch.k),
    )


def _logits(launch: PartsLaunch | BlockScoresLaunch, rule: MapRule, s: Setting) -> dict[str, Any]:
    """Give what the kernels that multiply the rows and units of a map share."""
    return {
        "header": s.header,
        "head_dim": s.spec.head_dim,
        "block_r": launch.axis("block_r"),
        "num_stages": launch.axis("stages"),
        "size": rule.size,
        "is_crossed": rule.is_crossed,
        "is_bound": bool(launch.low_buf),
        "is_float32": s.is_float32,
        "is_interpreted": s.is_interpreted,
    }


def _parts(launch: PartsLaunch, s: Setting) -> object:
    rule = launch.rule
    return maps.parts_context(
        block_u=launch.axis("block_u"),
        tiles=launch.axis("tiles"),
        part=launch.axis("part"),
        visible=rule.visible,
        granule=rule.granule,
        **_logits(launch, rule, s),
    )


def _row_lse(launch: RowLseLaunch, s: Setting) -> object:
    return maps.RowLseContext(s.header, launch.axis("block_r"), launch.axis("block_n"))


def _block_sums(launch: BlockSumsLaunch, s: Setting) -> object:
    rule = launch.rule
    return maps.block_sums_context(
        header=s.header,
        block_r=launch.axis("block_r"),
        block_n=launch.axis("block_n"),
        ratio=rule.granule // launch.fine,
        granule=rule.granule,
        is_mean=rule.heads != "query" and rule.reduce == "mean",
        visible=rule.visible,
        forced=rule.forced,
    )


def _block_scores(launch: BlockScoresLaunch, s: Setting) -> object:
    rule = launch.rule
    return maps.block_scores_context(
        block_n=launch.axis("block_n"),
        fine=launch.logits.granule,
        span=launch.span,
        stride=launch.stride,
        block=launch.block,
        has_lse=bool(launch.lse_buf),
        reduction="none" if rule.heads == "query" else rule.reduce,
        is_highest=launch.by == "max",
        candidate=launch.logits.visible,
        visible=rule.visible,
        forced=rule.forced,
        granule=rule.granule,
        **_logits(launch, launch.logits, s),
    )


def _topp(launch: TopPLaunch, s: Setting) -> object:
    return maps.topp_context(
        header=s.header,
        block_u=launch.axis("block_u"),
        granule=launch.granule,
        least=launch.least,
        is_dropped=launch.crossing == "drop",
        table=launch.share_buf,
        forced=launch.forced,
    )


def _tiles(launch: TilesLaunch, s: Setting) -> object:
    return tiles.tiles_context(
        header=s.header,
        block_q=launch.axis("block_q"),
        block_k=launch.axis("block_k"),
        chunk=launch.axis("chunk"),
        leaves=tuple(tiles.Leaf(n, x.granule, x.unit) for n, x in enumerate(launch.leaves)),
        predicate=launch.predicate,
        inputs=s.inputs(launch.table_bufs),
        has_counter=bool(launch.counter_buf),
        is_pooled=_is_pooled(launch),
        is_packed=s.is_packed,
    )


def _invert(launch: InvertLaunch, s: Setting) -> object:
    if launch.step == "scan":
        return invert.InvertScanContext(header=s.header, block=launch.axis("block"))
    return invert.InvertContext(
        header=s.header,
        rows=launch.axis("rows"),
        block_u=launch.axis("block_u"),
        is_packed=s.is_packed,
    )


def _is_pooled(launch: TilesLaunch | Attending) -> bool:
    """Tell whether the entries of a launch's stream are units and not tokens."""
    return bool(launch.keys != dims.Skv)


def _pairs(launch: Attending, s: Setting) -> dict[str, Any]:
    """Give what every kernel that attends has; a scale that is not positive goes through the score
    hook."""
    rule = launch.rule
    needs_hook = rule.score_mod is not None or (rule.scale is not None and rule.scale <= 0)
    return {
        "header": s.header,
        "head_dim": s.spec.head_dim,
        "value_dim": s.spec.value_dim,
        "predicate": rule.predicate,
        "inputs": s.inputs(launch.table_bufs),
        "score_hook": rule.score_mod or attend.SCORE,
        "has_score_hook": needs_hook,
        "is_pooled": _is_pooled(launch),
    }


def _rule(launch: Attending, s: Setting) -> dict[str, Any]:
    """Give what the kernels that attend in plain Triton share."""
    return {
        **_pairs(launch, s),
        "is_float32": s.is_float32,
        "is_packed": s.is_packed,
        "is_interpreted": s.is_interpreted,
    }


def _attend_ws(launch: WarpsLaunch, s: Setting) -> object:
    return warps_context(
        block_q=launch.axis("block_q"),
        heads=launch.axis("heads"),
        block_k=launch.axis("block_k"),
        entries=launch.entries,
        stages=launch.axis("stages"),
        dtype=s.spec.dtype,
        is_copied_out=s.plan.buffer(base(launch.out_buf)).dtype == "data",
        has_sinks=bool(launch.sinks_buf),
        flags=launch.rule.flags,
        **_pairs(launch, s),
    )


def _attend(launch: AttendLaunch, s: Setting) -> object:
    return attend.attend_context(
        block_q=launch.axis("block_q"),
        block_k=launch.axis("block_k"),
        num_stages=launch.axis("stages"),
        flags=launch.rule.flags,
        has_sinks=bool(launch.sinks_buf),
        has_packed_out=s.is_packed_out(launch.out_buf),
        **_rule(launch, s),
    )


def _gather(launch: GatherLaunch, s: Setting) -> object:
    return attend.gather_context(
        block_m=launch.axis("block_m"),
        block_k=launch.axis("block_k"),
        num_stages=launch.axis("stages"),
        unit=launch.unit,
        flags=launch.rule.flags,
        has_sinks=bool(launch.sinks_buf),
        has_packed_out=s.is_packed_out(launch.out_buf),
        **_rule(launch, s),
    )


def _keys(launch: KeysLaunch, s: Setting) -> object:
    return attend.keys_context(
        block_m=launch.axis("block_m"),
        block_k=launch.axis("block_k"),
        num_stages=launch.axis("stages"),
        unit=launch.unit,
        has_shared_lists=s.plan.buffer(launch.entries_buf).dims[1] != dims.Hq,
        **_rule(launch, s),
    )


def _merge(launch: MergeLaunch, s: Setting) -> object:
    return attend.merge_context(
        header=s.header,
        value_dim=s.spec.value_dim,
        block_r=launch.axis("block_r"),
        block_p=launch.axis("block_p"),
        has_counts=bool(launch.count_buf),
        has_sinks=bool(launch.sinks_buf),
        has_gates=bool(launch.gates_buf),
        is_interpreted=s.is_interpreted,
        is_packed=s.is_packed,
        has_packed_out=s.is_packed_out(launch.out_buf),
    )


CONTEXTS: dict[type[Launch], Callable[..., object]] = {
    PoolLaunch: _pool,
    SelectLaunch: _select,
    ScoreLaunch: _score,
    TopKLaunch: _topk,
    PartsLaunch: _parts,
    RowLseLaunch: _row_lse,
    BlockSumsLaunch: _block_sums,
    BlockScoresLaunch: _block_scores,
    TopPLaunch: _topp,
    TilesLaunch: _tiles,
    InvertLaunch: _invert,
    AttendLaunch: _attend,
    WarpsLaunch: _attend_ws,
    GatherLaunch: _gather,
    KeysLaunch: _keys,
    MergeLaunch: _merge,
}
