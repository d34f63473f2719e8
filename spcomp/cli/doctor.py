"""`spcomp doctor`: what is installed, what can run here, and every setting."""

from __future__ import annotations

import os
import platform
import warnings
from typing import Any

import click

from spcomp import settings
from spcomp.autotune.survey import installed
from spcomp.backends import registry
from spcomp.backends.base import Backend
from spcomp.cli.options import as_json
from spcomp.cli.output import print_json, print_table
from spcomp.errors import SpcompError
from spcomp.version import VERSION

PACKAGES = ("torch", "triton", "jinja2", "sympy", "networkx", "transformers", "gguf", "plotly")


@click.command()
@as_json
def doctor(json_: bool) -> None:
    """Say what spcomp finds on this machine. Exits with 1 when something stops it from working."""
    found = {
        "spcomp": VERSION,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: installed(name) for name in PACKAGES},
        "devices": _devices(),
        "backends": _backends(),
        "cache": _cache(),
        "settings": _settings(),
    }
    problems = _problems(found)
    if json_:
        print_json({**found, "problems": problems})
    else:
        _print(found, problems)
    if problems:
        click.get_current_context().exit(1)


def _devices() -> list[str]:
    """Name the devices torch sees."""
    if installed("torch") is None:
        return []
    import torch

    cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return ["cpu", *(f"cuda:{n} {torch.cuda.get_device_name(n)}" for n in cards)]


def _backends() -> dict[str, dict[str, str]]:
    """Say of each backend which target this machine's own device or its CPU is, or why neither."""
    rows = {}
    device = "cuda" if any(d.startswith("cuda") for d in _devices()) else "cpu"
    for name in registry.names():
        backend = registry.backend(name)
        found = [_status(backend, where) for where in dict.fromkeys((device, "cpu"))]
        status = next((text for text, runs in found if runs), found[0][0])
        rows[name] = {"status": status, "targets": ", ".join(backend.targets())}
    return rows


def _status(backend: Backend, device: str) -> tuple[str, bool]:
    """Give a sentence, and whether the backend runs on the device."""
    try:
        return f"runs here on {backend.target_of(device).title}", True
    except SpcompError as error:
        return str(error).splitlines()[0].partition(": ")[2], False


def _cache() -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            folder = settings.cache_dir()
        except SpcompError as error:
            return {
                "folder": os.environ.get("SPCOMP_CACHE_DIR"),
                "writable": False,
                "note": str(error),
            }
    note = str(caught[0].message) if caught else ""
    return {"folder": str(folder), "writable": True, "note": note}


def _settings() -> list[dict[str, str]]:
    return [
        {
            "variable": name,
            "value": os.environ.get(name, ""),
            "default": default,
            "meaning": meaning,
        }
        for name, (default, meaning) in settings.VARIABLES.items()
    ]


def _problems(found: dict[str, Any]) -> list[str]:
    problems: list[str] = []
    if found["packages"]["torch"] is None:
        problems.append("torch is not installed: pip install torch")
    if not found["cache"]["writable"]:
        problems.append(found["cache"]["note"])
    try:
        settings.current()
    except SpcompError as error:
        problems.append(str(error))
    return list(dict.fromkeys(problems))


def _print(found: dict[str, Any], problems: list[str]) -> None:
    click.echo(f"spcomp {found['spcomp']}, Python {found['python']}, {found['machine']}")
    click.echo(f"devices  {', '.join(found['devices']) or 'none'}")
    cache = found["cache"]
    click.echo(
        f"cache    {cache['folder']} ({'writable' if cache['writable'] else 'NOT writable'})"
    )
    click.echo()
    print_table(
        ("package", "version"), ((n, v or "not installed") for n, v in found["packages"].items())
    )
    click.echo()
    print_table(
        ("backend", "here", "targets"),
        ((n, b["status"], b["targets"]) for n, b in found["backends"].items()),
        numbers_from=3,
    )
    click.echo()
    print_table(
        ("setting", "value", "default", "meaning"),
        ((s["variable"], s["value"] or "-", s["default"], s["meaning"]) for s in found["settings"]),
        numbers_from=4,
    )
    for problem in problems:
        click.echo(f"\n{problem}", err=True)
