"""Comparing a compiled pattern with float64 attention over the pairs it selects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spcomp import api
from spcomp.autotune.fidelity import agreement
from spcomp.dsl import Pattern
from spcomp.errors import SpcompError
from spcomp.ir.nodes import Argument, Attend, Merge, Stream
from spcomp.ir.types import is_token_stream


class MoreThanAMask(SpcompError):
    """The pattern's meaning is not that of a mask."""

    message = "check compares with float64 attention under a mask, and '{pattern}' {why}."
    help = "compare two backends in Python: spcomp.compile(pattern, backend=...)."


@dataclass(frozen=True, slots=True)
class Comparison:
    """Largest absolute errors against float64: ours, and plain PyTorch's in the same dtype."""

    pattern: str
    phase: str
    shape: Mapping[str, int]
    backend: str
    device: str
    dtype: str
    error: float
    plain_error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the error is within what is allowed; a NaN is not."""
        return self.error <= self.allowed

    def row(self) -> dict[str, Any]:
        """Give the comparison as plain values."""
        return {**asdict(self), "ok": self.holds}


def compare(
    pattern: Pattern,
    shape: Mapping[str, int],
    dtype: str,
    *,
    backend: str,
    device: str,
    seed: int,
) -> Comparison:
    """Run a pattern that `check_is_mask` accepts on random tensors and compare it with float64.

    Raises: what the call raises.
    """
    q, k, v = _tensors(shape, getattr(torch, dtype), device, seed)
    attention = api.compile(pattern, backend=backend)
    got = attention(q, k, v)
    scale = _scale(pattern)
    found = agreement(got, q, k, v, attention.to_mask(q, k), scale=scale)
    beside = 1e-6 if dtype == "float32" else 1e-4
    return Comparison(
        pattern=pattern.program.title(),
        phase=api.phase_of(q),
        shape=dict(shape),
        backend=backend,
        device=device,
        dtype=dtype,
        error=found.error,
        plain_error=(found.allowed - beside) / 2,
        allowed=found.allowed,
    )


def _tensors(
    shape: Mapping[str, int], dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (
        (shape["B"], shape["Hq"], shape["Sq"], shape["D"]),
        (shape["B"], shape["Hkv"], shape["Skv"], shape["D"]),
        (shape["B"], shape["Hkv"], shape["Skv"], shape["Dv"]),
    )
    q, k, v = (torch.randn(s, generator=generator).to(device, dtype) for s in sizes)
    return q, k, v


def check_is_mask(pattern: Pattern) -> None:
    """Refuse a pattern that is more than softmax attention under a mask.

    Raises: MoreThanAMask.
    """
    for node in pattern.program.stages():
        why = ""
        if isinstance(node, Argument):
            why = f"takes the tensor {node.name} beside q, k and v"
        elif isinstance(node, Attend) and node.score_mod is not None:
            why = "changes scores by a score_mod"
        elif isinstance(node, Merge) and node.by == "gates":
            why = "joins results by gates"
        elif isinstance(node, (Attend, Merge)) and node.sinks is not None:
            why = "has sink logits"
        elif isinstance(node, Attend) and len(node.streams) > 1:
            why = "attends to several streams"
        elif isinstance(node, Stream) and not is_token_stream(node):
            why = "attends to pooled keys"
        if why:
            raise MoreThanAMask(where=node.where, pattern=pattern.name, why=why)


def _scale(pattern: Pattern) -> float | None:
    scales = {n.scale for n in pattern.program.stages() if isinstance(n, Attend)}
    return scales.pop() if len(scales) == 1 else None
