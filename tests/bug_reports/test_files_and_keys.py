"""Source files on disk, and what makes two kernels two."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spcomp as sp
from tests import oracle
from tests.bug_reports.make import DEVICE, assert_attends, compiled, qkv

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


def test_a_read_only_folder_the_user_set_is_an_error(tmp_path: Path) -> None:
    """B52. In a process without rights, since a superuser may write anywhere."""
    if os.getuid() != 0:
        pytest.skip("only a superuser may become another user")
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o755)
    for parent in folder.parents:
        if parent.owner() == folder.owner() and str(parent).startswith(tempfile.gettempdir()):
            parent.chmod(parent.stat().st_mode | 0o055)
    said = _in_process(POWERLESS, {"SPCOMP_CACHE_DIR": str(folder)})
    assert said.splitlines()[0] == (
        f"CacheNotWritable: the cache folder {folder} set by SPCOMP_CACHE_DIR cannot be written "
        "(Permission denied)."
    )


POWERLESS = """
    import os
    import spcomp.settings, filelock
    from spcomp.cache import Key, default_store
    from spcomp.errors import CacheNotWritable
    os.setgid(65534), os.setuid(65534)
    try:
        default_store().load_or_build(Key("attend", "0" * 64, {}), lambda: {"attend.py": b"1"})
    except CacheNotWritable as error:
        print(error)
"""

HOMELESS = """
    import os, warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from spcomp.cache import Key, default_store
        entries = [
            default_store().load_or_build(Key("attend", "0" * 64, {"n": n}), lambda: {"a.py": b"1"})
            for n in ("1", "2")
        ]
    mine = [str(w.message) for w in caught if "spcomp" in str(w.message)]
    assert len(mine) == int(os.environ["WARNINGS"]), mine
    assert [e.files for e in entries] == [{"a.py": b"1"}] * 2
    assert len({e.folder.parents[2] for e in entries}) == 1
    assert os.stat(entries[0].folder.parents[2]).st_mode & 0o077 == 0
    print(entries[0].folder)
"""


@pytest.mark.parametrize(
    ("home", "warnings"), [(None, 0), ("/proc/no-such-home", 1)], ids=["unset", "not writable"]
)
def test_without_a_usable_home_a_private_folder_serves(
    home: str | None, warnings: int, tmp_path: Path
) -> None:
    """B52. One warning, not one a kernel."""
    pytest.importorskip("platformdirs")
    change = {"TMPDIR": str(tmp_path), "WARNINGS": str(warnings)}
    change |= {"XDG_CACHE_HOME": str(tmp_path / "xdg")} if home is None else {"HOME": home}
    drop = ("SPCOMP_CACHE_DIR", "XDG_CACHE_HOME", "HOME")
    assert _in_process(HOMELESS, change, drop).startswith(str(tmp_path))


def _in_process(script: str, change: dict[str, str], drop: tuple[str, ...] = ()) -> str:
    env = {k: v for k, v in os.environ.items() if k not in drop}
    env["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**env, **change},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
