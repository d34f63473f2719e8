"""Selections as masks: which keys of a stream a chunk of query rows sees.

Masks are boolean and broadcast to [B,Hq,R,N]; a rule that does not depend on the batch or the head
keeps length 1 there, so that only lists and tables cost memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from spcomp.backends.reference.call import Call
from spcomp.backends.reference.covering import covered
from spcomp.backends.reference.expressions import Value, Values, evaluate
from spcomp.backends.reference.pooling import Grid, block_grid
from spcomp.backends.reference.probing import alike, head_table
from spcomp.backends.reference.scoring import (
    Rows,
    candidates,
    forced,
    list_rows,
    row_grid,
    scores,
    unit_grid,
)
from spcomp.backends.reference.tokens import by_head
from spcomp.errors import ShapeMismatch
from spcomp.ir.expr import Expr
from spcomp.ir.nodes import (
    Alike,
    Causal,
    Covered,
    Diagonals,
    Everything,
    Given,
    Intersect,
    Local,
    MaskMod,
    Needed,
    Node,
    Region,
    Similar,
    Sink,
    Switch,
    TopK,
    TopP,
    Union,
)
from spcomp.ir.nodes.select import Crossing
from spcomp.ir.types import role_of
from spcomp.ir.units import units_ranked


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Query rows [start, stop) against the first `keys` entries of a stream that lies on `grid`.

    An entry becomes visible with its last token; a mask_mod sees its number, as it does a token's.
    """

    call: Call
    start: int
    stop: int
    grid: Grid
    keys: int

    @property
    def queries(self) -> Tensor:
        """Query row numbers, int64 [R, 1]."""
        return torch.arange(self.start, self.stop, device=self.call.device)[:, None]

    @property
    def positions(self) -> Tensor:
        """Positions of the query rows among the keys, int64 [R, 1]; negative ones see nothing."""
        return self.queries + self.call.shift

    @property
    def lasts(self) -> Tensor:
        """The last token of each entry, int64 [N]."""
        return self.grid.last[: self.keys]


def mask_of(node: Node, chunk: Chunk) -> Tensor:
    """Give the mask of a selection for a chunk, broadcastable to [B,Hq,R,N]."""
    if isinstance(node, (Union, Intersect)):
        parts = [mask_of(p, chunk) for p in node.parts]
        return reduce(torch.logical_or if isinstance(node, Union) else torch.logical_and, parts)
    if isinstance(node, (TopK, TopP)):
        return _chosen(node, chunk)
    if isinstance(node, Given):
        return _given(node, chunk)
    if isinstance(node, Switch):
        return _switched(node, chunk)
    if isinstance(node, Diagonals):
        return _diagonal(node, chunk)
    if isinstance(node, Covered):
        return _covering(node, chunk)
    if isinstance(node, Alike):
        return alike(chunk.call, node)[:, :, None, None]
    if isinstance(node, Similar):
        return _judged(node, chunk)
    if isinstance(node, MaskMod):
        return _ruled(node.predicate, symbols(chunk), chunk)
    if isinstance(node, Region):
        held = {f"chosen{n}": mask_of(part, chunk) for n, part in enumerate(node.lists)}
        return _ruled(node.predicate, {**symbols(chunk), **held}, chunk)
    return _placed(node, chunk)


def _switched(node: Switch, chunk: Chunk) -> Tensor:
    """Take for each head the mask of its case."""
    if isinstance(node.by, Alike):
        case = alike(chunk.call, node.by).long()
    else:
        case = head_table(chunk.call, node.by, chunk.call.env["Hq"])[None]
    parts = [
        mask_of(held, chunk) & (case == number)[:, :, None, None]
        for number, held in enumerate(node.cases)
    ]
    return reduce(torch.logical_or, parts)


def _diagonal(node: Diagonals, chunk: Chunk) -> Tensor:
    """Hold the keys whose distance from the query is listed, in tokens or in blocks of them."""
    assert isinstance(node.offsets, (TopK, TopP))
    with torch.no_grad():
        _, kept, _ = kept_units(chunk.call, node.offsets, 0, 1)
        unit = units_ranked(node.offsets.scores).stride
        t, key = chunk.positions, chunk.lasts[None, :]
        offset = t // unit - key // unit
        held = kept[:, :, 0][:, :, offset.clamp(min=0)] & (key <= t)
        return _on_heads(held, chunk)


