"""`spcomp cache` and what it does: look, verify, prune, clear, export, import."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spcomp.cache import Store, upkeep
from spcomp.cache.built import built_file
from spcomp.cli import main
from tests.cache.stores import FILES, key, names_below


def run(*arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(main, ["cache", *arguments], input=answer)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Make a cache of three entries, the first used last."""
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path / "cache"))
    made = Store(tmp_path / "cache")
    for number in range(3):
        folder = made.load_or_build(key(number, triton="3.7.1"), lambda: FILES).folder
        assert folder is not None
        used = time.time() - 86400 * number
        os.utime(folder / "meta.json", (used, used))
    return made


def digests(store: Store) -> set[str]:
    return {row.digest for row in upkeep.listed(store)}


def wanted(*numbers: int) -> set[str]:
    return {key(n, triton="3.7.1").digest for n in numbers}


def damage(store: Store, number: int) -> Path:
    folder = store.path_of(key(number, triton="3.7.1"))
    (folder / "attend.cubin").write_bytes(b"1")
    return folder


def test_info_counts_what_is_there(store: Store) -> None:
    (store.folder / "tuning").mkdir()
    (store.folder / "tuning" / "moba.jsonl").write_text("{}\n")
    told = json.loads(run("info", "--json").stdout)
    assert told["folder"] == str(store.folder) and told["set_by"] == "SPCOMP_CACHE_DIR"
    assert (told["entries"], told["tuning_records"], told["left_in_staging"]) == (3, 1, 0)
    on_disk = sum(p.stat().st_size for p in store.kernels.rglob("*") if p.is_file())
    assert told["entry_bytes"] == on_disk
    assert "entries          3\n" in run("info").stdout


def test_info_of_a_folder_that_is_not_there_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path / "none"))
    assert json.loads(run("info", "--json").stdout)["entries"] == 0
    assert run("list").exit_code == run("verify").exit_code == 0
    assert not (tmp_path / "none").exists()


def test_list_names_every_entry_and_a_damaged_one_as_such(store: Store) -> None:
    (damage(store, 1) / "meta.json").write_text("{")
    rows = {row["digest"]: row for row in json.loads(run("list", "--json").stdout)}
    assert set(rows) == wanted(0, 1, 2)
    good, bad = rows[next(iter(wanted(0)))], rows[next(iter(wanted(1)))]
    assert good["fields"]["target"] == "cuda:90" and good["problem"] == ""
    assert bad["problem"] == "meta.json is no whole JSON object of this program"
    table = run("list").stdout.splitlines()
    assert len(table) == 4 and sum("damaged" in line for line in table) == 1
    assert sum("1d ago" in line or "2d ago" in line for line in table) == 1


def test_verify_names_what_is_damaged_and_exits_with_1(store: Store) -> None:
    assert run("verify").stdout == "3 entries, 0 damaged\n"
    folder = damage(store, 2)
    result = run("verify")
    assert result.exit_code == 1
    assert result.stdout == (
        f"{folder} is damaged: attend.cubin has 1 bytes, where 4096 were written\n"
        "3 entries, 1 damaged\n"
    )
    assert json.loads(run("verify", "--json").stdout)["damaged"] == {
        str(folder): "attend.cubin has 1 bytes, where 4096 were written"
    }
    assert folder.exists(), "verifying changes nothing"


def test_prune_removes_what_was_used_least_recently(store: Store) -> None:
    one = next(upkeep.listed(store)).bytes
    assert run("prune", "--max-size", f"{2 * one}B").stdout.startswith("removed 1 entries")
    assert digests(store) == wanted(0, 1)
    assert run("prune", "--older-than", "12h").exit_code == 0
    assert digests(store) == wanted(0)
    assert run("prune", "--max-size", "1GiB", "--older-than", "1d").exit_code == 0
    assert digests(store) == wanted(0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "give --max-size, --older-than, or both."),
        (("--max-size", "lots"), "'lots' is not of the form 2GiB."),
        (("--older-than", "5y"), "'5y' is not of the form 30d."),
    ],
)
def test_prune_refuses_what_it_cannot_read(
    store: Store, arguments: tuple[str, ...], text: str
) -> None:
    result = run("prune", *arguments)
    assert result.exit_code == 2 and result.stderr.rstrip().endswith(text)
    assert len(digests(store)) == 3


