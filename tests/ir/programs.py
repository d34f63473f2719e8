"""Programs and plans the tests of the IR share: the shipped patterns and one of every stage."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spcomp.dsl import (
    Pattern,
    attend,
    block_indices,
    block_mask,
    causal,
    downsample,
    everything,
    gather,
    local,
    mask_mod,
    merge,
    own,
    pattern,
    regroup,
    score,
    sink,
    softmax,
    stream,
    tensor,
    topk,
    topp,
    window,
)
from spcomp.ir.passes import PATTERN_PIPELINE, cut
from spcomp.ir.plan import LoopOrder, Phase, Plan
from spcomp.ir.program import Program
from spcomp.ir.schedule import Schedule, frozen
from spcomp.patterns import block_topk, moba, quest, streaming_llm, xattention

# Fixed here, so that tuning the defaults of a backend changes no expectation.
AXES: Mapping[str, Mapping[str, int]] = {
    "attend": {"block_q": 64, "block_k": 64, "warps": 4, "stages": 2},
    "attend_gather": {
        "block_m": 16, "block_k": 32, "programs": 8, "max_splits": 4, "warps": 4, "stages": 2,
    },
    "attend_keys": {"block_m": 32, "block_k": 32, "warps": 4, "stages": 2},
    "merge": {"block_r": 4, "block_p": 4, "warps": 4, "stages": 2},
    "pool": {"unit_tile": 1, "token_tile": 32, "warps": 4, "stages": 2},
    "select": {"block_r": 16, "block_u": 32, "warps": 4, "stages": 2},
    "score": {"block_r": 16, "block_u": 32, "warps": 4, "stages": 2},
    "topk": {"block_u": 1024, "warps": 4, "stages": 1},
    "topp": {"block_u": 1024, "warps": 4, "stages": 1},
    "part_lse": {"block_r": 16, "block_u": 32, "part": 16, "tiles": 1, "warps": 4, "stages": 2},
    "row_lse": {"block_r": 4, "block_n": 32, "warps": 4, "stages": 1},
    "block_sums": {"block_r": 4, "block_n": 32, "warps": 4, "stages": 1},
    "block_scores": {"block_r": 16, "block_n": 16, "warps": 4, "stages": 2},
    "tiles": {"chunk": 64, "warps": 4, "stages": 1},
    "invert_count": {"rows": 32, "block_u": 32, "warps": 4, "stages": 1},
    "invert_scan": {"block": 64, "warps": 4, "stages": 1},
    "invert_fill": {"rows": 32, "block_u": 32, "warps": 4, "stages": 1},
}  # fmt: skip
SCHEDULE = Schedule("query_major", frozen(AXES))
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@pattern
def documents(q, k, v, *, starts, width=40):
    """A window that stays inside documents, through a captured table."""
    same = mask_mod(lambda b, h, i, j: starts[i] == starts[j])
    return attend(q, gather(k, window(width) & same), gather(v, window(width) & same))


@pattern
def two_lists(q, k, v, *, block=32):
    """Two lists of different units, a sink and a rule in one selection."""
    rows = downsample(q, block=64)
    fine = topk(score(rows, downsample(k, block=block)), k=2, always=own())
    coarse = topk(score(rows, downsample(k, block=2 * block, by="max")), fraction=0.3)
    far = mask_mod(lambda b, h, i, j: (i - j) % 3 != 1)
    chosen = (fine | coarse | sink(4)) & far
    return attend(q, gather(k, chosen), gather(v, chosen))


@pattern
def hooked(q, k, v, *, slopes):
    """A score hook with a table and an infinity, no mask, a scale of its own."""

    def hook(s, b, h, i, j):
        return torch.where(i >= j, s - slopes[h] * abs(i - j), -float("inf"))

    return attend(q, k, v, mask=None, scale=0.25, score_mod=hook)


@pattern
def joined(q, k, v):
    """Two results joined by their LSE, one nested."""
    near = attend(q, gather(k, window(16)), gather(v, window(16)))
    far = mask_mod(lambda b, h, i, j: j <= i - 16)
    rest = attend(q, gather(k, far), gather(v, far))
    return merge(near, merge(rest))


@pattern
def gated(q, k, v, gates: tensor("B Hq Sq 2")):
    """Two results joined by gates of the call, one of them a join by LSE."""
    near = attend(q, gather(k, window(16)), gather(v, window(16)))
    return merge(joined(q, k, v), near, gates=gates)


@pattern
def indexed(
    q, k, v, iq: tensor("B 6 Sq 5", dtype="float32"), ik: tensor("B 1 Skv 5", dtype="float32")
):
    """Units chosen by heads and keys of an indexer, one list for all heads."""
    best = topk(score(iq, downsample(ik, block=16), heads="all", reduce="sum"), k=2)
    return attend(q, gather(k, best), gather(v, best))


@pattern
def weighed(q, k, v, iq: tensor("B 6 Sq 5"), ik: tensor("B 1 Skv 5"), iw: tensor("B 6 Sq")):
    """Tokens chosen by weighed heads of an indexer, one list for all heads."""
    scores = score(iq, ik, activation="relu", weights=iw, heads="all", reduce="sum")
    best = topk(scores, k=5)
    return attend(q, gather(k, best), gather(v, best))


@pattern
def listed(q, k, v, *, indices, counts):
    """A list the user brings, under the causal rule."""
    chosen = block_indices(indices, counts, block=(16, 32)) & causal()
    return attend(q, gather(k, chosen), gather(v, chosen), mask=None)


@pattern
def marked(q, k, v, *, marks):
    """A block mask the user brings."""
    chosen = block_mask(marks, block=32) | local(1)
    return attend(q, gather(k, chosen), gather(v, chosen))


@pattern
def pooled_stream(q, k, v):
    """One softmax over the nearest tokens and all pooled units."""
    units = stream(downsample(k, block=8), downsample(v, block=8))
    return attend(q, [gather(stream(k, v), window(8)), gather(units, everything())])


@pattern
def sunk(q, k, v, *, logits):
    """A window beside sink logits."""
    return attend(q, gather(k, window(16)), gather(v, window(16)), sinks=logits)


@pattern
def sunk_lists(q, k, v, *, logits):
    """A list for each query beside sink logits."""
    best = topk(score(q, downsample(k, block=16)), k=2, always=own())
    return attend(q, gather(k, best), gather(v, best), sinks=logits)


@pattern
def sunk_merge(q, k, v, *, logits):
    """Two results that share one softmax and its sink logits, one nested."""
    near = attend(q, gather(k, window(16)), gather(v, window(16)))
    far = mask_mod(lambda b, h, i, j: j <= i - 16)
    return merge(near, merge(attend(q, gather(k, far), gather(v, far))), sinks=logits)


@pattern
def overlapping(q, k, v, *, block=8, by="sum", heads="group", reduce="sum", rows=1):
    """NSA's importance: overlapping units, summed over a group, weighed onto blocks."""
    units = downsample(k, block=block, stride=4, tail="drop")
    chances = softmax(score(q, units), heads=heads, reduce=reduce)
    best = topk(regroup(chances, block=16, by=by, rows=rows), k=3, always=sink(1) | local(1))
    return attend(q, gather(k, best), gather(v, best))


