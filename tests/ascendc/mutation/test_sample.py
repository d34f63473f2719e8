"""A seeded 5 % of the mutants of every template, judged on each run of the tests.

Those with a proof that they change nothing are left out. The run is a process of its own, which
forks: the one that runs the tests has threads.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_twentieth_of_the_mutants_is_noticed() -> None:
    command = [sys.executable, "-m", "tests.ascendc.mutation", "--sample", "0.05", "--seed", "1"]
    command += ["--strict"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
