"""The generated source of every shipped pattern, one schedule each: a diff says what changed."""

from __future__ import annotations

from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from spcomp import compiler
from spcomp.backends import registry
from spcomp.backends.base import Specialisation
from spcomp.ir.plan import Phase
from spcomp.patterns import SHIPPED
from tests.shipped import ON_TRITON

HEADER_LINES = 4  # version, pattern, schedule, command: no part of the code


class SourceFile(SingleFileSnapshotExtension):
    """One Python file a snapshot."""

    _write_mode = WriteMode.TEXT
    file_extension = "py.txt"


@pytest.fixture
def source_snapshot(snapshot: SnapshotAssertion) -> Any:
    return snapshot.use_extension(SourceFile)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", ON_TRITON)
def test_generated_source_is_as_recorded(name: str, phase: Phase, source_snapshot: Any) -> None:
    backend, target = registry.backend("triton"), registry.target("sm90")
    spec = Specialisation("bfloat16", 128, 128)
    plan = compiler.lower(SHIPPED[name](), backend=backend, target=target, spec=spec, phase=phase)
    files = compiler.emit(plan, backend, target, spec).files
    bodies = [f"# ---- {f.file_name}\n" + _without_header(f.text) for f in files]
    assert "\n".join(bodies) == source_snapshot


def _without_header(text: str) -> str:
    lines = text.splitlines(keepends=True)
    assert all(line.startswith("#") for line in lines[:HEADER_LINES])
    return "".join(lines[HEADER_LINES:])
