"""The form of a cache entry on disk, and its verification.

An entry is a folder with the files of one compiled kernel and `meta.json`, which says what the
entry was made from and holds the size and SHA-256 of every file, and a SHA-256 of itself. An entry
is believed only when all of it agrees; it is read as bytes, never executed or unpickled to find
out."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from spcomp.version import VERSION

SCHEMA = 1
"""Version of this form; a part of every key, so that another version never finds an entry."""

META = "meta.json"
SUM = "meta_sha256"
DIGEST_DIGITS = 32


class Damaged(Exception):
    """An entry is not what its name says; the text is why, without the folder."""


@dataclass(frozen=True)
class Key:
    """Everything that makes two binaries two.

    kernel: the name its files carry. source_sha256: of the generated text without its header.
    fields: all else by name: target, arguments, options, versions of the tools."""

    kernel: str
    source_sha256: str
    fields: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Give the name of the entry: 32 hex digits, the same whatever the order of the fields."""
        whole = [SCHEMA, self.kernel, self.source_sha256, dict(self.fields)]
        return hashlib.sha256(_canonical(whole)).hexdigest()[:DIGEST_DIGITS]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept under a key: the verified content of its files, without `meta.json`.

    folder: where it stands; None when it could not be kept and lives in memory only."""

    key: Key
    folder: Path | None
    files: Mapping[str, bytes]


def write(folder: Path, key: Key, files: Mapping[str, bytes]) -> None:
    """Write an entry into a new folder, private to the user.

    Raises: OSError; the folder may then hold a part.
    """
    folder.mkdir(mode=0o700)
    for name, data in files.items():
        _write_file(folder / name, data)
    _write_file(folder / META, _meta_of(key, files))


def read(folder: Path, key: Key | None = None) -> Entry:
    """Read an entry and verify all of it; key: what it must have been made from, if that is known.

    Raises: Damaged, saying what does not agree; OSError where a file cannot be read.
    """
    present = _names_in(folder)
    if META not in present:
        raise Damaged(f"{META} is missing")
    meta = _parsed(_read_file(folder / META))
    found = _key_of(meta)
    if folder.name != found.digest and key is None:
        raise Damaged(f"it was made from other things than its name says ({found.digest})")
    if key is not None and found.digest != key.digest:
        raise Damaged("it was made from other things than what is asked for")
    _same_names(present - {META}, meta["files"])
    files = {name: _read_file(folder / name) for name in sorted(meta["files"])}
    for name, data in files.items():
        _same_content(name, data, meta["files"][name])
    return Entry(found, folder, files)


def meta_in(folder: Path) -> dict[str, Any]:
    """Read what an entry says of itself, verified by its own sum alone.

    Raises: Damaged, OSError.
    """
    return _parsed(_read_file(folder / META))


def key_from(files: Mapping[str, bytes]) -> Key:
    """Give the key that the `meta.json` among some files names.

    Raises: Damaged.
    """
    if META not in files:
        raise Damaged(f"{META} is missing")
    return _key_of(_parsed(files[META]))


# ---- meta.json ----------------------------------------------------------------------------------


def _meta_of(key: Key, files: Mapping[str, bytes]) -> bytes:
    meta = {
        "schema": SCHEMA,
        "spcomp": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kernel": key.kernel,
        "source_sha256": key.source_sha256,
        "fields": dict(sorted(key.fields.items())),
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in sorted(files.items())
        },
    }
    return (json.dumps({**meta, SUM: _sum_of(meta)}, indent=1) + "\n").encode()


def _key_of(meta: Mapping[str, Any]) -> Key:
    return Key(meta["kernel"], meta["source_sha256"], meta["fields"])


def _parsed(data: bytes) -> dict[str, Any]:
    """Parse `meta.json`; what carries its own sum has the form it was written in."""
    try:
        meta = json.loads(data)
        given = meta.pop(SUM)
        schema = meta["schema"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{META} is no whole JSON object of this program") from None
    if schema != SCHEMA:
        raise Damaged(f"it has schema {schema!r}, where this version reads {SCHEMA}")
    if given != _sum_of(meta):
        raise Damaged(f"{META} does not have the sum it names")
    whole: dict[str, Any] = meta
    return whole


def _sum_of(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(meta)).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


# ---- files ---------------------------------------------------------------------------------------


def _names_in(folder: Path) -> set[str]:
    return {item.name for item in os.scandir(folder)}


def _same_names(present: set[str], named: Iterable[str]) -> None:
    missing, extra = sorted(set(named) - present), sorted(present - set(named))
    if missing:
        raise Damaged(f"{', '.join(missing)} is missing")
    if extra:
        raise Damaged(f"{', '.join(extra)} does not belong to it")


def _same_content(name: str, data: bytes, wanted: Mapping[str, Any]) -> None:
    if len(data) != wanted["bytes"]:
        raise Damaged(f"{name} has {len(data)} bytes, where {wanted['bytes']} were written")
    if hashlib.sha256(data).hexdigest() != wanted["sha256"]:
        raise Damaged(f"{name} does not have the content that was written")


def _write_file(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def _read_file(path: Path) -> bytes:
    """Read a regular file; a link is not followed."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        if path.is_symlink():
            raise Damaged(f"{path.name} is a link") from None
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from None
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise Damaged(f"{path.name} is no regular file")
        return file.read()
