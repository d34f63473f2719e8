"""Softmax attention over what was selected, and joining several results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spcomp.ir.expr import Expr
from spcomp.ir.nodes.base import Node

Quantisation = Literal["int8"]
QUANTISATIONS: tuple[Quantisation, ...] = ("int8",)


@dataclass(frozen=True, slots=True)
class Stream(Node):
    """A key tensor and a value tensor of equal length: tokens, or units pooled from them.

    k [B,Hkv,N,D], v [B,Hkv,N,Dv]. Entry j of a stream of units stands for the tokens of unit j; it
    is visible to a query iff its last token is (`Downsample.stride`, `Downsample.block` give that
    token)."""

    k: Node
    v: Node


@dataclass(frozen=True, slots=True)
class Gather(Node):
    """The part of a stream that a selection holds; a view, never stored unless a schedule says so.

    Before `attend` joins two of them, k or v alone may be gathered: `stream` is then that tensor.
    """

    stream: Node
    selection: Node


@dataclass(frozen=True, slots=True)
class Attend(Node):
    """One softmax over the union of the gathered streams.

    q [B,Hq,Sq,D] -> out [B,Hq,Sq,Dv] in q's dtype and lse [B,Hq,Sq] f32, natural log. A row that
    sees no key gives 0 and -inf. Streams do not deduplicate against each other. scale None means
    1/sqrt(D). `score_mod` changes the scaled logit; it reads (score, b, h, q, k). `sinks` [Hq] are
    logits that join the denominator and have no value: out is multiplied by sigmoid(lse - sink),
    lse leaves them out.

    `tile` = (query rows, key tokens) cuts the pairs of a head from row 0 and key 0 on; a tile is
    visited iff the selection holds one of its pairs. A number or table (f32 [Hq] or [Hkv], 0 or
    more) of `skip` leaves tiles out: the visited tiles of a row of tiles are taken by ascending
    keys, and one is dropped from out and from lse iff in each of its query rows its highest logit,
    in units of log 2, is at least `skip` below the highest of the tiles before it; the last visited
    tile is never dropped (SpargeAttn, arXiv:2502.18137, section 3.4). `quantise` "int8" takes the
    products from whole numbers: each block of tile[0] rows of q and of tile[1] keys is divided by
    delta = max|x| / 127 + 1e-7 and rounded, halves away from zero; the product of the numbers is
    multiplied by both deltas (SageAttention, arXiv:2410.02367). It has no gradient."""

    q: Node
    streams: tuple[Node, ...]
    causal: bool = True
    scale: float | None = None
    score_mod: Expr | None = None
    tables: tuple[Node, ...] = ()
    sinks: Node | None = None
    tile: tuple[int, int] | None = None
    skip: float | None = None
    skip_by_head: Node | None = None
    quantise: Quantisation | None = None

    @property
    def skips(self) -> bool:
        """Whether tiles may be left out."""
        return self.skip is not None or self.skip_by_head is not None


@dataclass(frozen=True, slots=True)
class Merge(Node):
    """Join attention results: by "lse" as if their keys were one softmax, or by learned "gates".

    parts: results with outs [B,Hq,Sq,Dv] and lses; gates: one tensor [B,Hq,Sq,P] with a value for
    each part in their order, or none. By gates, out = sum_p gate_p * out_p, whatever the values
    are and without normalising them; a row that part p leaves empty adds 0, whatever its gate; lse
    is that of the keys of all parts together. `sinks` [Hq] join the one softmax of all parts, so no
    part of a merge by LSE has its own, and a merge by gates has none. Source of the LSE rule:
    FlashAttention, arXiv:2205.14135, section 3.1; of gates: NSA, arXiv:2502.11089, equation 5.
    """

    parts: tuple[Node, ...]
    by: Literal["lse", "gates"] = "lse"
    gates: Node | None = None
    sinks: Node | None = None
