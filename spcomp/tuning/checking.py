"""What counts as right: a candidate against the reference, and against the default schedule.

The tolerance comes from plain torch's own error in the same dtype. A few rows may differ by more:
where two units score alike, another order of additions may choose the other one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from spcomp.api import Attention
from spcomp.autotune.fidelity import Measurement, agreement
from spcomp.autotune.record import Kept
from spcomp.compiler import DECODE_ROWS
from spcomp.dsl.pattern import Pattern
from spcomp.errors import SpcompError
from spcomp.ir.nodes import Attend, Merge, Node
from spcomp.ir.nodes.base import rebuild

TIED_ROWS = 0.005
"""Share of the rows that may differ by more than the tolerance."""

LOOSE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""What two schedules may differ by where there is no reference to take a tolerance from."""

CHECKED_ROWS = 1025
"""Query rows that are compared with the reference; odd, so that tiles have tails."""

CHECKED_PAIRS = {"cuda": 1 << 28, "cpu": 1 << 22}
"""(query, key) pairs over batch and query heads that a check looks at."""

KEPT_PAIRS = {"cuda": 1 << 31, "cpu": 1 << 22}
"""Pairs that a measure of fidelity looks at. On a card a second or two of work and 8191 tokens of
32 heads, which is longer than what the patterns of this field keep."""


@dataclass(frozen=True, slots=True)
class Part:
    """The beginning of a sample: n query rows, and the keys up to the last of them."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def tokens(self) -> int:
        """Give how many keys it has."""
        return self.k.shape[2]


@dataclass(frozen=True, slots=True)
class Standard:
    """What candidates are measured against: the reference's result on a part of the sample."""

    part: Part
    out: Tensor
    allowed: float


def part_of(
    q: Tensor, k: Tensor, v: Tensor, pairs: Mapping[str, int], most_rows: int | None = None
) -> Part:
    """Cut a sample so that it has no more pairs than `pairs` has for its device; its phase stays.

    Prefill keeps 17 rows or more; rows before the first key, which see nothing, go first.
    """
    most = pairs[q.device.type] // (q.shape[0] * q.shape[1])
    blind = max(0, q.shape[2] - k.shape[2])
    q = q[:, :, blind:]
    rows, ahead = q.shape[2], k.shape[2] - q.shape[2]
    # n * (n + ahead) <= most, solved for n
    fitting = math.isqrt(ahead * ahead + 4 * most) - ahead
    cut = min(rows, fitting // 2, rows if most_rows is None else most_rows)
    if cut < rows:
        cut -= 1 - cut % 2
    cut = min(rows, max(cut, DECODE_ROWS + 1))
    return Part(q[:, :, :cut], k[:, :, : cut + ahead], v[:, :, : cut + ahead])


def standard(reference: Attention, part: Part) -> Standard:
    """Compute what the reference gives for a part, and how far a candidate may be from it.

    Raises: what the reference raises.
    """
    out = reference(part.q, part.k, part.v)
    mask = reference.to_mask(part.q, part.k)
    scale = scale_of(reference.pattern)
    allowed = agreement(out, part.q, part.k, part.v, mask, scale=scale).allowed
    return Standard(part, out, allowed)


def error_between(got: Tensor, want: Tensor) -> float:
    """Give the largest difference of two outputs [B,Hq,Sq,Dv], the share TIED_ROWS of the rows with
    the largest ones left out; infinite where a value is not finite."""
    worst = []
    for one, other in zip(got.flatten(0, 1), want.flatten(0, 1), strict=True):
        worst.append((one.float() - other.float()).abs().amax(-1))
    rows = torch.cat(worst)
    if not bool(rows.isfinite().all()):
        return math.inf
    kept = rows.numel() - int(TIED_ROWS * rows.numel())
    return float(rows.kthvalue(kept).values)


def kept_of(
    reference: Attention, q: Tensor, k: Tensor, v: Tensor
) -> tuple[dict[str, float] | None, str]:
    """Measure how much of dense attention a pattern keeps, on as much of the sample as a check may
    look at. Sink logits are left out on both sides: what counts is the keys that are read. Returns
    the fields of `Kept`, or None and why there are none."""
    reference = Attention(_without_sinks(reference.pattern), reference.backend_name)
    part, measurement = part_of(q, k, v, KEPT_PAIRS), Measurement()
    try:
        with torch.no_grad():
            out = reference(part.q, part.k, part.v)
            mask = reference.to_mask(part.q, part.k)
        scale = scale_of(reference.pattern)
        measurement.add(part.q, part.k, part.v, mask=mask, out=out, scale=scale)
    except (SpcompError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return None, f"what it keeps of attention was not measured ({reason})"
    found = measurement.result()
    assert found.mass_mean is not None and found.mass_p5 is not None and found.density is not None
    kept = Kept(part.tokens, found.mass_mean, found.mass_p5, found.out_error, found.density)
    return asdict(kept), ""


def _without_sinks(pattern: Pattern) -> Pattern:
    def visit(node: Node) -> Node:
        changed = rebuild(node, visit)
        has_sinks = isinstance(changed, (Attend, Merge)) and changed.sinks is not None
        return replace(changed, sinks=None) if has_sinks else changed  # type: ignore[call-arg]

    return replace(pattern, program=replace(pattern.program, result=visit(pattern.program.result)))


def scale_of(pattern: Pattern) -> float | None:
    """Give the softmax scale that all attends of a pattern share; None is 1/sqrt(D)."""
    scales = {node.scale for node in pattern.program.stages() if isinstance(node, Attend)}
    return scales.pop() if len(scales) == 1 else None
