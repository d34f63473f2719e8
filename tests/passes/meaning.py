"""Running a program before and after a pass on the same random tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from spcomp.backends.reference.pattern import run_program
from spcomp.dsl import Pattern
from spcomp.ir.program import Program
from tests.ir.programs import tensors

SIZES = ((70, 70), (1, 70), (70, 33))  # the captured tensors of `programs` are made for 70 rows


def meaning(program: Program, captured: dict[str, Tensor], sq: int, skv: int) -> tuple[Tensor, ...]:
    """Give out and lse in float64, as the reference interpreter understands the program."""
    return run_program(program, {**tensors(sq, skv), **captured})


def assert_same_meaning(pattern: Pattern, before: Program, after: Program) -> None:
    """Check that two programs give the same result, to rounding in float64."""
    sizes = SIZES[:1] if pattern.tensors else SIZES
    for sq, skv in sizes:
        first = meaning(before, pattern.tensors, sq, skv)
        second = meaning(after, pattern.tensors, sq, skv)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
