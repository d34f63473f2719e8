"""What the tests of all shipped patterns share: which have no kernels, and what a call takes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from spcomp import compiler
from spcomp.backends import registry
from spcomp.backends.base import Specialisation
from spcomp.dsl import Pattern
from spcomp.errors import CannotLower, Refused
from spcomp.ir import dims
from spcomp.ir.nodes import Argument
from spcomp.ir.plan import Phase
from spcomp.patterns import SHIPPED

_LINES = "a list for all queries, chosen by sums along lines of a map cannot be lowered: "
_TILES = "this selection in the loop order {order} cannot be lowered: this backend has no kernel "
_NOT_YET = "no kernel makes it yet."

NO_KERNELS: dict[str, dict[str, str]] = {
    "triton": {
        "flexprefill": _LINES + _NOT_YET,
        "minference": _LINES + _NOT_YET,
        "spargeattn": "keys less their mean cannot be lowered: " + _NOT_YET,
    },
    "ascendc": {
        "flexprefill": _LINES + _NOT_YET,
        "infllm_v2": "a list chosen by regrouped scores cannot be lowered: this backend has no "
        "kernel part_lse, row_lse, block_scores.",
        "minference": _LINES + _NOT_YET,
        "nsa": _TILES,
        "quest": "the ascendc backend refuses pooling by minmax: its template has mean, max, min.",
        "spargeattn": "keys less their mean cannot be lowered: " + _NOT_YET,
        "streaming_llm": _TILES,
        "xattention": "a list as long as a share of the scores needs cannot be lowered: this "
        "backend has no kernel topp.",
    },
}
"""The shipped patterns that a backend refuses at their defaults, in both phases, and its words."""

NOT_PACKED = {
    "infllm_v2": "a map of scores",
    "nsa": "attention over pooled units",
    "xattention": "a map of scores",
}
"""What the Triton backend has no kernel of for packed sequences, by the patterns that need it."""

ON_TRITON = tuple(name for name in SHIPPED if name not in NO_KERNELS["triton"])


def refusal(backend: str, name: str, phase: Phase) -> str | None:
    """Give the sentence with which a backend refuses a shipped pattern, or None."""
    said = NO_KERNELS[backend].get(name)
    if said != _TILES:
        return said
    order, more = ("query_major_ws", ", attend_ws") if phase == "prefill" else ("gather", "")
    return said.format(order=order) + f"tiles{more}."


def assert_refused(name: str, target: str, phase: Phase) -> None:
    """Check that lowering a shipped pattern for a target is refused, in the words held here."""
    chip = registry.target(target)
    said = refusal(chip.backend, name, phase)
    assert said is not None, f"{name} is not among the patterns without kernels"
    backend, spec = registry.backend(chip.backend), Specialisation("bfloat16", 128, 128)
    with pytest.raises((CannotLower, Refused)) as caught:
        compiler.lower(SHIPPED[name](), backend=backend, target=chip, spec=spec, phase=phase)
    assert str(caught.value).splitlines()[0] == f"{type(caught.value).__name__}: {said}"


def declared(pattern: Pattern, shape: Mapping[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw the tensors that a pattern takes beside q, k and v, each from 0 to 1."""
    taken = [node for node in pattern.program.stages() if isinstance(node, Argument)]
    return {n.name: torch.rand([dims.evaluate(d, shape) for d in n.dims]).to(dtype) for n in taken}
