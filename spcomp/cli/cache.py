"""`spcomp cache`: look at the kernel cache, verify it, keep it small, carry it elsewhere."""

from __future__ import annotations

import os
import re
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from spcomp.cache import Damaged, Store, archive, default_store, upkeep
from spcomp.cache.upkeep import Listed
from spcomp.cli.options import ParamType, as_json
from spcomp.cli.output import mebibytes, print_json, print_table, say
from spcomp.errors import CacheNotWritable, EntryDamaged, NoSuchEntry
from spcomp.settings import CachePlace, cache_place

UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
SHORT = 12  # digits of a digest that a table shows


class Measure(ParamType):
    """A number with a unit, such as 2GiB or 30d; gives it in the smallest one."""

    def __init__(self, name: str, units: dict[str, int]) -> None:
        self.name, self.units = name, units

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the number and its unit."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).lower())
        if found is None or found[2] not in self.units:
            self.fail(f"{value!r} is not of the form {self.name}.", param, ctx)
        return int(float(found[1]) * self.units[found[2]])


@click.group(short_help="Look at, verify, prune and move the kernel cache.")
def cache() -> None:
    """Look at, verify, prune and move the kernel cache. All of it works while it is in use."""


@cache.command()
@as_json
def info(json_: bool) -> None:
    """Say where the cache lies and what it holds."""
    place, store = cache_place(), default_store()
    held = upkeep.contents(store)
    facts = {
        "folder": str(place.folder),
        "set by": place.variable or "default",
        "writes": _writes(place),
        "entries": held.entries,
        "entry bytes": held.entry_bytes,
        "tuning records": held.tunings,
        "tuning bytes": held.tuning_bytes,
        "built files": held.built,
        "built bytes": held.built_bytes,
        "left in staging": held.leftovers,
    }
    if json_:
        print_json({name.replace(" ", "_"): value for name, value in facts.items()})
    else:
        for name, value in facts.items():
            click.echo(f"{name:<16} {value}")


@cache.command("list")
@as_json
def list_entries(json_: bool) -> None:
    """List every entry: what it was made for, its size, when it was last used."""
    rows = list(upkeep.listed(default_store()))
    if json_:
        print_json([_plain(row) for row in rows])
        return
    print_table(
        ("digest", "kernel", "target", "warps", "stages", "tools", "last used", "size"),
        (_cells(row) for row in rows),
        numbers_from=7,
    )


@cache.command()
@as_json
def verify(json_: bool) -> None:
    """Verify every entry; exits with 1 when one is damaged."""
    rows = list(upkeep.listed(default_store()))
    problems = {str(row.folder): found for row in rows if (found := upkeep.problem_of(row))}
    if json_:
        print_json({"entries": len(rows), "damaged": problems})
    else:
        for folder, problem in problems.items():
            click.echo(f"{folder} is damaged: {problem}")
        click.echo(f"{len(rows)} entries, {len(problems)} damaged")
        if problems:
            say(
                "a call that needs a damaged entry makes it again; `spcomp cache clear` removes all"
            )
    if problems:
        click.get_current_context().exit(1)


@cache.command()
@click.option("--max-size", type=Measure("2GiB", UNITS), help="What all may hold at most.")
@click.option("--older-than", type=Measure("30d", SECONDS), help="What was not used for so long.")
def prune(max_size: int | None, older_than: int | None) -> None:
    """Remove entries and built files, those used least recently first, and what dead processes left
    behind."""
    if max_size is None and older_than is None:
        raise click.UsageError("give --max-size, --older-than, or both.")
    store = _writable_store()
    gone = upkeep.prune(store, most_bytes=max_size, most_age_s=older_than)
    entries = sum(row.folder.is_relative_to(store.kernels) for row in gone)
    what = f"{entries} entries and {len(gone) - entries} built files"
    click.echo(f"removed {what}, {mebibytes(sum(row.bytes for row in gone))}")


