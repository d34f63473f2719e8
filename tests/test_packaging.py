"""The sdist and the wheel built from it hold the whole package, as plain files."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = (ROOT / "pyproject.toml").is_file() and (ROOT / "spcomp" / "ir").is_symlink()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="builds from a checkout with its links"),
]


def _python(code: str, folder: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _build(kind: str, source: Path, into: Path) -> Path:
    into.mkdir()
    hook = f"from setuptools import build_meta as b; b.build_{kind}({str(into)!r})"
    _python(hook, source)
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy, so that no build product lands in the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "tests")
    shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=left_out)
    return _build("sdist", folder / "copy", folder / "built")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked")
    (source,) = (folder / "unpacked").iterdir()
    return _build("wheel", source, folder / "built")


def _sources() -> set[str]:
    """List the files of the checkout that must travel, by their name inside the package."""
    found = set()
    for where, folders, files in os.walk(ROOT / "spcomp", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        inside = Path(where).relative_to(ROOT)
        found |= {
            str(inside / f)
            for f in files
            if f.endswith((".py", ".jinja", ".json", ".h")) or f == "py.typed"
        }
    return found


def test_sdist_holds_plain_files_where_the_checkout_has_links(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {member.name.split("/", 1)[-1] for member in members}
    assert [member.name for member in members if member.issym() or member.islnk()] == []
    assert _sources() <= names
    assert {"LICENSE", "pyproject.toml"} <= names


def test_wheel_holds_every_module_and_template_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert {name for name in names if ".dist-info/" not in name} == _sources()
    assert "spcomp/ir/__init__.py" in names
    assert any(name.startswith("spcomp/templates/triton/") for name in names)


def test_wheel_names_its_licence_and_its_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = {n.split("/", 1)[1]: n for n in archive.namelist() if ".dist-info/" in n}
        metadata = archive.read(info["METADATA"]).decode()
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(info["entry_points.txt"]).decode())
    assert "licenses/LICENSE" in info
    assert "License-Expression: Apache-2.0" in metadata.splitlines()
    assert scripts["console_scripts"]["spcomp"] == "spcomp.cli:main"


def test_unpacked_wheel_imports_with_its_templates_from_any_folder(
    wheel: Path, tmp_path: Path
) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import spcomp, spcomp.ir, importlib.resources as r\n"
        "folder = r.files('spcomp') / 'templates' / 'triton' / 'kernels'\n"
        "print(spcomp.__file__, spcomp.ir.__file__, *sorted(f.name for f in folder.iterdir()))"
    )
    package, ir, *kernels = _python(code, elsewhere, PYTHONPATH=str(site)).split()
    assert Path(package).is_relative_to(site)
    assert Path(ir).is_relative_to(site)
    assert "attend.py.jinja" in kernels
