"""Every environment variable of spcomp, and the only code that knows folders.

| variable | default | meaning |
|---|---|---|
| `SPCOMP_CACHE_DIR` | the user's cache folder | where compiled kernels and tuning are kept |
| `SPCOMP_CACHE_READ_ONLY` | `0` | `1` uses what the cache holds and writes nothing |
| `SPCOMP_BACKEND` | `auto` | backend of `compile()` when the call names none |
| `SPCOMP_CHECK` | `0` | `1` checks the IR's rules after every pass |
"""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from spcomp.errors import BadSetting, CacheNotWritable

VARIABLES: dict[str, tuple[str, str]] = {
    "SPCOMP_CACHE_DIR": ("the user's cache folder", "where compiled kernels and tuning are kept"),
    "SPCOMP_CACHE_READ_ONLY": ("0", "1 uses what the cache holds and writes nothing"),
    "SPCOMP_BACKEND": ("auto", "backend of compile() when the call names none"),
    "SPCOMP_CHECK": ("0", "1 checks the IR's rules after every pass"),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How spcomp runs, read from the environment once per call of `current`."""

    cache_dir: Path | None
    cache_read_only: bool
    backend: str
    check: bool


def current() -> Settings:
    """Read the settings from the environment.

    Raises: BadSetting, naming the variable, its value and what is allowed.
    """
    folder = os.environ.get("SPCOMP_CACHE_DIR")
    return Settings(
        cache_dir=Path(folder).expanduser() if folder else None,
        cache_read_only=_switch("SPCOMP_CACHE_READ_ONLY"),
        backend=os.environ.get("SPCOMP_BACKEND") or "auto",
        check=_switch("SPCOMP_CHECK"),
    )


def _switch(variable: str) -> bool:
    value = os.environ.get(variable, "0")
    if value not in ("0", "1", ""):
        raise BadSetting(variable=variable, value=value, wanted="0 or 1")
    return value == "1"


@dataclass(frozen=True, slots=True)
class CachePlace:
    """Where the cache lies; variable: the setting that names the folder, empty for the default."""

    folder: Path
    may_write: bool
    variable: str


def cache_place() -> CachePlace:
    """Say where the cache lies, without making a folder the user set.

    The default folder is made here; where it cannot be, one warning and a private temporary folder
    for this process.
    """
    settings = current()
    if settings.cache_dir is None:
        return CachePlace(_default_cache_dir(), not settings.cache_read_only, "")
    return CachePlace(settings.cache_dir, not settings.cache_read_only, "SPCOMP_CACHE_DIR")


def cache_dir() -> Path:
    """Give the folder of the cache, made with mode 0700 and writable.

    A folder that the user set and that cannot be written is an error; the default one is a warning
    and a private temporary folder for this process.

    Raises: CacheNotWritable.
    """
    place = cache_place()
    try:
        _make_private(place.folder)
    except OSError as error:
        raise CacheNotWritable(
            folder=place.folder, variable=place.variable, reason=error.strerror or error
        ) from error
    return place.folder


@lru_cache(maxsize=1)
def _default_cache_dir() -> Path:
    try:
        import platformdirs

        folder = Path(platformdirs.user_cache_dir("spcomp"))
        _make_private(folder)
    except (OSError, RuntimeError) as error:
        folder = Path(tempfile.mkdtemp(prefix="spcomp-"))
        warnings.warn(
            f"spcomp: the default cache folder cannot be written ({error}); "
            f"kernels of this process go to {folder}. Set SPCOMP_CACHE_DIR to keep them.",
            stacklevel=3,
        )
    return folder


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "permission denied", str(folder))
