"""Whole patterns, shapes and layouts drawn at random, and an oracle that knows what they mean.

A drawn selection is a small tree of our own. It is built twice: with the verbs of the language, and
as a dense mask with plain loops and comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import spcomp as sp
from spcomp.dsl import Pattern
from spcomp.ir.nodes import Node, Selection
from tests import oracle

Sel = Selection


# ---- calls ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """The shape of a call, how its tensors lie in memory, and the seed of their values."""

    b: int
    group: int
    hkv: int
    sq: int
    skv: int
    d: int
    layout: str
    seed: int

    @property
    def hq(self) -> int:
        return self.group * self.hkv

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw q, k, v in float64."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int, tokens: int, width: int) -> Tensor:
            shape = (self.b, heads, tokens, width)
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            if self.layout == "swapped":
                return x.transpose(1, 2).contiguous().transpose(1, 2)
            if self.layout == "padded":
                return torch.nn.functional.pad(x, (0, 3, 2, 1), value=torch.nan)[
                    :, :, 2 : 2 + tokens, :width
                ]
            return x

        return (
            draw(self.hq, self.sq, self.d),
            draw(self.hkv, self.skv, self.d),
            draw(self.hkv, self.skv, 5),
        )


calls = st.builds(
    Call,
    b=st.integers(1, 2),
    group=st.integers(1, 3),
    hkv=st.integers(1, 2),
    sq=st.integers(1, 40),
    skv=st.integers(1, 50),
    d=st.integers(1, 9),
    layout=st.sampled_from(["plain", "swapped", "padded"]),
    seed=st.integers(0, 2**20),
)


# ---- selections ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    size: int

    def build(self, q: Node, k: Node) -> Sel:
        return sp.window(self.size)

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        return oracle.window_mask(q.shape[2], k.shape[2], self.size)


@dataclass(frozen=True)
class Sink:
    count: int

    def build(self, q: Node, k: Node) -> Sel:
        return sp.sink(self.count)

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.arange(k.shape[2])[None, :] < self.count


@dataclass(frozen=True)
class Rule:
    """A mask_mod: (a*q + b*k + h + item) % m in [low, m)."""

    a: int
    b: int
    m: int
    low: int

    def _holds(self, item: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (self.a * q + self.b * k + h + item) % self.m >= self.low

    def build(self, q: Node, k: Node) -> Sel:
        return sp.mask_mod(self._holds)

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        return self._holds(*torch.meshgrid(*map(torch.arange, sizes), indexing="ij"))


@dataclass(frozen=True)
class Listed:
    """A block mask of the user's, drawn from a seed; heads "one", "kv" or "query"."""

    rows: int
    unit: int
    heads: str
    seed: int
    call: Call

    @property
    def marks(self) -> Tensor:
        heads = {"one": 1, "kv": self.call.hkv, "query": self.call.hq}[self.heads]
        shape = 1, heads, -(-self.call.sq // self.rows), -(-self.call.skv // self.unit)
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.seed)) < 0.4

    def build(self, q: Node, k: Node) -> Sel:
        return sp.block_mask(self.marks, block=(self.rows, self.unit))

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        per_list = q.shape[1] // self.marks.shape[1]
        wide = self.marks.repeat_interleave(per_list, 1)
        wide = wide.repeat_interleave(self.rows, 2).repeat_interleave(self.unit, 3)
        return wide[:, :, : q.shape[2], : k.shape[2]]


