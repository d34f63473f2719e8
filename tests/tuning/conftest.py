"""Fixtures of the tests of tuning."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tuning.fates import Fates


@pytest.fixture
def fates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fates:
    """Give a tuning whose process follows a script."""
    return Fates(tmp_path, monkeypatch)
