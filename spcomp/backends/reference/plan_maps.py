"""The launches that make a map of scores and keep a share of it, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from spcomp.backends.reference.plan_lists import truth, unit_symbols, write_list
from spcomp.backends.reference.pooling import fold
from spcomp.backends.reference.scoring import head_scores, shared
from spcomp.backends.reference.selecting import share
from spcomp.backends.reference.slab import Slab
from spcomp.ir.launches import (
    BlockScoresLaunch,
    BlockSumsLaunch,
    MapRule,
    PartsLaunch,
    RowLseLaunch,
    ScoreRule,
    TopPLaunch,
)


def run_parts(launch: PartsLaunch, slab: Slab) -> None:
    """Sum each part of a row."""
    logits, able = _logits(launch, launch.rule, slab)
    part = launch.axis("part")
    logits = logits.masked_fill(~able, -torch.inf)
    padded = torch.nn.functional.pad(logits, (0, -logits.shape[3] % part), value=-torch.inf)
    slab.write(launch.parts_buf, _in_groups(padded, 3, part).logsumexp(-1))


def run_row_lse(launch: RowLseLaunch, slab: Slab) -> None:
    """Sum the parts of a row."""
    parts = slab.read(launch.parts_buf)
    empty = parts.new_full(parts.shape[:3], -torch.inf)
    slab.write(launch.lse_buf, parts.logsumexp(-1) if parts.shape[3] else empty)


def run_block_sums(launch: BlockSumsLaunch, slab: Slab) -> None:
    """Sum probabilities over the fine rows and the heads of a row."""
    parts = slab.read(launch.parts_buf)
    chances = _chances(parts, slab.read(launch.lse_buf), parts != -torch.inf)
    rule = launch.rule
    values = shared(chances, slab.env["Hkv"], rule.heads, rule.reduce)
    ratio = rule.granule // launch.fine
    _mark(launch.scores_buf, rule, _rows_joined(values, ratio, 0.0).sum(3), slab)


def run_block_scores(launch: BlockScoresLaunch, slab: Slab) -> None:
    """Join values over heads, then units, then fine rows."""
    values, able = _logits(launch, launch.logits, slab)
    has_lse, rule = bool(launch.lse_buf), launch.rule
    if has_lse:
        values = _chances(values, slab.read(launch.lse_buf), able)
    values = shared(values, slab.env["Hkv"], rule.heads, rule.reduce)
    fill = 0.0 if launch.by == "sum" or has_lse else torch.finfo(values.dtype).min
    values = values.masked_fill(~able[:, :1], fill)
    rows = _rows_joined(values, rule.granule // launch.logits.granule, fill)
    rows = rows.sum(3) if launch.by == "sum" else rows.amax(3)
    blocks = slab.read(launch.scores_buf).shape[3]
    overlap = _overlap(launch, rows.shape[3], blocks, slab)
    if launch.by == "sum":
        joined = rows @ (overlap / launch.stride).to(rows.dtype)
    else:
        joined = torch.stack([_highest(rows[..., held], fill) for held in overlap.T > 0], -1)
    _mark(launch.scores_buf, rule, joined, slab)


def _logits(
    launch: PartsLaunch | BlockScoresLaunch, rule: MapRule, slab: Slab
) -> tuple[Tensor, Tensor]:
    """Give the logits [B,Hq,Nf,U], and which units are candidates."""
    q = slab.rows_of(launch.rows_buf, 1 if rule.size > 1 else rule.granule)
    high = slab.read(launch.units_buf).detach().to(slab.dtype)
    low = slab.read(launch.low_buf).detach().to(slab.dtype) if launch.low_buf else None
    q = fold(q.detach().to(slab.dtype), rule.size, rule.is_crossed)
    high = fold(high, rule.size, False)
    assert high.shape[2] == slab.number(launch.units)
    scale = rule.scale * (slab.env["D"] ** -0.5 if rule.is_head_scaled else 1.0)
    values = head_scores(q, high, low, "none", None) * scale
    able = truth(rule.visible, unit_symbols(rule.granule, slab, values), slab, values)
    return values, able


def _chances(logits: Tensor, lse: Tensor, able: Tensor) -> Tensor:
    """Give exp(logit - lse), 0 for what is no candidate; a row of an empty sum is divided by 1."""
    total = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    return torch.where(able, (logits - total).exp(), 0.0)


def _rows_joined(values: Tensor, ratio: int, fill: float) -> Tensor:
    """Group fine rows: [B,Hl,Nf,U] -> [B,Hl,Nr,ratio,U]."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[2] % ratio), value=fill)
    return _in_groups(padded, 2, ratio)


def _in_groups(values: Tensor, axis: int, size: int) -> Tensor:
    """Split an axis into groups: [..,n*size,..] -> [..,n,size,..]."""
    shape = values.shape
    return values.reshape(*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])


def _overlap(launch: BlockScoresLaunch, units: int, blocks: int, slab: Slab) -> Tensor:
    """Count the tokens of each unit in each block: int64 [units, blocks]."""
    unit = slab.arange(units)[:, None] * launch.stride
    block = slab.arange(blocks)[None, :] * launch.block
    end = torch.minimum(unit + launch.span, block + launch.block)
    return (end - torch.maximum(unit, block)).clamp(min=0)


def _highest(values: Tensor, fill: float) -> Tensor:
    return values.amax(-1) if values.shape[-1] else values.new_full(values.shape[:-1], fill)


def _mark(name: str, rule: ScoreRule, values: Tensor, slab: Slab) -> None:
    """Write scores with -inf for blocks a row may not take and inf for those it must; infinite
    scores become the largest finite ones."""
    symbols = unit_symbols(rule.granule, slab, values)
    able, always = (truth(e, symbols, slab, values) for e in (rule.visible, rule.forced))
    largest = torch.finfo(values.dtype).max
    values = values.clamp(-largest, largest)
    slab.write(name, values.masked_fill(~able, -torch.inf).masked_fill(always & able, torch.inf))


def run_topp(launch: TopPLaunch, slab: Slab) -> None:
    """Keep a share."""
    values = slab.read(launch.scores_buf)
    able = values != -torch.inf
    always = truth(launch.forced, unit_symbols(launch.granule, slab, values), slab, values) & able
    p: Tensor | float = launch.p
    if launch.share_buf:
        p = slab.read(launch.share_buf).to(values.dtype)[None, :, None, None]
    kept = share(values, able, always, p, launch.crossing, launch.least)
    write_list(launch, kept, slab)
