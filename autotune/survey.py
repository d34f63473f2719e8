"""Measure compiled patterns on captured layers: the rows and block maps of a report."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spcomp.autotune.fidelity import Measurement, block_map
from spcomp.autotune.report.record import BlockMap, Environment, Mass, Row, Rung, Timing
from spcomp.version import VERSION

if TYPE_CHECKING:
    from torch import Tensor


class Operands(Protocol):
    """One layer's q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv] and softmax scale."""

    @property
    def layer(self) -> int:
        """Index of the layer in its model."""

    @property
    def q(self) -> Tensor:
        """Queries, rotated."""

    @property
    def k(self) -> Tensor:
        """Keys, rotated."""

    @property
    def v(self) -> Tensor:
        """Values."""

    @property
    def scale(self) -> float:
        """What q·k is multiplied by."""


class Measurable(Protocol):
    """A compiled pattern that can also say which pairs it reads."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, /, *, scale: float | None = ...) -> Any:
        """Attend: [B,Hq,Sq,Dv]."""

    def to_mask(self, q: Tensor, k: Tensor, /) -> Tensor:
        """Give the pairs it reads: bool [B,Hq,Sq,Skv]."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A compiled pattern and what the report calls it."""

    pattern: str
    block: int | None
    budget: float
    attention: Measurable


@dataclass(frozen=True, slots=True)
class Price:
    """What one layer's forward costs: by the cost model, and in time where that is known."""

    flops: int | None = None
    bytes: int | None = None
    timing: Timing | None = None


def measure(
    candidate: Candidate,
    layers: Sequence[Operands],
    *,
    perplexity: float | None,
    price: Price,
    rung: Rung,
) -> Row:
    """Run a candidate on every layer and compare with dense attention, pooled over the layers.

    Raises: what the attention raises, and MaskSeesTheFuture.
    """
    measurement = Measurement()
    for layer in layers:
        out = candidate.attention(layer.q, layer.k, layer.v, scale=layer.scale)
        mask = candidate.attention.to_mask(layer.q, layer.k)
        measurement.add(layer.q, layer.k, layer.v, mask=mask, out=out, scale=layer.scale)
    found = measurement.result()
    assert found.mass_mean is not None and found.mass_p5 is not None
    assert found.mass_min_head is not None and found.density is not None
    return Row(
        pattern=candidate.pattern,
        block=candidate.block,
        budget=candidate.budget,
        mass=Mass(found.mass_mean, found.mass_p5, found.mass_min_head),
        out_error=found.out_error,
        out_max_abs=found.out_max_abs,
        density=found.density,
        perplexity=perplexity,
        flops=price.flops,
        bytes=price.bytes,
        timing=price.timing,
        rung=rung,
    )


def block_maps(
    candidate: Candidate, layer: Operands, heads: Sequence[int], *, block: int
) -> tuple[BlockMap, ...]:
    """Draw what some query heads of the first batch item see, in blocks of ``block`` tokens."""
    mask = candidate.attention.to_mask(layer.q, layer.k)[0]
    return tuple(
        BlockMap(
            pattern=candidate.pattern,
            block=block,
            budget=candidate.budget,
            layer=layer.layer,
            head=head,
            cells=tuple(tuple(row) for row in block_map(mask[head], block).tolist()),
        )
        for head in heads
    )


def environment(card: str | None, seed: int) -> Environment:
    """Describe this machine and these versions; the commit only where the source is a checkout."""
    torch_version = installed("torch")
    assert torch_version is not None
    return Environment(
        card=card,
        spcomp=VERSION,
        torch=torch_version,
        triton=installed("triton"),
        python=platform.python_version(),
        commit=_commit(Path(__file__).resolve().parent.parent),
        seed=seed,
    )


def installed(package: str) -> str | None:
    """Give the version of an installed package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