@pattern
def foreign_sum(q, k, v):
    """InfLLM-V2's: divided by the sum over coarser units, the highest unit of a block counts."""
    fine = downsample(k, block=8, stride=4, tail="drop")
    coarse = downsample(k, block=32, stride=16, tail="drop")
    chances = softmax(score(q, fine), over=score(q, coarse), heads="group")
    best = topk(regroup(chances, block=16, by="max"), k=3, always=sink(1) | local(1))
    return attend(q, gather(k, best), gather(v, best))


@pattern
def highest(q, k, v):
    """Plain scores, by their bound, the highest of a block and of its heads."""
    pages = downsample(k, block=8, by="minmax")
    pooled = regroup(score(q, pages, heads="group", reduce="max"), block=16, rows=16, by="max")
    best = topk(pooled, k=2)
    return attend(q, gather(k, best), gather(v, best))


@pattern
def shares(q, k, v):
    """A share of the softmax of pooled blocks, without what would pass it."""
    rows, units = (downsample(x, block=16) for x in (q, k))
    best = topp(softmax(score(rows, units)), p=0.7, crossing="drop", least=2, always=local(1))
    return attend(q, gather(k, best), gather(v, best))


def _indices() -> tuple[Tensor, Tensor]:
    indices = torch.tensor([[0, 2, -1], [1, -1, -1], [0, 1, 3], [3, -1, -1], [0, 2, 3]])
    counts = (indices >= 0).sum(-1)
    shape = (1, 1, *indices.shape)
    return indices.reshape(shape).int(), counts.reshape(shape[:3]).int()


