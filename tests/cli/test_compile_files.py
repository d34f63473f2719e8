"""`spcomp compile`: what it writes, and that it writes all of it or nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from spcomp.backends.base import Export
from spcomp.backends.triton import TritonBackend
from spcomp.cli import main
from spcomp.ir.text import parse_plan
from spcomp.version import VERSION

MADE = Export(
    files={"one.py": b"1\n", "deep/er/two.bin": b"\0\1"},
    manifest={"rung": "compiled", "kernels": [{"source": "one.py"}]},
    columns=("kernel", "bytes"),
    rows=(("one.py", 2),),
)


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args, catch_exceptions=False)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend of sm90 export something small."""
    monkeypatch.setattr(TritonBackend, "export", lambda self, source, program: MADE)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.usefixtures("exported")
def test_what_the_backend_gives_is_written_beside_pattern_plan_and_manifest(tmp_path: Path) -> None:
    result = run("compile", "moba", "-o", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    found = contents(tmp_path)
    assert set(found) == {*MADE.files, "pattern.ir", "plan.txt", "manifest.json"}
    assert {name: found[name] for name in MADE.files} == MADE.files
    manifest = json.loads(found["manifest.json"])
    assert (manifest["spcomp"], manifest["target"], manifest["rung"]) == (
        VERSION,
        "sm90",
        "compiled",
    )
    assert manifest["pattern"] == parse_plan(found["plan.txt"].decode()).pattern
    assert result.stdout.split() == ["kernel", "bytes", "one.py", "2"]


@pytest.mark.usefixtures("exported")
def test_json_is_the_manifest_and_the_folder(tmp_path: Path) -> None:
    shown = json.loads(run("compile", "moba", "-o", str(tmp_path), "--json").stdout)
    assert shown.pop("folder") == str(tmp_path)
    assert shown == json.loads((tmp_path / "manifest.json").read_text())


@pytest.mark.usefixtures("exported")
def test_files_of_yours_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "one.py").write_text("an older export")
    assert run("compile", "moba", "-o", str(tmp_path)).exit_code == 0
    found = contents(tmp_path)
    assert found["notes.txt"] == b"mine"
    assert found["one.py"] == MADE.files["one.py"]


@pytest.mark.usefixtures("exported")
def test_a_full_disk_leaves_no_half_of_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def until_full(self: Path, data: Any) -> int:
        if self.name == "two.bin":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", until_full)
    result = run("compile", "moba", "-o", str(tmp_path))
    assert result.exit_code == 2
    assert f"cannot write to the folder {tmp_path}: No space left on device." in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ on the path")
def test_a_target_may_have_a_project_in_place_of_binaries(tmp_path: Path) -> None:
    options = ("--target", "ascend910b", "--set", "block=64", "--set", "k_blocks=2")
    sizes = ("--dtype", "bf16", "--head-dim", "80", "--phase", "decode")
    result = run("compile", "moba", *options, *sizes, "-o", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    assert "compiling 4 kernels" in result.stderr
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["arch"], manifest["phase"]) == ("dav-2201", "decode")
    assert manifest["rung"] == "matched in the emulator"
    assert [(tmp_path / kernel["source"]).is_file() for kernel in manifest["kernels"]] == [True] * 4
    assert "moba_decode_03_attend_gather" in result.stdout
    (command,) = re.findall(
        "^# Remake    spcomp (.*)$", (tmp_path / "CMakeLists.txt").read_text(), re.M
    )
    again = tmp_path / "again"
    assert run(*command.replace("DIR", str(again)).split()).exit_code == 0
    remade = contents(again)
    assert {name: (tmp_path / name).read_bytes() for name in remade} == remade
