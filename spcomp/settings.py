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
    return Settings(
        cache_dir=_folder("SPCOMP_CACHE_DIR"),
        cache_read_only=_switch("SPCOMP_CACHE_READ_ONLY"),
        backend=os.environ.get("SPCOMP_BACKEND") or "auto",
        check=_switch("SPCOMP_CHECK"),
    )


def _switch(variable: str) -> bool:
    value = os.environ.get(variable, "0")
    if value not in ("0", "1", ""):
        raise BadSetting(variable=variable, value=value, wanted="0 or 1")
    return value == "1"


def _folder(variable: str) -> Path | None:
    """Give an absolute path, so that it stays the same folder when the process changes its own."""
    value = os.environ.get(variable)
    if not value:
        return None
    try:
        return Path(value).expanduser().absolute()
    except (RuntimeError, OSError):  # no such user, or no current folder
        raise BadSetting(variable=variable, value=value, wanted="the path of a folder") from None


@dataclass(frozen=True, slots=True)
class CachePlace:
    """Where the cache lies; variable: the setting that names the folder, empty for the default."""

    folder: Path
    may_write: bool
    variable: str


NOWHERE = Path(os.devnull, "spcomp")
"""A cache that holds nothing and can hold nothing: nobody can put anything below a device."""


def cache_place() -> CachePlace:
    """Say where the cache lies, without making a folder the user set or one that is only read.

    The default folder is made here; where it cannot be, one warning and a private temporary folder
    for this process, and where there is none either, kernels live in memory.
    """
    settings = current()
    if settings.cache_dir is not None:
        return CachePlace(settings.cache_dir, not settings.cache_read_only, "SPCOMP_CACHE_DIR")
    if not settings.cache_read_only:
        return _default_place()
    try:
        return CachePlace(_user_cache_dir(), False, "")
    except (OSError, RuntimeError):
        return CachePlace(NOWHERE, False, "")


def cache_dir() -> Path:
    """Give the folder of the cache, made with mode 0700 and writable; not made where the settings
    say that nothing is written.

    A folder that the user set and that cannot be written is an error; the default one is a warning
    and a private temporary folder for this process.

    Raises: CacheNotWritable.
    """
    place = cache_place()
    if not place.may_write:
        return place.folder
    try:
        _make_private(place.folder)
    except OSError as error:
        raise CacheNotWritable(
            folder=place.folder, variable=place.variable, reason=error.strerror or error
        ) from error
    return place.folder


@lru_cache(maxsize=1)
def _default_place() -> CachePlace:
    try:
        folder = _user_cache_dir()
        _make_private(folder)
        return CachePlace(folder, True, "")
    except (OSError, RuntimeError) as error:
        place, where = _place_without_home()
        warnings.warn(
            f"spcomp: the default cache folder cannot be written ({error}); "
            f"kernels of this process {where}. Set SPCOMP_CACHE_DIR to keep them.",
            stacklevel=3,
        )
        return place


def _place_without_home() -> tuple[CachePlace, str]:
    try:
        folder = Path(tempfile.mkdtemp(prefix="spcomp-"))
    except OSError:
        return CachePlace(NOWHERE, False, ""), "stay in memory"
    return CachePlace(folder, True, ""), f"go to {folder}"


def _user_cache_dir() -> Path:
    """Give the folder the system keeps caches in.

    Raises: OSError, RuntimeError where the user has none.
    """
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("spcomp"))
    if not folder.is_absolute():  # `~` of a user without a name
        raise FileNotFoundError(2, "no home folder", str(folder))
    return folder


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "permission denied", str(folder))
