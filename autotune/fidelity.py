"""How much of dense attention a pattern keeps: mass, output error, density, perplexity, block maps.

The measure of all of them is dense attention in float32 over the same q, k and v. Everything is
chunked over query rows, so neither the probability map nor a float32 copy of the keys per query
head is ever whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from spcomp.errors import HeadsDoNotDivide, ShapeMismatch, SpcompError

ROWS_AT_ONCE = 128
"""Query rows whose probabilities are held at once, for every head."""

EMPTY, PARTIAL, FULL = 0, 1, 2
"""What a cell of a block map says."""

MaskRows = Callable[[int, int], Tensor]
"""Gives rows [start, stop) of a visibility map: bool [B, Hq, stop - start, Skv]."""


class MaskSeesTheFuture(SpcompError):
    """A mask that shows a query a later key cannot be measured against causal attention."""

    message = "the mask shows {pairs} (query, key) pairs whose key comes after its query."
    help = "combine it with the causal mask, or pass causal=False to compare with full attention."


class NothingToMeasure(SpcompError):
    """Neither a mask nor an output was given."""

    message = "fidelity was given neither a mask nor an output (mask={mask}, out={out})."
    help = "pass mask=attn.to_mask(q, k), out=attn(q, k, v), or both."


class TooFewTokens(SpcompError):
    """Perplexity needs a token to predict."""

    message = "perplexity was given token ids of shape {shape}; it needs [B, S] with S >= 2."
    help = "pass at least two tokens, and a batch dimension."


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What one attention keeps of the dense one, over all rows of all heads and layers.

    ``mass`` of a row is the dense softmax probability of the keys it still sees, in [0, 1].
    ``mass_mean`` is its mean and ``mass_p5`` its 5th percentile over every (layer, batch, head,
    row); ``mass_by_head`` its mean per query head, layer after layer, and ``mass_min_head`` the
    least of these. ``density`` is visible pairs over causal pairs. These are None or empty without
    a mask.
    ``out_error`` is the relative Frobenius norm of out - dense, ``out_max_abs`` the largest
    absolute difference; without an output they are those of the masked attention in float32.
    """

    rows: int
    out_error: float
    out_max_abs: float
    mass_mean: float | None = None
    mass_p5: float | None = None
    mass_min_head: float | None = None
    mass_by_head: tuple[float, ...] = ()
    density: float | None = None


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood (natural log) over every predicted token."""

    value: float
    nll_mean: float
    tokens: int


class Measurement:
    """Fidelity over several layers: add each, then take the result.

    ``causal`` and ``rows_at_once`` are those of `fidelity`.
    """

    def __init__(self, *, causal: bool = True, rows_at_once: int = ROWS_AT_ONCE) -> None:
        self._causal = causal
        self._rows_at_once = rows_at_once
        self._masses: list[list[Tensor]] = []  # per layer and chunk, [B, Hq, rows]
        self._visible = 0
        self._possible = 0
        self._rows = 0
        self._error = 0.0
        self._norm = 0.0
        self._max_abs = 0.0

    def add(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | MaskRows | None = None,
        out: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        """Count one layer; the arguments are those of `fidelity`, and so is what it raises."""
        if mask is None and out is None:
            raise NothingToMeasure(mask=mask, out=out)
        _check_shapes(q, k, v, mask, out)
        sight = _as_rows(mask)
        self._masses.append([])
        with torch.no_grad():
            for chunk in _dense_chunks(q, k, v, scale, self._causal, self._rows_at_once):
                self._add_chunk(chunk, sight, out, v)

    def _add_chunk(
        self, chunk: _Chunk, sight: MaskRows | None, out: Tensor | None, v: Tensor
    ) -> None:
        """Count one chunk; where no output is given, it is that of the masked attention."""
        counted = chunk.causal.any(-1)  # rows with something to see
        batch, heads = chunk.out.shape[:2]
        self._rows += int(counted.sum()) * batch * heads
        self._possible += int(chunk.causal.sum()) * batch * heads
        got = None if out is None else out[:, :, chunk.start : chunk.stop].float()
        if sight is not None:
            seen = sight(chunk.start, chunk.stop)
            masked = self._add_mask(chunk, seen, counted, v)
            got = masked if got is None else got
        assert got is not None
        self._add_error((got - chunk.out)[:, :, counted], chunk.out[:, :, counted])

    def _add_mask(self, chunk: _Chunk, seen: Tensor, counted: Tensor, v: Tensor) -> Tensor:
        batch, kv_heads, group, rows, keys = chunk.probs.shape
        heads = kv_heads * group
        seen = seen.expand(batch, heads, rows, keys)
        future = int((seen & ~chunk.causal).sum())
        if future:
            raise MaskSeesTheFuture(pairs=future)
        self._visible += int(seen.sum())
        kept = chunk.probs * seen.view(batch, kv_heads, group, rows, keys)
        mass = kept.sum(-1)
        self._masses[-1].append(mass.reshape(batch, heads, rows)[:, :, counted])
        # An empty row has mass 0 and gives 0; so does a row whose kept mass underflows.
        share = kept / mass.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        return _weighted(share, v)

    def _add_error(self, error: Tensor, dense: Tensor) -> None:
        self._error += error.double().square().sum().item()
        self._norm += dense.double().square().sum().item()
        if error.numel():
            self._max_abs = max(self._max_abs, error.abs().max().item())

    def result(self) -> Fidelity:
        """Turn what was added into figures."""
        out_error = math.sqrt(self._error / self._norm) if self._norm else math.sqrt(self._error)
        layers = [torch.cat(chunks, dim=2) for chunks in self._masses if chunks]
        if not layers:
            return Fidelity(rows=self._rows, out_error=out_error, out_max_abs=self._max_abs)
        by_head = torch.cat([mass.double().mean(dim=(0, 2)) for mass in layers])
        mass = torch.cat([mass.flatten() for mass in layers])
        return Fidelity(
            rows=self._rows,
            out_error=out_error,
            out_max_abs=self._max_abs,
            mass_mean=mass.double().mean().item(),
            mass_p5=_percentile(mass, 0.05),
            mass_min_head=by_head.min().item(),
            mass_by_head=tuple(by_head.tolist()),
            density=self._visible / self._possible,
        )


class _GivesLogits(Protocol):
    def __call__(self, input_ids: Tensor, /, **kwargs: Any) -> Any: ...


def fidelity(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | MaskRows | None = None,
    out: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Fidelity:
    """Compare a mask, an output, or both with dense attention in float32.

    q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv]; mask bool [B, Hq, Sq, Skv] (heads and
    batch may be 1), or a callable that gives a range of its rows, for lengths at which the whole
    does not fit; out [B, Hq, Sq, Dv]. Causal with Sq != Skv is aligned bottom-right, and rows
    without a causal key (Sq > Skv) are left out of every figure.

    Raises: NothingToMeasure, ShapeMismatch, HeadsDoNotDivide, MaskSeesTheFuture.
    """
    measurement = Measurement(causal=causal, rows_at_once=rows_at_once)
    measurement.add(q, k, v, mask=mask, out=out, scale=scale)
    return measurement.result()


def perplexity(model: _GivesLogits, input_ids: Tensor, *, tokens_at_once: int = 512) -> Perplexity:
    """Predict every token of the text but the first of each row, and none is left out.

    input_ids [B, S] int64. The logits are turned to float32 and normalised ``tokens_at_once`` at a
    time. To replace the model's attention, see `spcomp.integrations.transformers.perplexity`.

    Raises: TooFewTokens.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise TooFewTokens(shape=tuple(input_ids.shape))
    with torch.inference_mode():
        logits = model(input_ids, use_cache=False).logits[:, :-1]
        targets = input_ids[:, 1:]
        total = 0.0
        for start in range(0, targets.shape[1], tokens_at_once):
            window = slice(start, start + tokens_at_once)
            logp = torch.log_softmax(logits[:, window].float(), dim=-1)
            total -= logp.gather(-1, targets[:, window, None]).double().sum().item()
    mean = total / targets.numel()
    return Perplexity(value=math.exp(mean), nll_mean=mean, tokens=targets.numel())


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Tensor:
    """Attend densely in float32: q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv] -> [B,Hq,Sq,Dv].

    Causal is aligned bottom-right; a row without a visible key gives 0.
    """
    _check_shapes(q, k, v, None, None)
    with torch.no_grad():
        chunks = [c.out for c in _dense_chunks(q, k, v, scale, causal, rows_at_once)]
    return torch.cat(chunks, dim=2)