@cache.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(yes: bool) -> None:
    """Remove every entry, every built file and every tuning record."""
    store = _writable_store()
    held = upkeep.contents(store)
    if not yes:
        what = f"{held.entries} entries, {held.built} built files and {held.tunings} tuning records"
        click.confirm(f"remove {what} in {store.folder}?", abort=True, err=True)
    rest = f"{held.built} built files and {held.tunings} tuning records"
    click.echo(f"removed {upkeep.clear(store)} entries, {rest}")


@cache.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("digests", nargs=-1)
def export(file: Path, digests: tuple[str, ...]) -> None:
    """Write entries to a tar FILE: all, or those whose digests begin as given."""
    rows = list(upkeep.listed(default_store()))
    for digest in digests:
        if not any(row.digest.startswith(digest) for row in rows):
            raise NoSuchEntry(digest=digest)
    chosen = [r.folder for r in rows if not digests or r.digest.startswith(digests)]
    try:
        count = archive.export_entries(chosen, file)
    except Damaged as problem:
        raise EntryDamaged(folder=problem) from None
    except OSError as error:
        raise click.BadParameter(f"cannot write {file}: {error.strerror}.") from None
    click.echo(f"wrote {count} entries to {file}")


@cache.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def import_file(file: Path) -> None:
    """Take the entries of a tar FILE; exits with 1 when one of them is refused."""
    store = _writable_store()
    try:
        found = archive.import_entries(file, store)
    except OSError as error:
        raise CacheNotWritable(
            folder=store.folder, variable=cache_place().variable or "default", reason=error.strerror
        ) from error
    for digest, problem in found.refused.items():
        click.echo(f"refused {digest}: {problem}")
    counts = f"{len(found.placed)} taken, {len(found.present)} there already"
    click.echo(f"{counts}, {len(found.refused)} refused")
    if found.refused:
        click.get_current_context().exit(1)


def _writes(place: CachePlace) -> str:
    if not place.may_write:
        return "no (SPCOMP_CACHE_READ_ONLY=1)"
    return "yes" if _is_writable(place.folder) else "no (Permission denied)"


def _writable_store() -> Store:
    place = cache_place()
    if not place.may_write:
        raise CacheNotWritable(
            folder=place.folder,
            variable=place.variable or "default",
            reason="SPCOMP_CACHE_READ_ONLY=1 forbids it",
        )
    if place.folder.exists() and not _is_writable(place.folder):
        raise CacheNotWritable(
            folder=place.folder, variable=place.variable or "default", reason="Permission denied"
        )
    return default_store()


def _is_writable(folder: Path) -> bool:
    """Tell whether entries can be made and removed; a folder that is not there yet counts by the
    one it would be made in."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    inner = [there / "kernels", there / "staging"] if there == folder else []
    return all(os.access(p, os.W_OK | os.X_OK) for p in (there, *inner) if p.exists())


def _cells(row: Listed) -> tuple[str, ...]:
    if row.problem:
        return (row.digest[:SHORT], "damaged", row.problem, "", "", "", "", mebibytes(row.bytes))
    fields = row.meta["fields"]
    cells = (
        row.digest[:SHORT],
        row.meta["kernel"],
        fields.get("target", ""),
        fields.get("num_warps", ""),
        fields.get("num_stages", ""),
        f"triton {fields.get('triton', '')}",
        _age(row.last_used),
        mebibytes(row.bytes),
    )
    return tuple(_shown(cell) for cell in cells)


def _shown(text: str) -> str:
    """Show a text that another machine may have written: no control codes, no markup."""
    return escape("".join(c if c.isprintable() else "?" for c in text))


def _age(last_used: float) -> str:
    seconds = max(0, int(time.time() - last_used))
    for unit, size in sorted(SECONDS.items(), key=lambda pair: -pair[1]):
        if seconds >= size:
            return f"{seconds // size}{unit} ago"
    return "now"


def _plain(row: Listed) -> dict[str, Any]:
    used = datetime.fromtimestamp(row.last_used, timezone.utc).isoformat(timespec="seconds")
    return {
        "digest": row.digest,
        "folder": str(row.folder),
        "bytes": row.bytes,
        "last_used": used,
        "problem": row.problem,
        **row.meta,
    }
