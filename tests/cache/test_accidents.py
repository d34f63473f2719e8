"""What else can happen to a cache folder: other things in an entry's place, other users, races."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from spcomp import settings
from spcomp.cache import Damaged, Key, Store, archive, entry, upkeep
from spcomp.errors import BadSetting
from tests.cache.stores import FILES, ROOT, key, names_below, run, silent


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", variable="SPCOMP_CACHE_DIR")


@pytest.fixture
def folder(store: Store) -> Path:
    """Keep an entry; gives its folder."""
    folder = store.load_or_build(key(), lambda: FILES).folder
    assert folder is not None
    return folder


def never() -> Mapping[str, bytes]:
    raise AssertionError("it was built again")


# ---- other things in an entry's place ------------------------------------------------------------


def _file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def _link_to_nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


def _link_to_a_copy(folder: Path) -> None:
    copy = folder.parents[2] / "copy"
    folder.rename(copy)
    folder.symlink_to(copy)


@pytest.mark.parametrize("replace", [_file, _link_to_nothing, _link_to_a_copy])
def test_what_stands_in_the_place_of_an_entry_is_taken_away(
    store: Store, folder: Path, replace: Callable[[Path], None]
) -> None:
    """B48. A file or a link there would else keep the entry out of the cache for ever."""
    replace(folder)
    with pytest.warns(UserWarning, match="is damaged: it is not a folder") as warned:
        healed = store.load_or_build(key(), lambda: FILES)
    assert len(warned) == 1
    assert healed.folder == folder and folder.is_dir() and not folder.is_symlink()
    assert names_below(store.staging) == []
    with silent():
        assert store.load_or_build(key(), never).files == FILES


@pytest.mark.parametrize("name", ["meta.json", "attend.cubin"])
def test_a_pipe_in_place_of_a_file_does_not_stop_the_reader(
    store: Store, folder: Path, name: str
) -> None:
    script = """
        import sys, warnings
        from pathlib import Path
        from spcomp.cache import Store
        from tests.cache.stores import key
        warnings.simplefilter("ignore")
        print(Store(Path(sys.argv[1])).load(key()))
    """
    (folder / name).unlink()
    os.mkfifo(folder / name)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(store.folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize("name", ["meta.json", "attend.cubin"])
def test_a_file_of_a_terabyte_is_not_read(store: Store, folder: Path, name: str) -> None:
    os.truncate(folder / name, 1 << 40)
    with pytest.warns(UserWarning, match=r"is damaged: .* has 1099511627776 bytes"):
        assert store.load(key()) is None


def _signed(**changes: Any) -> Callable[[dict[str, Any]], bytes]:
    """Make a meta.json whose own sum is right, with members changed or (None) left out."""

    def make(meta: dict[str, Any]) -> bytes:
        whole = {**meta, **changes}
        whole = {name: value for name, value in whole.items() if value is not None}
        whole.pop("meta_sha256")
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
        whole["meta_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        return (json.dumps(whole, indent=1) + "\n").encode()

    return make


METAS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "without a kernel": _signed(kernel=None),
    "without files": _signed(files=None),
    "files are a list": _signed(files=["attend.py"]),
    "a file without a size": _signed(files={name: {} for name in FILES}),
    "a file that is a number": _signed(files=dict.fromkeys(FILES, 3)),
    "fields are a list": _signed(fields=["target"]),
    "fields are nested": _signed(fields={"target": {}}),
    "the kernel is a number": _signed(kernel=7),
    "a file outside": _signed(files={"../../x": {"bytes": 1, "sha256": "0" * 64}}),
    "schema as true": _signed(schema=True),
    "deeply nested": lambda _: b"[" * 200_000,
    "not UTF-8": lambda _: b"\xff\xfe{}",
    "a number too long": lambda _: b'{"schema":' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("how", METAS)
def test_no_meta_json_whatever_it_holds_raises(store: Store, folder: Path, how: str) -> None:
    meta = folder / "meta.json"
    meta.write_bytes(METAS[how](json.loads(meta.read_text())))
    with pytest.warns(UserWarning, match="is damaged"):
        assert store.load_or_build(key(), lambda: FILES).files == FILES


def test_every_changed_byte_of_meta_json_is_noticed(tmp_path: Path) -> None:
    """Also one that JSON does not care about: what is read is what was written."""
    folder = tmp_path / key().digest
    entry.write(folder, key(), FILES)
    meta = folder / "meta.json"
    whole = meta.read_bytes()
    for place in range(len(whole)):
        for value in {whole[place] ^ 1, whole[place] ^ 0x20, 0x0A, 0x20, 0x09, 0x0D} - {
            whole[place]
        }:
            meta.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with pytest.raises(Damaged):
                entry.read(folder, key())


# ---- what others do meanwhile --------------------------------------------------------------------


def _once(
    monkeypatch: pytest.MonkeyPatch, name: str, about: str, act: Callable[[], object]
) -> None:
    """Do something in the middle of other work: before its first call os.<name>(…<about>)."""
    real, done = getattr(os, name), []

    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        if not done and str(path).endswith(about):
            done.append(1)
            act()
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("at", ["meta.json", "attend.cubin"])
def test_an_entry_cleared_and_made_again_while_it_is_read_is_not_called_damaged(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """B47. The reader met the old folder and then the new one; both were right."""
    other = {**FILES, "attend.cubin": b"another run of the compiler"}

    def clear_and_make() -> None:
        folder.rename(store.folder / "aside")
        shutil.rmtree(store.folder / "aside")
        entry.write(folder, key(), other)

    _once(monkeypatch, "open", at, clear_and_make)
    with silent():
        assert store.load(key()) is None
    monkeypatch.undo()
    with silent():
        assert store.load_or_build(key(), never).files == other


def test_the_entry_that_another_process_healed_is_not_taken_away(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two readers met the damage; the second acts when the first has put the right one there."""
    os.truncate(folder / "attend.cubin", 7)

    def heal() -> None:
        shutil.rmtree(folder)
        entry.write(folder, key(), FILES)

    _once(monkeypatch, "rename", folder.name, heal)
    with pytest.warns(UserWarning, match="is damaged"):
        assert store.load(key()) is None
    monkeypatch.undo()
    with silent():
        assert store.load_or_build(key(), never).files == FILES
    assert names_below(store.staging) == []