def block_map(mask: Tensor, block: int) -> Tensor:
    """Say of each (query block, key block) whether it is empty, partly or fully visible.

    mask bool [Sq, Skv] -> uint8 [ceil(Sq / block), ceil(Skv / block)]: 0 empty, 1 partial, 2 full.
    A cut block at the end is full when all the pairs it has are visible.
    """
    sq, skv = mask.shape
    seen = _block_sums(mask.to(torch.int32), block)
    size_q = _lengths(sq, block, mask.device)
    size_k = _lengths(skv, block, mask.device)
    pairs = size_q[:, None] * size_k[None, :]
    return ((seen > 0).to(torch.uint8) + (seen == pairs).to(torch.uint8)).to(torch.uint8)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Largest absolute error against float64, and what plain torch's own error allows."""

    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the error is within what is allowed."""
        return self.error <= self.allowed


def agreement(
    got: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None
) -> Agreement:
    """Compare an output with masked attention in float64; small sizes, since nothing is chunked.

    got [B,Hq,Sq,Dv]; mask bool [B,Hq,Sq,Skv] holds the pairs that the pattern reads. Allowed is
    twice the error of plain torch in q's dtype, and 1e-6 (float32) or 1e-4 (16 bit) beside it.
    """
    want = _masked(q.double(), k.double(), v.double(), mask, scale)
    plain = _masked(q, k, v, mask, scale)
    beside = 1e-6 if q.dtype == torch.float32 else 1e-4
    error = (got.double() - want).abs().max().item()
    return Agreement(error, 2 * (plain.double() - want).abs().max().item() + beside)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    seen = mask.expand(*q.shape[:3], k.shape[2]).reshape(*queries.shape[:4], k.shape[2])
    scores = (queries @ k.transpose(-1, -2).unsqueeze(2)) * scale
    probs = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (probs @ v.unsqueeze(2)).reshape(*q.shape[:3], v.shape[-1])


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Dense attention of query rows [start, stop)."""

    start: int
    stop: int
    causal: Tensor  # bool [rows, Skv]
    probs: Tensor  # f32 [B, Hkv, G, rows, Skv]; a row without a visible key is 0
    out: Tensor  # f32 [B, Hq, rows, Dv]


