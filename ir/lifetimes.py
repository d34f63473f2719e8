"""How long each scratch buffer of a plan must keep its place."""

from __future__ import annotations

from dataclasses import dataclass

from spcomp.ir.plan import Plan, Slabs
from spcomp.ir.plan_rules import base


@dataclass(frozen=True, slots=True)
class Lifetime:
    """The first and the last launch, by number, between which a scratch buffer must keep its place.

    A buffer written once a call and read inside slabs lives until the slabs end: the next slab
    reads it again.
    """

    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Tell whether two buffers are alive at one time."""
        return self.first <= other.last and other.first <= self.last


def lifetimes(plan: Plan) -> dict[str, Lifetime]:
    """Give the lifetime of every scratch buffer that some launch touches, in order of first use."""
    ends = _slab_ends(plan)
    wanted = {b.name for b in plan.scratch()}
    found: dict[str, Lifetime] = {}
    for n, launch in enumerate(plan.launches()):
        for name in dict.fromkeys(base(b) for b in launch.buffers()):
            if name not in wanted:
                continue
            first = found[name].first if name in found else n
            crosses = n in ends and ends.get(first) != ends[n]
            last = ends[n] if crosses else n
            found[name] = Lifetime(first, max(last, found[name].last if name in found else n))
    return found


def _slab_ends(plan: Plan) -> dict[int, int]:
    """Give, for the number of each launch inside slabs, that of the last launch of its slabs."""
    ends: dict[int, int] = {}
    n = 0
    for step in plan.steps:
        count = len(step.launches) if isinstance(step, Slabs) else 1
        if isinstance(step, Slabs):
            ends.update(dict.fromkeys(range(n, n + count), n + count - 1))
        n += count
    return ends