def test_clear_asks_and_then_removes_everything(store: Store) -> None:
    (store.folder / "tuning").mkdir()
    (store.folder / "tuning" / "moba.jsonl").write_text("{}\n")
    assert run("clear", answer="n\n").exit_code == 1
    assert len(digests(store)) == 3
    assert run("clear", "--yes").stdout == (
        "removed 3 entries, 0 built files and 1 tuning records\n"
    )
    assert [p for p in names_below(store.folder) if p.endswith((".json", ".jsonl"))] == []


def test_read_only_forbids_what_would_write(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run("export", str(tmp_path / "x.tar")).exit_code == 0
    monkeypatch.setenv("SPCOMP_CACHE_READ_ONLY", "1")
    for command in (
        ("clear", "--yes"),
        ("prune", "--max-size", "0B"),
        ("import", str(tmp_path / "x.tar")),
    ):
        result = run(*command)
        assert result.exit_code == 1
        assert "(SPCOMP_CACHE_READ_ONLY=1 forbids it)" in result.stderr
    assert len(digests(store)) == 3


def test_entries_travel_to_another_machine(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "1.tar", tmp_path / "2.tar"
    assert run("export", str(first)).stdout == f"wrote 3 entries to {first}\n"
    run("export", str(second))
    assert first.read_bytes() == second.read_bytes(), "the same entries are the same file"
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path / "other"))
    assert run("import", str(first)).stdout == "3 taken, 0 there already, 0 refused\n"
    assert run("import", str(first)).stdout == "0 taken, 3 there already, 0 refused\n"
    there = Store(tmp_path / "other")
    assert digests(there) == wanted(0, 1, 2)
    found = there.load(key(0, triton="3.7.1"))
    assert found is not None and found.files == FILES
    assert names_below(there.staging) == []
    modes = {p.stat().st_mode & 0o777 for p in there.kernels.rglob("*") if p.is_file()}
    assert modes == {0o600}


def test_export_takes_the_beginning_of_a_digest(store: Store, tmp_path: Path) -> None:
    digest = next(iter(wanted(1)))
    assert "wrote 1 entries" in run("export", str(tmp_path / "x.tar"), digest[:10]).stdout
    result = run("export", str(tmp_path / "y.tar"), "zz")
    assert result.exit_code == 2
    assert result.stderr == (
        "NoSuchEntry: no cache entry begins with 'zz'.\n"
        "  help: `spcomp cache list` shows those there are.\n"
    )


def test_a_damaged_entry_is_not_exported(store: Store, tmp_path: Path) -> None:
    folder = damage(store, 1)
    result = run("export", str(tmp_path / "x.tar"))
    assert result.exit_code == 1
    assert f"EntryDamaged: the cache entry {folder}: attend.cubin has 1 bytes" in result.stderr
    assert not (tmp_path / "x.tar").exists()


def _archive(path: Path, *members: tuple[str, bytes, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data, kind in members:
            member = tarfile.TarInfo(name)
            member.size, member.type = len(data), kind
            member.linkname = "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            file.addfile(member, io.BytesIO(data))
    return path


DIGEST = "a" * 32
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a path upwards": (
        lambda p: _archive(p, (f"{DIGEST}/../../x", b"1", tarfile.REGTYPE)),
        f"'{DIGEST}/../../x' is no file of an entry",
    ),
    "an absolute path": (
        lambda p: _archive(p, ("/tmp/x", b"1", tarfile.REGTYPE)), "'/tmp/x' is no file of an entry"
    ),
    "a link": (
        lambda p: _archive(p, (f"{DIGEST}/meta.json", b"", tarfile.SYMTYPE)),
        f"'{DIGEST}/meta.json' is no regular file",
    ),
    "two dots": (
        lambda p: _archive(p, (f"{DIGEST}/..", b"1", tarfile.REGTYPE)),
        f"'{DIGEST}/..' is no file of an entry",
    ),
    "nothing": (lambda p: _archive(p), "it holds no entry"),
    "no tar file": (lambda p: p.write_bytes(b"no" * 999), "it cannot be read (its end is missing)"),
}  # fmt: skip


