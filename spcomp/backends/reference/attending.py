"""Softmax attention of a chunk of query rows over what was selected, and joining results."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spcomp.backends.reference.call import Call, single, stream_of
from spcomp.backends.reference.expressions import Values, evaluate
from spcomp.backends.reference.selecting import Chunk, mask_of, symbols
from spcomp.backends.reference.tiles import integer_products, skipped, whole_tiles
from spcomp.backends.reference.tokens import by_head, mean_token
from spcomp.errors import CannotLower
from spcomp.ir.expr import Expr
from spcomp.ir.nodes import Attend, Causal, Centre, Gather, Merge, Node
from spcomp.ir.token_rules import permutation_of

Result = tuple[Tensor, Tensor]
"""out [B,Hq,R,Dv] in the dtype of the computation, and lse [B,Hq,R], natural log."""


def result_of(node: Node, call: Call, start: int, stop: int) -> Result:
    """Run an attend, or a merge of several, for query rows [start, stop)."""
    if isinstance(node, Merge):
        parts = [result_of(p, call, start, stop) for p in node.parts]
        if node.gates is None:
            result = merged(parts)
        else:
            result = gated(parts, call.tensor(node.gates)[:, :, start:stop].to(call.dtype))
    else:
        assert isinstance(node, Attend), node
        result = _attend(node, call, start, stop)
    return result if node.sinks is None else beside_sinks(result, call.tensor(node.sinks))


def _attend(node: Attend, call: Call, start: int, stop: int) -> Result:
    first, end = whole_tiles(node, start, stop, call.env["Sq"])
    logits, values = [], []
    for part in node.streams:
        stream, chunk = stream_of(part), _chunk(part, node, call, first, end)
        held = visible(part, node, chunk)
        logits.append(_seen_logits(part, node, chunk, held)[:, :, start - first : stop - first])
        values.append(single(stream.v, call.wide(stream.v))[:, :, : chunk.keys])
    return softmax(torch.cat(logits, dim=-1) if len(logits) > 1 else logits[0], values)


def _seen_logits(part: Node, node: Attend, chunk: Chunk, held: Tensor) -> Tensor:
    """Give the logits of one stream for whole tiles of rows, -inf where nothing is attended to."""
    logits = _logits(part, node, chunk).masked_fill_(~held, -torch.inf)
    if not node.skips:
        return logits
    return logits.masked_fill(_skipped(node, chunk, logits, held), -torch.inf)


def _skipped(node: Attend, chunk: Chunk, logits: Tensor, held: Tensor) -> Tensor:
    distance: float | Tensor | None = node.skip
    if node.skip_by_head is not None:
        table = chunk.call.tensor(node.skip_by_head).to(logits.dtype)[None, :, None, None]
        distance = by_head(table, logits.shape[1], "a distance to skip at")
    assert distance is not None and node.tile is not None
    return skipped(logits, held, node.tile, distance)


def _chunk(part: Node, node: Attend, call: Call, start: int, stop: int) -> Chunk:
    """Give the rows and the entries to look at: under a causal mask, none past the last row."""
    grid = call.grid(stream_of(part).k)
    keys = grid.count
    if node.causal:
        latest = torch.tensor([stop - 1 + call.shift], device=call.device)
        keys = int(torch.searchsorted(grid.last, latest, right=True))
    return Chunk(call, start, stop, grid, keys)


def visible(part: Node, node: Attend, chunk: Chunk) -> Tensor:
    """Give the mask of one stream of an attend, broadcastable to [B,Hq,R,N]."""
    held = mask_of(part.selection, chunk) if isinstance(part, Gather) else None
    if not node.causal:
        return _everything(chunk) if held is None else held
    causal = mask_of(Causal(), chunk)
    return causal if held is None else held & causal


def _everything(chunk: Chunk) -> Tensor:
    return torch.ones(1, 1, 1, chunk.keys, dtype=torch.bool, device=chunk.call.device)


def _logits(part: Node, node: Attend, chunk: Chunk) -> Tensor:
    """Give the logits of one stream after the score hook, [B,Hq,R,N]."""
    call, keys = chunk.call, stream_of(part).k
    q = single(node.q, call.value(node.q))[:, :, chunk.start : chunk.stop].to(call.dtype)
    held = single(keys, call.wide(keys))
    if node.quantise:
        scale = q.shape[-1] ** -0.5 if node.scale is None else node.scale
        logits = integer_products(node, q, held)[..., : chunk.keys] * scale
    else:
        logits = scaled_products(q, held[:, :, : chunk.keys], node.scale)
    if isinstance(keys, Centre):
        logits = logits + scaled_products(q, mean_token(call.tensor(keys.x)), node.scale)
    if node.score_mod is None:
        return logits
    return hooked(node.score_mod, logits, symbols(chunk), chunk.call.tensors)


def scaled_products(q: Tensor, keys: Tensor, scale: float | None) -> Tensor:
    """Give q·k * scale, [B,Hq,R,N] of q [B,Hq,R,D] and keys [B,Hkv,N,D]; scale None is
    1/sqrt(D)."""
    b, heads, rows, d = q.shape
    scaled = q * (d**-0.5 if scale is None else scale)
    product = scaled.reshape(b, keys.shape[1], -1, d) @ keys.transpose(-1, -2)
    return product.reshape(b, heads, rows, keys.shape[2])


def hooked(hook: Expr, logits: Tensor, values: Values, tables: Mapping[str, Tensor]) -> Tensor:
    """Apply a score hook to scaled logits; the result shares no memory with them."""
    changed = evaluate(hook, {**values, "score": logits}, tables, logits.dtype)
    return torch.as_tensor(changed, device=logits.device).to(logits.dtype).expand_as(logits).clone()


def softmax(logits: Tensor, values: list[Tensor]) -> Result:
    """Join all streams in one softmax; a row without a finite logit gives 0 and -inf.

    logits [B,Hq,R,N] of all streams side by side, which this overwrites; values: the streams' v
    [B,Hkv,N_i,Dv].
    """
    b, heads, rows, _ = logits.shape
    if logits.shape[-1] == 0:
        empty = logits.new_zeros(b, heads, rows, values[0].shape[3])
        return empty, logits.new_full((b, heads, rows), -torch.inf)
    # The shift cancels out of the result, so no gradient goes through it.
    top = logits.detach().amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = logits.sub_(top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    total_or_one = total.masked_fill(total == 0, 1.0)
    lse = (top + total_or_one.log()).masked_fill(total == 0, -torch.inf)[..., 0]
    out = logits.new_zeros(())
    first = 0
    for held in values:
        part = weights[..., first : first + held.shape[2]]
        grouped = part.reshape(b, held.shape[1], heads // held.shape[1] * rows, held.shape[2])
        out = out + (grouped @ held).reshape(b, heads, rows, -1)
        first += held.shape[2]
    return out / total_or_one, lse


def merged(parts: list[Result]) -> Result:
    """Join attention over disjoint key sets as if it were one softmax.

    A row empty in all parts gives 0 and -inf. Source: FlashAttention, arXiv:2205.14135, section
    3.1.
    """
    lses = torch.stack([lse for _, lse in parts])
    top = lses.detach().amax(dim=0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (lses - top).exp()
    total = weights.sum(dim=0)
    total_or_one = total.masked_fill(total == 0, 1.0)
    out = sum(w[..., None] * o for w, (o, _) in zip(weights, parts, strict=True))
    assert isinstance(out, Tensor)
    lse = (top + total_or_one.log()).masked_fill(total == 0, -torch.inf)
    return out / total_or_one[..., None], lse


def beside_sinks(result: Result, sinks: Tensor) -> Result:
    """Let sink logits [Hq], which have no value, take their share of the softmax; the lse leaves
    them out, and an empty row stays 0."""
    out, lse = result
    # An empty row has no share to lose; its lse of -inf beside a sink of -inf would be no number.
    seen = lse.masked_fill(lse == -torch.inf, 0.0)
    share = torch.sigmoid(seen - sinks.to(lse.dtype)[:, None])
    return out * share[..., None], lse


def gated(parts: list[Result], gates: Tensor) -> Result:
    """Add results weighted by gates [B,Hq,R,P], one a part; the lse is that of all their keys.

    A row that a part leaves empty adds 0, whatever its gate.
    """
    pairs = zip(gates.unbind(-1), parts, strict=True)
    out = sum(g.masked_fill(lse == -torch.inf, 0.0)[..., None] * o for g, (o, lse) in pairs)
    assert isinstance(out, Tensor)
    return out, merged(parts)[1]


def places(call: Call, node: Node) -> Tensor | None:
    """Give the place that each token has in the order of what a stage reads; None if as they
    came."""
    stage = permutation_of(node)
    return None if stage is None else call.tensor(stage.order).long().argsort()


def pairs_of(node: Node, call: Call, start: int, stop: int) -> Tensor:
    """Give the (query, key) pairs a result reads for rows [start, stop): bool [B,Hq,R,Skv], the
    rows in the order that q has, the keys as they came.

    Raises: CannotLower for a stream of units, whose entries are no tokens.
    """
    shape = (call.env["B"], call.env["Hq"], stop - start, call.env["Skv"])
    pairs = torch.zeros(shape, dtype=torch.bool, device=call.device)
    if isinstance(node, Merge):
        for inner in node.parts:
            pairs |= pairs_of(inner, call, start, stop)
        return pairs
    assert isinstance(node, Attend), node
    for part in node.streams:
        first, end = whole_tiles(node, start, stop, call.env["Sq"])
        chunk = _chunk(part, node, call, first, end)
        if chunk.grid.count != call.env["Skv"] or chunk.grid.stride != 1:
            raise CannotLower(
                where=part.where,
                what="a mask of tokens for a stream of units",
                why="its entries are pooled from several tokens",
                way_out="ask for the mask of the streams of tokens alone",
            )
        held = visible(part, node, chunk)
        if node.skips:
            logits = _logits(part, node, chunk).masked_fill_(~held, -torch.inf)
            held = held & ~_skipped(node, chunk, logits, held)
        rows = slice(start - first, stop - first)
        held = held.expand(shape[0], shape[1], end - first, chunk.keys)[:, :, rows]
        back = places(call, stream_of(part))
        pairs[..., : chunk.keys] |= held if back is None else held[..., back]
    return pairs