def _dense_chunks(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, rows_at_once: int
) -> Iterator[_Chunk]:
    batch, heads, sq, dim = q.shape
    kv_heads, skv = k.shape[1], k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    keys = k.float().transpose(-1, -2).unsqueeze(2)  # [B, Hkv, 1, D, Skv]
    columns = torch.arange(skv, device=q.device)
    for start in range(0, sq, rows_at_once):
        stop = min(start + rows_at_once, sq)
        rows = torch.arange(start, stop, device=q.device)
        seen = columns <= rows[:, None] + (skv - sq)
        seen = seen if causal else torch.ones_like(seen)
        queries = q[:, :, start:stop].float() * scale
        scores = queries.view(batch, kv_heads, heads // kv_heads, stop - start, dim) @ keys
        scores = scores.masked_fill_(~seen, -torch.inf)
        # A row that sees nothing is all -inf, which softmax turns into NaN: it is 0 by definition.
        probs = torch.softmax(scores, dim=-1).masked_fill_(~seen.any(-1, keepdim=True), 0.0)
        yield _Chunk(start, stop, seen, probs, _weighted(probs, v))


def _weighted(probs: Tensor, v: Tensor) -> Tensor:
    batch, kv_heads, group, rows, _ = probs.shape
    return (probs @ v.float().unsqueeze(2)).reshape(batch, kv_heads * group, rows, v.shape[-1])


def _percentile(values: Tensor, share: float) -> float:
    """Interpolate linearly between the two nearest values, for any number of them."""
    ordered = values.sort().values  # torch.quantile stops at 2^24 values
    place = share * (ordered.numel() - 1)
    low, high = math.floor(place), math.ceil(place)
    return torch.lerp(ordered[low], ordered[high], place - low).item()


def _block_sums(mask: Tensor, block: int) -> Tensor:
    sq, skv = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -skv % block, 0, -sq % block))
    blocks_q, blocks_k = padded.shape[0] // block, padded.shape[1] // block
    return padded.view(blocks_q, block, blocks_k, block).sum(dim=(1, 3))


def _lengths(total: int, block: int, device: torch.device) -> Tensor:
    starts = torch.arange(0, total, block, device=device)
    return (total - starts).clamp_max(block)


def _as_rows(mask: Tensor | MaskRows | None) -> MaskRows | None:
    if isinstance(mask, Tensor):
        return lambda start, stop: mask[:, :, start:stop]
    return mask


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | MaskRows | None, out: Tensor | None
) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        _clash("q, k and v", "[B, H, S, D]", f"{q.ndim}, {k.ndim} and {v.ndim} dimensions")
    if k.shape[:3] != v.shape[:3]:
        _clash("k and v", "one [B, Hkv, Skv]", f"{list(k.shape[:3])} and {list(v.shape[:3])}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        _clash("q and k", "one B and one D", f"{list(q.shape)} and {list(k.shape)}")
    if q.shape[1] % k.shape[1]:
        raise HeadsDoNotDivide(hq=q.shape[1], hkv=k.shape[1])
    if out is not None and out.shape != (*q.shape[:3], v.shape[3]):
        _clash("q, v and out", f"out {[*q.shape[:3], v.shape[3]]}", f"{list(out.shape)}")
    if isinstance(mask, Tensor):
        fits = mask.ndim == 4 and mask.dtype == torch.bool
        fits = fits and mask.shape[0] in (1, q.shape[0]) and mask.shape[1] in (1, q.shape[1])
        if not fits or mask.shape[2:] != (q.shape[2], k.shape[2]):
            wanted = [*q.shape[:3], k.shape[2]]
            _clash("q, k and mask", f"a bool mask {wanted}", f"{mask.dtype} {list(mask.shape)}")


def _clash(names: str, wanted: str, given: str) -> None:
    left, right = names.rsplit(" and ", 1)
    raise ShapeMismatch(
        left=left,
        right=right,
        problem=f"{wanted} is needed, {given} was given",
        way_out="the layout is q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv].",
    )
