"""Projects as the backend exports them, written to disk, and the compilers they are built with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

from spcomp import compiler
from spcomp.backends.ascendc import BACKEND
from spcomp.backends.ascendc.project import EMITTED, project_of
from spcomp.backends.ascendc.targets import TARGETS
from spcomp.backends.base import Export, Source, Specialisation
from spcomp.dsl.pattern import Pattern
from spcomp.ir.plan import Phase
from spcomp.patterns import block_topk, moba

TARGET = TARGETS["ascend910b"]
PATTERNS: dict[str, tuple[Pattern, Specialisation]] = {
    "block_topk": (block_topk(block=64, budget=0.5), Specialisation("float16", 64, 64)),
    "moba": (moba(block=64, k_blocks=2), Specialisation("bfloat16", 80, 80)),
}
WARNINGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-DSPCOMP_EMULATED")

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ on the path")
needs_cmake = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("g++") is None,
    reason="a project is built with cmake and g++, and one of them is not on the path",
)


@lru_cache(maxsize=8)
def source_of(name: str, phase: Phase) -> Source:
    pattern, spec = PATTERNS[name]
    plan = compiler.lower(pattern, backend=BACKEND, target=TARGET, spec=spec, phase=phase)
    return compiler.emit(plan, BACKEND, TARGET, spec)


@lru_cache(maxsize=8)
def unproven(name: str, phase: Phase) -> Export:
    """Give the project without the run in the emulator, which takes its time."""
    return project_of(source_of(name, phase), PATTERNS[name][0].program, lambda *_: EMITTED)


def written(name: str, phase: Phase, folder: Path) -> Path:
    """Write a project as `spcomp compile` does, as far as its own programs read it."""
    made = unproven(name, phase)
    manifest = {"dtype": PATTERNS[name][1].dtype, **made.manifest}
    files = {**made.files, "manifest.json": json.dumps(manifest).encode()}
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def run(*command: str | Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    words, env = [str(word) for word in command], {**os.environ, **variables}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=280)


def accepts(*command: str | Path, folder: Path, **variables: str) -> str:
    done = run(*command, folder=folder, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
