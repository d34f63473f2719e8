"""Run sparse attention on a real language model and report its speed and fidelity.

SmolLM2-135M reads a module of Python's standard library. The queries, keys and values of four of
its layers go through every pattern at block sizes 64, 128 and 256 and several budgets; then the
pattern replaces the attention of all layers and the model's perplexity is taken again. The report
stands in report/report.html, .json and .md.

    python examples/smollm2_report.py [--out report] [--tokens 2048]

With an NVIDIA card the kernels run and are timed there. Without one the reference backend computes
fidelity, Triton's interpreter proves the kernels on a slice, Triton's compiler builds them for an
H100, and times are predictions of the cost model.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import spcomp as sp
from spcomp import capture
from spcomp.autotune import fidelity, measure, price, survey
from spcomp.autotune.report import pages, tables
from spcomp.autotune.report.record import (
    BlockMap,
    KernelRow,
    PricedShape,
    ReportRecord,
    Row,
    Rung,
    Subject,
    Timing,
)
from spcomp.backends.base import Source
from spcomp.backends.reference.pattern import run_program
from spcomp.dsl.scaling import with_scale
from spcomp.integrations import transformers as plug
from spcomp.patterns import block_topk, moba, quest, streaming_llm

SEED = 0
LAYERS = (0, 9, 19, 29)
MAP_HEADS = (0, 4, 8)
TARGET = "sm90"
PROVEN_TOKENS = 640
PRICED_TOKENS = 32768  # a call of 2048 tokens is all launch cost on an H100
CPU_TOKENS, CPU_PERPLEXITY_TOKENS = 2048, 1024  # what two cores do in under five minutes
CARD_TOKENS = 8192

progress = Console(stderr=True)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Case:
    """A pattern at a block size and a budget; `at` makes it for a number of tokens."""

    name: str
    block: int | None
    budget: float
    at: Callable[[int], sp.Pattern]

    def __str__(self) -> str:
        return f"{tables.named(self.name, self.block)}, {tables.percent(self.budget)}"


def cases() -> list[Case]:
    """List what is tried."""
    found = []
    for block in (64, 128, 256):
        for budget in (0.125, 0.25, 0.5, 1.0):
            found.append(_block_topk(block, budget))
        found.append(_moba(block, 0.25))
    found += [_quest(64, 0.25), _streaming(0.125), _streaming(0.25)]
    return found


def _block_topk(block: int, budget: float) -> Case:
    return Case("block_topk", block, budget, lambda _: block_topk(block=block, budget=budget))


def _moba(block: int, budget: float) -> Case:
    def at(tokens: int) -> sp.Pattern:
        made: sp.Pattern = moba(block=block, k_blocks=max(1, round(budget * tokens / block)))
        return made

    return Case("moba", block, budget, at)


def _quest(page: int, budget: float) -> Case:
    return Case("quest", page, budget, lambda n: quest(page=page, budget=int(budget * n)))


def _streaming(budget: float) -> Case:
    def at(tokens: int) -> sp.Pattern:
        made: sp.Pattern = streaming_llm(sinks=4, recent=max(1, int(budget * tokens) - 4))
        return made

    return Case("streaming_llm", None, budget, at)


def compile_pattern(pattern: sp.Pattern) -> survey.Measurable:
    """Compile a pattern for the card, or let the reference backend run its meaning."""
    return sp.compile(pattern, backend="triton") if torch.cuda.is_available() else Meaning(pattern)


class Meaning:
    """A pattern run stage by stage by the reference backend.

    `sp.compile` would interpret the plan, launch by launch: the same figures, some times slower.
    """

    def __init__(self, pattern: sp.Pattern) -> None:
        self._pattern = pattern

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, /, *, scale: float | None = None
    ) -> torch.Tensor:
        """Attend."""
        pattern = self._pattern if scale is None else with_scale(self._pattern, scale)
        with torch.no_grad():
            return run_program(pattern.program, {"q": q, "k": k, "v": v})[0]

    def to_mask(self, q: torch.Tensor, k: torch.Tensor, /) -> torch.Tensor:
        """Give the pairs it reads."""
        return sp.compile(self._pattern).to_mask(q, k)


# ---- kernels: compiled for a card that is not here, and proven on a slice ------------------------


def compiled_kernels(case: Case, source: Source) -> tuple[KernelRow, ...]:
    """Compile every kernel of a source for its target and list what the compiler says."""
    from spcomp.backends.triton.offline import build_offline

    rows = (
        KernelRow(
            kernel=built.kernel,
            pattern=case.name,
            block=case.block,
            target=built.target,
            registers=built.registers,
            spill_bytes=built.spill_bytes,
            shared_bytes=built.shared_bytes,
            rung="compiled",
            note=", ".join(built.warnings),
        )
        for built in build_offline(source)
    )
    return tuple(dict.fromkeys(rows))  # a kernel launched twice is listed once


def prove(index: int, layer: capture.CapturedLayer, tokens: int) -> fidelity.Agreement:
    """Run a case's Triton kernels on a slice and compare with float64 over the same pairs."""
    pattern = cases()[index].at(tokens)
    q, k, v = layer.q[:, :, :tokens], layer.k[:, :, :tokens], layer.v[:, :, :tokens]
    group = q.shape[1] // k.shape[1]
    q, k, v = q[:, :group], k[:, :1], v[:, :1]
    kernels = sp.compile(pattern, backend="triton")
    got = kernels(q, k, v, scale=layer.scale)
    mask = kernels.to_mask(q, k)
    return fidelity.agreement(got, q, k, v, mask, scale=layer.scale)


