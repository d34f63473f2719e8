"""The form of a cache entry on disk, and its verification.

An entry is a folder with the files of one compiled kernel and `meta.json`, which says what the
entry was made from and holds the size and SHA-256 of every file, and a SHA-256 of itself. An entry
is believed only when all of it agrees; it is read as bytes, never executed or unpickled to find
out."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
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
MOST_META_BYTES = 1 << 20
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""Names of kernels and of their files; they become parts of paths."""

PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.ESTALE)
"""What says something of this process or this moment, and nothing of the entry."""


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", dict(self.fields))  # the caller's may change

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
        write_file(folder / name, data)
    write_file(folder / META, _meta_of(key, files))


def read(folder: Path, key: Key | None = None) -> Entry:
    """Read an entry and verify all of it; key: what it must have been made from, if that is known.

    Raises: Damaged, saying what does not agree; FileNotFoundError when it is not there, or was
    taken away while it was read; OSError when it cannot be read now (no file handle is left).
    """
    found, whole = read_whole(folder, key)
    return Entry(found, folder, {name: data for name, data in whole.items() if name != META})


def read_whole(folder: Path, key: Key | None = None) -> tuple[Key, dict[str, bytes]]:
    """Read an entry as `read` does; gives its files with `meta.json` among them."""
    handle = _opened(folder)
    try:
        return _verified(handle, folder.name, key)
    except Damaged:
        if not _stands(folder, os.fstat(handle)):
            raise FileNotFoundError(errno.ENOENT, "taken away meanwhile", str(folder)) from None
        raise
    finally:
        os.close(handle)


def meta_in(folder: Path) -> dict[str, Any]:
    """Read what an entry says of itself, verified by its own sum alone.

    Raises: Damaged, FileNotFoundError, OSError, as `read` does.
    """
    handle = _opened(folder)
    try:
        return _parsed(_read_file(handle, META))
    except Damaged:
        if not _stands(folder, os.fstat(handle)):
            raise FileNotFoundError(errno.ENOENT, "taken away meanwhile", str(folder)) from None
        raise
    finally:
        os.close(handle)


def check(files: Mapping[str, bytes], digest: str) -> Key:
    """Verify the files of an entry, `meta.json` among them, before they are written anywhere.

    Raises: Damaged.
    """
    if META not in files:
        raise Damaged(f"{META} is missing")
    meta = _parsed(files[META])
    key = _key_of(meta)
    _same_key(key, digest, None)
    _same_names(set(files) - {META}, meta["files"])
    for name, wanted in meta["files"].items():
        _same_content(name, files[name], wanted)
    return key


def _verified(handle: int, digest: str, key: Key | None) -> tuple[Key, dict[str, bytes]]:
    present = set(os.listdir(handle))
    if META not in present:
        raise Damaged(f"{META} is missing")
    whole = {META: _read_file(handle, META)}
    meta = _parsed(whole[META])
    found = _key_of(meta)
    _same_key(found, digest, key)
    _same_names(present - {META}, meta["files"])
    for name, wanted in sorted(meta["files"].items()):
        whole[name] = _read_file(handle, name, wanted["bytes"])
        _same_content(name, whole[name], wanted)
    return found, whole


def _same_key(found: Key, digest: str, key: Key | None) -> None:
    if key is None and found.digest != digest:
        raise Damaged(f"it was made from other things than its name says ({found.digest})")
    if key is not None and found != key:
        raise Damaged("it was made from other things than what is asked for")


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
    return _written(meta)


def _key_of(meta: Mapping[str, Any]) -> Key:
    return Key(meta["kernel"], meta["source_sha256"], meta["fields"])


def _parsed(data: bytes) -> dict[str, Any]:
    """Parse `meta.json`: byte for byte the text this program writes, and nothing that only means
    the same."""
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or not {"schema", SUM} <= set(meta):
        raise Damaged(f"{META} is no whole JSON object of this program")
    if type(meta["schema"]) is not int or meta["schema"] != SCHEMA:
        raise Damaged(f"it has schema {meta['schema']!r}, where this version reads {SCHEMA}")
    given = meta.pop(SUM)
    if given != _sum_of(meta) or _written(meta) != data:
        raise Damaged(f"{META} does not have the sum it names")
    if not _has_its_form(meta):
        raise Damaged(f"{META} lacks what an entry must say of itself")
    return meta


def _written(meta: Mapping[str, Any]) -> bytes:
    return (json.dumps({**meta, SUM: _sum_of(meta)}, indent=1) + "\n").encode()


def _has_its_form(meta: Mapping[str, Any]) -> bool:
    """Tell whether members have the types they are used with; a sum can be made by anyone."""
    texts = [meta.get(name) for name in ("spcomp", "created", "kernel", "source_sha256")]
    fields, files = meta.get("fields"), meta.get("files")
    if not isinstance(fields, dict) or not isinstance(files, dict):
        return False
    return (
        all(isinstance(text, str) for text in (*texts, *fields.values()))
        and NAME.fullmatch(meta["kernel"]) is not None
        and all(NAME.fullmatch(name) and name != META for name in files)
        and all(_is_size_and_sum(value) for value in files.values())
    )


def _is_size_and_sum(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"bytes", "sha256"}:
        return False
    size = value["bytes"]
    return type(size) is int and size >= 0 and isinstance(value["sha256"], str)


def _sum_of(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(meta)).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


# ---- files ---------------------------------------------------------------------------------------


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


def write_file(path: Path, data: bytes) -> None:
    """Write a new file, private to the user.

    Raises: OSError.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def _opened(folder: Path) -> int:
    """Open the folder of an entry: what is read through the handle is one entry, even where another
    takes its name."""
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (*PASSING, errno.ENOENT):
            raise
        refused = error
    try:
        stand = os.lstat(folder)
    except OSError:
        raise FileNotFoundError(errno.ENOENT, "not there", str(folder)) from None
    is_folder = stat.S_ISDIR(stand.st_mode)
    if is_folder and refused.errno in (errno.ENOTDIR, errno.ELOOP):  # by now one is there
        raise FileNotFoundError(errno.ENOENT, "put there meanwhile", str(folder))
    if is_folder:
        raise Damaged(f"it cannot be read ({refused.strerror})")
    raise Damaged("it is not a folder")


def _stands(folder: Path, stand: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.lstat(folder), stand)
    except OSError:
        return False


def _read_file(folder: int, name: str, wanted: int | None = None) -> bytes:
    """Read a regular file of a folder, never more of it than there may be.

    A link is not followed, and a pipe not waited for.
    Raises: Damaged, OSError.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in PASSING:
            raise
        why = {errno.ENOENT: "is missing", errno.ELOOP: "is a link"}
        said = why.get(error.errno or 0, f"cannot be read ({error.strerror})")
        raise Damaged(f"{name} {said}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{name} is no regular file")
        if wanted is None and status.st_size > MOST_META_BYTES:
            raise Damaged(f"{name} has {status.st_size} bytes, where at most {MOST_META_BYTES} are")
        if wanted is not None and status.st_size != wanted:
            raise Damaged(f"{name} has {status.st_size} bytes, where {wanted} were written")
        with open(handle, "rb", closefd=False) as file:
            return file.read(status.st_size)
    except OSError as error:
        if error.errno in PASSING:
            raise
        raise Damaged(f"{name} cannot be read ({error.strerror})") from None
    finally:
        os.close(handle)
