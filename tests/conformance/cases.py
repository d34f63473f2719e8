"""What every backend is tried on: patterns, awkward shapes, layouts, and how results are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.backends import registry
from spcomp.backends.reference.pattern import lists
from spcomp.compiler import DECODE_ROWS
from spcomp.dsl import Pattern
from spcomp.errors import SpcompError
from spcomp.ir.nodes import Captured, TopP
from spcomp.patterns import block_topk, moba, quest, streaming_llm, xattention
from tests import oracle

PROBES = 8
"""Columns of v beside the identity: with that, the output shows which keys a row read."""


# ---- backends ------------------------------------------------------------------------------------


ON_CPU = ("reference", "ascendc")


def device_of(backend: str) -> str:
    """Give the device a backend is tried on."""
    return "cuda" if torch.cuda.is_available() and backend not in ON_CPU else "cpu"


def why_not(backend: str) -> str | None:
    """Say why a backend cannot run here, or None."""
    try:
        registry.backend(backend).target_of(device_of(backend))
    except SpcompError as error:
        return str(error)
    return None


LACKS = {
    "ascendc": {
        "quest": "the ascendc backend refuses pooling by minmax",
        "quest-shared": "the ascendc backend refuses pooling by minmax",
        "streaming_llm": "this backend has no kernel tiles, attend",
        "xattention": "this backend has no kernel topp",
        "overlapping": "this backend has no kernel part_lse",
        "dense": "this backend has no kernel tiles, attend",
        "documents": "this backend has no kernel tiles, attend",
        "per_head": "this backend has no kernel tiles, attend",
        "union": "this backend has no kernel tiles, attend",
        "intersection": "the ascendc backend refuses scores with heads='all'",
        "softcapped": "this backend has no kernel tiles, attend",
        "merged": "this backend has no kernel tiles, attend",
        "given": "the ascendc backend refuses the pattern's own tensor table0_list",
        "sunk": "the ascendc backend refuses sink logits",
        "sunk-lists": "the ascendc backend refuses sink logits",
        "sunk-merge": "this backend has no kernel tiles, attend",
        "query_major": "this backend has no kernel tiles, attend",
        "key_major": "this backend has no kernel invert_count",
    }
}
"""What a backend refuses by name: a pattern of PATTERNS or a loop order, and what it says."""


def refuses(backend: str, name: str, call: Callable[[], object]) -> bool:
    """Tell whether a backend lacks what a pattern needs: it says so, or nothing is called."""
    said = LACKS.get(backend, {}).get(name)
    if said is None:
        return False
    with pytest.raises(SpcompError) as caught:
        call()
    assert said in str(caught.value)
    return True


# ---- patterns ------------------------------------------------------------------------------------


@sp.pattern
def dense(q, k, v):
    return sp.attend(q, k, v)


@sp.pattern
def bidirectional(q, k, v):
    best = sp.topk(sp.score(q, sp.downsample(k, block=16), mask=None), k=2)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best), mask=None)


def documents(case: Case) -> Pattern:
    """Make packed documents whose ends divide no block; the tables hold what there is, no more."""
    names_q, names_k = torch.arange(case.sq) // 23, torch.arange(case.skv) // 23

    @sp.pattern
    def packed(q, k, v):
        rule = sp.mask_mod(lambda b, h, q_idx, kv_idx: names_q[q_idx] == names_k[kv_idx])
        return sp.attend(q, sp.gather(k, rule), sp.gather(v, rule))

    return packed()


@sp.pattern
def per_head(q, k, v):
    stride = torch.tensor([3, 5, 2, 7, 4, 6])
    rule = sp.mask_mod(lambda b, h, q_idx, kv_idx: (q_idx + kv_idx + b) % stride[h] == 0)
    return sp.attend(q, sp.gather(k, rule), sp.gather(v, rule))


@sp.pattern
def overlapping(q, k, v):
    """Choose blocks by the probabilities of overlapping units, as NSA does, of whole KV groups."""
    units = sp.downsample(k, block=8, stride=4, tail="drop")
    chances = sp.softmax(sp.score(q, units), heads="group")
    best = sp.topk(sp.regroup(chances, block=16), k=2, always=sp.own())
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


@sp.pattern
def union(q, k, v):
    rows, units = (sp.downsample(x, block=32) for x in (q, k))
    best = sp.topk(sp.score(rows, units, heads="group", reduce="max"), k=1)
    chosen = best | sp.window(9) | sp.sink(3)
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))


@sp.pattern
def intersection(q, k, v):
    best = sp.topk(sp.score(q, sp.downsample(k, block=16, by="max"), heads="all"), k=3)
    chosen = best & sp.window(40)
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))


@sp.pattern
def softcapped(q, k, v):
    def hook(score, b, h, q_idx, kv_idx):
        return torch.tanh(score / 3.0) * 3.0 - 0.01 * torch.abs(q_idx - kv_idx) * (h + 1)

    near = sp.window(50)
    return sp.attend(q, sp.gather(k, near), sp.gather(v, near), scale=0.2, score_mod=hook)


@sp.pattern
def merged(q, k, v):
    even = sp.window(30) & sp.mask_mod(lambda b, h, q_idx, kv_idx: kv_idx % 2 == 0)
    odd = sp.mask_mod(lambda b, h, q_idx, kv_idx: kv_idx % 2 == 1)
    first = sp.attend(q, sp.gather(k, even), sp.gather(v, even))
    return sp.merge(first, sp.attend(q, sp.gather(k, odd), sp.gather(v, odd)))


def given(case: Case) -> Pattern:
    """Make a block mask the user brings, some of whose rows and heads mark nothing."""
    shape = case.b, case.hkv, -(-case.sq // 16), -(-case.skv // 32)
    marks = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.5

    @sp.pattern
    def marked(q, k, v):
        chosen = sp.block_mask(marks, block=(16, 32))
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))

    return marked()


def sinks_of(case: Case) -> Tensor:
    """Draw sink logits that leave each key a weight to be seen by, exact in half precision; the
    first one is none."""
    logits = 5 * torch.rand(case.hq, generator=torch.Generator().manual_seed(6)) - 3
    logits[0] = -torch.inf
    return logits.half().float()


def sunk(case: Case) -> Pattern:
    """Make lists beside sink logits."""
    logits = sinks_of(case)

    @sp.pattern
    def beside_sinks(q, k, v):
        rows, units = (sp.downsample(x, block=16) for x in (q, k))
        best = sp.topk(sp.score(rows, units, heads="group"), k=2, always=sp.own())
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best), sinks=logits)

    return beside_sinks()


def sunk_lists(case: Case) -> Pattern:
    """Make a list for each query beside sink logits of half precision."""
    logits = sinks_of(case).half()

    @sp.pattern
    def beside_sinks(q, k, v):
        best = sp.topk(sp.score(q, sp.downsample(k, block=16)), k=2, always=sp.own())
        return sp.attend(q, sp.gather(k, best), sp.gather(v, best), sinks=logits)

    return beside_sinks()


def sunk_merge(case: Case) -> Pattern:
    """Make two disjoint sets of keys that share one softmax, and its sinks."""
    logits = sinks_of(case)

    @sp.pattern
    def merged_beside_sinks(q, k, v):
        parts = []
        for n in range(2):
            rule = sp.window(30) & sp.mask_mod(lambda b, h, q_idx, kv_idx, n=n: kv_idx % 2 == n)
            parts.append(sp.attend(q, sp.gather(k, rule), sp.gather(v, rule)))
        return sp.merge(*parts, sinks=logits)

    return merged_beside_sinks()


@sp.pattern
def coarse_and_near(q, k, v):
    """One softmax over the near tokens and all pooled units."""
    units = sp.stream(sp.downsample(k, block=8), sp.downsample(v, block=8))
    return sp.attend(q, [sp.gather(sp.stream(k, v), sp.window(5)), units])


@sp.pattern
def compressed_and_near(q, k, v):
    """Merge NSA's compressed branch, whose units overlap, with a window."""
    units = (sp.downsample(x, block=32, stride=16, tail="drop") for x in (k, v))
    near = sp.attend(q, sp.gather(k, sp.window(5)), sp.gather(v, sp.window(5)))
    return sp.merge(sp.attend(q, *units), near)


