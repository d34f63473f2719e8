"""What the tests of the cache share: a key, files, damage, and processes that know no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from spcomp.cache import Key

ROOT = Path(__file__).resolve().parents[2]
FILES: Mapping[str, bytes] = {
    "attend.py": b"one = 1  # a line, and enough of it to be cut\n" * 9,
    "attend.cubin": bytes(range(256)) * 16,
    "attend.json": b'{"shared": 1024}\n',
}


def key(number: int = 0, **fields: str) -> Key:
    """Make a key; another number is another source."""
    return Key("attend", f"{number:064x}", {"target": "cuda:90", "num_warps": "8", **fields})


def names_below(folder: Path) -> list[str]:
    """Name every file and folder below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def run(script: str, *arguments: object, env: Mapping[str, str] | None = None) -> str:
    """Run a script in a fresh process that imports spcomp from this checkout; gives its output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def silent() -> Iterator[None]:
    """Turn a warning into a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
