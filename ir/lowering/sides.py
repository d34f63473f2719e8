"""What a launch that scores reads, and which units its rows may and must take."""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.errors import CannotLower
from spcomp.ir.expr import FALSE, TRUE, Expr, Lit, Sym, conjunction, op
from spcomp.ir.launches import PoolLaunch
from spcomp.ir.lowering.builder import PlanBuilder
from spcomp.ir.nodes import Argument, Downsample, Input, Local, Node, Sink, State
from spcomp.ir.types import source_type
from spcomp.ir.units import Units, position, units_of


@dataclass(frozen=True, slots=True)
class Pooled:
    """Buffers of a tensor in units: itself, or what a PoolLaunch wrote; `low` holds minima."""

    main: str
    low: str


def pooled(plan: PlanBuilder, side: Node) -> Pooled:
    """Give the buffers of q, k or a downsampled one, adding its pool launch once."""
    if isinstance(side, (Input, Argument)):
        return Pooled(side.name, "")
    if side in plan.made:
        found = plan.made[side]
        assert isinstance(found, Pooled)
        return found
    state = side.name if isinstance(side, State) else ""
    value = side.value if isinstance(side, State) else side
    assert isinstance(value, Downsample), value
    if value.tail == "pad":
        raise CannotLower(
            where=value.where,
            what="pooling a short last unit with zeros",
            why="no kernel does it yet",
            way_out="use backend='reference', or tail='keep'.",
        )
    assert isinstance(value.x, (Input, Argument)), value
    source = source_type(value)
    batch, heads, tokens, width = source.dims
    shape = (batch, heads, units_of(value).count(tokens), width)
    prefix = f"{value.x.name}_{value.by}"
    main = plan.scratch(
        prefix.replace("minmax", "max"), shape, source.dtype, f"{state}.max" if state else ""
    )
    low = ""
    if value.by == "minmax":
        low = plan.scratch(
            prefix.replace("minmax", "min"), shape, source.dtype, f"{state}.min" if state else ""
        )
    launch = PoolLaunch(
        stages=("downsample",),
        axes=plan.axes("pool", **_pool_tile(plan, value.block)),
        x_buf=value.x.name,
        out_buf=main,
        low_buf=low,
        block=value.block,
        stride=value.stride,
        by=value.by,
    )
    plan.once.append(launch)
    plan.made[side] = Pooled(main, low)
    return Pooled(main, low)


def _pool_tile(plan: PlanBuilder, block: int) -> dict[str, int]:
    """Fill a program of short units with several of them."""
    tokens = plan.schedule.of("pool").get("token_tile", 0)
    short = 1 << (block - 1).bit_length()
    if short >= tokens:
        return {}
    return {"token_tile": short, "unit_tile": tokens // short}


def unit_rules(always: tuple[Node, ...], units: Units, causal: bool) -> tuple[Expr, Expr]:
    """Say which units a row may and must take: the predicates `visible` and `forced`.

    A unit is a candidate when its last token is visible to the row's last query; a forced unit is
    taken as soon as its first token is, since the query's own unit is seldom complete."""
    unit, newest = Sym("k"), position("q_hi")
    complete: Expr = op("le", units.last(unit), newest) if causal else TRUE
    begun: Expr = op("le", units.first(unit), newest) if causal else TRUE
    forced: Expr = FALSE
    for anchor in always:
        forced = op("or", forced, _anchor(anchor, unit, units.stride))
    forced = conjunction(forced, begun)
    return op("or", complete, forced), forced


def _anchor(anchor: Node, unit: Expr, stride: int) -> Expr:
    if isinstance(anchor, Sink):
        return op("lt", unit, Lit(anchor.count))
    assert isinstance(anchor, Local), anchor
    first = op("floordiv", position("q_lo"), Lit(stride))
    last = op("floordiv", position("q_hi"), Lit(stride))
    oldest = op("sub", first, Lit(anchor.count))
    return conjunction(op("gt", unit, oldest), op("le", unit, last))
