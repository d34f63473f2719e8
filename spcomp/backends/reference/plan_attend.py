"""The launches that attend: query-major, gathered, key-major, and the merge of parts."""

from __future__ import annotations

import torch
from torch import Tensor

from spcomp.backends.reference.attending import (
    Result,
    beside_sinks,
    gated,
    hooked,
    merged,
    scaled_products,
    softmax,
)
from spcomp.backends.reference.expressions import Value, evaluate
from spcomp.backends.reference.plan_lists import TILE_BITS
from spcomp.backends.reference.slab import Slab, marked, spread
from spcomp.ir.launches import AttendLaunch, AttendRule, GatherLaunch, KeysLaunch, MergeLaunch

TILE_MASK = (1 << TILE_BITS) - 1


def _logits(
    rule: AttendRule, q: Tensor, keys: Tensor, values: dict[str, Value], slab: Slab
) -> Tensor:
    """Give the logits of some rows and keys after the score hook."""
    logits = scaled_products(q, keys, rule.scale)
    if rule.score_mod is None:
        return logits
    return hooked(rule.score_mod, logits, values, slab.tensors)


def _held(rule: AttendRule, values: dict[str, Value], slab: Slab) -> Tensor:
    """Evaluate the predicate of a rule."""
    found = evaluate(rule.predicate, values, slab.tensors, slab.dtype)
    return torch.as_tensor(found, device=slab.device).bool()


def _wide(slab: Slab, *names: str) -> list[Tensor]:
    return [slab.read(n).to(slab.dtype) for n in names]


def _symbols(slab: Slab, keys: int) -> dict[str, Value]:
    """Give the symbols of the pairs of a slab, for expressions that broadcast to [B,Hq,R,keys]."""
    return {
        **slab.symbols(slab.env["Hq"]),
        "q": (slab.begin + slab.arange(slab.rows))[:, None],
        "k": slab.arange(keys),
    }


