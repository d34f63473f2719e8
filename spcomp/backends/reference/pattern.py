"""The meaning of a pattern: its program interpreted in plain torch, chunk by chunk of query rows.

This is the living definition of every stage. It runs on any device and float dtype, repeats no KV
head, holds the logits of one chunk at a time, and is differentiable everywhere but in the
selection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spcomp.backends.reference.attending import Result, pairs_of, places, result_of
from spcomp.backends.reference.call import Call
from spcomp.backends.reference.scoring import row_grid
from spcomp.backends.reference.selecting import kept_units
from spcomp.ir.nodes import Score, TopK, TopP
from spcomp.ir.program import Program

LOGITS_AT_ONCE = 1 << 25
ROWS_AT_ONCE = 256
"""The most logits, and the most query rows, of one chunk: 128 MiB of float32, and little past the
diagonal."""


def run_program(
    program: Program,
    inputs: Mapping[str, Tensor],
    *,
    chunk_rows: int | None = None,
    kept: Mapping[str, Tensor] | None = None,
) -> Result:
    """Run a pattern.

    inputs: q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv] and the captured tensors, by name; any
    float dtype, any strides. chunk_rows: query rows held at once (default: what keeps a chunk near
    128 MiB). kept: states a cache holds, by name (`pages.max`, `pages.min`), of which a State is
    read instead of being made.
    Returns: out [B,Hq,Sq,Dv] in q's dtype, lse [B,Hq,Sq] float32 (float64 for float64), natural
    log; a row that sees no key gives 0 and -inf. Softmax and sums are float32 (float64 for
    float64). The backward pass runs each chunk again.
    Raises: CannotLower, ShapeMismatch.
    """
    call = Call(program, inputs, kept)
    outs, lses = [], []
    for start, stop in _chunks(call, chunk_rows):
        out, lse = _result(call, start, stop)
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs, dim=2), torch.cat(lses, dim=2)
    back = places(call, program.result)
    return (out, lse) if back is None else (out[:, :, back], lse[:, :, back])


def _result(call: Call, start: int, stop: int) -> Result:
    def chunk() -> Result:
        out, lse = result_of(call.program.result, call, start, stop)
        return out.to(call.out_dtype), lse

    if not torch.is_grad_enabled():
        return chunk()
    result: Result = checkpoint(chunk, use_reentrant=False, preserve_rng_state=False)
    return result


def _chunks(call: Call, chunk_rows: int | None) -> Iterator[tuple[int, int]]:
    size, rows = chunk_rows or _chunk_rows(call), call.env["Sq"]
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def _chunk_rows(call: Call) -> int:
    row = call.env["B"] * _most_heads(call) * max(call.env["Skv"], 1)
    return min(max(LOGITS_AT_ONCE // row, 1), ROWS_AT_ONCE)


def _most_heads(call: Call) -> int:
    """Give the most heads that hold a map at once: those of q, or of an indexer of its own."""
    sides = [n.q for n in call.program.stages() if isinstance(n, Score)]
    return max([call.env["Hq"], *(int(call.value(side)[0].shape[1]) for side in sides)])


@torch.no_grad()
def selection_mask(program: Program, inputs: Mapping[str, Tensor], rows: slice) -> Tensor:
    """Give the pairs a pattern reads for some query rows: bool [B,Hq,len(rows),Skv].

    Raises: CannotLower for a stream of units.
    """
    call = Call(program, inputs)
    start, stop, _ = rows.indices(call.env["Sq"])
    back = places(call, program.result)
    if back is None:
        return pairs_of(program.result, call, start, stop)
    wanted = back[start:stop]
    found = [
        pairs_of(program.result, call, a, b)[:, :, wanted[(wanted >= a) & (wanted < b)] - a]
        for a, b in _chunks(call, None)
    ]
    # Chunk by chunk they come by place; the rows asked for come by their own number.
    return torch.cat(found, dim=2)[
        :, :, (wanted // _chunk_rows(call)).argsort(stable=True).argsort()
    ]


@torch.no_grad()
def to_mask(program: Program, inputs: Mapping[str, Tensor]) -> Tensor:
    """Give all pairs a pattern reads: bool [B,Hq,Sq,Skv], made in chunks.

    Raises: CannotLower for a stream of units.
    """
    call = Call(program, inputs)
    chunks = _chunks(call, None)
    pairs = torch.cat([pairs_of(program.result, call, a, b) for a, b in chunks], dim=2)
    back = places(call, program.result)
    return pairs if back is None else pairs[:, :, back]


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """What one top-k or top-p chose.

    indices int32 [B,Hs,Nq,K], ascending, -1 at the end; counts int32 [B,Hs,Nq]; scores [B,Hs,Nq,Nk]
    of all units, candidates or not, float32 (float64 for float64).
    """

    node: TopK | TopP
    indices: Tensor
    counts: Tensor
    scores: Tensor


@torch.no_grad()
def lists(program: Program, inputs: Mapping[str, Tensor]) -> tuple[Lists, ...]:
    """Give the lists of every top-k and top-p of a pattern, for all rows at once (small sizes)."""
    call = Call(program, inputs)
    found = []
    for node in program.stages():
        if isinstance(node, (TopK, TopP)):
            rows = row_grid(call, node.scores).count
            _, kept, values = kept_units(call, node, 0, rows)
            width = call.number(node.k) if isinstance(node, TopK) else 0
            indices, counts = listed(kept, width)
            found.append(Lists(node, indices, counts, values))
    return tuple(found)


def listed(kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Turn marks [.., Nk] into indices [.., K], ascending, -1 at the end, and counts; both int32.

    K is `width` within the units there are, or the longest list if a forced set is longer.
    """
    units = kept.shape[-1]
    counts = kept.sum(dim=-1)
    longest = int(counts.max()) if counts.numel() else 0
    place = torch.arange(units, device=kept.device)
    ascending = torch.where(kept, place, units).sort(dim=-1).values
    held = ascending[..., : max(min(width, units), longest)]
    return torch.where(held < units, held, -1).int(), counts.int()
