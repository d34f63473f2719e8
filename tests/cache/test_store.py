"""One entry: kept, found, verified on every read, healed, private."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spcomp.cache import Key, Store, default_store, entry
from spcomp.errors import CacheNotWritable
from tests.cache.stores import FILES, key, names_below


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", variable="SPCOMP_CACHE_DIR")


def never() -> Mapping[str, bytes]:
    raise AssertionError("it was built again")


def test_what_was_built_is_found_again_and_not_built_again(store: Store) -> None:
    built = store.load_or_build(key(), lambda: FILES)
    assert built.files == FILES and built.folder == store.path_of(key())
    again = store.load_or_build(key(), never)
    assert again.files == FILES and again.key == key()
    assert store.load(key(1)) is None


def test_an_entry_is_a_folder_that_says_what_it_was_made_from(store: Store) -> None:
    folder = store.load_or_build(key(), lambda: FILES).folder
    assert folder is not None
    assert folder.name == key().digest and folder.parent.name == key().digest[:2]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["kernel"] == "attend" and meta["fields"] == dict(key().fields)
    assert meta["files"]["attend.cubin"]["bytes"] == 4096
    assert names_below(store.staging) == []


def test_every_field_makes_another_key_and_their_order_does_not() -> None:
    others = [
        key(1),
        key(target="cuda:80"),
        key(num_warps="4"),
        key(host="other"),
        Key("merge", key().source_sha256, key().fields),
    ]
    assert len({k.digest for k in (key(), *others)}) == 6
    turned = Key("attend", key().source_sha256, dict(reversed(list(key().fields.items()))))
    assert turned.digest == key().digest


def test_folders_and_files_are_private(store: Store) -> None:
    old = os.umask(0)
    try:
        store.load_or_build(key(), lambda: FILES)
    finally:
        os.umask(old)
    for path in (store.folder, *store.folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _link(path: Path) -> None:
    copy = path.parent.parent.parent.parent / f"copy-{path.name}"
    path.rename(copy)
    path.symlink_to(copy)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut in half": _cut,
    "one bit": _flip,
    "deleted": Path.unlink,
    "a link": _link,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", [*FILES, "meta.json"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_entry_is_never_loaded_and_made_again_with_one_warning(
    store: Store, name: str, how: str
) -> None:
    """B48."""
    folder = store.load_or_build(key(), lambda: FILES).folder
    assert folder is not None
    DAMAGE[how](folder / name)
    with pytest.warns(UserWarning, match="is damaged: .*; it is made again") as warned:
        healed = store.load_or_build(key(), lambda: {**FILES, "new": b"1"})
    assert len(warned) == 1
    assert str(folder) in str(warned[0].message)
    assert healed.files == {**FILES, "new": b"1"}
    assert store.load_or_build(key(), never).files == healed.files
    assert names_below(store.staging) == []


def _rewrite(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


TAMPERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file more": (lambda f: (f / "more.py").write_text("x"), "more.py does not belong to it"),
    "another kernel": (lambda f: _rewrite(f, kernel="merge"), "does not have the sum it names"),
    "another schema": (lambda f: _rewrite(f, schema=0), "it has schema 0, where this version"),
    "no object": (lambda f: (f / "meta.json").write_text("[]"), "is no whole JSON object"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_entry_is_told_with_its_reason(store: Store, how: str) -> None:
    folder = store.load_or_build(key(), lambda: FILES).folder
    assert folder is not None
    tamper, reason = TAMPERED[how]
    tamper(folder)
    with pytest.warns(UserWarning, match=reason):
        assert store.load(key()) is None


def test_an_entry_under_another_name_is_not_believed(store: Store) -> None:
    folder = store.load_or_build(key(), lambda: FILES).folder
    assert folder is not None
    other = store.path_of(key(1))
    other.parent.mkdir(exist_ok=True)
    folder.rename(other)
    with pytest.warns(UserWarning, match="made from other things than what is asked for"):
        assert store.load(key(1)) is None


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), which=st.integers(0, 3))
def test_any_changed_byte_is_noticed(place: float, flip: int, which: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / key().digest
        entry.write(folder, key(), FILES)
        path = sorted(folder.iterdir())[which]
        data = bytearray(path.read_bytes())
        data[int(place * len(data))] ^= flip
        path.write_bytes(bytes(data))
        with pytest.raises(entry.Damaged):
            entry.read(folder, key())


def test_a_build_that_raises_leaves_nothing_and_the_next_one_tries_again(store: Store) -> None:
    def fails() -> Mapping[str, bytes]:
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        store.load_or_build(key(), fails)
    assert names_below(store.kernels) == [] and names_below(store.staging) == []
    assert store.load_or_build(key(), lambda: FILES).files == FILES


@pytest.mark.parametrize("call", range(8))
def test_a_full_disk_leaves_the_kernel_in_memory_and_nothing_half_written(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The n-th file operation of the writer meets it."""
    from spcomp.cache import store as life

    monkeypatch.setattr(life, "_WARNED", set())
    store.load_or_build(key(1), lambda: FILES)
    left, real_open, real_mkdir = [call], os.open, Path.mkdir

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return attempt

    monkeypatch.setattr(
        entry.os,
        "open",
        lambda p, f, *m, **at: (
            counted(real_open) if f & os.O_CREAT and "staging" in str(p) else real_open
        )(p, f, *m, **at),
    )
    monkeypatch.setattr(Path, "mkdir", counted(real_mkdir))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        made = store.load_or_build(key(), lambda: FILES)
    monkeypatch.undo()
    assert made.files == FILES
    assert names_below(store.staging) == []
    if made.folder is None:
        assert [str(w.message) for w in warned] == [
            f"spcomp: kernels cannot be kept in {store.folder} (No space left on device); "
            "they stay in memory for this process."
        ]
        assert store.load(key()) is None
    assert store.load_or_build(key(), lambda: FILES).files == FILES
    assert store.load(key()) is not None


