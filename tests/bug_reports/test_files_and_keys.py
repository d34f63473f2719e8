"""Source files on disk, and what makes two kernels two."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spcomp as sp
from spcomp.cache import store_source
from spcomp.errors import CacheNotWritable
from tests import oracle
from tests.bug_reports.make import DEVICE, assert_attends, compiled, qkv

WRITERS = """
    import sys, time
    from pathlib import Path
    from spcomp.cache import store_source

    ready = Path(sys.argv[1])
    (ready / sys.argv[2]).touch()
    while len(list(ready.iterdir())) < 3:
        time.sleep(0.001)
    for turn in range(30):
        for n in range(8):
            text = f"# kernel {n} of turn {turn}, two thirds of a page\\n" + "x = 1  # …\\n" * 200
            assert store_source("attend", text).read_text(encoding="utf-8") == text
"""


def test_processes_that_write_the_same_files_never_meet_half_of_one(tmp_path: Path) -> None:
    """B47. Three processes, 240 files, one folder."""
    ready, cache = tmp_path / "ready", tmp_path / "cache"
    ready.mkdir()
    env = {**os.environ, "SPCOMP_CACHE_DIR": str(cache)}
    env["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(WRITERS), str(ready)]
    running = [
        subprocess.Popen([*command, str(n)], env=env, stderr=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    files = [p for p in cache.rglob("*") if p.is_file()]
    assert len(files) == 240
    assert {p.name for p in files} == {"attend.py"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set an own cache folder."""
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda _: b"",
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "random bytes": lambda whole: bytes(range(256)) * (len(whole) // 256 + 1),
    "other text": lambda whole: whole.replace(b"1", b"2"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_written_again_with_one_warning(cache: Path, how: str) -> None:
    """B48."""
    text = "one = 1  # a line, and enough of it to be cut\n" * 9
    path = store_source("attend", text)
    path.write_bytes(DAMAGE[how](text.encode()))
    with pytest.warns(UserWarning, match="was altered; it is written again") as warned:
        assert store_source("attend", text) == path
    assert len(warned) == 1
    assert path.read_text(encoding="utf-8") == text
    assert [p for p in path.parent.iterdir() if p != path] == []


def test_a_file_or_folder_that_was_removed_is_made_again(cache: Path) -> None:
    """B48."""
    path = store_source("attend", "one = 1\n")
    path.unlink()
    assert store_source("attend", "one = 1\n").read_text() == "one = 1\n"
    path.unlink()
    path.parent.rmdir()
    assert store_source("attend", "one = 1\n").read_text() == "one = 1\n"


# ---- keys ----------------------------------------------------------------------------------------

REACH = 5


def _helper(distance: Any) -> Any:
    return distance < 3


def _texts(pattern: sp.Pattern) -> tuple[str, ...]:
    tensors = (x.to(DEVICE) for x in qkv(1, 1, 1, 32, 32, 16))
    return tuple(f.text for f in compiled(pattern).built(*tensors).source.files)


def _near(rule: Callable[..., Any]) -> sp.Pattern:
    @sp.pattern
    def near(q, k, v):
        return sp.attend(q, k, v, mask=sp.mask_mod(rule))

    return near()


def _by_closure(reach: int) -> sp.Pattern:
    return _near(lambda b, h, q_idx, kv_idx: (q_idx - kv_idx < reach) & (kv_idx <= q_idx))


def _by_global() -> sp.Pattern:
    return _near(lambda b, h, q_idx, kv_idx: (q_idx - kv_idx < REACH) & (kv_idx <= q_idx))


def _by_helper() -> sp.Pattern:
    return _near(lambda b, h, q_idx, kv_idx: _helper(q_idx - kv_idx) & (kv_idx <= q_idx))


def _assert_window(pattern: sp.Pattern, size: int) -> None:
    tensors = qkv(1, 1, 1, 32, 32, 16)
    assert_attends(compiled(pattern), *tensors, oracle.window_mask(32, 32, size))


def test_captured_values_globals_and_helpers_are_part_of_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """B50. Changed in turn, in one process: another text each time, and the right result."""
    module = sys.modules[__name__]
    made = {5: _by_closure(5), 9: _by_closure(9)}
    assert _texts(made[5]) != _texts(made[9])
    for size, pattern in made.items():
        _assert_window(pattern, size)
    before = _by_global()
    monkeypatch.setattr(module, "REACH", 8)
    assert _texts(_by_global()) != _texts(before)
    _assert_window(_by_global(), 8)
    _assert_window(before, 5)
    before = _by_helper()
    monkeypatch.setattr(module, "_helper", lambda distance: distance < 11)
    assert _texts(_by_helper()) != _texts(before)
    _assert_window(_by_helper(), 11)


def test_two_rules_on_one_line_are_two_kernels() -> None:
    """B50."""
    rules = [lambda b, h, i, j: (i - j < 4) & (j <= i), lambda b, h, i, j: (i - j < 6) & (j <= i)]
    assert len({_texts(_near(rule)) for rule in rules}) == 2
    for rule, size in zip(rules, (4, 6), strict=True):
        _assert_window(_near(rule), size)


def test_equal_rules_are_one_kernel() -> None:
    """B50. The key is the text, so what is the same is made once."""
    assert _texts(_by_closure(5)) == _texts(_by_global())


@pytest.mark.parametrize("form", ["table", "block mask", "indices"])
def test_a_captured_tensor_that_changes_is_read_anew(form: str) -> None:
    """B50. A tensor is an input of the kernels: what stands in it at the call counts."""
    marks = torch.tensor([True, True, False]).to(DEVICE)
    wide = marks[None, None, None].expand(1, 1, 3, 3).contiguous()
    listed = torch.tensor([0, 1, -1], dtype=torch.int32).to(DEVICE).expand(1, 1, 3, 3).contiguous()
    table = marks.repeat_interleave(16)

    @sp.pattern
    def chosen(q, k, v):
        kept = {
            "table": lambda: sp.mask_mod(lambda b, h, i, j: table[j]),
            "block mask": lambda: sp.block_mask(wide, block=16),
            "indices": lambda: sp.block_indices(listed, block=16),
        }[form]()
        return sp.attend(q, sp.gather(k, kept), sp.gather(v, kept), mask=None)

    tensors = qkv(1, 1, 1, 48, 48, 16)
    attention = sp.compile(chosen, backend="triton")
    assert_attends(attention, *tensors, (torch.arange(48) < 32).expand(48, 48))
    table.fill_(False)[16:].fill_(True)
    wide.fill_(False)[..., 1:].fill_(True)
    listed.copy_(torch.tensor([1, 2, -1]))
    assert_attends(attention, *tensors, (torch.arange(48) >= 16).expand(48, 48))


# ---- folders -------------------------------------------------------------------------------------


def test_the_folder_is_private(cache: Path) -> None:
    """B52."""
    store_source("attend", "one = 1\n")
    assert stat.S_IMODE(cache.stat().st_mode) & 0o077 == 0


def test_a_folder_the_user_set_that_is_not_writable_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B52. A file stands in its place, which stops a superuser too."""
    taken = tmp_path / "taken"
    taken.write_text("")
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(taken / "cache"))
    with pytest.raises(CacheNotWritable) as caught:
        store_source("attend", "one = 1\n")
    assert str(caught.value) == (
        f"CacheNotWritable: the cache folder {taken / 'cache'} set by SPCOMP_CACHE_DIR cannot be "
        "written (Not a directory).\n"
        "  help: give a folder you may write, or unset SPCOMP_CACHE_DIR."
    )


@pytest.mark.skipif(os.getuid() == 0, reason="a superuser may write anywhere")
def test_a_read_only_folder_the_user_set_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B52."""
    tmp_path.chmod(0o500)
    for folder in (tmp_path, tmp_path / "below"):
        monkeypatch.setenv("SPCOMP_CACHE_DIR", str(folder))
        with pytest.raises(CacheNotWritable, match=r"(?i)permission denied"):
            store_source("attend", "one = 1\n")
    tmp_path.chmod(0o700)


HOMELESS = """
    import os, warnings
    from pathlib import Path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from spcomp.cache import store_source
        paths = [store_source("attend", f"one = {n}\\n") for n in range(2)]
    mine = [str(w.message) for w in caught if "spcomp" in str(w.message)]
    assert len(mine) == int(os.environ["WARNINGS"]), mine
    assert [p.read_text() for p in paths] == ["one = 0\\n", "one = 1\\n"]
    assert len({p.parents[2] for p in paths}) == 1
    print(paths[0])
"""


@pytest.mark.parametrize(
    ("home", "warnings"), [(None, 0), ("/proc/no-such-home", 1)], ids=["unset", "not writable"]
)
def test_without_a_usable_home_a_private_folder_serves(
    home: str | None, warnings: int, tmp_path: Path
) -> None:
    """B52. One warning, not one a kernel."""
    pytest.importorskip("platformdirs")
    drop = ("SPCOMP_CACHE_DIR", "XDG_CACHE_HOME", "HOME")
    env = {k: v for k, v in os.environ.items() if k not in drop}
    env["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    env |= {"TMPDIR": str(tmp_path), "WARNINGS": str(warnings)}
    if home is None:
        env["XDG_CACHE_HOME"] = str(tmp_path / "xdg")
    else:
        env["HOME"] = home
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HOMELESS)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
