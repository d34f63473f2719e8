"""`spcomp compile`: what a backend makes for a chip that need not be here, and a manifest."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from spcomp import compiler
from spcomp.cli.options import (
    Setup,
    as_json,
    lowering_options,
    own_sizes,
    pattern_argument,
    phase_option,
    schedule_of,
    setup_for,
    values_of,
    widths_of,
)
from spcomp.cli.output import print_json, print_table, say
from spcomp.cli.patterns import load_pattern
from spcomp.ir.plan import Plan
from spcomp.ir.text import print_plan, print_program
from spcomp.version import VERSION


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
    own: tuple[tuple[str, int], ...],
    axes: tuple[Any, ...],
    folder: Path,
    json_: bool,
) -> None:
    """Compile PATTERN for a target into a folder: source, binaries, manifest. No GPU is needed."""
    made = load_pattern(pattern, values_of(settings))
    sizes = own_sizes(made.program, own, is_whole=False)
    widths = widths_of(made.program, sizes)
    setup = setup_for(target, dtype, head_dim, value_dim, widths)
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
    export = setup.backend.export(source, made.program)
    manifest = {**_about(plan, setup), **export.manifest}
    texts = {
        "pattern.ir": print_program(made.program),
        "plan.txt": print_plan(plan),
        "manifest.json": json.dumps(manifest, indent=2),
    }
    encoded = {name: (text.rstrip("\n") + "\n").encode() for name, text in texts.items()}
    _write(folder, {**export.files, **encoded})
    if json_:
        print_json({"folder": str(folder), **manifest})
    else:
        print_table(export.columns, export.rows)
        say(f"wrote {folder}")


def _make(folder: Path) -> None:
    """Make the folder before the long part, so that a wrong name costs no time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(
            f"cannot make the folder {folder}: {error.strerror}.", param_hint="-o"
        ) from None


def _about(plan: Plan, setup: Setup) -> dict[str, Any]:
    """Give the part of the manifest that no backend has a say in."""
    return {
        "spcomp": VERSION,
        "pattern": plan.pattern,
        "phase": plan.phase,
        "order": plan.order,
        "notes": list(plan.notes),
        "target": setup.target.name,
        "arch": setup.target.arch,
        "dtype": setup.spec.dtype,
        "head_dim": setup.spec.head_dim,
        "value_dim": setup.spec.value_dim,
    }


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files aside, then move each to its place, so that a full disk leaves no half of
    them. What else lies in the folder stays."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as aside:
            for name, content in files.items():
                path = Path(aside, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            for name in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(aside, name), folder / name)
    except OSError as error:
        raise click.BadParameter(
            f"cannot write to the folder {folder}: {error.strerror}.", param_hint="-o"
        ) from None
