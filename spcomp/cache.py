"""Where generated source lies on disk. Triton reads the text of a kernel from its file.

The name is the hash of the text, so a file never changes once it is there: it is written beside and
renamed, and a file whose text is not what its name says is written again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from spcomp.settings import cache_dir


def store_source(kernel: str, text: str) -> Path:
    """Keep a generated file and give its path, `<cache>/src/<hash>/<kernel>.py`.

    Raises: CacheNotWritable when the user's own folder cannot be written.
    """
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    path = cache_dir() / "src" / key / f"{kernel}.py"
    if path.exists():
        if path.read_bytes() == text.encode():
            return path
        warnings.warn(f"spcomp: {path} was altered; it is written again.", stacklevel=2)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_whole(path, text)
    return path


def _write_whole(path: Path, text: str) -> None:
    """Write beside the file and rename, so that nobody ever reads half of it."""
    handle, staged = tempfile.mkstemp(dir=path.parent, prefix=".staged-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(staged, path)
    except BaseException:
        os.unlink(staged)
        raise


@dataclass(frozen=True, slots=True)
class Key:
    """Everything that makes two binaries two: kernel name, hash of its source, and the rest by
    name."""

    kernel: str
    source_sha256: str
    fields: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Give the name of its entry."""
        text = json.dumps([self.kernel, self.source_sha256, dict(self.fields)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept under a key."""

    key: Key
    folder: Path | None
    files: Mapping[str, bytes]


class Store:
    """Compiled kernels on disk."""

    def path_of(self, key: Key) -> Path:
        """Give the folder of an entry."""
        return cache_dir() / "kernels" / key.digest

    def load(self, key: Key) -> Entry | None:
        """Give an entry if it is there."""
        folder = self.path_of(key)
        if not folder.exists():
            return None
        return Entry(key, folder, {p.name: p.read_bytes() for p in folder.iterdir()})

    def load_or_build(self, key: Key, build: Callable[[], Mapping[str, bytes]]) -> Entry:
        """Give an entry, built if it is not there."""
        found = self.load(key)
        if found is None:
            files = build()
            staged = Path(tempfile.mkdtemp(dir=cache_dir()))
            for name, data in files.items():
                (staged / name).write_bytes(data)
            self.path_of(key).parent.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # another process was first
                staged.rename(self.path_of(key))
            found = self.load(key)
        assert found is not None
        return found


def default_store() -> Store:
    """Give the store in the folder of the settings."""
    return Store()
