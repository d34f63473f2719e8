"""`spcomp compile`: source, binaries and a manifest for a chip that need not be here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from spcomp import compiler
from spcomp.autotune.survey import installed
from spcomp.backends.base import BuiltKernel, Source
from spcomp.cli.options import (
    Setup,
    as_json,
    lowering_options,
    pattern_argument,
    phase_option,
    schedule_of,
    setup_for,
    values_of,
)
from spcomp.cli.output import print_json, print_table, say
from spcomp.cli.patterns import load_pattern
from spcomp.ir.plan import Plan
from spcomp.ir.text import print_plan, print_program
from spcomp.version import VERSION

BINARY = {"cuda": ".cubin", "hip": ".hsaco"}


@click.command("compile", short_help="Write source, binaries and a manifest for a target.")
@pattern_argument
@phase_option
@lowering_options
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="The folder to write to; made when it is not there.",
)
@as_json
def compile_files(
    pattern: str,
    settings: tuple[Any, ...],
    phase: Any,
    order: Any,
    target: str,
    dtype: str,
    head_dim: int,
    value_dim: int | None,
    axes: tuple[Any, ...],
    folder: Path,
    json_: bool,
) -> None:
    """Compile PATTERN for a target into a folder: source, binaries, manifest. No GPU is needed."""
    made = load_pattern(pattern, values_of(settings))
    setup = setup_for(target, dtype, head_dim, value_dim)
    plan = compiler.lower(
        made,
        backend=setup.backend,
        target=setup.target,
        spec=setup.spec,
        phase=phase,
        order=order if phase == "prefill" else None,
        schedule=schedule_of(setup, axes),
    )
    source = compiler.emit(plan, setup.backend, setup.target, setup.spec)
    _make(folder)
    say(f"compiling {len(source.files)} kernels of {plan.pattern} for {setup.target.title}")
    built = setup.backend.compile(source)
    texts = {"pattern.ir": print_program(made.program), "plan.txt": print_plan(plan)}
    manifest = _manifest(plan, source, setup, built)
    _write(folder, source, built, {**texts, "manifest.json": json.dumps(manifest, indent=2)})
    if json_:
        print_json({"folder": str(folder), **manifest})
    else:
        _print(manifest)
        say(f"wrote {folder}")


def _make(folder: Path) -> None:
    """Make the folder before the long part, so that a wrong name costs no time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(
            f"cannot make the folder {folder}: {error.strerror}.", param_hint="-o"
        ) from None


def _manifest(
    plan: Plan, source: Source, setup: Setup, built: tuple[BuiltKernel, ...]
) -> dict[str, Any]:
    return {
        "spcomp": VERSION,
        "triton": installed("triton"),
        "pattern": plan.pattern,
        "phase": plan.phase,
        "order": plan.order,
        "notes": list(plan.notes),
        "target": setup.target.name,
        "arch": setup.target.arch,
        "dtype": setup.spec.dtype,
        "head_dim": setup.spec.head_dim,
        "value_dim": setup.spec.value_dim,
        "rung": "compiled",
        "kernels": [
            {
                "launch": kernel.launch,
                "kernel": kernel.kernel,
                "source": file.file_name,
                "source_sha256": _sha256(file.text.encode()),
                "binary": _binary_name(file.file_name, setup),
                "binary_sha256": _sha256(kernel.binary),
                "binary_bytes": kernel.binary_bytes,
                "registers": kernel.registers,
                "spill_bytes": kernel.spill_bytes,
                "shared_bytes": kernel.shared_bytes,
                "warps": kernel.warps,
                "stages": kernel.stages,
                "axes": dict(launch.axes),
                "warnings": list(kernel.warnings),
            }
            for file, kernel, launch in zip(source.files, built, plan.launches(), strict=True)
        ],
    }


def _binary_name(source_name: str, setup: Setup) -> str:
    return source_name.removesuffix(".py") + BINARY[setup.target.arch.partition(":")[0]]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(
    folder: Path, source: Source, built: tuple[BuiltKernel, ...], texts: Mapping[str, str]
) -> None:
    suffix = BINARY[source.target.arch.partition(":")[0]]
    for file, kernel in zip(source.files, built, strict=True):
        path = folder / file.file_name
        path.write_text(file.text)
        path.with_suffix(suffix).write_bytes(kernel.binary)
    for name, text in texts.items():
        (folder / name).write_text(text if text.endswith("\n") else text + "\n")


def _print(manifest: Mapping[str, Any]) -> None:
    columns = ("registers", "spill_bytes", "shared_bytes", "binary_bytes", "warps", "stages")
    print_table(
        ("kernel", *(c.replace("_", " ") for c in columns), "warnings"),
        (
            (k["source"], *(k[c] for c in columns), " ".join(k["warnings"]) or "-")
            for k in manifest["kernels"]
        ),
    )
