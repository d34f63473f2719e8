"""Survivors that no test can notice, each with its proof.

An entry stands for the mutants of a template whose line reads `before` and, mutated, `after`; below
narrows it to those that follow such a line of code. An entry whose mutant does not exist, or is
noticed by now, is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.ascendc.mutation.mutants import Mutant


@dataclass(frozen=True, slots=True)
class Equivalent:
    """A mutation that changes nothing, and why."""

    template: str
    before: str
    after: str
    proof: str
    below: str = ""

    def fits(self, mutant: Mutant) -> bool:
        """Whether the entry speaks of this mutant."""
        mine = (self.template, self.before, self.after, self.below or mutant.below)
        return mine == (mutant.template, mutant.before, mutant.after, mutant.below)


EQUIVALENTS: tuple[Equivalent, ...] = ()
