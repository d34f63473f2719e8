"""Which keys a query sees. A selection is a value; it denotes a set of (query, key) token pairs.

Leaves are lists (`TopK`, `TopP`, `Given`) or rules (`Sink`, `Local`, `Causal`, `MaskMod`);
`Union` and `Intersect` combine any of them. A list has granules: an index stands for `unit` key
tokens, a row for some query tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spcomp.ir.dims import Dim
from spcomp.ir.expr import Expr
from spcomp.ir.nodes.base import Node

Crossing = Literal["keep", "drop"]
CROSSINGS: tuple[Crossing, ...] = ("keep", "drop")
Extent = Literal["row", "map"]
EXTENTS: tuple[Extent, ...] = ("row", "map")


@dataclass(frozen=True, slots=True)
class Selection(Node):
    """Base of everything `|` and `&` combine."""

    def __or__(self, other: Selection) -> Union:
        return Union((*_parts(self, Union), *_parts(other, Union)))

    def __and__(self, other: Selection) -> Intersect:
        return Intersect((*_parts(self, Intersect), *_parts(other, Intersect)))

    def __bool__(self) -> bool:
        raise TypeError("a selection has no truth value; combine selections with | and &")


@dataclass(frozen=True, slots=True)
class TopK(Selection):
    """Keep the k best-scored units of each row; a list.

    scores [B,Hs,Nq,Nk] f32 -> indices [B,Hs,Nq,k] i32, ascending, -1 at the end, and counts
    [B,Hs,Nq] i32. A tie goes to the lower index. Units of `always` (`Sink` and `Local` in units)
    count towards k and are kept whatever their score. k is clamped to the candidates there are; it
    may depend on Skv. With `k_from` a row keeps no more than that says: a captured table [Hs] i32,
    or the counts of a `Needed`; k is then the most any row may keep."""

    scores: Node
    k: Dim
    always: tuple[Selection, ...] = ()
    k_from: Node | None = None


@dataclass(frozen=True, slots=True)
class TopP(Selection):
    """Keep the best units of each row that together hold a share of the row's scores; a list.

    scores [B,Hs,Nq,Nk] f32, none below 0 -> a list as `TopK` gives it, as long as it needs to be.
    With T the sum of a row's candidates, the units of `always` are taken first, then the others
    from the highest down, a tie to the lower index. A unit is kept while the scores taken before
    it are below p*T (crossing "keep"), or while those up to and with it are at most p*T (crossing
    "drop").
    p is a number or a captured tensor with one for each head of the list, f32. At least `least`
    units are kept where there are so many candidates. Over the "map" all rows of a head are one
    row, the units of its first row first, so that a row may keep few units or none."""

    scores: Node
    p: float | None
    p_by_head: Node | None = None
    crossing: Crossing = "keep"
    always: tuple[Selection, ...] = ()
    least: int = 0
    over: Extent = "row"


@dataclass(frozen=True, slots=True)
class Given(Selection):
    """A list the user brings: `block_indices` (with counts) or a boolean `block_mask`.

    form "indices": indices [B|1, Hs, Nq, K] i32, -1 for no unit; counts [B|1, Hs, Nq] i32. form
    "mask": mask [B|1, Hs, Nq, Nk] bool. Hs is 1, Hkv or Hq. Row r covers the query rows r*block_q …
    (by row, not by position); unit u covers the key tokens u*block_k …."""

    form: Literal["indices", "mask"]
    tensor: Node
    counts: Node | None
    block_q: int
    block_k: int
    built_for: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Sink(Selection):
    """The first `count` units (of `unit` tokens) of the sequence.

    by_head: a captured table [Hq] i32 with the count of each query head; `count` is then the most.
    """

    count: int
    unit: int = 1
    by_head: Node | None = None


@dataclass(frozen=True, slots=True)
class Local(Selection):
    """The last `count` units up to and including the query's own; never a later key.

    With unit 1 this is the sliding window t - count < u <= t. by_head as in `Sink`.
    """

    count: int
    unit: int = 1
    by_head: Node | None = None


@dataclass(frozen=True, slots=True)
class Causal(Selection):
    """Keys not later than the query, aligned bottom-right: u <= row + Skv - Sq."""


@dataclass(frozen=True, slots=True)
class Everything(Selection):
    """All pairs."""


@dataclass(frozen=True, slots=True)
class MaskMod(Selection):
    """A traced rule over (b, h, q, k), q and k being plain row and key numbers as in
    FlexAttention."""

    predicate: Expr
    tables: tuple[Node, ...] = ()
    name: str = "mask_mod"
    built_for: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Union(Selection):
    """Pairs that any part holds; a pair counts once."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Intersect(Selection):
    """Pairs that all parts hold."""

    parts: tuple[Node, ...]


def _parts(selection: Selection, kind: type[Union] | type[Intersect]) -> tuple[Node, ...]:
    """Give the parts of a nested combination of the same kind, so that chains stay flat."""
    if not isinstance(selection, Selection):
        raise TypeError(f"{type(selection).__name__} is not a selection; | and & join selections")
    return selection.parts if isinstance(selection, kind) else (selection,)


@dataclass(frozen=True, slots=True)
class Region(Selection):
    """The normal form `infer_masks` gives: one predicate over (b, h, q, k) and flags of lists.

    The symbol chosen<n> of the predicate is true where list n holds the pair. k numbers the entries
    of the stream."""

    predicate: Expr
    lists: tuple[Node, ...] = ()
    tables: tuple[Node, ...] = ()
