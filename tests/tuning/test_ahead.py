"""Candidates compiled before their turn are in the cache when they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spcomp import processors
from spcomp.backends import registry
from spcomp.backends.triton import TritonBackend
from spcomp.patterns import streaming_llm
from spcomp.tuning.ahead import Ahead
from tests.tuning.fates import tensors

DEFAULT: dict[str, Any] = {"order": None, "axes": []}
OTHER: dict[str, Any] = {"order": None, "axes": [["tiles", [["warps", 2]]]]}
NEVER: dict[str, Any] = {"order": "key_major", "axes": []}


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ahead:
    """Give what compiles for a card, as if one were here and eight processors free."""
    monkeypatch.setenv("SPCOMP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(TritonBackend, "target_of", lambda self, device: registry.target("sm90"))
    monkeypatch.setattr(processors, "usable", lambda: 10)
    q, k, v = tensors()
    return Ahead(streaming_llm(), "triton", "cuda:0", q, k, v)


def test_candidates_are_compiled_into_the_cache_with_what_they_spill(
    maker: Ahead, tmp_path: Path
) -> None:
    maker.begin([DEFAULT, OTHER, NEVER])
    assert maker.take(DEFAULT) == {"spill_bytes": 0}
    assert maker.take(OTHER) == {"spill_bytes": 0}
    assert maker.take(NEVER) == {}, "what cannot be compiled says why when it is tried"
    assert maker.take(DEFAULT) == {}, "it had its turn"
    kernels = [path.name for path in tmp_path.rglob("*.cubin")]
    assert sorted(kernels) == ["attend.cubin", "tiles.cubin", "tiles.cubin"]


def test_nothing_is_compiled_ahead_where_nothing_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    maker = Ahead(streaming_llm(), "triton", "cpu", q, k, v)
    maker.begin([DEFAULT])
    assert maker.take(DEFAULT) == {}