@dataclass(frozen=True, slots=True)
class Climb:
    """How far the kernels of each case got, and what went wrong on the way."""

    rungs: tuple[Rung, ...]
    kernels: tuple[KernelRow, ...]
    notes: tuple[str, ...]


def climb(found: list[Case], sources: list[Source], layer: capture.CapturedLayer) -> Climb:
    """Compile and prove every set of kernels once; cases that share kernels share the rung."""
    first: dict[tuple[str, ...], int] = {}
    shared = [first.setdefault(price.same_kernels(s), n) for n, s in enumerate(sources)]
    rungs: dict[int, Rung] = {}
    kernels: list[KernelRow] = []
    notes: list[str] = []
    with _workers(on_card=layer.q.is_cuda) as pool:
        proofs = {n: pool.submit(prove, n, layer, PROVEN_TOKENS) for n in first.values()}
        for n, proof in proofs.items():
            progress.print(f"  compiling for {TARGET} and proving: {found[n]}")
            built, problem = _attempt(partial(compiled_kernels, found[n], sources[n]))
            agreement, trouble = _attempt(proof.result)
            if agreement is not None and not agreement.holds:
                trouble = f"off by {agreement.error:.2e}, {agreement.allowed:.2e} is allowed"
            rungs[n] = "emitted" if problem else "compiled" if trouble else "matched"
            kernels += [replace(row, rung=rungs[n]) for row in built or ()]
            notes += [f"{found[n]}: not compiled: {problem}"] if problem else []
            notes += [f"{found[n]}: not matched: {trouble}"] if trouble else []
    how = "on the card" if layer.q.is_cuda else "in Triton's interpreter"
    notes.append(
        f"Matched: the kernels of {len(rungs)} sets ran {how} over {PROVEN_TOKENS} tokens of layer "
        f"{layer.layer} in float32, against float64; cases that generate the same kernels share it."
    )
    return Climb(tuple(rungs[n] for n in shared), tuple(kernels), tuple(notes))


def _attempt(step: Callable[[], Result]) -> tuple[Result | None, str]:
    """Run a step whose failure is a finding of the report and not the end of the job."""
    try:
        return step(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:300]


