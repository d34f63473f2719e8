"""Archives that others made: nothing in them is believed, and nothing comes half."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from spcomp.cache import Damaged, Key, Store, archive, entry, upkeep
from spcomp.cli import main
from spcomp.errors import NotAnArchive
from tests.cache.stores import FILES, key, silent


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", variable="SPCOMP_CACHE_DIR")


@pytest.fixture
def folder(store: Store) -> Path:
    """Keep an entry; gives its folder."""
    folder = store.load_or_build(key(), lambda: FILES).folder
    assert folder is not None
    return folder


def _packed(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def _entry_of(kernel: str, **fields: str) -> dict[str, bytes]:
    """Make an entry whose sums are all right, as a stranger can."""
    made = Key(kernel, "0" * 64, fields)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / made.digest
        entry.write(folder, made, FILES)
        return {f"{made.digest}/{p.name}": p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("kernel", ["../../../x", "a/b", "x" * 300, "nul\0", "", "\x1b[31m"])
def test_an_entry_whose_kernel_is_no_name_is_refused(
    store: Store, tmp_path: Path, kernel: str
) -> None:
    """The name becomes a part of a path."""
    path = _packed(tmp_path / "x.tar", {**_entry_of(kernel), **_entry_of("attend")})
    found = archive.import_entries(path, store)
    assert list(found.refused.values()) == ["meta.json lacks what an entry must say of itself"]
    assert found.placed == [Key("attend", "0" * 64, {}).digest]


def test_a_refused_entry_never_stands_in_the_cache(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = _entry_of("attend")
    name = next(n for n in members if n.endswith("cubin"))
    path = _packed(tmp_path / "x.tar", {**members, name: bytes(len(members[name]))})
    monkeypatch.setattr(Store, "place", lambda *_: pytest.fail("it was placed"))
    with silent():
        assert len(archive.import_entries(path, store).refused) == 1


@pytest.mark.parametrize("size", [1 << 30, 1 << 60, -512])
def test_a_member_larger_than_its_archive_is_refused(
    store: Store, tmp_path: Path, size: int
) -> None:
    """Also a sparse one, which unpacks to any size."""
    name = f"{'a' * 32}/meta.json"
    path = tmp_path / "x.tar"
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE):
        member = tarfile.TarInfo(name)
        member.size, member.type = size, kind
        head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        if kind == tarfile.GNUTYPE_SPARSE:
            head[483:495] = b"%011o\0" % (1 << 30)  # its real size
            head[124:136] = b"%011o\0" % 0
            head[148:156] = b" " * 8
            head[148:156] = b"%06o\0 " % sum(head)
        path.write_bytes(bytes(head) + bytes(tarfile.RECORDSIZE - len(head)))
        with pytest.raises(NotAnArchive):
            archive.import_entries(path, store)


def test_a_member_that_comes_twice_is_refused(store: Store, tmp_path: Path) -> None:
    members = _entry_of("attend")
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name, data in [*members.items(), *members.items()]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    with pytest.raises(NotAnArchive, match="comes twice"):
        archive.import_entries(tmp_path / "x.tar", store)


@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=16))))
def test_no_change_to_an_archive_does_more_than_refuse(changes: list[tuple[float, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        whole = bytearray(_packed(Path(name, "x.tar"), _entry_of("attend")).read_bytes())
        for place, new in changes:
            start = int(place * 4096)
            whole[start : start + len(new)] = new
        Path(name, "x.tar").write_bytes(whole)
        store = Store(Path(name, "cache"))
        with contextlib.suppress(NotAnArchive), silent():
            archive.import_entries(Path(name, "x.tar"), store)
        assert all(upkeep.problem_of(row) == "" for row in upkeep.listed(store))
        assert {p.name for p in Path(name).iterdir()} <= {"x.tar", "cache"}


def test_a_failed_export_leaves_the_older_file(store: Store, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    archive.export_entries([folder], path)
    before = path.read_bytes()
    os.truncate(folder / "attend.cubin", 7)
    with pytest.raises(Damaged):
        archive.export_entries([folder], path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "x.tar"]


def test_a_list_shows_a_strangers_text_as_text(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(store.folder))
    members = _entry_of("attend", target="[/red]", num_warps="\x1b[2J")
    archive.import_entries(_packed(tmp_path / "x.tar", members), store)
    told = CliRunner().invoke(main, ["cache", "list"], catch_exceptions=False)
    assert "[/red]" in told.stdout and "\x1b" not in told.stdout
