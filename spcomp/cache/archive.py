"""Entries as one file, to carry them to a machine that shall not compile."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from spcomp.cache import entry as form
from spcomp.cache.entry import Damaged
from spcomp.cache.store import Store
from spcomp.errors import NotAnArchive

MEMBER = re.compile(rf"([0-9a-f]{{{form.DIGEST_DIGITS}}})/([A-Za-z0-9_.-]+)")
UNREADABLE = (tarfile.TarError, EOFError, OSError, OverflowError, MemoryError, RecursionError)
"""What reading a tar file of any content may raise."""


class NoRoom(Exception):
    """The store could not be written: no fault of the archive, which raises the same class."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(slots=True)
class Imported:
    """What became of the entries of an archive: digests, and of the refused ones the reason."""

    placed: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def export_entries(folders: Iterable[Path], path: Path) -> int:
    """Write entries to a tar file, the same bytes for the same entries; gives how many.

    Each is verified first; one that was cleared meanwhile is left out. The file appears whole, in
    place of an older one. Raises: Damaged, naming the entry; OSError.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        count = _write(folders, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return count


def import_entries(path: Path, store: Store) -> Imported:
    """Put the entries of a tar file into a store; each is verified before it takes its place.

    Raises: NotAnArchive for a file that is no tar file or holds anything but entries, before
    anything is placed; OSError where nothing can be written.
    """
    result = Imported()
    try:
        _check_end(path)
        with tarfile.open(path, "r:") as archive:
            for digest, members in sorted(_members(archive, path).items()):
                _place(digest, _contents(archive, members), store, result)
    except NoRoom as error:
        raise error.reason from None
    except UNREADABLE as error:
        raise NotAnArchive(path=path, problem=f"it cannot be read ({error})") from None
    return result


def _write(folders: Iterable[Path], path: Path) -> int:
    count = 0
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for folder in sorted(folders, key=lambda folder: folder.name):
            try:
                _, files = form.read_whole(folder)
            except FileNotFoundError:
                continue
            except Damaged as problem:
                raise Damaged(f"{folder}: {problem}") from None
            for name, data in sorted(files.items()):
                member = tarfile.TarInfo(f"{folder.name}/{name}")
                member.size, member.mode = len(data), 0o600
                archive.addfile(member, io.BytesIO(data))
            count += 1
    return count


def _members(archive: tarfile.TarFile, path: Path) -> dict[str, list[tarfile.TarInfo]]:
    """Give the members of each entry, by digest.

    Raises: NotAnArchive when one is anything but a file of an entry, or is larger than the archive.
    """
    entries: dict[str, list[tarfile.TarInfo]] = {}
    seen: set[str] = set()
    room = path.stat().st_size
    for member in archive:
        name = MEMBER.fullmatch(member.name)
        if name is None or name[2] in (".", ".."):
            raise NotAnArchive(path=path, problem=f"{member.name!r} is no file of an entry")
        if not member.isreg() or member.issparse() or not 0 <= member.size <= room:
            raise NotAnArchive(path=path, problem=f"{member.name!r} is no regular file")
        if member.name in seen:
            raise NotAnArchive(path=path, problem=f"{member.name!r} comes twice")
        seen.add(member.name)
        entries.setdefault(name[1], []).append(member)
    if not entries:
        raise NotAnArchive(path=path, problem="it holds no entry")
    return entries


def _contents(archive: tarfile.TarFile, members: Iterable[tarfile.TarInfo]) -> dict[str, bytes]:
    files = {}
    for member in members:
        content = archive.extractfile(member)
        assert content is not None, "a regular file"
        files[member.name.rpartition("/")[2]] = content.read()
    return files


def _check_end(path: Path) -> None:
    """Refuse a file that was cut: a reader of tar files takes a cut between two members for the
    end.

    Raises: tarfile.ReadError, OSError.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
        if size % tarfile.RECORDSIZE or file.read().strip(b"\0"):
            raise tarfile.ReadError("its end is missing")


def _place(digest: str, files: dict[str, bytes], store: Store, result: Imported) -> None:
    def fill(folder: Path) -> None:
        folder.mkdir(mode=0o700)
        for name, data in files.items():
            form.write_file(folder / name, data)

    try:
        key = form.check(files, digest)
    except Damaged as problem:
        result.refused[digest] = str(problem)
        return
    if store.load(key) is not None:
        result.present.append(digest)
        return
    try:
        store.place(key, fill)
    except OSError as error:
        raise NoRoom(error) from error
    result.placed.append(digest)
