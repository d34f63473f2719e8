"""Where generated source lies on disk. Triton reads the text of a kernel from its file.

The name is the hash of the text, so a file never changes once it is there: it is written beside and
renamed, and a file whose text is not what its name says is written again."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
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
