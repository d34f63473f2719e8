"""Everything the README and the docs show is run, and output they show is what came out."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from spcomp import settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CONSOLE = [
    pytest.param(command, shown, id=f"{page.name}: {command}")
    for page in PAGES
    for language, text in BLOCK.findall(page.read_text())
    if language == "console"
    for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_of_a_page_runs_in_order(page: Path, tmp_path: Path) -> None:
    """The blocks of a page share one namespace, as a reader's session does."""
    code = [text for language, text in BLOCK.findall(page.read_text()) if language == "python"]
    if not code:
        pytest.skip(f"{page.name} shows no Python")
    script = tmp_path / "page.py"
    script.write_text("\n".join(code))
    done = _run([sys.executable, str(script)], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("command", "shown"), CONSOLE)
def test_a_command_of_a_page_prints_what_is_shown(command: str, shown: str, tmp_path: Path) -> None:
    """A line of `...` in the shown output stands for any lines."""
    program, *arguments = shlex.split(command)
    assert program in ("spcomp", "python"), f"only spcomp and python are shown, not {program}"
    called = [sys.executable, *(["-m", "spcomp"] if program == "spcomp" else []), *arguments]
    done = _run(called, ROOT)
    printed = [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]
    parts = [re.escape(line.rstrip()) for line in shown.splitlines()]
    pattern = "\n".join(".*?" if part == r"\.\.\." else part for part in parts)
    assert re.fullmatch(pattern, "\n".join(printed), re.DOTALL), "\n".join(printed)


@pytest.mark.parametrize("script", ["custom_pattern.py"])
def test_an_example_runs(script: str, tmp_path: Path) -> None:
    done = _run([sys.executable, str(ROOT / "examples" / script)], tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_page_of_settings_lists_every_variable_as_the_code_has_it() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", (ROOT / "docs/settings.md").read_text(), re.MULTILINE
    )
    plain = {
        name: (default.strip("`"), meaning.replace("`", "")) for name, default, meaning in rows
    }
    assert plain == settings.VARIABLES


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "NO_COLOR": "1",
        "COLUMNS": "110",
        "TRITON_INTERPRET": "0",
        "CUDA_VISIBLE_DEVICES": "",  # what is shown was printed without a card
    }
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
