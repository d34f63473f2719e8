"""Dense attention in float64, and the masks of the shipped patterns, written from their papers.

Nothing of spcomp is imported here: these are the second opinion every backend is measured against.
A mask is a boolean tensor [B,Hq,Sq,Skv], true where the query may see the key. Query row i stands
at position t = i + Skv - Sq; a negative position sees nothing. A unit is complete for a query when
its last token is at or before the query's position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

TINY = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}
Hook = Callable[[Tensor], Tensor]


# ---- attention ---------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    hook: Hook | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the pairs of a mask, in float64, differentiable.

    q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv], mask bool broadcastable to [B,Hq,Sq,Skv];
    `hook` maps the scaled logits to new ones; `sinks` [Hq] are logits without a key and a value.
    Returns out [B,Hq,Sq,Dv] and lse [B,Hq,Sq], which leaves sinks out, float64; a row that sees no
    key gives 0 and -inf.
    """
    return _attention(q.double(), k.double(), v.double(), mask, scale, hook, sinks)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    hook: Hook | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in the dtype of the inputs: what a careful user would write in plain PyTorch."""
    return _attention(q, k, v, mask, scale, hook, sinks)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float | None,
    hook: Hook | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    logits = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if hook is not None:
        logits = hook(logits)
    logits = logits.masked_fill(~mask, -math.inf)
    empty = (logits == -math.inf).all(dim=-1, keepdim=True)
    logits = logits.masked_fill(empty, 0.0)
    out = (torch.softmax(logits, dim=-1) @ v).masked_fill(empty, 0.0)
    lse = torch.logsumexp(logits, dim=-1).masked_fill(empty[..., 0], -math.inf)
    if sinks is not None:
        out = _beside_sinks(logits, v, sinks.to(logits.dtype)).masked_fill(empty, 0.0)
    return out, lse


def _beside_sinks(logits: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """A column of sink logits joins the softmax and is cut off again before the values."""
    everything = (sinks == math.inf)[:, None, None]
    column = sinks[:, None, None].masked_fill(everything, 0.0).expand(*logits.shape[:3], 1)
    weights = torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)[..., :-1]
    return (weights @ v).masked_fill(everything, 0.0)


def error(got: Tensor, want: Tensor) -> float:
    """Give the largest absolute difference; infinities must stand at the same places."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape or not torch.equal(got.isinf(), want.isinf()) or got.isnan().any():
        return math.inf
    finite = want.isfinite()
    return float((got - want)[finite].abs().max()) if bool(finite.any()) else 0.0


def budgets(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    hook: Hook | None = None,
    sinks: Tensor | None = None,
) -> tuple[float, float]:
    """Give the errors allowed in out and in lse: twice those of plain PyTorch, and a tiny rest."""
    want = attention(q, k, v, mask, scale=scale, hook=hook, sinks=sinks)
    plain = plain_attention(q, k, v, mask, scale=scale, hook=hook, sinks=sinks)
    out, lse = (2 * error(p, w) + TINY[q.dtype] for p, w in zip(plain, want, strict=True))
    return out, lse


# ---- masks of positions ------------------------------------------------------------------------


def positions(sq: int, skv: int) -> Tensor:
    """Give the position of each query row, [Sq, 1]."""
    return torch.arange(sq)[:, None] + (skv - sq)


def causal_mask(sq: int, skv: int) -> Tensor:
    """Keys not later than the query, aligned bottom-right."""
    return torch.arange(skv)[None, :] <= positions(sq, skv)


def window_mask(sq: int, skv: int, size: int) -> Tensor:
    """The last `size` keys, the query's own included."""
    return causal_mask(sq, skv) & (torch.arange(skv)[None, :] > positions(sq, skv) - size)


def sink_window_mask(sq: int, skv: int, sinks: int, recent: int) -> Tensor:
    """StreamingLLM (arXiv:2309.17453): the first `sinks` keys and the last `recent`."""
    early = torch.arange(skv)[None, :] < sinks
    return (early & causal_mask(sq, skv)) | window_mask(sq, skv, recent)


def document_mask(lengths: Sequence[int]) -> Tensor:
    """Causal attention inside each of several documents packed one after another."""
    names = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)])
    return causal_mask(len(names), len(names)) & (names[:, None] == names[None, :])


# ---- masks of scores ---------------------------------------------------------------------------


def choose(
    scores: Sequence[float], candidates: Collection[int], forced: Collection[int], k: int
) -> set[int]:
    """Keep the forced units, then the best candidates, the lower unit first on a tie.

    min(max(k, forced), available) units are kept; a score that is not a number ranks last.
    """
    kept = set(forced)

    def rank(u: int) -> tuple[bool, float, int]:
        return (True, 0.0, u) if math.isnan(scores[u]) else (False, -scores[u], u)

    for u in sorted(set(candidates) - kept, key=rank):
        if len(kept) >= k:
            break
        kept.add(u)
    return kept


