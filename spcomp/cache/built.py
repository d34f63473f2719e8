"""Files that a backend builds and can build again, kept beside the entries of the cache.

They lie in `built/<group>/<name>`, a group for each kind; the name holds a hash of all a file was
made from. Unlike entries they carry no sums: they never leave this machine."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from spcomp.settings import cache_dir, cache_place

BUILT = "built"
STAGING = "staging"
NOTED_S = 3600.0
"""How exact the time of the last use is; what is pruned goes by it."""


def built_file(group: str, name: str, make: Callable[[Path], None]) -> Path:
    """Give a file, made by `make` at the path it is given if it is not there yet.

    It takes its place by one rename. Where nothing may be written, what is missing lives in a
    private folder as long as this process. Raises: CacheNotWritable, and what `make` raises.
    """
    file = cache_place().folder / BUILT / group / name
    if not file.exists():
        folder = cache_dir() if cache_place().may_write else _private_folder()
        file = folder / BUILT / group / name
        if not file.exists():
            _make(file, folder / STAGING, make)
    else:
        _note_use(file)
    return file


def _make(file: Path, staging: Path, make: Callable[[Path], None]) -> None:
    staging.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=staging, prefix="making-") as making:
        made = Path(making, file.name)
        make(made)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.replace(made, file)


def _note_use(file: Path) -> None:
    with contextlib.suppress(OSError):
        if cache_place().may_write and time.time() - file.stat().st_mtime > NOTED_S:
            os.utime(file)


@lru_cache(maxsize=1)
def _private_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="spcomp-built-"))