@contextmanager
def _workers(*, on_card: bool) -> Iterator[ProcessPoolExecutor]:
    """Start processes in which Triton interprets its kernels, or uses the card that is there."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0" if on_card else "1"
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1 if on_card else 2, mp_context=spawn) as pool:
            yield pool
    finally:
        os.environ.pop("TRITON_INTERPRET")
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


# ---- the model -----------------------------------------------------------------------------------


def take_layers(
    loaded: capture.LoadedModel, source: capture.TextSource, tokens: int
) -> tuple[torch.Tensor, list[capture.CapturedLayer]]:
    """Tokenise the text and capture the layers."""
    ids = capture.encode(loaded, source, tokens)
    return ids, capture.capture_qkv(loaded.model, ids, LAYERS)


def price_of(
    case: Case, source: Source, shape: PricedShape, layer: capture.CapturedLayer
) -> survey.Price:
    """Price a case by the cost model, and time it where a card is present."""
    found = price.predicted(source, shape)
    if not layer.q.is_cuda:
        return found
    q, k, v = (x.to(torch.bfloat16) for x in (layer.q, layer.k, layer.v))
    attention = compile_pattern(case.at(shape.tokens))
    ours = measure.time_ms(lambda: attention(q, k, v, scale=layer.scale))
    dense = measure.time_ms(lambda: plug.dense_causal(q, k, v, scale=layer.scale))
    card = torch.cuda.get_device_name()
    timing = Timing("measured", ours.median_ms, ours.spread_ms, dense.median_ms, card)
    return replace(found, timing=timing)


def measure_case(
    case: Case,
    loaded: capture.LoadedModel,
    ids: torch.Tensor,
    layers: list[capture.CapturedLayer],
    cost: survey.Price,
    rung: Rung,
) -> Row:
    """Take fidelity on the captured layers, and perplexity with all attention replaced."""
    tokens = layers[0].q.shape[2]
    candidate = survey.Candidate(
        case.name, case.block, case.budget, compile_pattern(case.at(tokens))
    )
    everywhere = compile_pattern(case.at(ids.shape[1]))
    found = plug.perplexity(loaded.model, ids, everywhere)
    is_timed = cost.timing is not None and cost.timing.kind == "measured"
    return survey.measure(
        candidate, layers, perplexity=found.value, price=cost, rung="timed" if is_timed else rung
    )


def maps(layers: list[capture.CapturedLayer]) -> tuple[BlockMap, ...]:
    """Draw some heads of two layers under block_topk, and of one under quest."""
    tokens = layers[0].q.shape[2]
    found: list[BlockMap] = []
    for case, chosen in ((_block_topk(64, 0.25), layers[1:3]), (_quest(64, 0.25), layers[1:2])):
        candidate = survey.Candidate(
            case.name, case.block, case.budget, compile_pattern(case.at(tokens))
        )
        for layer in chosen:
            found += survey.block_maps(candidate, layer, MAP_HEADS, block=64)
    return tuple(found)


def build_record(tokens: int | None) -> ReportRecord:
    """Do the whole job."""
    began = time.monotonic()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    tokens = tokens or (CARD_TOKENS if card else CPU_TOKENS)
    torch.manual_seed(SEED)
    progress.print("loading SmolLM2-135M")
    loaded = capture.load_smollm2("cuda" if card else "cpu")
    text = capture.standard_library_text(least_characters=tokens * 8)
    progress.print(f"capturing layers {LAYERS} over {tokens} tokens of {text.name}")
    ids, layers = take_layers(loaded, text, tokens)
    few = ids if card else ids[:, :CPU_PERPLEXITY_TOKENS]
    dense = plug.perplexity(loaded.model, few)
    (_, query_heads, _, head_dim), kv_heads = layers[0].q.shape, layers[0].k.shape[1]
    priced = tokens if card else PRICED_TOKENS
    shape = PricedShape(1, query_heads, kv_heads, priced, head_dim, "bfloat16")
    found = cases()
    sources = [price.source_for(case.at(priced), shape, TARGET) for case in found]
    climbed = climb(found, sources, layers[1])
    rows = []
    for index, case in enumerate(found):
        progress.print(f"  measuring {index + 1} of {len(found)}: {case}")
        cost = price_of(case, sources[index], shape, layers[1])
        rows.append(measure_case(case, loaded, few, layers, cost, climbed.rungs[index]))
    return ReportRecord(
        title="Sparse attention on a real model",
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        elapsed_s=time.monotonic() - began,
        environment=survey.environment(card, SEED),
        subject=Subject(
            model=loaded.name,
            text=text.name,
            text_sha256=text.sha256,
            tokens=tokens,
            perplexity_tokens=few.shape[1],
            layers=LAYERS,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype="float32",
            computed_by="the Triton kernels" if card else "the reference backend",
        ),
        priced=shape,
        dense=price.dense_price(shape, dense.value),
        rows=tuple(rows),
        kernels=climbed.kernels,
        block_maps=maps(layers),
        notes=climbed.notes,
    )


def show(record: ReportRecord) -> Table:
    """Lay out the figures that fit a terminal."""
    shown = {"pattern", "block", "budget", "mass mean", "perplexity", "vs dense", "rung"}
    whole = tables.row_table(record)
    places = [n for n, column in enumerate(whole.columns) if column.name in shown]
    table = Table(title=pages.subtitle(record), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place in places:
        column = whole.columns[place]
        justify: Literal["left", "right"] = "right" if column.is_number else "left"
        table.add_column(column.name, justify=justify, no_wrap=True)
    for row in whole.rows:
        table.add_row(*(row[place].text for place in places))
    return table


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("report"), show_default=True)
@click.option("--tokens", type=int, default=None, help="2048, or 8192 on a card")
def main(out: Path, tokens: int | None) -> None:
    """Write the report and print a short table."""
    try:
        record = build_record(tokens)
    except sp.SpcompError as error:
        progress.print(str(error), markup=False)
        sys.exit(1)
    html, json_file, markdown = pages.write_all(record, out)
    Console().print(show(record))
    kinds = {row.timing.kind for row in record.rows if row.timing is not None}
    click.echo(f"'vs dense' is {' and '.join(sorted(kinds))} over {record.priced}.")
    click.echo(f"{html} (also {json_file.name}, {markdown.name}) in {record.elapsed_s:.0f} s")


if __name__ == "__main__":
    main()