@pytest.mark.parametrize("how", HOSTILE)
def test_an_archive_that_is_none_is_refused_before_anything_is_placed(
    store: Store, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "x.tar"
    make, problem = HOSTILE[how]
    make(path)
    result = run("import", str(path))
    assert result.exit_code == 1
    assert result.stderr == (
        f"NotAnArchive: {path} is not an archive of cache entries: {problem}.\n"
        "  help: write one with `spcomp cache export FILE.tar`. Nothing of it was taken.\n"
    )
    assert len(digests(store)) == 3


def test_a_cut_archive_is_refused(store: Store, tmp_path: Path) -> None:
    run("export", str(tmp_path / "x.tar"))
    whole = (tmp_path / "x.tar").read_bytes()
    upkeep.clear(store)
    for size in (0, 1000, 2 * 4096, tarfile.RECORDSIZE, len(whole) - 1):
        (tmp_path / "x.tar").write_bytes(whole[:size])
        result = run("import", str(tmp_path / "x.tar"))
        assert result.exit_code == 1 and "NotAnArchive" in result.stderr, size
    assert digests(store) == set()


def test_a_tampered_entry_of_an_archive_is_refused_and_the_others_taken(
    store: Store, tmp_path: Path
) -> None:
    run("export", str(tmp_path / "x.tar"))
    with tarfile.open(tmp_path / "x.tar") as file:
        members = [(m.name, file.extractfile(m).read(), m.type) for m in file]  # type: ignore[union-attr]
    bad, renamed = sorted(wanted(0, 1))
    changed = []
    for name, data, kind in members:
        if name == f"{bad}/attend.cubin":
            data = bytes(len(data))
        changed.append((name.replace(renamed, DIGEST), data, kind))
    _archive(tmp_path / "y.tar", *changed)
    upkeep.clear(store)
    result = run("import", str(tmp_path / "y.tar"))
    assert result.exit_code == 1
    assert set(result.stdout.splitlines()) == {
        f"refused {bad}: attend.cubin does not have the content that was written",
        f"refused {DIGEST}: it was made from other things than its name says ({renamed})",
        "1 taken, 0 there already, 2 refused",
    }
    assert digests(store) == wanted(2)
    assert names_below(store.staging) == []


# ---- built files ---------------------------------------------------------------------------------


def build(number: int, size: int = 1000) -> Path:
    def make(path: Path) -> None:
        path.write_bytes(b"x" * size)

    return built_file("a-kind", f"{number}.so", make)


def test_built_files_are_counted_and_no_entries(store: Store) -> None:
    build(0), build(1)
    told = json.loads(run("info", "--json").stdout)
    assert (told["entries"], told["built_files"], told["built_bytes"]) == (3, 2, 2000)
    assert digests(store) == wanted(0, 1, 2)
    assert run("verify").stdout == "3 entries, 0 damaged\n"


def test_a_built_file_is_made_once_and_appears_whole(store: Store) -> None:
    file = build(0)
    assert file == store.folder / "built" / "a-kind" / "0.so"
    assert built_file("a-kind", "0.so", lambda path: pytest.fail("made twice")) == file

    def fail(path: Path) -> None:
        path.write_bytes(b"half of it")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        built_file("a-kind", "1.so", fail)
    assert names_below(store.folder / "built") == ["a-kind", "a-kind/0.so"]
    assert names_below(store.staging) == []


def test_prune_goes_by_the_last_use_of_entries_and_built_files_alike(store: Store) -> None:
    old, new = build(0), build(1)
    entry_bytes = next(upkeep.listed(store)).bytes
    for file, days in ((old, 1.5), (new, 0.5)):  # entries are 0, 1 and 2 days old
        os.utime(file, (time.time() - 86400 * days,) * 2)
    said = run("prune", "--max-size", f"{entry_bytes + 1000}B").stdout
    assert said.startswith("removed 2 entries and 1 built files, ")
    assert digests(store) == wanted(0) and new.exists() and not old.exists()
    run("prune", "--older-than", "6h")
    assert not new.exists() and digests(store) == wanted(0)


def test_a_use_is_noted(store: Store) -> None:
    file = build(0)
    os.utime(file, (0, 0))
    run("prune", "--max-size", "1GiB")
    build(0)
    run("prune", "--older-than", "1h")
    assert file.exists()


def test_what_may_not_be_kept_is_built_elsewhere(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = build(0)
    monkeypatch.setenv("SPCOMP_CACHE_READ_ONLY", "1")
    os.utime(kept, (0, 0))
    assert build(0) == kept and kept.stat().st_mtime == 0
    other = build(1)
    assert not other.is_relative_to(store.folder) and other.read_bytes() == b"x" * 1000
    assert names_below(store.folder / "built") == ["a-kind", "a-kind/0.so"]


def test_clear_removes_built_files_too(store: Store) -> None:
    file = build(0)
    assert run("clear", "--yes").stdout == (
        "removed 3 entries, 1 built files and 0 tuning records\n"
    )
    assert not file.exists()
