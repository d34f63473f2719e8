"""Entries as one file, to carry them to a machine that shall not compile."""

from __future__ import annotations

import io
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
MOST_BYTES = 1 << 30
"""Largest file of an archive that is read into memory."""


@dataclass(slots=True)
class Imported:
    """What became of the entries of an archive: digests, and of the refused ones the reason."""

    placed: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def export_entries(folders: Iterable[Path], path: Path) -> int:
    """Write entries to a tar file, the same bytes for the same entries; gives how many.

    Each is verified first. Raises: Damaged, naming the entry; OSError.
    """
    count = 0
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for folder in sorted(folders, key=lambda folder: folder.name):
            try:
                files = dict(form.read(folder).files)
            except Damaged as problem:
                raise Damaged(f"{folder}: {problem}") from None
            files[form.META] = (folder / form.META).read_bytes()
            for name, data in sorted(files.items()):
                member = tarfile.TarInfo(f"{folder.name}/{name}")
                member.size, member.mode = len(data), 0o600
                archive.addfile(member, io.BytesIO(data))
            count += 1
    return count


def import_entries(path: Path, store: Store) -> Imported:
    """Put the entries of a tar file into a store; each is verified before it takes its place.

    Raises: NotAnArchive for a file that is no tar file or holds anything but entries, before
    anything is placed; OSError where nothing can be written.
    """
    result = Imported()
    for digest, files in sorted(_members(path).items()):
        _place(digest, files, store, result)
    return result


def _members(path: Path) -> dict[str, dict[str, bytes]]:
    entries: dict[str, dict[str, bytes]] = {}
    try:
        _check_end(path)
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = MEMBER.fullmatch(member.name)
                if name is None or name[2] in (".", ".."):
                    raise NotAnArchive(path=path, problem=f"{member.name!r} is no file of an entry")
                if not member.isreg() or member.size > MOST_BYTES:
                    raise NotAnArchive(path=path, problem=f"{member.name!r} is no regular file")
                content = archive.extractfile(member)
                assert content is not None
                entries.setdefault(name[1], {})[name[2]] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise NotAnArchive(path=path, problem=f"it cannot be read ({error})") from None
    if not entries:
        raise NotAnArchive(path=path, problem="it holds no entry")
    return entries


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
            (folder / name).write_bytes(data)
            (folder / name).chmod(0o600)

    try:
        key = form.key_from(files)
        if key.digest != digest:
            raise Damaged(f"it was made from other things than its name says ({key.digest})")
        if store.load(key) is not None:
            result.present.append(digest)
        elif store.place(key, fill) is not None:
            result.placed.append(digest)
        else:
            raise Damaged("its files do not agree with its meta.json")
    except Damaged as problem:
        result.refused[digest] = str(problem)
