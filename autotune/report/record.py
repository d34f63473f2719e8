"""What a report says, as values; and the rule that it claims nothing it has not done."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal, TypeAlias

from spcomp.errors import SpcompError

SCHEMA = 1
"""Version of the JSON form; it grows when a field changes its meaning or goes."""

RUNGS = ("emitted", "compiled", "matched", "timed")
"""How far a kernel got, lowest first: text, binary, equal to the reference, timed on a card."""

Rung: TypeAlias = Literal["emitted", "compiled", "matched", "timed"]


class ReportContradiction(SpcompError):
    """A record claims more than was done, or holds a figure that cannot be."""

    message = "{entry} says {claim}, but {fact}."
    help = "{way_out}"


@dataclass(frozen=True, slots=True)
class Environment:
    """Where the figures come from. ``card`` and ``triton`` are None where there is none."""

    card: str | None
    spcomp: str
    torch: str
    triton: str | None
    python: str
    commit: str | None
    seed: int


@dataclass(frozen=True, slots=True)
class Subject:
    """The model and the text whose queries, keys and values were measured.

    ``tokens``: the first of the text, of which q, k and v come; ``perplexity_tokens``: those of
    them that perplexity is taken over. ``computed_by``: what gave the outputs that are compared.
    """

    model: str
    text: str
    text_sha256: str
    tokens: int
    perplexity_tokens: int
    layers: tuple[int, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    computed_by: str


@dataclass(frozen=True, slots=True)
class PricedShape:
    """The call that FLOPs, bytes and times belong to: one layer's causal forward.

    It may be longer than the text that was measured, since a short call is all launch cost.
    """

    batch: int
    query_heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    dtype: str

    def __str__(self) -> str:
        heads = f"{self.query_heads} query and {self.kv_heads} KV heads of size {self.head_dim}"
        return f"{self.tokens} tokens, {heads}, batch {self.batch}, {self.dtype}"


@dataclass(frozen=True, slots=True)
class Dense:
    """Dense causal attention: what every row is compared with.

    ``flops`` and ``bytes`` are those of the priced call, by the cost model.
    """

    perplexity: float | None
    flops: int | None
    bytes: int | None


@dataclass(frozen=True, slots=True)
class Mass:
    """Dense attention probability kept, in [0, 1], over all layers of the subject."""

    mean: float
    p5: float
    min_head: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of the priced call beside dense attention, and how they came about.

    ``where`` names the card for a measured time, and the target of the roofline for a predicted
    one. ``spread_ms`` is the distance between the quartiles, and exists only when measured.
    """

    kind: Literal["measured", "predicted"]
    median_ms: float
    spread_ms: float | None
    dense_ms: float
    where: str

    @property
    def vs_dense(self) -> float:
        """How many times faster than dense attention."""
        return self.dense_ms / self.median_ms


@dataclass(frozen=True, slots=True)
class Row:
    """One pattern at one block size and budget.

    ``block`` is None for a pattern that chooses tokens and knows no block. ``budget`` is the share
    of the keys asked for, in (0, 1]; ``density`` the share of causal pairs really visible.
    ``out_error`` is the relative Frobenius norm against dense float32 attention.
    """

    pattern: str
    block: int | None
    budget: float
    mass: Mass
    out_error: float
    out_max_abs: float
    density: float
    perplexity: float | None
    flops: int | None
    bytes: int | None
    timing: Timing | None
    rung: Rung
    note: str = ""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One kernel as its compiler left it; None where there is no block or no figure."""

    kernel: str
    pattern: str
    block: int | None
    target: str
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int | None
    rung: Rung
    note: str = ""


@dataclass(frozen=True, slots=True)
class BlockMap:
    """Which blocks of one head are seen: 0 empty, 1 partial, 2 full; [query blocks][key blocks]."""

    pattern: str
    block: int
    budget: float
    layer: int
    head: int
    cells: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ReportRecord:
    """Everything a report shows. ``created`` is ISO 8601 in UTC; ``elapsed_s`` the whole job's."""

    title: str
    created: str
    elapsed_s: float
    environment: Environment
    subject: Subject
    priced: PricedShape
    dense: Dense
    rows: tuple[Row, ...]
    kernels: tuple[KernelRow, ...]
    block_maps: tuple[BlockMap, ...]
    notes: tuple[str, ...] = ()


def check(record: ReportRecord) -> None:
    """Refuse a record that claims more than was done, or that holds an impossible figure.

    A time counts as measured exactly when its rung is *timed*, which needs a card; every share lies
    where a share can lie, and no figure is infinite or NaN.

    Raises: ReportContradiction.
    """
    for row in record.rows:
        block = "no block" if row.block is None else f"block {row.block}"
        _check_row(f"the row {row.pattern}, {block}, budget {row.budget:g}", row, record)
    for kernel in record.kernels:
        _check_rung(f"the kernel {kernel.kernel}", kernel.rung, record.environment.card)
    for place, value in _figures(record, "the report"):
        if not math.isfinite(value):
            raise ReportContradiction(
                entry=place, claim=value, fact="a figure is finite", way_out="use None for unknown."
            )


def _check_row(entry: str, row: Row, record: ReportRecord) -> None:
    _check_rung(entry, row.rung, record.environment.card)
    is_measured = row.timing is not None and row.timing.kind == "measured"
    if is_measured != (row.rung == "timed"):
        kind = "no time" if row.timing is None else f"a {row.timing.kind} time"
        raise ReportContradiction(
            entry=entry,
            claim=f"rung '{row.rung}'",
            fact=f"it holds {kind}",
            way_out="a measured time and the rung 'timed' go together.",
        )
    shares = {"budget": row.budget, "density": row.density, "mass mean": row.mass.mean}
    for name, value in shares.items():
        # Float32 sums of probabilities pass 1 by a few roundings.
        if not 0 <= value <= 1 + 1e-5 or (name == "budget" and value == 0):
            raise ReportContradiction(
                entry=entry,
                claim=f"{name} {value:g}",
                fact="a share lies between 0 and 1",
                way_out="give it as a fraction, 0.25 for 25 %.",
            )


def _check_rung(entry: str, rung: str, card: str | None) -> None:
    if rung not in RUNGS:
        raise ReportContradiction(
            entry=entry,
            claim=f"rung '{rung}'",
            fact=f"the rungs are {', '.join(RUNGS)}",
            way_out="name the highest one that was reached.",
        )
    if rung == "timed" and card is None:
        raise ReportContradiction(
            entry=entry,
            claim="rung 'timed'",
            fact="the environment names no card",
            way_out="name the card, or claim 'matched' at most.",
        )


def _figures(value: object, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _figures(item, f"{place}[{index}]")
    elif is_dataclass(value):
        for field in fields(value):
            yield from _figures(getattr(value, field.name), f"{place}.{field.name}")