def test_a_process_without_free_handles_does_not_take_entries_for_damaged(
    store: Store, folder: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 1, before[1]))
    try:
        with silent():
            assert store.load(key()) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(held[0])
    with silent():
        assert store.load_or_build(key(), never).files == FILES


@pytest.mark.parametrize("at", ["meta.json", "attend.cubin"])
def test_what_goes_away_while_it_is_looked_at_is_no_damage(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: str
) -> None:
    """verify, list and export while another process clears the cache."""
    rows = list(upkeep.listed(store))
    looks: list[Callable[[], object]] = [
        lambda: upkeep.problem_of(rows[0]) == "",
        lambda: archive.export_entries([folder], tmp_path / "x.tar") == 0,
        lambda: at != "meta.json" or list(upkeep.listed(store)) == [],
    ]
    for look in looks:
        store.load_or_build(key(), lambda: FILES)
        with monkeypatch.context() as patch:
            _once(patch, "open", at, lambda: upkeep.clear(store))
            assert look()


# ---- what cannot be kept -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_a_rename_that_fails_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    from spcomp.cache import store as life

    monkeypatch.setattr(life, "_WARNED", set())

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "rename", fails)
    with pytest.warns(UserWarning, match=os.strerror(error)) as warned:
        made = store.load_or_build(key(), lambda: FILES)
    monkeypatch.undo()
    assert len(warned) == 1
    assert made.folder is None and made.files == FILES
    assert names_below(store.staging) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full_is_one_warning(small_disk: Path) -> None:
    """B52."""
    store, large = Store(small_disk / "cache"), {"attend.cubin": bytes(1 << 20)}
    store.load_or_build(key(), lambda: FILES)
    with pytest.warns(UserWarning, match="No space left on device") as warned:
        for number in (1, 2):
            made = store.load_or_build(key(number), lambda: large)
            assert made.folder is None and made.files == large
    assert len(warned) == 1
    assert names_below(store.staging) == []
    with silent():
        assert store.load_or_build(key(), never).files == FILES