def complete_units(t: int, block: int, skv: int) -> list[int]:
    """Give the units whose last token, the last one of all in a short tail, is at or before t."""
    return [u for u in range(-(-skv // block)) if min((u + 1) * block, skv) - 1 <= t]


def pooled(x: Tensor, block: int, how: Callable[[Tensor], Tensor]) -> Tensor:
    """Pool each unit over its real tokens: x [B,H,S,D] -> [B,H,U,D], in x's dtype."""
    parts = [how(x[:, :, i : i + block].double()) for i in range(0, x.shape[2], block)]
    return torch.stack(parts, dim=2).to(x.dtype).double()


def mean(x: Tensor) -> Tensor:
    """Mean over the tokens of a unit."""
    return x.mean(dim=2)


def block_topk_mask(
    q: Tensor, k: Tensor, *, block: int, keep: int, sinks: int, locals: int
) -> Tensor:
    """Mean-pooled query blocks choose mean-pooled key blocks, one list a KV head.

    A block of queries ranks the blocks complete at its last row; the first `sinks` blocks and the
    `locals` nearest of its rows' own are forced once they have begun.
    """
    (b, hq, sq, _), (_, hkv, skv, _) = q.shape, k.shape
    group = hq // hkv
    rows, units = pooled(q, block, mean), pooled(k, block, mean)
    by_head = torch.einsum("bghrd,bgud->bghru", rows.unflatten(1, (hkv, group)), units)
    scores = by_head.mean(dim=2)
    mask = torch.zeros(b, hq, sq, skv, dtype=torch.bool)
    for item in range(b):
        for head in range(hkv):
            for row in range(rows.shape[2]):
                first, last = row * block, min((row + 1) * block, sq) - 1
                t_lo, t_hi = first + skv - sq, last + skv - sq
                begun = [u for u in range(units.shape[2]) if u * block <= t_hi]
                forced = {u for u in begun if u < sinks or u > t_lo // block - locals}
                candidates = complete_units(t_hi, block, skv)
                for u in choose(scores[item, head, row].tolist(), candidates, forced, keep):
                    heads = slice(head * group, (head + 1) * group)
                    mask[item, heads, first : last + 1, u * block : (u + 1) * block] = True
    return mask & causal_mask(sq, skv)


def moba_mask(q: Tensor, k: Tensor, *, block: int, k_blocks: int) -> Tensor:
    """MoBA (arXiv:2502.13189): a query's own block, and the past blocks of best mean key."""
    group = q.shape[1] // k.shape[1]
    means = pooled(k, block, mean).repeat_interleave(group, dim=1)
    return _token_lists(q.double() @ means.transpose(-1, -2), k.shape[2], block, k_blocks)


def quest_mask(q: Tensor, k: Tensor, *, page: int, budget: int, shared: bool = False) -> Tensor:
    """Quest (arXiv:2406.10774): the pages of highest possible q·k, the newest always among them.

    shared: one list for the heads of a KV head, by their mean score.
    """
    hkv, group = k.shape[1], q.shape[1] // k.shape[1]
    low = pooled(k, page, lambda x: x.amin(dim=2)).repeat_interleave(group, dim=1)
    high = pooled(k, page, lambda x: x.amax(dim=2)).repeat_interleave(group, dim=1)
    bounds = []
    for u in range(low.shape[2]):
        corners = torch.maximum(q.double() * low[:, :, u, None], q.double() * high[:, :, u, None])
        bounds.append(corners.sum(dim=-1))
    scores = torch.stack(bounds, dim=-1)
    if shared:
        joined = scores.unflatten(1, (hkv, group)).mean(dim=2)
        scores = joined.repeat_interleave(group, dim=1)
    return _token_lists(scores, k.shape[2], page, max(1, budget // page))


def _token_lists(scores: Tensor, skv: int, block: int, keep: int) -> Tensor:
    """Choose for every query of every head, its own unit forced: scores [B,Hq,Sq,U] -> mask."""
    b, hq, sq, _ = scores.shape
    mask = torch.zeros(b, hq, sq, skv, dtype=torch.bool)
    values = scores.tolist()
    for row in range(sq):
        t = row + skv - sq
        if t < 0:
            continue
        candidates = complete_units(t, block, skv)
        for item in range(b):
            for head in range(hq):
                for u in choose(values[item][head][row], candidates, {t // block}, keep):
                    mask[item, head, row, u * block : (u + 1) * block] = True
    return mask & causal_mask(sq, skv)
