"""Survivors that no test can notice, each with its proof: `equivalents.json`.

An entry stands for the mutants of a template whose line reads `before` and, mutated, `after`; below
narrows it to those that follow such a line of code. An entry whose mutant does not exist, or is
noticed by now, is an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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


def equivalents() -> tuple[Equivalent, ...]:
    """Read all entries."""
    groups = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return tuple(Equivalent(proof=g["proof"], **entry) for g in groups for entry in g["mutants"])
