"""`python -m tests.ascendc.mutation`: how many mutants of the AscendC templates are noticed.

    --template NAME   only this one (several times for several)
    --sample SHARE    of every template that share of its mutants, at least one
    --seed N          which ones (default 0)
    --workers N       processes at a time (default: the cores this process may use)
    --strict          leave out what is proven equivalent, and fail for every survivor
    --all             also list the mutants that were noticed, and by what

Exit code 1 below 95 % noticed of those without a proof, for an entry of `equivalents.json` that has
rotted, and for templates that do not pass as they are.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.ascendc.mutation.equivalents import equivalents
from tests.ascendc.mutation.judge import Bench
from tests.ascendc.mutation.mutants import Mutant, mutants_of, unchanged
from tests.ascendc.mutation.report import Score, print_report
from tests.ascendc.mutation.suites import SUITES, Suite

LEAST = 0.95


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge, print, and give the exit code."""
    options = _options(arguments)
    scores: list[Score] = []
    with tempfile.TemporaryDirectory(prefix="spcomp-mutation-") as folder:
        bench = Bench(Path(folder), options.workers)
        for template in options.template or SUITES:
            suites = {suite.name: suite for suite in SUITES[template]()}
            scores.append(_score(bench, template, suites, options))
    least = None if options.strict else LEAST
    problems = print_report(scores, equivalents(), least=least)
    return 1 if problems else 0


def _score(
    bench: Bench, template: str, suites: dict[str, Suite], options: argparse.Namespace
) -> Score:
    texts = {name: suite.text() for name, suite in suites.items()}
    # A sample trusts the other specialisations to the kernels' own tests.
    asked = [*suites] if options.sample == 1.0 else [*suites][:1]
    for _, verdict in bench.judge([unchanged(template, name) for name in asked], suites):
        if verdict.outcome != "survived":
            said = f"{verdict.outcome} in {verdict.suite}: {verdict.said}"
            raise SystemExit(f"{template} as it is does not pass: {said}")
    made = mutants_of(template, texts)
    proven = [claim for claim in equivalents() if options.strict and claim.template == template]
    asked_for = [mutant for mutant in made if not any(claim.fits(mutant) for claim in proven)]
    chosen = _sampled(asked_for, options)
    bench.prepare(chosen, suites)
    score = Score(template, made)
    for mutant, verdict in bench.judge(chosen, suites):
        score.add(mutant, verdict)
        _tell(score, options)
    return score


def _sampled(made: list[Mutant], options: argparse.Namespace) -> list[Mutant]:
    if options.sample == 1.0:
        return made
    size = max(1, round(options.sample * len(made)))
    return random.Random(options.seed).sample(made, size)


def _tell(score: Score, options: argparse.Namespace) -> None:
    mutant, verdict = score.verdicts[-1]
    if verdict.outcome == "survived" or options.all:
        line = f"{score.template}:{mutant.line}: {verdict.outcome}"
        text = f"{line}: {mutant.before}  =>  {mutant.after}"
        print(text, file=sys.stderr, flush=True)
    if verdict.outcome == "error":
        raise SystemExit(f"{score.template}:{mutant.line}: {verdict.said}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.ascendc.mutation", description=__doc__)
    parser.add_argument("--template", action="append", choices=[*SUITES])
    parser.add_argument("--sample", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--all", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