def test_two_machines_share_a_folder(store: Store) -> None:
    here, there = key(target="cuda:90"), key(target="hip:gfx942")
    store.load_or_build(here, lambda: FILES)
    store.load_or_build(there, lambda: {"attend.hsaco": b"2"})
    assert store.load_or_build(here, never).files == FILES
    assert store.load_or_build(there, never).files == {"attend.hsaco": b"2"}


def test_read_only_serves_hits_and_keeps_misses_in_memory(tmp_path: Path) -> None:
    Store(tmp_path).load_or_build(key(), lambda: FILES)
    before = names_below(tmp_path)
    readable = Store(tmp_path, may_write=False, variable="SPCOMP_CACHE_DIR")
    assert readable.load_or_build(key(), never).files == FILES
    missed = readable.load_or_build(key(1), lambda: FILES)
    assert missed.files == FILES and missed.folder is None
    assert names_below(tmp_path) == before


def test_read_only_leaves_a_damaged_entry_and_warns(tmp_path: Path) -> None:
    folder = Store(tmp_path).load_or_build(key(), lambda: FILES).folder
    assert folder is not None
    _cut(folder / "attend.cubin")
    readable = Store(tmp_path, may_write=False)
    with pytest.warns(UserWarning, match="it is not used"):
        assert readable.load_or_build(key(), lambda: FILES).folder is None
    assert folder.exists()


def test_a_folder_that_cannot_be_made_is_an_error_of_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = Store(tmp_path / "file" / "cache", variable="SPCOMP_CACHE_DIR")
    with pytest.raises(CacheNotWritable) as caught:
        store.load_or_build(key(), lambda: FILES)
    assert str(caught.value) == (
        f"CacheNotWritable: the cache folder {tmp_path}/file/cache set by SPCOMP_CACHE_DIR cannot "
        "be written (Not a directory).\n"
        "  help: give a folder you may write, or unset SPCOMP_CACHE_DIR. SPCOMP_CACHE_READ_ONLY=1 "
        "says that nothing is meant to be written there."
    )


def test_settings_choose_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path / "mine"))
    assert default_store().folder == tmp_path / "mine" and default_store().may_write
    assert not (tmp_path / "mine").exists(), "looking makes nothing"
    monkeypatch.setenv("SPCOMP_CACHE_READ_ONLY", "1")
    assert not default_store().may_write


def test_the_last_use_is_noted_at_most_once_an_hour(store: Store) -> None:
    folder = store.load_or_build(key(), lambda: FILES).folder
    assert folder is not None
    meta = folder / "meta.json"
    recent, long_ago = time.time() - 60, time.time() - 7200
    os.utime(meta, (recent, recent))
    store.load(key())
    assert meta.stat().st_mtime == pytest.approx(recent)
    os.utime(meta, (long_ago, long_ago))
    store.load(key())
    assert meta.stat().st_mtime > recent


def test_staging_of_dead_processes_is_swept_and_of_live_ones_kept(store: Store) -> None:
    store.load_or_build(key(), lambda: FILES)
    import socket

    host = socket.gethostname()
    dead, alive = (store.staging / f"{host}~{pid}~attend~00" for pid in (2**22 + 1, os.getpid()))
    old, new = (store.staging / f"elsewhere~1~attend~{n}" for n in (1, 2))
    for folder in (dead, alive, old, new):
        folder.mkdir()
    os.utime(old, (0, 0))
    store.load_or_build(key(1), lambda: FILES)
    assert sorted(p.name for p in store.staging.iterdir()) == sorted([alive.name, new.name])


def test_a_lock_that_cannot_be_had_is_one_warning(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spcomp.cache import store as life

    class NoLock:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def acquire(self, timeout: float) -> None:
            raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(life, "FileLock", NoLock)
    with pytest.warns(UserWarning, match="no lock for .*; building without it"):
        assert store.load_or_build(key(), lambda: FILES).folder is not None