def _covering(node: Covered, chunk: Chunk) -> Tensor:
    """Hold what each block of query rows reads of lines covered by blocks of keys."""
    assert isinstance(node.columns, (TopK, TopP)) and isinstance(node.offsets, (TopK, TopP))
    with torch.no_grad():
        call = chunk.call
        columns, offsets = (
            kept_units(call, part, 0, 1)[1][:, :, 0] for part in (node.columns, node.offsets)
        )
        first = chunk.start // node.block
        blocks = range(first, -(-chunk.stop // node.block))
        ends = [(m + 1) * node.block + call.shift for m in blocks]
        held = covered(columns, offsets, ends, node.block)[..., : chunk.keys]
        return _on_queries(held, node.block, first, chunk)


def _placed(node: Node, chunk: Chunk) -> Tensor:
    """Masks of positions alone, [1,1,R,N]; with a table by head [1,Hq,R,N]."""
    t, key = chunk.positions, chunk.lasts[None, :]
    if isinstance(node, Causal):
        return (key <= t)[None, None]
    if isinstance(node, Local):
        recent = key // node.unit > t // node.unit - _count(node, chunk)
        return (key <= t) & recent
    if isinstance(node, Sink):
        return chunk.grid.first[: chunk.keys] < _count(node, chunk) * node.unit
    assert isinstance(node, Everything), node
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=t.device)


def _count(node: Sink | Local, chunk: Chunk) -> Tensor:
    """Give the count of a rule, [1,1,1,1] or by head [1,Hq,1,1]."""
    if node.by_head is None:
        return torch.tensor(node.count, device=chunk.call.device)[None, None, None, None]
    table = head_table(chunk.call, node.by_head, chunk.call.env["Hq"])
    return table[None, :, None, None].long()


def _ruled(predicate: Expr, values: Values, chunk: Chunk) -> Tensor:
    held = evaluate(predicate, values, chunk.call.tensors, chunk.call.dtype)
    mask = torch.as_tensor(held, device=chunk.call.device).bool()
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def symbols(chunk: Chunk) -> dict[str, Value]:
    """Give the symbols of an element expression as tensors that broadcast to [B,Hq,R,N]."""
    env, device = chunk.call.env, chunk.call.device
    return {
        "b": torch.arange(env["B"], device=device)[:, None, None, None],
        "h": torch.arange(env["Hq"], device=device)[None, :, None, None],
        "q": chunk.queries[None, None],
        "k": torch.arange(chunk.keys, device=device)[None, None, None, :],
        "Sq": env["Sq"],
        "Skv": env["Skv"],
    }


# ---- lists ---------------------------------------------------------------------------------------


def kept_units(call: Call, node: TopK | TopP, first: int, stop: int) -> tuple[Rows, Tensor, Tensor]:
    """Choose units for rows [first, stop) of a list.

    Returns: the rows, the kept units bool [B,Hs,n,Nk], and the scores [B,Hs,n,Nk].
    """
    if isinstance(node, TopP) and node.over == "map":
        return _of_the_map(call, node, first, stop)
    rows = list_rows(call, node.scores, first, stop)
    values = scores(call, node.scores, rows)
    always = forced(call, node.scores, node.always, rows)
    able = candidates(call, node.scores, rows) | always
    if isinstance(node, TopK):
        return rows, best(values, able, always, _most(call, node, rows, values.shape[1])), values
    p = _goal(call, node, values)
    return rows, share(values, able, always, p, node.crossing, node.least), values


def _goal(call: Call, node: TopP, values: Tensor) -> Tensor | float:
    if node.p_by_head is not None:
        return call.tensor(node.p_by_head).to(values.dtype)[None, :, None, None]
    assert node.p is not None
    return node.p


def _most(call: Call, node: TopK, rows: Rows, heads: int) -> int | Tensor:
    """Give how many units a row keeps: a number, or int64 broadcastable to [B,Hs,n]."""
    k = call.number(node.k)
    if node.k_from is None:
        return k
    if isinstance(node.k_from, Needed):
        return needed(call, node.k_from)[:, :, rows.start : rows.stop].clamp(max=k)
    return head_table(call, node.k_from, heads)[None, :, None].long().clamp(max=k)


def _of_the_map(call: Call, node: TopP, first: int, stop: int) -> tuple[Rows, Tensor, Tensor]:
    """Choose from all rows of a head as from one; once a call."""
    everything = list_rows(call, node.scores, 0, row_grid(call, node.scores).count)
    values = scores(call, node.scores, everything)
    if node not in call.known:
        always = forced(call, node.scores, node.always, everything)
        able = candidates(call, node.scores, everything) | always
        flat, may, must = (
            x.expand_as(values).flatten(2)[:, :, None] for x in (values, able, always)
        )
        p = _goal(call, node, values)
        kept = share(flat, may, must, p, node.crossing, node.least)
        call.known[node] = kept.reshape(values.shape)
    rows = list_rows(call, node.scores, first, stop)
    part = slice(rows.start, rows.stop)
    return rows, call.known[node][:, :, part], values[:, :, part]


def needed(call: Call, node: Needed) -> Tensor:
    """Count the units that a share of each row needs, as `Needed` says: int64 [B,Hs,Nq]."""
    if node not in call.known:
        rows = list_rows(call, node.scores, 0, row_grid(call, node.scores).count)
        values = scores(call, node.scores, rows)
        able = candidates(call, node.scores, rows)
        kept = share(values, able, torch.zeros_like(able), node.p, node.crossing, 0)
        units = (-(-(kept.sum(-1) + node.extra) // node.per)).clamp(min=node.least)
        call.known[node] = units if node.most is None else units.clamp(max=node.most)
    return call.known[node]


def best(values: Tensor, able: Tensor, always: Tensor, k: int | Tensor) -> Tensor:
    """Keep min(max(k, always), able) units a row: those of `always`, then the highest values.

    values [B,Hs,n,Nk]; able, always bool broadcastable to it; k a number, or int64 broadcastable to
    [B,Hs,n] -> bool like values. A tie goes to the lower index; NaN ranks below every number.
    """
    always, able = always.expand_as(values), able.expand_as(values)
    wanted = torch.as_tensor(k, device=values.device)
    keep = torch.minimum(torch.maximum(always.sum(-1), wanted), able.sum(-1))[..., None]
    order = _ranked(values, able, always)
    place = torch.arange(values.shape[-1], device=values.device)
    return torch.zeros_like(able).scatter(-1, order, place < keep)


def share(
    values: Tensor,
    able: Tensor,
    always: Tensor,
    p: Tensor | float,
    crossing: Crossing,
    least: int,
) -> Tensor:
    """Keep the units that together hold a share p of a row's scores, as `TopP` says.

    values [B,Hs,n,Nk]; able, always bool broadcastable to it; p a number or [1,Hs,1,1] -> bool like
    values. NaN counts as 0 and ranks below every number.
    """
    always, able = always.expand_as(values), able.expand_as(values)
    order = _ranked(values, able, always)
    counted = values.masked_fill(~able | values.isnan(), 0.0)
    ordered = counted.gather(-1, order)
    reached = ordered.cumsum(dim=-1)
    goal = p * reached[..., -1:]  # summed as what it is compared with, so that p = 1 is all
    kept = reached - ordered < goal if crossing == "keep" else reached <= goal
    place = torch.arange(values.shape[-1], device=values.device)
    kept = torch.zeros_like(able).scatter(-1, order, kept | (place < least))
    return (kept & able) | always


def _ranked(values: Tensor, able: Tensor, always: Tensor) -> Tensor:
    """Order the units of each row: those it must keep, then by score, then those it cannot have.
    A tie goes to the lower index; NaN ranks below every number."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    group = 2 * values.isnan().int() + 4 * (~able).int()
    group = torch.where(always, -1, group).gather(-1, order)
    return order.gather(-1, group.sort(dim=-1, stable=True).indices)


def _chosen(node: TopK | TopP, chunk: Chunk) -> Tensor:
    with torch.no_grad():
        call = chunk.call
        granule = row_grid(call, node.scores).stride
        first = chunk.start // granule
        rows, kept, _ = kept_units(call, node, first, -(-chunk.stop // granule))
        held = _on_entries(kept, unit_grid(call, node.scores), chunk)
        return _on_queries(held, rows.granule, rows.start, chunk)


def _judged(node: Similar, chunk: Chunk) -> Tensor:
    """Carry what is said of blocks to the queries, or to the entries, that lie in them."""
    call = chunk.call
    held = call.alike(node) ^ node.negated
    if role_of(node.x) == "query":
        return _on_queries(held[..., None], node.block, 0, chunk)
    blocks = block_grid(call.env["Skv"], node.block, call.device)
    marks = _on_entries(held, blocks, chunk)[:, :, None]
    return by_head(marks, call.env["Hq"], "blocks that are judged")


def _given(node: Given, chunk: Chunk) -> Tensor:
    first = chunk.start // node.block_q
    units = _marked(node, chunk.call)[:, :, first : -(-chunk.stop // node.block_q)]
    tokens = chunk.call.env["Skv"]
    starts = torch.arange(units.shape[3], device=units.device) * node.block_k
    ends = (starts + node.block_k).clamp(max=tokens) - 1
    real = starts < tokens
    grid = Grid(starts[real], ends[real], node.block_k, tokens)
    held = _on_entries(units[..., : grid.count], grid, chunk)
    return _on_queries(held, node.block_q, first, chunk)


def _marked(node: Given, call: Call) -> Tensor:
    """Give a user's list as marks on units, bool [B|1,Hs,Nq,U]; a unit past the end marks none."""
    tensor = call.tensor(node.tensor)
    if node.form == "mask":
        return tensor.bool()
    counts = None if node.counts is None else call.tensor(node.counts)
    units = -(-call.env["Skv"] // node.block_k)
    real = (tensor >= 0) & (tensor < units)
    if counts is not None:
        real &= torch.arange(tensor.shape[3], device=tensor.device) < counts[..., None]
    place = torch.where(real, tensor, units).long()
    marks = torch.zeros(*tensor.shape[:3], units + 1, dtype=torch.bool, device=tensor.device)
    return marks.scatter(-1, place, True)[..., :units]


def _on_entries(units: Tensor, grid: Grid, chunk: Chunk) -> Tensor:
    """Carry marks from the units of a list to the entries of a stream: [..., U] -> [..., N]."""
    if grid.same_as(chunk.grid):
        return units[..., : chunk.keys]
    low, high = grid.holders(chunk.lasts)
    padded = torch.nn.functional.pad(units, (0, 1))
    if bool((high - low <= 1).all()):
        return padded[..., low] & (high > low)
    before = torch.nn.functional.pad(units.int().cumsum(-1), (1, 0))
    return before[..., high] > before[..., low]


def _on_queries(held: Tensor, granule: int, first: int, chunk: Chunk) -> Tensor:
    """Carry marks from the rows and heads of a list to queries: [B|1,Hs,n,N] -> [B|1,Hq|1,R,N]."""
    row = chunk.queries[:, 0] // granule - first
    padded = torch.nn.functional.pad(held, (0, 0, 0, 1))
    return _on_heads(padded[:, :, row.clamp(max=held.shape[2])], chunk)


def _on_heads(held: Tensor, chunk: Chunk) -> Tensor:
    """Carry marks from the heads of a list to the query heads; those of one list stay one."""
    lists, heads = held.shape[1], chunk.call.env["Hq"]
    if heads % lists:
        raise ShapeMismatch(
            left=f"a list for {lists} heads",
            right=f"q with {heads} heads",
            problem=f"{heads} is not a multiple of {lists}",
            way_out="give one list for all heads, for each KV head, or for each query head.",
        )
    return held if lists == 1 else held.repeat_interleave(heads // lists, dim=1)
