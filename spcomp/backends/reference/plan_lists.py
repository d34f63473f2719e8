"""The launches that make lists: pool, score, top-k, select, tiles, invert."""

from __future__ import annotations

import torch
from torch import Tensor

from spcomp.backends.reference.expressions import Value, evaluate
from spcomp.backends.reference.pattern import listed
from spcomp.backends.reference.pooling import pool
from spcomp.backends.reference.scoring import head_scores, shared
from spcomp.backends.reference.selecting import best
from spcomp.backends.reference.slab import Slab, marked, spread
from spcomp.ir.expr import Expr
from spcomp.ir.launches import (
    InvertLaunch,
    PoolLaunch,
    ScoreLaunch,
    SelectLaunch,
    TilesLaunch,
    TopKLaunch,
    TopPLaunch,
)

TILE_BITS = 24


def run_pool(launch: PoolLaunch, slab: Slab) -> None:
    """Pool the tokens of each unit."""
    out = slab.tensors[launch.out_buf]
    x = slab.tensors[launch.x_buf].detach()
    values, low = pool(x, launch.by, launch.block, launch.stride, out.shape[2])
    slab.put(launch.out_buf, values)
    if low is not None:
        slab.put(launch.low_buf, low)


# ---- scores and top-k ----------------------------------------------------------------------------


def _scored(launch: SelectLaunch | ScoreLaunch, slab: Slab) -> tuple[Tensor, Tensor, Tensor]:
    """Give the scores [B,Hl,Nr,Nk], and which units a row may and must take."""
    rule = launch.rule
    q = slab.rows_of(launch.rows_buf, rule.granule).detach().to(slab.dtype)
    high = slab.read(launch.units_buf).detach().to(slab.dtype)
    low = slab.read(launch.low_buf).to(slab.dtype) if launch.low_buf else None
    weights = None
    if launch.weights_buf:
        weights = slab.rows_of(launch.weights_buf, rule.granule).detach().to(slab.dtype)
    by_head = head_scores(q, high, low, rule.activation, weights)
    values = shared(by_head, high.shape[1], rule.heads, rule.reduce) * rule.scale
    symbols = unit_symbols(rule.granule, slab, values)
    able, always = (truth(e, symbols, slab, values) for e in (rule.visible, rule.forced))
    return values, able, always & able


def unit_symbols(granule: int, slab: Slab, like: Tensor) -> dict[str, Value]:
    """Give the symbols of a rule over the rows and units of scores [B,Hl,Nr,Nk]."""
    first = slab.begin + slab.arange(like.shape[2])[:, None] * granule
    return {
        **slab.symbols(like.shape[1]),
        "q_lo": first,
        "q_hi": (first + granule).clamp(max=slab.env["Sq"]) - 1,
        "k": slab.arange(like.shape[3]),
    }


def truth(expr: Expr, symbols: dict[str, Value], slab: Slab, like: Tensor) -> Tensor:
    """Evaluate a predicate to truth values of a tensor's shape."""
    value = evaluate(expr, symbols, slab.tensors, slab.dtype)
    return torch.as_tensor(value, device=like.device).bool().expand_as(like)


def run_score(launch: ScoreLaunch, slab: Slab) -> None:
    """Score every unit: -inf for those a row may not take, +inf for those it must."""
    values, able, always = _scored(launch, slab)
    values = values.masked_fill(~able, -torch.inf).masked_fill(always, torch.inf)
    slab.write(launch.scores_buf, values)


def run_select(launch: SelectLaunch, slab: Slab) -> None:
    """Score and choose."""
    values, able, always = _scored(launch, slab)
    write_list(launch, best(values, able, always, slab.number(launch.k)), slab)


def run_topk(launch: TopKLaunch, slab: Slab) -> None:
    """Choose from scores."""
    values = slab.read(launch.scores_buf)
    able, always = values != -torch.inf, values == torch.inf
    write_list(launch, best(values, able, always, slab.number(launch.k)), slab)


