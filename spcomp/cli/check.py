"""`spcomp check`: a pattern's error against float64 beside plain PyTorch's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from spcomp.cli.comparison import Comparison, check_is_mask, compare
from spcomp.cli.options import (
    as_json,
    dtype_option,
    pattern_argument,
    shape_option,
    values_of,
)
from spcomp.cli.output import print_json, print_table, say
from spcomp.cli.patterns import load_pattern

PREFILL = {"B": 1, "Hq": 4, "Hkv": 2, "Sq": 515, "Skv": 777, "D": 64, "Dv": 64}
INTERPRETED = {**PREFILL, "Hq": 2, "Hkv": 1, "Sq": 37, "Skv": 200}
DECODE = {"Sq": 1}


@click.command(short_help="Compare a pattern with float64 attention.")
@pattern_argument
@shape_option("Lengths; by default small awkward ones.")
@dtype_option
@click.option(
    "--backend",
    help="reference, triton or ascendc. By default triton with a card, reference without one.",
)
@click.option("--device", help="A torch device. By default the card, else the CPU.")
@click.option("--seed", type=int, default=0, show_default=True)
@as_json
def check(
    pattern: str,
    settings: tuple[Any, ...],
    shape: Mapping[str, int] | None,
    dtype: str,
    backend: str | None,
    device: str | None,
    seed: int,
    json_: bool,
) -> None:
    """Compare PATTERN with float64 on random tensors, in prefill and in decode.

    The error must be at most twice that of plain PyTorch in the same dtype (and 1e-6, or 1e-4 in 16
    bit, beside it).
    """
    made = load_pattern(pattern, values_of(settings))
    check_is_mask(made)
    where = device or _device()
    name = backend or ("triton" if where.startswith("cuda") else "reference")
    prefill = INTERPRETED if name != "reference" and where == "cpu" else PREFILL
    shapes = [shape] if shape is not None else [prefill, {**prefill, **DECODE}]
    results = []
    for lengths in shapes:
        say(f"{made.program.title()}: {', '.join(f'{k}={v}' for k, v in lengths.items())}")
        results.append(compare(made, lengths, dtype, backend=name, device=where, seed=seed))
    if json_:
        print_json([r.row() for r in results])
    else:
        _print(results)
    if not all(r.holds for r in results):
        click.get_current_context().exit(1)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _print(results: list[Comparison]) -> None:
    print_table(
        ("phase", "shape", "backend", "dtype", "our error", "PyTorch's error", "allowed", "result"),
        (
            (
                r.phase,
                "x".join(str(n) for n in r.shape.values()),
                r.backend,
                r.dtype,
                f"{r.error:.3e}",
                f"{r.plain_error:.3e}",
                f"{r.allowed:.3e}",
                "ok" if r.holds else "FAILED",
            )
            for r in results
        ),
        numbers_from=4,
    )
