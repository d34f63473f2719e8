"""Context of the tiles kernel: which key tiles a query tile visits, and with which mask."""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.backends.triton.contexts.base import CapturedArg
from spcomp.backends.triton.expr_text import Helpers, helpers_of
from spcomp.ir.expr import Expr, Sym, conjuncts, tile_bounds

PAIRS_PER_STEP = 4096  # that a program holds in registers at once


@dataclass(frozen=True, slots=True)
class Leaf:
    """Selection number n, named chosen{n} in the predicate.

    granule: query tokens a row of its lists stands for, a multiple of the query tile;
    unit: key tokens, or units of a pooled stream, an entry stands for, a multiple of the key tile.
    """

    n: int
    granule: int
    unit: int

    @property
    def bit(self) -> int:
        """The bit of a tile entry that says "this selection chose the tile"."""
        return 24 + self.n


@dataclass(frozen=True, slots=True)
class TilesContext:
    """Variables of `triton/kernels/tiles.py.jinja`.

    has_elements: bounds do not decide a tile, so its pairs are looked at. is_sole: every visible
    pair lies in a unit of the only list. is_pooled: the stream holds units, which k numbers.
    """

    header: tuple[str, ...]
    block_q: int
    block_k: int
    chunk: int
    step_q: int
    leaves: tuple[Leaf, ...]
    has_leaves: bool
    is_sole: bool
    tiles_per_unit: int
    predicate: Expr
    everywhere: Expr
    somewhere: Expr
    has_elements: bool
    inputs: tuple[CapturedArg, ...]
    has_counter: bool
    is_pooled: bool
    is_packed: bool
    helpers: Helpers


def tiles_context(
    *,
    header: tuple[str, ...],
    block_q: int,
    block_k: int,
    predicate: Expr,
    leaves: tuple[Leaf, ...] = (),
    inputs: tuple[CapturedArg, ...] = (),
    chunk: int = 512,
    has_counter: bool = False,
    is_pooled: bool = False,
    is_packed: bool = False,
) -> TilesContext:
    """Make the context of the tiles kernel.

    predicate: over q, k, b, h, Sq, Skv and chosen{n} of each leaf. A predicate that bounds cannot
    decide is looked at element by element.
    chunk: key tiles looked at together, a power of two; up to this many are classified once.
    has_counter: set the counter of the launch that follows to 0.
    """
    is_sole = len(leaves) == 1 and Sym("chosen0") in conjuncts(predicate)
    assert all(leaf.granule % block_q == 0 and leaf.unit % block_k == 0 for leaf in leaves)
    assert len(leaves) <= 7, "a tile entry has seven flags"
    everywhere, somewhere, is_exact = tile_bounds(predicate)
    shown = (everywhere, somewhere) if is_exact else (everywhere, somewhere, predicate)
    return TilesContext(
        header=header,
        block_q=block_q,
        block_k=block_k,
        chunk=chunk,
        step_q=max(1, min(block_q, PAIRS_PER_STEP // block_k)),
        leaves=leaves,
        has_leaves=bool(leaves),
        is_sole=is_sole,
        tiles_per_unit=leaves[0].unit // block_k if is_sole else 0,
        predicate=predicate,
        everywhere=everywhere,
        somewhere=somewhere,
        has_elements=not is_exact,
        inputs=inputs,
        has_counter=has_counter,
        is_pooled=is_pooled,
        is_packed=is_packed,
        helpers=helpers_of(*shown),
    )
