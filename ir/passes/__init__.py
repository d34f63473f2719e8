"""The passes, and the only place that knows their order."""

from __future__ import annotations

from collections.abc import Callable

from spcomp.ir.passes.check_selection import check_selection
from spcomp.ir.passes.cut import cut
from spcomp.ir.passes.infer_masks import infer_masks
from spcomp.ir.passes.infer_types import infer_types
from spcomp.ir.passes.simplify import simplify
from spcomp.ir.program import Program

PatternPass = Callable[[Program], Program]

PATTERN_PIPELINE: tuple[PatternPass, ...] = (infer_types, check_selection, simplify, infer_masks)

__all__ = ["PATTERN_PIPELINE", "check_selection", "cut", "infer_masks", "infer_types", "simplify"]
