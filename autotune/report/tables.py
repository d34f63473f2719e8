"""The figures of a report as text: units, labels and columns, the same for every page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spcomp.autotune.report.record import KernelRow, ReportRecord, Row, Timing

NOTHING = "–"
"""What a cell shows where there is no figure."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column's head, and what its figures mean in a few words."""

    name: str
    meaning: str
    is_number: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell; ``kind`` is 'text', 'number', 'predicted', 'rung-…' or 'best'."""

    text: str
    kind: str = "number"


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column names its rows."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


ROW_COLUMNS = (
    Column("pattern", "the pattern that ran", is_number=False),
    Column("block", "tokens in a block of keys"),
    Column("budget", "share of the keys asked for"),
    Column("mass mean", "dense attention probability kept, mean over rows, heads and layers"),
    Column("p5", "the same at the 5th percentile of rows"),
    Column("min head", "the same for the worst head"),
    Column("output error", "relative Frobenius norm against dense float32 attention"),
    Column("perplexity", "of the text with every layer's attention replaced"),
    Column("density", "visible pairs over causal pairs"),
    Column("FLOPs", "of the priced call, by the cost model"),
    Column("bytes", "moved by the priced call at least, by the cost model"),
    Column("time", "of the priced call: measured on the card, or predicted by the roofline"),
    Column("vs dense", "how many times faster than dense attention, measured or predicted alike"),
    Column("rung", "how far the kernels of this row got", is_number=False),
)

KERNEL_COLUMNS = (
    Column("kernel", "the generated kernel", is_number=False),
    Column("pattern", "the pattern it was made for", is_number=False),
    Column("block", "tokens in a block of keys"),
    Column("target", "what it was compiled for", is_number=False),
    Column("registers", "a thread"),
    Column("spills", "bytes of registers spilled to memory, a thread"),
    Column("shared memory", "bytes a program"),
    Column("rung", "how far it got", is_number=False),
)


def row_table(record: ReportRecord) -> Table:
    """Lay out every measured row, with dense attention as the first one."""
    rows = (_dense_cells(record), *(_row_cells(row) for row in ordered(record.rows)))
    return Table("Every pattern, block size and budget", ROW_COLUMNS, rows)


def kernel_table(record: ReportRecord) -> Table:
    """Lay out every compiled kernel."""
    return Table(
        "Every kernel as its compiler left it",
        KERNEL_COLUMNS,
        tuple(_kernel_cells(kernel) for kernel in record.kernels),
    )


def environment_table(record: ReportRecord) -> Table:
    """Lay out where the figures come from."""
    where, subject = record.environment, record.subject
    digest = f"SHA-256 {subject.text_sha256[:12]}"
    groups = f"{subject.query_heads} query, {subject.kv_heads} KV"
    entries = {
        "card": where.card or "no card: times are predicted, fidelity is computed on the CPU",
        "model": subject.model,
        "text": f"{subject.text}, first {subject.tokens} tokens ({digest})",
        "perplexity over": f"the first {subject.perplexity_tokens} of them",
        "layers": ", ".join(map(str, subject.layers)),
        "heads": f"{groups}, head size {subject.head_dim}",
        "dtype": subject.dtype,
        "priced call": str(record.priced),
        "fidelity by": subject.computed_by,
        "spcomp": where.spcomp + (f", commit {where.commit}" if where.commit else ""),
        "torch": where.torch,
        "triton": where.triton or "not installed",
        "Python": where.python,
        "seed": str(where.seed),
        "made": f"{record.created} in {record.elapsed_s:.0f} s",
    }
    columns = (Column("what", "", is_number=False), Column("value", "", is_number=False))
    rows = tuple((Cell(name, "text"), Cell(value, "text")) for name, value in entries.items())
    return Table("Where the figures come from", columns, rows)


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Order rows by pattern (as they first come), budget and block."""
    first = {row.pattern: place for place, row in reversed(list(enumerate(rows)))}
    return sorted(rows, key=lambda row: (first[row.pattern], row.budget, row.block or 0))


def named(pattern: str, block: int | None) -> str:
    """Name a pattern with its block size, if it has one."""
    return pattern if block is None else f"{pattern}, block {block}"


def percent(share: float, digits: int = 1) -> str:
    """Write a share as a percentage; 0.125 is '12.5 %'."""
    text = f"{100 * share:.{digits}f}"
    # A no-break space: a figure and its sign stay on one line.
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}\u00a0%"


def count(value: int | None, unit: str = "") -> str:
    """Write a large count with a decimal prefix and three figures; 1 234 567 is '1.23 M'."""
    if value is None:
        return NOTHING
    scaled, prefix = float(value), ""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(scaled) < 999.5 or prefix == "P":
            break
        scaled /= 1000
    return f"{scaled:.3g} {prefix}{unit}".rstrip()


def time_text(timing: Timing | None) -> str:
    """Write a time with its kind, so that no prediction passes for a measurement."""
    if timing is None:
        return NOTHING
    spread = "" if timing.spread_ms is None else f" ± {timing.spread_ms:.2g}"
    return f"{timing.median_ms:.3g}{spread} ms {timing.kind}"


def _row_cells(row: Row) -> tuple[Cell, ...]:
    kind = "predicted" if row.timing is not None and row.timing.kind == "predicted" else "number"
    return (
        Cell(row.pattern, "text"),
        Cell(_integer(row.block)),
        Cell(percent(row.budget)),
        Cell(percent(row.mass.mean, 2)),
        Cell(percent(row.mass.p5, 2)),
        Cell(percent(row.mass.min_head, 2)),
        Cell(f"{row.out_error:.2e}"),
        Cell(_perplexity(row.perplexity)),
        Cell(percent(row.density)),
        Cell(count(row.flops)),
        Cell(count(row.bytes, "B")),
        Cell(time_text(row.timing), kind),
        Cell(NOTHING if row.timing is None else f"{row.timing.vs_dense:.2f}×", kind),
        Cell(row.rung, f"rung rung-{row.rung}"),
    )


def _dense_cells(record: ReportRecord) -> tuple[Cell, ...]:
    timings = [row.timing for row in record.rows if row.timing is not None]
    kinds = {timing.kind for timing in timings}
    times = {timing.dense_ms for timing in timings}
    time = NOTHING
    if len(times) == 1 and len(kinds) == 1:
        time = f"{times.pop():.3g} ms {kinds.pop()}"
    kind = "predicted" if time.endswith("predicted") else "number"
    one = percent(1.0)
    texts = [NOTHING, NOTHING, one, one, one, f"{0:.2e}", _perplexity(record.dense.perplexity), one]
    cells = [Cell(text) for text in texts]
    cells += [Cell(count(record.dense.flops)), Cell(count(record.dense.bytes, "B"))]
    ratio = NOTHING if time == NOTHING else "1.00×"
    cells += [Cell(time, kind), Cell(ratio, kind), Cell(NOTHING, "text")]
    return (Cell("dense", "text"), *cells)


def _kernel_cells(row: KernelRow) -> tuple[Cell, ...]:
    figures = (row.registers, row.spill_bytes, row.shared_bytes)
    return (
        Cell(row.kernel, "text"),
        Cell(row.pattern, "text"),
        Cell(_integer(row.block)),
        Cell(row.target, "text"),
        *(Cell(_integer(figure)) for figure in figures),
        Cell(row.rung, f"rung rung-{row.rung}"),
    )


def _integer(value: int | None) -> str:
    return NOTHING if value is None else str(value)


def _perplexity(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"
