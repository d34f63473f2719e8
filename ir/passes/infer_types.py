"""Pass: check that the stages fit together."""

from __future__ import annotations

from spcomp.ir.program import Program
from spcomp.ir.types import types_of


def infer_types(program: Program) -> Program:
    """Check that every stage can be typed; the program is unchanged, types are read with
    `types_of`.

    Rewrite: none.
    Needs:   nothing.
    Gives:   every stage has a type; contracted dims agree; scores are f32, indices i32.
    Raises:  WrongStage, CannotLower.
    """
    types_of(program)
    return program
