"""What the command line does with a whole cache: look, verify, prune, clear.

All of it works while other processes use the cache: an entry goes in one rename, and whoever wants
it then makes it again."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spcomp.cache import entry as form
from spcomp.cache.built import BUILT
from spcomp.cache.entry import Damaged
from spcomp.cache.store import STALE_S, Store, remove

TUNING = "tuning"
DIGEST = re.compile(rf"[0-9a-f]{{{form.DIGEST_DIGITS}}}")


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry as its folder tells: meta is empty and problem says why where that is damaged.

    folder: a file that was built beside entries is one by itself. last_used: seconds since the
    epoch."""

    digest: str
    folder: Path
    bytes: int
    last_used: float
    meta: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a cache folder holds, counted."""

    entries: int
    entry_bytes: int
    tunings: int
    tuning_bytes: int
    built: int
    built_bytes: int
    leftovers: int


def listed(store: Store) -> Iterator[Listed]:
    """Yield every entry by digest; what has no place in the cache is no entry."""
    for folder in sorted(_folders(store.kernels)):
        try:
            meta, problem = form.meta_in(folder), ""
        except FileNotFoundError:  # gone in the meantime
            continue
        except (Damaged, OSError) as error:
            meta, problem = {}, str(error)
        with contextlib.suppress(OSError):  # gone in the meantime
            used = _last_used(folder)
            yield Listed(folder.name, folder, _bytes_below(folder), used, meta, problem)


def built_files(store: Store) -> Iterator[Listed]:
    """Yield what backends have built beside entries; the digest is the name of the file."""
    for group in sorted(_items(store.folder / BUILT)):
        for path in sorted(_files(group)):
            with contextlib.suppress(OSError):  # gone in the meantime
                held = path.lstat()
                yield Listed(path.name, path, held.st_size, held.st_mtime, {})


def problem_of(item: Listed) -> str:
    """Verify all of an entry; gives what is wrong with it, or nothing."""
    try:
        form.read(item.folder)
    except FileNotFoundError:
        return ""  # gone in the meantime
    except (Damaged, OSError) as error:
        return str(error)
    return ""


def contents(store: Store) -> Contents:
    """Count what a cache holds."""
    folders = list(_folders(store.kernels))
    records = [p for p in _files(store.folder / TUNING) if p.suffix == ".jsonl"]
    staged = list(_items(store.staging))
    built = list(built_files(store))
    return Contents(
        len(folders),
        sum(_bytes_below(f) for f in folders),
        len(records),
        _bytes_below(store.folder / TUNING),
        len(built),
        sum(item.bytes for item in built),
        len(staged),
    )


def prune(
    store: Store, *, most_bytes: int | None = None, most_age_s: float | None = None
) -> list[Listed]:
    """Remove the entries and built files used least recently until the rest holds at most
    `most_bytes`, and those not used for `most_age_s`; and what processes that are gone left behind.
    Gives what went."""
    now, kept, gone = time.time(), 0, []
    for item in sorted([*listed(store), *built_files(store)], key=lambda item: -item.last_used):
        too_old = most_age_s is not None and now - item.last_used > most_age_s
        too_much = most_bytes is not None and kept + item.bytes > most_bytes
        if (too_old or too_much) and store.discard(item.folder):
            gone.append(item)
        else:
            kept += item.bytes
    _sweep(store)
    return gone


def clear(store: Store) -> int:
    """Remove every entry, built file and tuning record; gives how many entries went."""
    gone = sum(store.discard(folder) for folder in _folders(store.kernels))
    for item in list(built_files(store)):
        store.discard(item.folder)
    store.discard(store.folder / TUNING)
    _sweep(store)
    return gone


def _sweep(store: Store) -> None:
    for stale in list(store.leftovers()):
        remove(stale)
    for lock in _files(store.locks):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > STALE_S:
                lock.unlink()


def _folders(kernels: Path) -> Iterator[Path]:
    for group in _items(kernels):
        for item in _items(group):
            if DIGEST.fullmatch(item.name):
                yield item


def _items(folder: Path) -> list[Path]:
    try:
        return [Path(item.path) for item in os.scandir(folder)]
    except OSError:
        return []


def _files(folder: Path) -> list[Path]:
    return [p for p in _items(folder) if p.is_file()]


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*") if folder.is_dir() and not folder.is_symlink() else ():
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def _last_used(folder: Path) -> float:
    meta = folder / form.META
    return (meta if os.path.lexists(meta) else folder).lstat().st_mtime
