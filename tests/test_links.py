"""The folders at the root appear inside the package as committed relative links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("ir", "autotune", "templates")


@pytest.fixture(params=LINKED)
def link(request: pytest.FixtureRequest) -> Path:
    if not (ROOT / request.param).exists() and (ROOT / "PKG-INFO").is_file():
        pytest.skip("an unpacked sdist holds plain folders in place of the links")
    return ROOT / "spcomp" / str(request.param)


def test_package_folder_is_a_link_to_its_sister_at_the_root(link: Path) -> None:
    assert link.is_symlink(), f"{link} is no link; clone with core.symlinks=true (CONTRIBUTING.md)"
    assert os.readlink(link) == f"../{link.name}"


def test_link_ends_at_a_real_folder_of_this_checkout(link: Path) -> None:
    sister = ROOT / link.name
    assert sister.is_dir()
    assert not sister.is_symlink()
    assert link.resolve() == sister
