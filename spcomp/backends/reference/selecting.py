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
from spcomp.backends.reference.expressions import Value, Values, evaluate
from spcomp.backends.reference.pooling import Grid
from spcomp.backends.reference.scoring import (
    Rows,
    candidates,
    forced,
    list_rows,
    row_grid,
    scores,
    unit_grid,
)
from spcomp.errors import ShapeMismatch
from spcomp.ir.expr import Expr
from spcomp.ir.nodes import (
    Causal,
    Everything,
    Given,
    Intersect,
    Local,
    MaskMod,
    Node,
    Region,
    Sink,
    TopK,
    TopP,
    Union,
)
from spcomp.ir.nodes.select import Crossing


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
    if isinstance(node, MaskMod):
        return _ruled(node.predicate, symbols(chunk), chunk)
    if isinstance(node, Region):
        held = {f"chosen{n}": mask_of(part, chunk) for n, part in enumerate(node.lists)}
        return _ruled(node.predicate, {**symbols(chunk), **held}, chunk)
    return _placed(node, chunk)[None, None]


def _placed(node: Node, chunk: Chunk) -> Tensor:
    """Masks of positions alone: [R, N]."""
    t, key = chunk.positions, chunk.lasts[None, :]
    if isinstance(node, Causal):
        return key <= t
    if isinstance(node, Local):
        return (key <= t) & (key // node.unit > t // node.unit - node.count)
    if isinstance(node, Sink):
        return chunk.grid.first[None, : chunk.keys] < node.count * node.unit
    assert isinstance(node, Everything), node
    return torch.ones(1, 1, dtype=torch.bool, device=t.device)


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
    rows = list_rows(call, node.scores, first, stop)
    values = scores(call, node.scores, rows)
    always = forced(call, node.scores, node.always, rows)
    able = candidates(call, node.scores, rows) | always
    if isinstance(node, TopK):
        return rows, best(values, able, always, call.number(node.k)), values
    p: Tensor | float | None = node.p
    if node.p_by_head is not None:
        table = call.tensor(node.p_by_head)
        if table.shape[0] != values.shape[1]:
            raise ShapeMismatch(
                where=node.where,
                left=f"topp's p of shape [{table.shape[0]}]",
                right=f"a list of {values.shape[1]} heads",
                problem=f"{table.shape[0]} numbers for {values.shape[1]} heads",
                way_out="give one number for each head of the list.",
            )
        p = table.to(values.dtype)[None, :, None, None]
    assert p is not None
    return rows, share(values, able, always, p, node.crossing, node.least), values


def best(values: Tensor, able: Tensor, always: Tensor, k: int) -> Tensor:
    """Keep min(max(k, always), able) units a row: those of `always`, then the highest values.

    values [B,Hs,n,Nk]; able, always bool broadcastable to it -> bool like values. A tie goes to the
    lower index; NaN ranks below every number.
    """
    always, able = always.expand_as(values), able.expand_as(values)
    keep = torch.minimum(always.sum(-1).clamp(min=k), able.sum(-1))[..., None]
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
    goal = p * counted.sum(dim=-1, keepdim=True)
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
    by_query = padded[:, :, row.clamp(max=held.shape[2])]
    lists, heads = held.shape[1], chunk.call.env["Hq"]
    if heads % lists:
        raise ShapeMismatch(
            left=f"a list for {lists} heads",
            right=f"q with {heads} heads",
            problem=f"{heads} is not a multiple of {lists}",
            way_out="give one list for all heads, for each KV head, or for each query head.",
        )
    return by_query if lists == 1 else by_query.repeat_interleave(heads // lists, dim=1)
