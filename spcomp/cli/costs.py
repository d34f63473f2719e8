"""Costs as rows: formulas of every launch, their values for a shape, the roofline's time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from spcomp.cli.options import Setup
from spcomp.cli.output import mebibytes, print_table, scaled
from spcomp.ir import cost, dims
from spcomp.ir.passes.place_buffers import scratch_bytes, slab_rows
from spcomp.ir.plan import Plan

FORMULAS = (*cost.FIGURES, "width", "pairs")
LETTERS = {"width": "W", "pairs": "P"}


def cost_rows(plan: Plan, setup: Setup, shape: Mapping[str, int] | None) -> dict[str, Any]:
    """Give the costs of a plan as plain values; figures and times only with a shape."""
    costs = cost.costs_of(plan)
    rows: dict[str, Any] = {
        "pattern": plan.pattern,
        "phase": plan.phase,
        "order": plan.order,
        "launches": [
            {"kernel": c.kernel, "formulas": {n: str(getattr(c, n)) for n in FORMULAS}}
            for c in costs
        ],
        "scratch_bytes": str(scratch_bytes(plan)),
    }
    if shape is None:
        return rows
    env = environment(setup, shape)
    counts = cost.runs_of(plan, shape, setup.spec.element_bytes)
    figures = [cost.evaluate(c, env) for c in costs]
    for row, one, count in zip(rows["launches"], figures, counts, strict=True):
        row["values"] = values(one)
        row["runs"] = count
        row["roofline_ms"] = cost.roofline_ms(one, setup.target, setup.spec.dtype, count)
    dense = cost.evaluate(cost.dense_cost(), env)
    rows |= {
        "shape": dict(shape),
        "target": setup.target.name,
        "dtype": setup.spec.dtype,
        "total": values(cost.total(figures)),
        "roofline_ms": sum(row["roofline_ms"] for row in rows["launches"]),
        "dense": values(dense),
        "dense_roofline_ms": cost.roofline_ms(dense, setup.target, setup.spec.dtype),
        "density": density(figures, dense),
        **memory(plan, setup, shape),
    }
    return rows


def environment(setup: Setup, shape: Mapping[str, int]) -> dict[str, int]:
    """Give the symbols that cost formulas are evaluated with."""
    return {**shape, "E": setup.spec.element_bytes}


def values(figures: cost.Figures) -> dict[str, int]:
    """Give figures by name."""
    return {name: getattr(figures, name) for name in (*cost.FIGURES, "pairs")}


def density(figures: list[cost.Figures], dense: cost.Figures) -> float:
    """Give the share of the causal pairs that is computed, at most."""
    return sum(f.pairs for f in figures) / dense.pairs


def memory(plan: Plan, setup: Setup, shape: Mapping[str, int]) -> dict[str, int]:
    """Give the rows of a slab, how many slabs a call has, and the scratch they take."""
    rows = slab_rows(plan, shape, setup.spec.element_bytes)
    here = {**environment(setup, shape), "R": min(rows, shape["Sq"]), "R0": 0}
    return {
        "slab_rows": here["R"],
        "slabs": -(-shape["Sq"] // rows),
        "slab_scratch_bytes": dims.evaluate(scratch_bytes(plan), here),
    }


def print_costs(plan: Plan, setup: Setup, shape: Mapping[str, int] | None) -> None:
    """Print formulas, and with a shape a table of their values."""
    rows = cost_rows(plan, setup, shape)
    click.echo(f"{rows['pattern']}  {rows['phase']}, {rows['order']}")
    for row in rows["launches"]:
        click.echo(f"\n{row['kernel']}")
        for name, formula in row["formulas"].items():
            if formula != "0":
                click.echo(f"  {LETTERS.get(name, name):<13} = {formula}")
    click.echo(f"\nscratch_bytes of a slab = {rows['scratch_bytes']}\n")
    if shape is not None:
        _print_values(rows, setup)


def _print_values(rows: Mapping[str, Any], setup: Setup) -> None:
    click.echo(", ".join(f"{k}={v}" for k, v in rows["shape"].items()))
    print_table(
        ("launch", "runs", "FLOPs", "floor bytes", "L2 bytes", "scratch", "roofline ms"),
        [
            *(
                _row(r["kernel"], r["runs"], r["values"], r["roofline_ms"])
                for r in rows["launches"]
            ),
            _row("total", "", rows["total"], rows["roofline_ms"]),
            _row("dense causal", 1, rows["dense"], rows["dense_roofline_ms"]),
        ],
    )
    click.echo(
        f"\ndensity {rows['density']:.4f} of causal; {rows['slabs']} slabs of {rows['slab_rows']} "
        f"rows, {mebibytes(rows['slab_scratch_bytes'])} of scratch alive"
    )
    click.echo(f"times are predicted by the roofline of {setup.target.title} for {rows['dtype']}")


def _row(name: str, runs: object, figures: Mapping[str, int], time_ms: float) -> list[object]:
    moved = [mebibytes(figures[n]) for n in ("floor_bytes", "l2_bytes", "scratch_bytes")]
    return [name, runs, scaled(figures["flops"], "FLOP"), *moved, f"{time_ms:.4f}"]
