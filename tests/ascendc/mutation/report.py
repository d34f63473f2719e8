"""What is printed of a mutation run: a table, the score, and the survivors with their proofs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from spcomp.codegen.render import TEMPLATES
from tests.ascendc.mutation.equivalents import Equivalent
from tests.ascendc.mutation.judge import KILLS, Verdict
from tests.ascendc.mutation.mutants import Mutant

WIDTH = 120  # columns of a report that goes to a file


@dataclass
class Score:
    """The verdicts on a template's mutants; made: all there are, judged or not."""

    template: str
    made: list[Mutant]
    verdicts: list[tuple[Mutant, Verdict]] = field(default_factory=list)

    def add(self, mutant: Mutant, verdict: Verdict) -> None:
        """Count one in."""
        self.verdicts.append((mutant, verdict))

    @property
    def survivors(self) -> list[Mutant]:
        """Those that nothing noticed, in the order of the text."""
        left = [mutant for mutant, verdict in self.verdicts if verdict.outcome == "survived"]
        return sorted(left, key=lambda mutant: mutant.line)


def print_report(
    scores: Sequence[Score], claims: Sequence[Equivalent], *, least: float | None
) -> list[str]:
    """Print it; give what is wrong, one sentence each.

    least: the share that must be noticed of those not proven equivalent; None: every survivor must
    have a proof instead.
    """
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=WIDTH)
    console.print(_table(scores))
    survivors = [mutant for score in scores for mutant in score.survivors]
    proofs = [_proof(mutant, claims) for mutant in survivors]
    judged = sum(len(score.verdicts) for score in scores)
    noticed = judged - len(survivors)
    unproven = sum(proof is None for proof in proofs)
    share = noticed / max(judged, 1)
    console.print(f"{noticed} of {judged} mutants are noticed: {share:.2%}")
    others = max(noticed + unproven, 1)
    console.print(
        f"without the {len(survivors) - unproven} proven equivalent: {noticed} of {others}, "
        f"{noticed / others:.2%}"
    )
    for mutant, proof in zip(survivors, proofs, strict=True):
        console.print(f"\n{_place(mutant)} ({mutant.kind})", markup=False)
        console.print(f"  below   {mutant.below}", markup=False)
        console.print(f"  before  {mutant.before}", markup=False)
        console.print(f"  after   {mutant.after}", markup=False)
        console.print(f"  {'UNEXPLAINED' if proof is None else f'proof   {proof}'}", markup=False)
    problems = [*rotten(scores, claims)]
    if least is None and unproven:
        problems.append(f"{unproven} survivors have no proof in equivalents.json.")
    reached = noticed / others
    if least is not None and reached < least:
        problems.append(f"{reached:.2%} of the mutants are noticed, less than {least:.0%}.")
    for problem in problems:
        console.print(f"\nerror: {problem}", markup=False)
    return problems


def rotten(scores: Sequence[Score], claims: Sequence[Equivalent]) -> list[str]:
    """Say which claims fit no mutant of their template, or one that was noticed."""
    said = []
    for score in scores:
        for claim in claims:
            if claim.template != score.template:
                continue
            if not any(map(claim.fits, score.made)):
                gone = f"{claim.before!r} => {claim.after!r}"
                said.append(
                    f"{claim.template} has no mutant {gone}; drop it from equivalents.json."
                )
            for mutant, verdict in score.verdicts:
                if claim.fits(mutant) and verdict.outcome != "survived":
                    said.append(
                        f"{_place(mutant)}: {claim.before!r} => {claim.after!r} is claimed "
                        f"equivalent, but noticed: {verdict.outcome}, {verdict.said}"
                    )
    return said


def unexplained(scores: Sequence[Score], claims: Sequence[Equivalent]) -> list[Mutant]:
    """Give the survivors without a proof."""
    return [m for score in scores for m in score.survivors if _proof(m, claims) is None]


def _proof(mutant: Mutant, claims: Sequence[Equivalent]) -> str | None:
    return next((claim.proof for claim in claims if claim.fits(mutant)), None)


def _table(scores: Sequence[Score]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("template")
    for name in ("sync", "more", "less", *KILLS, "survived", "noticed"):
        table.add_column(name, justify="right")
    for score in scores:
        kinds = Counter(mutant.kind for mutant, _ in score.verdicts)
        outcomes = Counter(verdict.outcome for _, verdict in score.verdicts)
        noticed = 1 - outcomes["survived"] / max(len(score.verdicts), 1)
        cells = [kinds["sync"], kinds["more"], kinds["less"], *(outcomes[kill] for kill in KILLS)]
        row = map(str, (*cells, outcomes["survived"], f"{noticed:.1%}"))
        table.add_row(score.template, *row)
    return table


def _place(mutant: Mutant) -> str:
    """Name the line of the template that a line of its text comes from, where there is but one."""
    found = [
        f"{path.relative_to(TEMPLATES.parent)}:{number}"
        for path in sorted((TEMPLATES / "ascendc").rglob("*.jinja"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.strip() == mutant.before
    ]
    name = next(iter(mutant.edits))
    rendered = f"{mutant.template}, line {mutant.line} as rendered for {name}"
    return f"{found[0]} ({rendered})" if len(found) == 1 else rendered