def patterns() -> dict[str, Pattern]:
    """Give small patterns that hold every stage between them, for 70 tokens and 4 query heads."""
    indices, counts = _indices()
    starts = torch.arange(70) // 30
    marks = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    logits = torch.tensor([0.5, -torch.inf, 3.0, -1.0])
    return {
        "block_topk": block_topk(block=16, budget=0.5),
        "block_topk-count": block_topk(block=32, budget=2, sinks=0, locals=1),
        "moba": moba(block=64, k_blocks=1),
        "moba-small": moba(block=16, k_blocks=2),
        "quest": quest(page=16, budget=32),
        "quest-group": quest(page=4, budget=12, heads="group"),
        "streaming_llm": streaming_llm(sinks=4, recent=20),
        "documents": documents(starts=starts),
        "two_lists": two_lists(),
        "hooked": hooked(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
        "joined": joined(),
        "gated": gated(),
        "indexed": indexed(),
        "weighed": weighed(),
        "listed": listed(indices=indices, counts=counts),
        "marked": marked(marks=marks),
        "pooled_stream": pooled_stream(),
        "sunk": sunk(logits=logits),
        "sunk_lists": sunk_lists(logits=logits),
        "sunk_merge": sunk_merge(logits=logits),
        "xattention": xattention(block=16, stride=4, threshold=0.7),
        "xattention-heads": xattention(block=16, stride=8, threshold=SHARES),
        "overlapping": overlapping(),
        "foreign_sum": foreign_sum(),
        "highest": highest(),
        "shares": shares(),
    }


SHARES = torch.tensor([0.0, 0.5, 0.9, 1.0])
PATTERNS = patterns()
NO_PLAN = {"marked"}  # block masks become lists in `compile`
LOWERED = [name for name in PATTERNS if name not in NO_PLAN]


def normal(name: str) -> Program:
    """Give a program after the passes of the pattern level."""
    program = PATTERNS[name].program
    for step in PATTERN_PIPELINE:
        program = step(program)
    return program


def plan_of(name: str, phase: Phase = "prefill", order: LoopOrder | None = None) -> Plan:
    """Lower one of the patterns."""
    return cut(normal(name), phase, SCHEDULE, order)


def tensors(sq: int = 70, skv: int = 70, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Draw q [2,4,sq,8], k [2,2,skv,8] and v [2,2,skv,12], and what some patterns take besides:
    gates [2,4,sq,2], iq [2,6,sq,5], ik [2,1,skv,5] and iw [2,6,sq]."""
    made = torch.Generator().manual_seed(1)
    sizes = {"q": (2, 4, sq, 8), "k": (2, 2, skv, 8), "v": (2, 2, skv, 12)}
    sizes |= {"gates": (2, 4, sq, 2), "iq": (2, 6, sq, 5), "ik": (2, 1, skv, 5)}
    sizes |= {"iw": (2, 6, sq)}
    return {n: torch.randn(s, generator=made, dtype=dtype) for n, s in sizes.items()}