def write_list(launch: SelectLaunch | TopKLaunch | TopPLaunch, kept: Tensor, slab: Slab) -> None:
    """Write marked units as a list and its counts."""
    width = slab.number(launch.width)
    indices, counts = listed(kept, width)
    slab.write(launch.indices_buf, _fitted(indices, width))
    slab.write(launch.counts_buf, counts)


def _fitted(entries: Tensor, width: int) -> Tensor:
    """Give rows of exactly `width` entries, -1 where there is none."""
    assert entries.shape[-1] <= width, f"a list of {entries.shape[-1]} in {width} places"
    return torch.nn.functional.pad(entries, (0, width - entries.shape[-1]), value=-1)


# ---- tiles ---------------------------------------------------------------------------------------


def run_tiles(launch: TilesLaunch, slab: Slab) -> None:
    """List the partial and the full key tiles of each query tile."""
    block_k, keys = launch.axis("block_k"), slab.number(launch.keys)
    flags = _tile_flags(launch, slab)
    some, every = (_on_tiles if launch.exact else _on_elements)(launch, flags, slab)
    whole = (slab.arange(some.shape[3]) + 1) * block_k <= keys
    full = every & whole & some
    partial = some & ~full
    tile = slab.arange(some.shape[3])
    entry = tile.expand_as(some).clone()
    for n, flag in enumerate(flags):
        entry += flag.long() << (TILE_BITS + n)
    rank = torch.where(partial, 0, torch.where(full, 1, 2))
    ordered = entry.gather(-1, rank.sort(dim=-1, stable=True).indices)
    total = some.sum(-1)
    listed = torch.where(tile < total[..., None], ordered, -1)[..., : int(total.max())]
    slab.write(launch.tiles_buf, _fitted(listed, slab.number(launch.capacity)).int())
    slab.write(launch.partial_buf, partial.sum(-1).int())
    slab.write(launch.total_buf, total.int())