POOLED: dict[str, tuple[Pattern, tuple[int, int, bool]]] = {
    "coarse_and_near": (coarse_and_near(), (8, 8, True)),
    "compressed_and_near": (compressed_and_near(), (32, 16, False)),
}
"""Patterns that also see a window of 5 tokens, and the block, stride and short tail of their
units."""


# ---- shapes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    b: int
    hq: int
    hkv: int
    sq: int
    skv: int
    d: int
    dtype: torch.dtype = torch.float32
    layout: str = "plain"
    columns: int = 0
    """Of v; 0 for as many as it needs."""

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"b{self.b}-h{self.hq}:{self.hkv}-s{self.sq}x{self.skv}-d{self.d}-{kind}-{self.layout}"
        )

    def tensors(self, device: str, *, probe: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Draw q and k, and make v the identity beside a few random columns."""
        q = self._laid_out(torch.randn(self.b, self.hq, self.sq, self.d))
        k = self._laid_out(torch.randn(self.b, self.hkv, self.skv, self.d))
        spare = self.columns - self.skv * probe if self.columns else PROBES
        columns = torch.randn(self.b, self.hkv, self.skv, spare)
        eye = torch.eye(self.skv).expand(self.b, self.hkv, -1, -1)
        v = self._laid_out(torch.cat([eye, columns], dim=-1) if probe else columns)
        return q.to(device), k.to(device), v.to(device)

    def _laid_out(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.layout == "swapped":  # [B, S, H, D] in memory
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "sliced":  # a part of a longer cache
            longer = torch.full((*x.shape[:2], x.shape[2] + 7, x.shape[3] + 16), torch.nan)
            held = longer.to(x.dtype)[:, :, 3 : 3 + x.shape[2], 16 : 16 + x.shape[3]]
            return held.copy_(x)
        return x


CASES = (
    Case(2, 4, 2, 1, 77, 32, torch.bfloat16),
    Case(1, 3, 1, 40, 40, 80),
    Case(1, 2, 2, 1, 1, 16, torch.float16),
    Case(1, 4, 2, 50, 33, 40, torch.float16, "sliced"),
    Case(2, 3, 3, 18, 50, 17, torch.float32, "swapped"),
    Case(1, 6, 1, 4, 100, 64, torch.bfloat16, "swapped"),
    Case(1, 4, 2, 33, 33, 16, torch.bfloat16),
)
COMPRESSED = (
    Case(1, 4, 2, 30, 44, 16),
    Case(2, 3, 1, 1, 77, 80, torch.bfloat16),
    Case(3, 6, 2, 20, 31, 40, torch.float16, "sliced"),
    Case(1, 4, 4, 50, 33, 17, torch.float32, "swapped"),
)
"""For streams of units, whose values are pooled too: an identity in v would not show what was
read."""
LONGER = (
    Case(1, 6, 2, 130, 130, 80, torch.bfloat16),
    Case(2, 4, 4, 200, 240, 128, torch.float16, "swapped"),
)
INTERPRETED = 2
"""Cases a pattern is tried on where a backend is interpreted, a thousand times slower than a
card."""


PATTERNS: dict[str, Callable[[Case], Pattern]] = {
    "block_topk": lambda _: block_topk(block=32, budget=0.5),
    "block_topk-few": lambda _: block_topk(block=16, budget=2, sinks=1, locals=1),
    "moba": lambda _: moba(block=16, k_blocks=3),
    "moba-wide": lambda _: moba(block=64, k_blocks=1),
    "quest": lambda _: quest(page=16, budget=48),
    "quest-shared": lambda _: quest(page=8, budget=24, heads="group"),
    "streaming_llm": lambda _: streaming_llm(sinks=4, recent=20),
    "xattention": lambda _: xattention(block=16, stride=4, threshold=0.6),
    "overlapping": lambda _: overlapping(),
    "dense": lambda _: dense(),
    "bidirectional": lambda _: bidirectional(),
    "documents": documents,
    "per_head": lambda _: per_head(),
    "union": lambda _: union(),
    "intersection": lambda _: intersection(),
    "softcapped": lambda _: softcapped(),
    "merged": lambda _: merged(),
    "given": given,
    "sunk": sunk,
    "sunk-lists": sunk_lists,
    "sunk-merge": sunk_merge,
}


SPECIALISED = {
    "block_topk": (torch.bfloat16, 80),
    "moba-wide": (torch.bfloat16, 128),
}
"""Dtype and head dimension of the patterns that a cube core runs in others than float16 and 64."""

COLUMNS = 128
"""Of v, where kernels are specialised for seconds: one number that all short cases fit in."""

DECODED = ("block_topk-few",)
"""Patterns that are tried in decode too where kernels are compiled for seconds."""


def adapted(backend: str, case: Case, name: str = "") -> Case:
    """Give a case in a dtype and head dimensions that a backend has; lengths and layout stay."""
    if backend != "ascendc":
        return case
    dtype, d = SPECIALISED.get(name, (torch.float16, 64))
    return replace(case, dtype=dtype, d=d, columns=COLUMNS)


def cases_of(backend: str, name: str) -> tuple[Case, ...]:
    """Give the cases to try a pattern on; patterns take turns where a backend is slow."""
    if backend == "ascendc":
        fit = [c for c in CASES if c.sq > DECODE_ROWS or name in DECODED]
        most = 1 if name in LACKS[backend] else len(fit)
        return tuple(adapted(backend, case, name) for case in fit[:most])
    if device_of(backend) != "cpu" or backend == "reference":
        return (*CASES, *LONGER)
    first = list(PATTERNS).index(name)
    return tuple(CASES[(first + 3 * n) % len(CASES)] for n in range(INTERPRETED))


def rule_of(name: str, case: Case) -> dict[str, Any]:
    """Give the scale, the hook and the sinks of a pattern, for the oracle."""
    if name.startswith("sunk"):
        return {"sinks": sinks_of(case)}
    if name != "softcapped":
        return {}
    heads, rows, keys = (torch.arange(n) for n in (case.hq, case.sq, case.skv))
    distance = (rows[:, None] - keys[None, :]).abs()

    def hook(logits: Tensor) -> Tensor:
        slope = (0.01 * distance * (heads[:, None, None] + 1)).to(logits.dtype)
        return torch.tanh(logits / 3.0) * 3.0 - slope

    return {"scale": 0.2, "hook": hook}


# ---- judging -------------------------------------------------------------------------------------


def read_keys(out: Tensor, skv: int) -> Tensor:
    """Give the pairs a run read, from an output whose v began with the identity."""
    return out[..., :skv] > 0


def assert_same_selection(
    pattern: Pattern, q: Tensor, k: Tensor, got: Tensor, want: Tensor
) -> None:
    """Check two masks; a list may swap units whose scores differ by less than their error.

    Only a pattern with one list can swap: where units differ, as many are kept, and their scores in
    float64 lie within the rounding of the dtype of each other. A list of a share may also end
    earlier or later, where the sums it stands for are within rounding of the goal.
    """
    if torch.equal(got, want):
        return
    exact = {"q": q.double(), "k": k.double(), "v": k.double(), **pattern.tensors}
    found = lists(pattern.program, exact)
    assert len(found) == 1, f"{int((got != want).sum())} pairs differ"
    scores = found[0].scores
    granule, unit = -(-q.shape[2] // scores.shape[2]), -(-k.shape[2] // scores.shape[3])
    allowed = 8 * torch.finfo(q.dtype).eps * float(scores.abs().max())
    for b, h, row in (got != want).any(-1).nonzero().tolist():
        columns = [m[b, h, row].split(unit) for m in (got, want)]
        kept = [torch.stack([c.any() for c in part]) for part in columns]
        differ = kept[0] != kept[1]
        mine = scores[b, h * scores.shape[1] // q.shape[1], row // granule][differ]
        if isinstance(found[0].node, TopP):
            head, line = h * scores.shape[1] // q.shape[1], row // granule
            assert_ends_nearby(found[0].node, pattern, kept, scores[b, head, line], head)
            continue
        assert int(kept[0].sum()) == int(kept[1].sum()), (b, h, row)
        assert float(mine.max() - mine.min()) <= allowed, (b, h, row, mine)


def assert_ends_nearby(
    node: TopP, pattern: Pattern, kept: list[Tensor], scores: Tensor, head: int
) -> None:
    """Check two choices of one row: what they hold apart weighs no more than rounding, or where one
    goes on the other has reached the goal within rounding."""
    p = node.p
    if isinstance(node.p_by_head, Captured):
        p = float(pattern.tensors[node.p_by_head.name][head])
    assert p is not None
    counted = torch.where(scores.isfinite(), scores, 0.0)
    total = float(counted.sum())
    held = [float(counted[k].sum()) for k in kept]
    slack = 1e-5 * total
    assert abs(held[0] - held[1]) <= slack or min(abs(x - p * total) for x in held) <= slack, held


def assert_within(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    **rule: Any,
) -> None:
    """Check out and lse against the oracle, within twice the error of plain PyTorch."""
    want, want_lse = oracle.attention(q, k, v, mask, **rule)
    budget, _ = oracle.budgets(q, k, v, mask, **rule)
    single = (x.float() for x in (q, k, v))
    _, budget_lse = oracle.budgets(*single, mask, **rule)
    assert oracle.error(out, want) <= budget
    # Logits and their sum are float32 whatever the inputs, so is the error of the lse.
    assert oracle.error(lse, want_lse) <= max(budget_lse, 1e-5)
