"""The life of cache entries: looked up, built once, verified on every read, healed when damaged."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from spcomp.cache import entry as form
from spcomp.cache.entry import Damaged, Entry, Key
from spcomp.errors import CacheNotWritable
from spcomp.settings import cache_place

LOCK_TIMEOUT_S = 600.0
"""How long a process waits for another that builds the same key, before it builds by itself."""

STALE_S = 3600.0
"""Age after which what lies in staging belongs to nobody."""

Build = Callable[[], Mapping[str, bytes]]
REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG),
)
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
"""What a rename says when something stands in the place."""


class Store:
    """Compiled kernels in a folder: `kernels/<2 digits>/<digest>/`, `locks/`, `staging/`.

    An entry appears by one rename and is never changed afterwards. Making a Store touches no disk;
    it may be used from several threads, and on both sides of a fork.
    """

    def __init__(self, folder: Path, *, may_write: bool = True, variable: str = "") -> None:
        """Look at a folder; variable: the setting that names it, for errors."""
        self.folder = folder
        self.may_write = may_write
        self._variable = variable

    @property
    def kernels(self) -> Path:
        """Where entries stand."""
        return self.folder / "kernels"

    @property
    def staging(self) -> Path:
        """Where entries are written, and where damaged ones go to be removed."""
        return self.folder / "staging"

    @property
    def locks(self) -> Path:
        """Where the locks of keys lie."""
        return self.folder / "locks"

    def path_of(self, key: Key) -> Path:
        """Give the folder an entry stands or would stand in."""
        digest = key.digest
        return self.kernels / digest[:2] / digest

    def load(self, key: Key) -> Entry | None:
        """Give an entry if it is there and all of it agrees.

        A damaged entry is removed with one warning and counts as not there; where nothing may be
        written it stays, and the warning with it.
        """
        return self._find(key)[0]

    def load_or_build(self, key: Key, build: Build) -> Entry:
        """Give an entry, built by one process and read by all others.

        build gives the files of the entry; what it raises passes through and leaves nothing.
        Raises: CacheNotWritable when something must be kept in a folder the user set and that
        cannot be written. A full disk is a warning: the entry then lives in memory.
        """
        found, damage_stays = self._find(key)
        if found is not None:
            return found
        if damage_stays or not self.may_write or not self._is_ready():
            return Entry(key, None, dict(build()))
        with self._lock(key):
            return self.load(key) or self._keep(key, dict(build()))

    def discard(self, folder: Path, damaged: Key | None = None) -> bool:
        """Take an entry away in one rename, so that nobody reads half of it; False when it cannot
        be.

        damaged: whose entry it is, if it goes because of damage; the right one of that key, which
        another process may have put there by now, stays.
        """
        aside = self._staged("removed")
        if not os.path.lexists(folder):
            return False
        try:
            self.staging.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.rename(folder, aside)
        except FileNotFoundError:  # another process was first
            return True
        except OSError:
            return False
        if damaged is not None:
            with contextlib.suppress(Damaged, OSError):
                form.read(aside, damaged)
                os.rename(aside, folder)
        remove(aside)
        return True

    def place(self, key: Key, fill: Callable[[Path], None]) -> Entry | None:
        """Put an entry in its place: `fill` writes a folder in staging, which is renamed and read
        back. Gives None when it does not become the entry of the key.

        Raises: OSError; staging is empty again.
        """
        staged, target = self._staged(key.kernel), self.path_of(key)
        try:
            self.staging.mkdir(mode=0o700, parents=True, exist_ok=True)
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fill(staged)
            for _ in range(2):  # a damaged entry in its place is taken away by `load`
                try:
                    os.rename(staged, target)
                except OSError as error:
                    if error.errno not in TAKEN:
                        raise
                else:
                    return self.load(key)
                found = self.load(key)
                if found is not None:
                    return found
            return None
        finally:
            remove(staged)

    def leftovers(self) -> Iterator[Path]:
        """Yield what lies in staging and belongs to no running process."""
        with contextlib.suppress(OSError):
            for item in os.scandir(self.staging):
                if _is_stale(item):
                    yield Path(item.path)

    def _keep(self, key: Key, files: dict[str, bytes]) -> Entry:
        try:
            kept = self.place(key, lambda folder: form.write(folder, key, files))
        except OSError as error:
            self._warn_not_kept(error)
            kept = None
        for stale in self.leftovers():
            remove(stale)
        return kept or Entry(key, None, files)

    def _is_ready(self) -> bool:
        """Make the folders; False when there is no room for them.

        Raises: CacheNotWritable.
        """
        try:
            for folder in (self.folder, self.kernels, self.staging, self.locks):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.kernels, self.staging, self.locks):
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, "Permission denied")
        except OSError as error:
            if error.errno in REFUSED and self._variable:
                raise CacheNotWritable(
                    folder=self.folder, variable=self._variable, reason=error.strerror
                ) from error
            self._warn_not_kept(error)
            return False
        return True

    def _lock(self, key: Key) -> AbstractContextManager[object]:
        """Hold the lock of a key, or nothing where there is none to be had: a build done twice is
        harmless."""
        lock = FileLock(str(self.locks / f"{key.digest}.lock"), mode=0o600)
        try:
            return lock.acquire(timeout=LOCK_TIMEOUT_S)
        except (Timeout, OSError, NotImplementedError) as error:
            warnings.warn(
                f"spcomp: no lock for {self.path_of(key)} ({error}); building without it.",
                stacklevel=4,
            )
            return contextlib.nullcontext()

    def _find(self, key: Key) -> tuple[Entry | None, bool]:
        """Give an entry if it is there, and whether a damaged one stays in its place."""
        folder = self.path_of(key)
        try:
            found = form.read(folder, key)
        except Damaged as problem:
            went = self.may_write and self.discard(folder, key)
            then = "it is made again" if went else "it is not used"
            warnings.warn(
                f"spcomp: the cache entry {folder} is damaged: {problem}; {then}.", stacklevel=4
            )
            return None, not went
        except OSError:  # not there, or no file handle is left to look
            return None, False
        self._note_use(folder)
        return found, False

    def _note_use(self, folder: Path) -> None:
        """Note when an entry was last used, at most once an hour: what is pruned goes by it."""
        if self.may_write:
            with contextlib.suppress(OSError):
                meta = folder / form.META
                if time.time() - meta.stat().st_mtime > STALE_S:
                    os.utime(meta)

    def _staged(self, name: str) -> Path:
        return self.staging / f"{_host()}~{os.getpid()}~{name}~{secrets.token_hex(6)}"

    def _warn_not_kept(self, error: OSError) -> None:
        if self.folder not in _WARNED:
            _WARNED.add(self.folder)
            warnings.warn(
                f"spcomp: kernels cannot be kept in {self.folder} ({error.strerror}); they stay in "
                "memory for this process.",
                stacklevel=5,
            )


_WARNED: set[Path] = set()


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or whatever else stands there; never through a
    link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def _host() -> str:
    return socket.gethostname().replace("~", "-").replace("/", "-")


def _is_stale(item: os.DirEntry[str]) -> bool:
    """Tell whether the process that made a folder in staging is gone, or has had an hour: a number
    may belong to another process by now."""
    host, _, rest = item.name.partition("~")
    number = rest.partition("~")[0]
    if host == _host() and number.isdecimal() and not _is_running(int(number)):
        return True
    with contextlib.suppress(OSError):
        return time.time() - item.stat(follow_symlinks=False).st_mtime > STALE_S
    return False


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it runs under another user
        return True
    return True


def default_store() -> Store:
    """Give the store of the settings' folder; making one costs nothing."""
    place = cache_place()
    return Store(place.folder, may_write=place.may_write, variable=place.variable)
