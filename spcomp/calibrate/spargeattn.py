"""The thresholds of SpargeAttn, one set a head: found from samples, or read from a tuned model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spcomp import api
from spcomp.backends.reference.pattern import selection_mask
from spcomp.dsl.pattern import Pattern
from spcomp.errors import NotANumber, ShapeMismatch, SpcompError
from spcomp.patterns.spargeattn import spargeattn

Sample = tuple[Tensor, Tensor, Tensor]
THETAS = tuple(n / 16 for n in range(-16, 16))
BIN = 1 / 8
"""Cosines that are taken together when a head's best is chosen."""
TAU_WIDTH, LAM_WIDTH, MOST_LAM = 1e-3, 0.1, 50.0
LEAST_SPARSITY = 0.1
"""A head that leaves out less is dense."""
ROWS_AT_ONCE = 512


class NoThresholds(SpcompError):
    """A state dict holds no thresholds for a layer."""

    message = "the state dict has no {missing} for the layer '{layer}'."
    help = "{way_out}"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Thresholds of one layer, each float32 [Hq]: tau, theta and lam of `spargeattn`.

    sparsity: the share of the work of dense attention that they left out over the samples, where
    known; a tile that is chosen and then skipped counts half, for its scores."""

    tau: Tensor
    theta: Tensor
    lam: Tensor
    sparsity: Tensor | None = None

    def options(self) -> dict[str, Tensor]:
        """Give the keyword arguments of `spargeattn`."""
        return {"tau": self.tau, "theta": self.theta, "lam": self.lam}


def thresholds_of(state: Mapping[str, Tensor], layer: str) -> Thresholds:
    """Read the thresholds of a layer from a state dict of the official code (thu-ml/SpargeAttn).

    state: what torch.load gives of a tuned model, such as `blocks.0.attn.cdfthreshd` [H] beside
    `.simthreshd1` and `.pvthreshd`; layer: what stands before, `blocks.0.attn`. Both codes mean the
    same by the numbers: a cosine, a share, and a distance in powers of two. `.simthreshd2` is read
    by neither.
    Raises: NoThresholds.
    """
    found = []
    for name in ("cdfthreshd", "simthreshd1", "pvthreshd"):
        held = state.get(f"{layer}.{name}")
        if held is None or held.dim() != 1:
            layers = sorted(k.removesuffix(f".{name}") for k in state if k.endswith(f".{name}"))
            raise NoThresholds(
                missing=f"{name} [H]",
                layer=layer,
                way_out=f"it has them for {', '.join(layers) if layers else 'no layer'}.",
            )
        found.append(held.detach().float())
    return Thresholds(*found)


def calibrate_spargeattn(
    samples: Iterable[Sample],
    *,
    tau_error: float = 0.07,
    lam_error: float = 0.08,
    thetas: Sequence[float] = THETAS,
    backend: str | None = None,
    **options: Any,
) -> Thresholds:
    """Find, for each query head, thresholds that leave out the most within a bound on the error.

    samples: (q, k, v) of one layer, as its attention gets them. tau_error: the most error that
    choosing blocks may bring, sum |out - dense| / sum |dense| over a sample and a head; lam_error:
    that of skipping tiles besides. thetas: the cosines tried, ascending; a head tries no higher one
    once it leaves out less than a tenth. backend: as in compile(). options: other arguments of
    `spargeattn`, such as causal, int8, block_q, block_k.

    For each cosine the least tau within its bound is bisected to 0.001, then the least lam to 0.1.
    Cosines are pooled over the samples by eighths; a head takes the eighth that leaves out the most
    in sum, and of it the highest tau, theta and lam. A head that leaves out a tenth or less is
    dense. The procedure is that of the official code (SpargeAttn, arXiv:2502.18137, section 3.6),
    but a bound that is reported was met by a run, where it takes the middle of the last interval,
    and a dense head skips no tile.
    Raises: NotANumber, ShapeMismatch, and what the pattern raises.
    """
    if not 0 < tau_error < lam_error:
        raise NotANumber(
            verb="calibrate_spargeattn",
            name="(tau_error, lam_error)",
            value=(tau_error, lam_error),
            kind="pair",
            wanted="two errors above 0, the second the larger",
        )
    points: list[dict[str, Tensor]] = []
    for sample in samples:
        if points and points[0]["tau"].shape[0] != sample[0].shape[1]:
            raise ShapeMismatch(
                left=f"a sample with {points[0]['tau'].shape[0]} query heads",
                right=f"one with {sample[0].shape[1]}",
                problem="the samples are of one layer, whose heads are the same",
                way_out="calibrate each layer by itself.",
            )
        points += _Search(sample, (tau_error, lam_error), backend, options).points(thetas)
    if not points:
        raise NotANumber(
            verb="calibrate_spargeattn",
            name="samples and thetas",
            value=[],
            kind="list",
            wanted="one sample and one cosine at least",
        )
    return _best(points)


class _Search:
    """The thresholds of one sample, all heads at once: their tables are written to in place, which
    the calls that follow read."""

    def __init__(
        self, sample: Sample, errors: tuple[float, float], backend: str | None, options: Any
    ) -> None:
        self.sample = tuple(x.detach() for x in sample)
        self.tau_error, self.lam_error = errors
        q = self.sample[0]
        self.tau, self.theta, self.lam = (q.new_zeros(q.shape[1]).float() for _ in range(3))
        tables = {"tau": self.tau, "theta": self.theta}
        self.chosen = spargeattn(**{**options, **tables, "lam": None})
        self.skipping = spargeattn(**{**options, **tables, "lam": self.lam})
        causal = bool(options.get("causal", False))
        self.attend = [api.compile(p, backend=backend) for p in (self.chosen, self.skipping)]
        self.dense_pattern = spargeattn(theta=1.0, causal=causal)
        with torch.no_grad():
            self.dense = api.compile(self.dense_pattern, backend=backend)(*self.sample)

    @torch.no_grad()
    def points(self, thetas: Sequence[float]) -> list[dict[str, Tensor]]:
        """Give tau, theta, lam, the sparsity and whether it counts, of each cosine: [Hq] each."""
        found: list[dict[str, Tensor]] = []
        counts = torch.ones_like(self.tau, dtype=torch.bool)
        possible = self._pairs(self.dense_pattern)
        for theta in thetas:
            self.theta.fill_(theta)
            self._bisect(self.tau, (0.0, 0.1, 1.0), TAU_WIDTH, self.attend[0], self.tau_error)
            self._bisect(self.lam, (0.0, 20.0, MOST_LAM), LAM_WIDTH, self.attend[1], self.lam_error)
            work = (self._pairs(self.chosen) + self._pairs(self.skipping)) / 2
            sparsity = 1 - work / possible
            held = {"tau": self.tau, "theta": self.theta, "lam": self.lam}
            point = {name: table.clone() for name, table in held.items()}
            found.append({**point, "sparsity": sparsity, "counts": counts.clone()})
            counts &= sparsity >= LEAST_SPARSITY
            if not counts.any():
                break
        return found

    def _bisect(
        self,
        table: Tensor,
        ends: tuple[float, float, float],
        width: float,
        attend: Callable[..., Tensor],
        bound: float,
    ) -> None:
        """Leave in a table the least number of each head whose error is below a bound; ends are the
        lowest, the first tried and the highest, which is taken to be within it."""
        low, high = torch.full_like(table, ends[0]), torch.full_like(table, ends[2])
        table.fill_(ends[1])
        while bool((high - low > width).any()):
            open_ = high - low > width
            within = self._error(attend(*self.sample)) < bound
            high = torch.where(open_ & within, table, high)
            low = torch.where(open_ & ~within, table, low)
            table.copy_((low + high) / 2)
        table.copy_(high)

    def _error(self, out: Tensor) -> Tensor:
        """Give sum |out - dense| / sum |dense| of each head, [Hq]."""
        wide, dense = out.float(), self.dense.float()
        return (wide - dense).abs().sum(dim=(0, 2, 3)) / dense.abs().sum(dim=(0, 2, 3))

    def _pairs(self, pattern: Pattern) -> Tensor:
        """Count the pairs that a pattern attends to in each head, float64 [Hq]."""
        q, k, v = self.sample
        given = {"q": q, "k": k, "v": v, **pattern.tensors}
        total = torch.zeros(q.shape[1], dtype=torch.float64, device=q.device)
        for first in range(0, q.shape[2], ROWS_AT_ONCE):
            rows = selection_mask(pattern.program, given, slice(first, first + ROWS_AT_ONCE))
            total += rows.sum(dim=(0, 2, 3))
        return total


def _best(points: list[dict[str, Tensor]]) -> Thresholds:
    """Take for each head the bin of cosines that leaves out the most, and its highest numbers."""
    stacked = {name: torch.stack([p[name] for p in points]) for name in points[0]}
    counts, sparsity = stacked["counts"], stacked["sparsity"]
    bins = ((stacked["theta"] + 1) / BIN).floor().long()
    left_out = sparsity.new_zeros(int(bins.max()) + 1, bins.shape[1])
    tried = torch.zeros_like(left_out).scatter_add_(0, bins, counts.to(left_out.dtype))
    left_out.scatter_add_(0, bins, sparsity.where(counts, 0.0))
    left_out.masked_fill_(tried == 0, -torch.inf)
    chosen = counts & (bins == left_out.argmax(dim=0))
    mean = sparsity.where(chosen, 0.0).sum(dim=0) / chosen.sum(dim=0)
    tau, theta, lam = (
        stacked[name].masked_fill(~chosen, -torch.inf).amax(dim=0)
        for name in ("tau", "theta", "lam")
    )
    dense = mean <= LEAST_SPARSITY
    return Thresholds(
        tau.masked_fill(dense, 1.0),
        theta.masked_fill(dense, 1.0),
        lam.masked_fill(dense, torch.inf),
        mean.masked_fill(dense, 0.0).float(),
    )