def run_attend(launch: AttendLaunch, slab: Slab) -> None:
    """Attend by the tile lists: partial tiles under the predicate, full ones whole."""
    keys = slab.number(launch.keys)
    row = slab.arange(slab.rows) // launch.axis("block_q")
    key = slab.arange(keys) // launch.axis("block_k")
    entries, partial, total = (
        slab.read(n) for n in (launch.tiles_buf, launch.partial_buf, launch.total_buf)
    )

    def elements(marks: Tensor) -> Tensor:
        return spread(marks[:, :, row][..., key], slab.env["Hq"])

    tiles = -(-keys // launch.axis("block_k"))
    numbers = entries & TILE_MASK
    listed = marked(numbers, total, tiles)
    masked = marked(numbers, partial, tiles)
    values = _symbols(slab, keys)
    for n, flag in enumerate(launch.rule.flags):
        chosen = torch.where((entries >> (TILE_BITS + n)) & 1 == 1, numbers, tiles)
        valid = slab.arange(entries.shape[-1]) < total[..., None]
        marks = torch.zeros(*numbers.shape[:3], tiles + 1, dtype=torch.bool, device=slab.device)
        place = torch.where(valid, chosen, tiles).long()
        values[flag] = elements(marks.scatter(-1, place, True)[..., :tiles])
    mask = elements(listed & ~masked) | (elements(masked) & _held(launch.rule, values, slab))
    q = slab.rows_of(launch.q_buf).to(slab.dtype)
    k, v = _wide(slab, launch.k_buf, launch.v_buf)
    logits = _logits(launch.rule, q, k, values, slab).masked_fill_(~mask, -torch.inf)
    _finish(launch, softmax(logits, [v]), slab)


def run_gather(launch: GatherLaunch, slab: Slab) -> None:
    """Attend to the keys of each list row, split into parts of whole key tiles if there are
    several."""
    entries = slab.rows_of(launch.list_buf, launch.granule)
    counts = slab.rows_of(launch.count_buf, launch.granule)
    units = -(-slab.env["Skv"] // launch.unit)
    row = slab.arange(slab.rows) // launch.granule
    keys = slab.number(launch.keys)
    key = slab.arange(keys)

    def elements(marks: Tensor) -> Tensor:
        return spread(marks[:, :, row][..., key // launch.unit], slab.env["Hq"])

    numbers = torch.where(entries < 0, 0, entries & TILE_MASK)
    listed = elements(marked(numbers, counts, units))
    slot = _by_unit(slab.arange(entries.shape[-1]).expand_as(entries), numbers, counts, units)
    values = _symbols(slab, keys)
    for n, flag in enumerate(launch.rule.flags):
        bit = (entries >> (TILE_BITS + n)) & 1
        values[flag] = elements(_by_unit(bit.long(), numbers, counts, units) == 1)
    held = listed & _held(launch.rule, values, slab)
    q = slab.rows_of(launch.q_buf).to(slab.dtype)
    k, v = _wide(slab, launch.k_buf, launch.v_buf)
    logits = _logits(launch.rule, q, k, values, slab)
    place = elements(slot) * launch.unit + key % launch.unit
    parts = slab.number(launch.splits)
    stacked = launch.splits != 1
    step = launch.axis("block_k")
    tiles = (-(-counts.long() * launch.unit // (parts * step))).clamp(min=1)
    chunk = spread((tiles * step)[:, :, row], slab.env["Hq"])[..., None]
    results = []
    for part in range(parts):
        inside = held & (place // chunk == part)
        results.append(softmax(logits.masked_fill(~inside, -torch.inf), [v]))
    if stacked:
        for part, (out, lse) in enumerate(results):
            slab.write(f"{launch.out_buf}#{part}", out)
            slab.write(f"{launch.lse_buf}#{part}", lse)
    else:
        _finish(launch, results[0], slab)


def _by_unit(what: Tensor, units: Tensor, counts: Tensor, width: int) -> Tensor:
    """Put what each entry of a list says at its unit: [B,H,N,K] -> int64 [B,H,N,width]."""
    valid = torch.arange(units.shape[-1], device=units.device) < counts[..., None]
    place = torch.where(valid, units.long(), width)
    found = torch.zeros(*units.shape[:3], width + 1, dtype=torch.int64, device=units.device)
    return found.scatter(-1, place, what.long())[..., :width]


def run_keys(launch: KeysLaunch, slab: Slab) -> None:
    """Attend unit by unit: the rows that chose a unit read its keys, each into its own slot."""
    entries, starts = slab.read(launch.entries_buf), slab.read(launch.unit_start_buf)
    part, part_lse = slab.read(launch.part_buf), slab.read(launch.part_lse_buf)
    end = slab.number(launch.keys)
    slots, lists = part.shape[3], entries.shape[1]
    q = slab.rows_of(launch.q_buf).to(slab.dtype)
    k, v = _wide(slab, launch.k_buf, launch.v_buf)
    for b in range(slab.env["B"]):
        for head in range(slab.env["Hq"]):
            listed = min(b, entries.shape[0] - 1), head * lists // slab.env["Hq"]
            kv_head = head * slab.env["Hkv"] // slab.env["Hq"]
            bounds = starts[listed].tolist()
            for unit in range(slab.number(launch.units)):
                chosen = entries[listed][bounds[unit] : bounds[unit + 1]].long()
                if len(chosen) == 0:
                    continue
                row = chosen // slots
                keys = slice(min(unit * launch.unit, end), min((unit + 1) * launch.unit, end))
                values: dict[str, Value] = {
                    "b": b,
                    "h": head,
                    "q": (slab.begin + row)[:, None],
                    "k": slab.arange(end)[keys],
                    "Sq": slab.env["Sq"],
                    "Skv": slab.env["Skv"],
                }
                rows, near, far = q[b, head, row], k[b, kv_head, keys], v[b, kv_head, keys]
                logits = _logits(launch.rule, rows[None, None], near[None, None], values, slab)
                logits.masked_fill_(~_held(launch.rule, values, slab), -torch.inf)
                out, lse = softmax(logits, [far[None, None]])
                part[b, head, row, chosen % slots] = out[0, 0].to(part.dtype)
                part_lse[b, head, row, chosen % slots] = lse[0, 0]


def run_merge(launch: MergeLaunch, slab: Slab) -> None:
    """Join parts by their LSE or by gates; a part that a row does not have is not read."""
    part_lse = slab.read(launch.part_lse_buf)
    part = slab.read(launch.part_buf).to(part_lse.dtype)
    if launch.part_axis == 3:
        part, part_lse = part.movedim(3, 0), part_lse.movedim(3, 0)
    if launch.count_buf:
        counts = spread(slab.rows_of(launch.count_buf), slab.env["Hq"])
        there = slab.arange(part.shape[0])[:, None, None, None] < counts
        part = torch.where(there[..., None], part, 0.0)
        part_lse = torch.where(there, part_lse, -torch.inf)
    if part.shape[0] == 0:  # no row keeps a unit: one part in which nothing is
        part, part_lse = (
            part.new_zeros(1, *part.shape[1:]),
            part_lse.new_full((1, *part_lse.shape[1:]), -torch.inf),
        )
    results = list(zip(part, part_lse, strict=True))
    if launch.gates_buf:
        joined = gated(results, slab.rows_of(launch.gates_buf).to(part.dtype))
    else:
        joined = merged(results)
    _finish(launch, joined, slab)


def _finish(launch: AttendLaunch | GatherLaunch | MergeLaunch, result: Result, slab: Slab) -> None:
    """Write a result, beside its sinks where the launch has them."""
    if launch.sinks_buf:
        result = beside_sinks(result, slab.read(launch.sinks_buf))
    slab.write(launch.out_buf, result[0])
    slab.write(launch.lse_buf, result[1])
