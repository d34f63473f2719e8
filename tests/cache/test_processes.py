"""Many processes and one cache; processes that are killed while they write."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from spcomp.cache import Store
from tests.cache.stores import FILES, ROOT, key, names_below, run

RACE = """
    import os, sys, time
    from pathlib import Path
    from spcomp.cache import Key, Store

    cache, count = Path(sys.argv[1]), int(sys.argv[2])
    assert not {"torch", "triton", "numpy"} & set(sys.modules)
    key = Key("attend", "0" * 64, {"target": "cuda:90"})
    begin = time.time() + 0.5

    def build():
        note = os.open(cache / "builds", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(note, b"1")
        time.sleep(0.2)
        return {"attend.cubin": b"binary" * 5000}

    cache.mkdir()
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            time.sleep(max(0.0, begin - time.time()))
            entry = Store(cache).load_or_build(key, build)
            good = entry.folder is not None and entry.files["attend.cubin"] == b"binary" * 5000
            os._exit(0 if good else 1)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(ends.count(0), len((cache / "builds").read_bytes()))
"""


def test_two_hundred_processes_build_one_key_once(tmp_path: Path) -> None:
    good, builds = run(RACE, tmp_path / "cache", 200).split()
    assert (good, builds) == ("200", "1")
    assert names_below(tmp_path / "cache" / "staging") == []


CLEARED = """
    import sys, time
    from pathlib import Path
    from spcomp.cache import Key, Store, upkeep

    store, number = Store(Path(sys.argv[1])), int(sys.argv[2])
    for turn in range(30):
        for n in range(8):
            text = f"# kernel {n} of turn {turn}".encode() * 200
            key = Key("attend", f"{n:064x}", {"turn": str(turn)})
            assert store.load_or_build(key, lambda: {"attend.py": text}).files["attend.py"] == text
        if number == 0 and turn % 5 == 4:
            upkeep.clear(store)
"""


def test_processes_that_build_the_same_keys_while_one_clears_never_fail(tmp_path: Path) -> None:
    """B47."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(CLEARED)]
    running = [
        subprocess.Popen(
            [*command, str(tmp_path), str(n)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(8)
    ]
    for process in running:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    assert names_below(tmp_path / "staging") == []


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from spcomp.cache import Key, Store

    left = int(sys.argv[2])

    def deadly(name):
        real = getattr(os, name)
        def call(*args, **kwargs):
            global left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(os, name, call)

    for name in ("open", "mkdir", "rename", "rmdir", "unlink", "scandir", "fdopen", "utime"):
        deadly(name)
    key = Key("attend", "0" * 64, {"target": "cuda:90", "num_warps": "8"})
    files = {"attend.py": b"one = 1" * 99, "attend.cubin": b"binary" * 5000}
    Store(Path(sys.argv[1])).load_or_build(key, lambda: files)
"""


def test_a_kill_at_any_moment_leaves_nothing_that_loads_wrongly(tmp_path: Path) -> None:
    """One call into the system later each time, until the process lives to its end."""
    files = {"attend.py": b"one = 1" * 99, "attend.cubin": b"binary" * 5000}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for step in range(200):
        cache = tmp_path / str(step)
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(cache), str(step)]
        done = subprocess.run(command, env=env, capture_output=True, timeout=60)
        store = Store(cache)
        found = store.load(key())
        assert found is None or found.files == files
        assert store.load_or_build(key(), lambda: files).files == files
        store.load_or_build(key(1), lambda: FILES)
        assert names_below(store.staging) == [], f"left by a kill at step {step}"
        if done.returncode == 0:
            assert step > 10, "the kills never met the writer"
            return
        assert done.returncode == -9, done.stderr
    pytest.fail("the process never lived to its end")