AS_ANOTHER_USER = """
    import os, sys, warnings
    from pathlib import Path
    from spcomp.cache import Store
    from spcomp.errors import CacheNotWritable
    from tests.cache.stores import FILES, key

    cache = Path(sys.argv[1])
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    store = Store(cache, variable="SPCOMP_CACHE_DIR")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        hit = store.load_or_build(key(0), lambda: 1 / 0)
        assert hit.files == FILES and hit.folder is not None
        assert not warned, [str(w.message) for w in warned]
        healed = store.load_or_build(key(1), lambda: FILES)
        assert healed.folder is None and healed.files == FILES
        assert len(warned) == 1, [str(w.message) for w in warned]
        assert "it is not used" in str(warned[0].message), warned[0].message
    try:
        store.load_or_build(key(2), lambda: 1 / 0)
    except CacheNotWritable as error:
        print(error)
"""


def _let_others_read(cache: Path) -> None:
    """Give every user the right to read a cache, and to come to it."""
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for path in cache.parents:
        if path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o005 != 0o005:
            path.chmod(path.stat().st_mode | 0o055)


def test_a_folder_of_another_user_serves_hits_and_refuses_misses(tmp_path: Path) -> None:
    """B52. A damaged entry there stays, with a warning, and is built in memory."""
    cache = tmp_path / "cache"
    for number in (0, 1):
        Store(cache).load_or_build(key(number), lambda: FILES)
    os.truncate(Store(cache).path_of(key(1)) / "attend.cubin", 7)
    _let_others_read(cache)
    said = run(AS_ANOTHER_USER, cache)
    assert said == (
        f"CacheNotWritable: the cache folder {cache} set by SPCOMP_CACHE_DIR cannot be written "
        "(Permission denied).\n"
        "  help: give a folder you may write, or unset SPCOMP_CACHE_DIR. SPCOMP_CACHE_READ_ONLY=1 "
        "says that nothing is meant to be written there.\n"
    )


