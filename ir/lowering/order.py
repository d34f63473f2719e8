"""Which loop order an attend takes, and why: the part of the schedule that shapes the plan."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from spcomp.errors import CannotLower
from spcomp.ir.expr import TRUE, Expr, Sym, conjuncts, substitute
from spcomp.ir.lowering.builder import PlanBuilder
from spcomp.ir.lowering.lists import ListRef
from spcomp.ir.nodes import Region
from spcomp.ir.plan import LoopOrder, Phase

KEY_MAJOR_LEAST_UNIT = 64
TILE_LEAST = 16
WS_LEAST = 64  # rows that four warps multiply, and keys they take at once
WS_ROWS = 128  # rows of a program: those of two times four warps


@dataclass(frozen=True, slots=True)
class Choice:
    """A loop order with its reason."""

    order: LoopOrder
    reason: str


def sole_list(region: Region) -> bool:
    """Tell whether a region is one list, narrowed by rules: list & rule."""
    return len(region.lists) == 1 and Sym("chosen0") in conjuncts(region.predicate)


def without_list(predicate: Expr) -> Expr:
    """Give the rule that narrows the sole list."""
    return substitute(predicate, {"chosen0": TRUE})


def tile_sizes(lists: list[ListRef], block_q: int, block_k: int) -> tuple[int, int]:
    """Shrink a tile until it divides every list's granule and unit."""
    for ref in lists:
        block_q = math.gcd(block_q, ref.granule)
        block_k = math.gcd(block_k, ref.unit)
    return block_q, block_k


def choose(
    plan: PlanBuilder,
    region: Region,
    lists: list[ListRef],
    wanted: LoopOrder | None,
    noun: str = "tokens",
) -> Choice:
    """Choose the loop order of one attend, among those whose kernels the backend has. noun: what
    the units of lists are counted in.

    Raises: CannotLower when the wanted order, or any order, cannot express the region.
    """
    able = _possible(region, lists, plan.phase)
    sole = sole_list(region)
    possible = {o: why for o, why in able.items() if plan.offers(*_kernels(o, sole))}
    asked = wanted or next(iter(possible or able), None)
    if asked in able and asked not in possible:
        assert asked is not None
        lacking = [k for k in _kernels(asked, sole) if not plan.offers(k)]
        raise CannotLower(
            where=region.where,
            what=f"this selection in the loop order {asked}",
            why=f"this backend has no kernel {', '.join(lacking)}" + _reason(plan, lacking),
            way_out=f"{_others(possible)}use another backend, such as backend='reference'.",
        )
    if wanted is not None:
        if wanted not in possible:
            raise CannotLower(
                where=region.where,
                what=f"this selection in the loop order {wanted}",
                why=_refusal(wanted, region, lists, noun),
                way_out=(
                    f"leave the schedule open, or take one of: {', '.join(possible) or 'none'}."
                ),
            )
        return Choice(wanted, "asked for")
    if not possible:
        raise CannotLower(
            where=region.where,
            what="a union of lists with units of "
            + ", ".join(str(r.unit) for r in lists)
            + f" {noun}",
            why=(
                "tiles must divide every unit, and the largest that does is below "
                f"{TILE_LEAST} {noun}"
            ),
            way_out="use units that are multiples of 16, or backend='reference'.",
        )
    order = next(iter(possible))
    return Choice(order, possible[order] + _why_not_better(plan, able, order, sole))


def _why_not_better(
    plan: PlanBuilder, able: Iterable[LoopOrder], order: LoopOrder, is_sole: bool
) -> str:
    """Say why an order that would come before the chosen one is not there, if the backend says."""
    reasons = dict(plan.schedule.lacking)
    for better in able:
        if better == order:
            break
        for kernel in _kernels(better, is_sole):
            if kernel in reasons:
                return f"; not {better}, since {reasons[kernel]}"
    return ""


def _kernels(order: LoopOrder, is_sole: bool) -> tuple[str, ...]:
    """Name the kernels that a loop order is made of, beside those that make lists."""
    if order == "gather":
        return ("attend_gather",) if is_sole else ("tiles", "attend_gather")
    if order == "query_major":
        return ("tiles", "attend")
    if order == "query_major_ws":
        return ("tiles", "attend_ws")
    return ("invert_count", "invert_scan", "invert_fill", "attend_keys", "merge")


def _reason(plan: PlanBuilder, kernels: Iterable[str]) -> str:
    reasons = dict(plan.schedule.lacking)
    known = [reasons[k] for k in kernels if k in reasons]
    return f" here ({'; '.join(known)})" if known else ""


def _others(possible: Iterable[LoopOrder]) -> str:
    return "".join(f"take the loop order {order}, or " for order in possible)


def _possible(region: Region, lists: list[ListRef], phase: Phase) -> dict[LoopOrder, str]:
    """Give the orders that can express a region, best first, each with the reason it comes
    there."""
    found: dict[LoopOrder, str] = {}
    tile_q, tile_k = tile_sizes(lists, 1 << 20, 1 << 20)
    sole = sole_list(region)
    by_query = sole and lists[0].granule == 1 and lists[0].heads != 1
    tileable = tile_k % TILE_LEAST == 0
    if phase == "decode":
        if sole or tileable:
            found["gather"] = (
                "few query rows: the keys of a row are gathered and split over programs"
            )
        return found
    if tile_q % WS_LEAST == 0 and tile_k % WS_LEAST == 0:
        found["query_major_ws"] = (
            "each list serves a whole tile of queries; one warp copies while the others multiply"
        )
    if tile_q % TILE_LEAST == 0 and tileable:
        found["query_major"] = "each list serves a whole tile of queries"
    if by_query and tile_k >= KEY_MAJOR_LEAST_UNIT:
        found["key_major"] = "each query has its own list: the queries of a unit make a dense tile"
    if sole or tileable:
        found["gather"] = "each query has its own list of small units: its keys are gathered"
    if by_query:
        found.setdefault("key_major", "possible")
    return found


def _refusal(wanted: LoopOrder, region: Region, lists: list[ListRef], noun: str) -> str:
    rows = min((r.granule for r in lists), default=0)
    if wanted == "query_major_ws":
        units = min((r.unit for r in lists), default=0)
        return (
            f"its lists change every {rows} query rows and have units of {units} {noun}, and a "
            f"program takes multiples of {WS_LEAST} of both"
        )
    if wanted == "query_major":
        return (
            f"its lists change every {rows} query rows, and a query tile needs multiples of "
            f"{TILE_LEAST}"
        )
    if wanted == "key_major":
        return "key-major needs exactly one list, one row a query, narrowed by rules only"
    return "its lists cannot be cut into tiles of at least 16 keys"
