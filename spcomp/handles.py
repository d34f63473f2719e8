"""What names a compiled pattern in graphs, and what tells that its lists were written to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from torch import Tensor

from spcomp.dsl.pattern import Pattern
from spcomp.ir.nodes import Captured, Given
from spcomp.ir.plan import LoopOrder
from spcomp.ir.schedule import AxisChanges
from spcomp.ir.text import print_program


def handle_of(
    pattern: Pattern, backend: str | None, order: LoopOrder | None, axes: AxisChanges | None
) -> str:
    """Name what a compiled pattern means: `<pattern>-<20 hex digits>`, of the IR text, the names of
    its tensors and the options; equal in every process."""
    changes = {kernel: dict(values) for kernel, values in (axes or {}).items()}
    options = json.dumps([list(pattern.tensors), backend, order, changes], sort_keys=True)
    text = print_program(pattern.program, comments=False)
    return f"{pattern.name}-{hashlib.sha256(f'{text}{options}'.encode()).hexdigest()[:20]}"


def lists_of(pattern: Pattern) -> tuple[Tensor, ...]:
    """Give the index lists, counts and block masks a pattern brought."""
    if not pattern.tensors:
        return ()
    given = [n for n in pattern.program.stages() if isinstance(n, Given)]
    sides = [side for n in given for side in (n.tensor, n.counts)]
    return tuple(pattern.tensors[side.name] for side in sides if isinstance(side, Captured))


def versions_of(lists: Sequence[Tensor]) -> tuple[int, ...]:
    """Give numbers that change when a list is written to; those of inference mode count nothing."""
    return tuple([0 if t.is_inference() else t._version for t in lists])