def _tile_shape(launch: TilesLaunch, slab: Slab) -> tuple[int, int, int, int]:
    batch, heads, rows = slab.read(launch.total_buf).shape
    return batch, heads, rows, -(-slab.number(launch.keys) // launch.axis("block_k"))


def _tile_flags(launch: TilesLaunch, slab: Slab) -> list[Tensor]:
    """Tell of each list which tiles it chose: bool [B|1,Hl,Nt,T] each."""
    _, heads, rows, tiles = _tile_shape(launch, slab)
    found = []
    lists = zip(launch.leaves, launch.list_bufs, launch.count_bufs, strict=True)
    for leaf, indices, counts in lists:
        units = -(-slab.env["Skv"] // leaf.unit)
        held = marked(
            slab.rows_of(indices, leaf.granule), slab.rows_of(counts, leaf.granule), units
        )
        row = slab.arange(rows) * launch.axis("block_q") // leaf.granule
        unit = slab.arange(tiles) * launch.axis("block_k") // leaf.unit
        found.append(spread(held[:, :, row][..., unit], heads))
    return found


def _tile_symbols(launch: TilesLaunch, flags: list[Tensor], slab: Slab) -> dict[str, Value]:
    _, heads, rows, tiles = _tile_shape(launch, slab)
    block_q, block_k = launch.axis("block_q"), launch.axis("block_k")
    q_lo = slab.begin + slab.arange(rows)[:, None] * block_q
    k_lo = slab.arange(tiles) * block_k
    return {
        **slab.symbols(heads),
        "q_lo": q_lo,
        "q_hi": (q_lo + block_q).clamp(max=slab.env["Sq"]) - 1,
        "k_lo": k_lo,
        "k_hi": (k_lo + block_k).clamp(max=slab.number(launch.keys)) - 1,
        **{f"chosen{n}": f for n, f in enumerate(flags)},
    }


def _on_tiles(launch: TilesLaunch, flags: list[Tensor], slab: Slab) -> tuple[Tensor, Tensor]:
    """Judge tiles by the bounds of the predicate: some pair holds, every pair holds."""
    symbols = _tile_symbols(launch, flags, slab)
    like = torch.empty(_tile_shape(launch, slab), device=slab.device)
    return (
        truth(launch.somewhere, symbols, slab, like),
        truth(launch.everywhere, symbols, slab, like),
    )


def _on_elements(launch: TilesLaunch, flags: list[Tensor], slab: Slab) -> tuple[Tensor, Tensor]:
    """Judge tiles by their elements, of which only real rows and keys count."""
    shape = _tile_shape(launch, slab)
    block_q, block_k = launch.axis("block_q"), launch.axis("block_k")
    keys = slab.number(launch.keys)
    row, key = slab.arange(slab.rows), slab.arange(keys)
    values: dict[str, Value] = {
        **slab.symbols(shape[1]),
        "q": (slab.begin + row)[:, None],
        "k": key,
    }
    for n, flag in enumerate(flags):
        values[f"chosen{n}"] = flag[:, :, row // block_q][..., key // block_k]
    like = torch.empty(*shape[:2], slab.rows, keys, device=slab.device)
    held = truth(launch.predicate, values, slab, like)
    padding = (0, shape[3] * block_k - keys, 0, shape[2] * block_q - slab.rows)

    def tiled(fill: bool) -> Tensor:
        padded = torch.nn.functional.pad(held, padding, value=fill)
        return padded.reshape(*shape[:3], block_q, shape[3], block_k).transpose(4, 3).flatten(4)

    return tiled(False).any(-1), tiled(True).all(-1)


# ---- lists of rows per unit ----------------------------------------------------------------------


def run_invert(launch: InvertLaunch, slab: Slab) -> None:
    """Turn lists of units per row into lists of rows per unit, in three steps."""
    {"count": _count, "scan": _scan, "fill": _fill}[launch.step](launch, slab)


def _members(launch: InvertLaunch, slab: Slab) -> Tensor:
    """Tell which rows chose a unit: bool [B|1,Hl,Nk,Nr]."""
    indices, counts = slab.rows_of(launch.list_buf), slab.rows_of(launch.count_buf)
    return marked(indices, counts, slab.number(launch.units)).transpose(-1, -2)


def _count(launch: InvertLaunch, slab: Slab) -> None:
    rows = launch.axis("rows")
    members = _members(launch, slab)
    padded = torch.nn.functional.pad(members, (0, -members.shape[-1] % rows))
    chunks = padded.reshape(*members.shape[:3], -1, rows)
    slab.put(launch.prefix_buf, chunks.sum(-1))


def _scan(launch: InvertLaunch, slab: Slab) -> None:
    counts = slab.read(launch.prefix_buf).long()
    each = counts.sum(-1)
    flat = counts.flatten(2)
    slab.put(launch.prefix_buf, (flat.cumsum(-1) - flat).reshape(counts.shape))
    slab.put(launch.unit_start_buf, _starts(each))
    heads = heads_per_program(counts.shape[1], slab)
    tiles = -(-each * heads // launch.axis("block_m"))
    slab.put(launch.tile_start_buf, _starts(tiles))


def _starts(counts: Tensor) -> Tensor:
    """Give the first place of each group, and the end: [..,N] -> [..,N+1]."""
    return torch.nn.functional.pad(counts.cumsum(-1), (1, 0))


def heads_per_program(list_heads: int, slab: Slab) -> int:
    """Give the query heads a key-major program serves: those of a KV head if they share a list."""
    group = slab.env["Hq"] // slab.env["Hkv"]
    return group if slab.env["Hq"] // list_heads >= group else 1


def _fill(launch: InvertLaunch, slab: Slab) -> None:
    indices, counts = slab.rows_of(launch.list_buf), slab.rows_of(launch.count_buf)
    batch, heads, rows, width = indices.shape
    row, slot = slab.arange(rows)[:, None], slab.arange(width)
    packed = (row * width + slot).expand(batch, heads, rows, width).flatten(2)
    valid = (slot < counts[..., None]).flatten(2)
    unit = torch.where(valid, indices.flatten(2).long(), slab.number(launch.units))
    order = unit.sort(dim=-1, stable=True).indices
    entries = packed.gather(-1, order)
    place = slab.arange(rows * width)
    listed = torch.where(place < valid.sum(-1, keepdim=True), entries, -1)
    slab.put(launch.entries_buf, listed)