@dataclass(frozen=True)
class TopK:
    """The best units of each row of `rows` queries (1: each query its own list)."""

    rows: int
    unit: int
    by: str
    heads: str
    reduce: str
    k: int
    sinks: int
    nearest: int

    def build(self, q: Node, k: Node) -> Sel:
        side = q if self.rows == 1 else sp.downsample(q, block=self.rows)
        units = sp.downsample(k, block=self.unit, by=self.by)
        always = [sp.sink(self.sinks)] if self.sinks else []
        always += [sp.local(self.nearest)] if self.nearest else []
        ranked = sp.score(side, units, heads=self.heads, reduce=self.reduce)
        return sp.topk(ranked, k=self.k + self.sinks + self.nearest, always=always)

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        lists, scores = self._scores(q, k)
        (b, hq, sq, _), skv = q.shape, k.shape[2]
        mask = torch.zeros(b, hq, sq, skv, dtype=torch.bool)
        for item in range(b):
            for head in range(hq):
                for row in range(scores.shape[2]):
                    first, last = row * self.rows, min((row + 1) * self.rows, sq) - 1
                    values = scores[item, head * lists // hq, row].tolist()
                    for u in self._kept(values, first + skv - sq, last + skv - sq, skv):
                        keys = slice(u * self.unit, (u + 1) * self.unit)
                        mask[item, head, first : last + 1, keys] = True
        return mask

    def _kept(self, values: list[float], t_lo: int, t_hi: int, skv: int) -> set[int]:
        begun = [u for u in range(len(values)) if u * self.unit <= t_hi]
        forced = {u for u in begun if u < self.sinks}
        if self.nearest:
            forced |= {u for u in begun if u > math.floor(t_lo / self.unit) - self.nearest}
        able = oracle.complete_units(t_hi, self.unit, skv)
        return oracle.choose(values, able, forced, self.k + self.sinks + self.nearest)

    def _scores(self, q: Tensor, k: Tensor) -> tuple[int, Tensor]:
        hkv, group = k.shape[1], q.shape[1] // k.shape[1]
        rows = oracle.pooled(q, self.rows, oracle.mean)
        pool: dict[str, Callable[[Tensor], Tensor]] = {
            "mean": oracle.mean,
            "max": lambda x: x.amax(dim=2),
            "min": lambda x: x.amin(dim=2),
        }

        def units(by: str) -> Tensor:
            return oracle.pooled(k, self.unit, pool[by]).repeat_interleave(group, dim=1)

        if self.by == "minmax":
            low, high = units("min")[:, :, None], units("max")[:, :, None]
            by_head = torch.maximum(rows[:, :, :, None] * low, rows[:, :, :, None] * high).sum(-1)
        else:
            by_head = rows @ units(self.by).transpose(-1, -2)
        if self.heads == "query":
            return q.shape[1], by_head
        lists = hkv if self.heads == "group" else 1
        grouped = by_head.unflatten(1, (lists, -1))
        joined = {"mean": grouped.mean(2), "sum": grouped.sum(2), "max": grouped.amax(2)}
        return lists, joined[self.reduce]


@dataclass(frozen=True)
class Both:
    """Two selections joined by | or &."""

    union: bool
    left: Tree
    right: Tree

    def build(self, q: Node, k: Node) -> Sel:
        left, right = self.left.build(q, k), self.right.build(q, k)
        return left | right if self.union else left & right

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        left, right = self.left.mask(q, k), self.right.mask(q, k)
        return left | right if self.union else left & right


Tree = Window | Sink | Rule | Listed | TopK | Both


def trees(call: Call, sizes: st.SearchStrategy[int] | None = None) -> st.SearchStrategy[Tree]:
    """Draw selections for a call; `sizes` draws the tokens of rows and units (default: any)."""
    sizes = st.integers(1, 20) if sizes is None else sizes
    rules = st.builds(
        Rule, st.integers(-2, 2), st.integers(-2, 2), st.integers(2, 5), st.integers(0, 2)
    )
    listed = st.builds(
        Listed,
        sizes,
        sizes,
        st.sampled_from(["one", "kv", "query"]),
        st.integers(0, 99),
        st.just(call),
    )
    ranked = st.builds(
        TopK,
        rows=st.one_of(st.just(1), sizes),
        unit=sizes,
        by=st.sampled_from(["mean", "max", "min", "minmax"]),
        heads=st.sampled_from(["query", "group", "all"]),
        reduce=st.sampled_from(["mean", "sum", "max"]),
        k=st.integers(0, 4),
        sinks=st.integers(0, 2),
        nearest=st.integers(0, 2),
    )
    leaves = st.one_of(
        ranked,
        st.builds(Window, st.integers(1, 60)),
        st.builds(Sink, st.integers(0, 20)),
        rules,
        listed,
    )
    return st.recursive(leaves, lambda t: st.builds(Both, st.booleans(), t, t), max_leaves=4)


def pattern_of(tree: Tree, causal: bool, sinks: Tensor | None = None) -> Pattern:
    """Make the pattern that attends to a drawn selection, beside sink logits [Hq] if any."""

    @sp.pattern
    def drawn(q, k, v):
        chosen = tree.build(q, k)
        rule = "causal" if causal else None
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen), mask=rule, sinks=sinks)

    return drawn()


def dense_mask(tree: Tree, causal: bool, q: Tensor, k: Tensor) -> Tensor:
    """Give the mask a drawn pattern means, bool [B,Hq,Sq,Skv]."""
    mask = tree.mask(q, k)
    if causal:
        mask = mask & oracle.causal_mask(q.shape[2], k.shape[2])
    return mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


@st.composite
def drawn_calls(
    draw: st.DrawFn, sizes: st.SearchStrategy[int] | None = None
) -> tuple[Call, Tree, bool]:
    """Draw a call, a selection for it, and whether attend is causal."""
    call = draw(calls)
    return call, draw(trees(call, sizes)), draw(st.booleans())