HOMELESS = """
    import os, sys, warnings
    from pathlib import Path
    from spcomp.cache import default_store
    from tests.cache.stores import FILES, key

    os.chdir(sys.argv[1])
    if os.getuid() == 0:
        os.setgid(54321)
        os.setuid(54321)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for n in range(2):
            entry = default_store().load_or_build(key(n), lambda: FILES)
            assert entry.folder is not None and entry.folder.is_absolute(), entry.folder
        assert default_store().load_or_build(key(0), lambda: 1 / 0).files == FILES
    print(len(warned), default_store().folder.stat().st_mode & 0o777 == 0o700)
    assert os.listdir(".") == [], os.listdir(".")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only a superuser can become a user without a name")
def test_a_user_without_name_and_home_has_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B52. Never a folder called ~ where the process happens to stand."""
    for name in ("SPCOMP_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    here = Path("/tmp") / f"spcomp-homeless-{os.getpid()}"
    here.mkdir()
    here.chmod(0o777)
    try:
        assert run(HOMELESS, here, env={"TMPDIR": "/tmp"}) == "1 True\n"
    finally:
        shutil.rmtree(here)


READ_ONLY = """
    import os, warnings
    from spcomp.cache import default_store
    from tests.cache.stores import FILES, key
    warnings.simplefilter("error")
    entry = default_store().load_or_build(key(), lambda: FILES)
    assert entry.folder is None and entry.files == FILES
"""


@pytest.mark.parametrize("home", ["writable", "missing"])
def test_read_only_makes_no_folder_and_says_nothing(tmp_path: Path, home: str) -> None:
    there = tmp_path / "home"
    if home == "writable":
        there.mkdir()
    else:
        there = Path("/proc/no-such-home")
    env = {"HOME": str(there), "SPCOMP_CACHE_READ_ONLY": "1", "TMPDIR": str(tmp_path)}
    env |= {"XDG_CACHE_HOME": "", "SPCOMP_CACHE_DIR": ""}
    before = names_below(tmp_path)
    run(READ_ONLY, env=env)
    assert names_below(tmp_path) == before


def test_a_folder_that_names_no_user_is_an_error_of_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    monkeypatch.setenv("SPCOMP_CACHE_DIR", "~no-such-user/cache")
    with pytest.raises(BadSetting) as caught:
        settings.current()
    assert str(caught.value) == (
        "BadSetting: SPCOMP_CACHE_DIR is '~no-such-user/cache', which is not the path of a "
        "folder.\n  help: set it to the path of a folder, or unset it."
    )


# ---- staging -------------------------------------------------------------------------------------


def test_an_old_leftover_goes_although_its_number_is_a_running_process_again(store: Store) -> None:
    """In a container the same few process numbers are always taken."""
    store.load_or_build(key(), lambda: FILES)
    old = store._staged("attend")
    old.mkdir()
    os.utime(old, (0, 0))
    assert f"~{os.getpid()}~" in old.name
    store.load_or_build(key(1), lambda: FILES)
    assert names_below(store.staging) == []


@pytest.mark.parametrize("kind", ["file", "link"])
def test_leftovers_that_are_no_folders_go_too(store: Store, tmp_path: Path, kind: str) -> None:
    store.load_or_build(key(), lambda: FILES)
    stale = store.staging / f"{socket.gethostname()}~{2**22 + 1}~attend~00"
    if kind == "file":
        stale.write_text("")
    else:
        (tmp_path / "precious").mkdir()
        stale.symlink_to(tmp_path / "precious")
    os.utime(stale, (0, 0), follow_symlinks=False)
    upkeep.prune(store, most_age_s=1e9)
    assert names_below(store.staging) == []
    assert kind == "file" or (tmp_path / "precious").is_dir()


def test_prune_keeps_the_entry_used_last(store: Store) -> None:
    for n in range(3):
        store.load_or_build(key(n), lambda: FILES)
    now = time.time()
    for n, age in ((0, 10), (1, 3000), (2, 20)):
        os.utime(store.path_of(key(n)) / "meta.json", (now - age, now - age))
    size = next(upkeep.listed(store)).bytes
    gone = upkeep.prune(store, most_bytes=size)
    assert {item.digest for item in gone} == {key(1).digest, key(2).digest}
    assert store.load_or_build(key(0), never).files == FILES


def test_keys_do_not_change_with_the_mapping_they_were_made_from() -> None:
    fields = {"target": "cuda:90"}
    made = Key("attend", "0" * 64, fields)
    before = made.digest
    fields["target"] = "cuda:80"
    assert made.digest == before


def test_commands_that_remove_say_so_when_they_cannot(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    Store(cache).load_or_build(key(), lambda: FILES)
    _let_others_read(cache)
    script = """
        import os, sys
        from click.testing import CliRunner
        from spcomp.cli import main
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        for args in (["clear", "--yes"], ["prune", "--max-size", "0B"]):
            done = CliRunner().invoke(main, ["cache", *args])
            print(done.exit_code, done.stderr.splitlines()[0], done.stdout)
        print(CliRunner().invoke(main, ["cache", "info"]).stdout)
    """
    said = run(script, env={"SPCOMP_CACHE_DIR": str(cache)})
    assert said.count("1 CacheNotWritable: the cache folder") == 2
    assert "removed" not in said
    assert "writes           no (Permission denied)\n" in said
    assert Store(cache).load(key()) is not None
