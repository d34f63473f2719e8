"""The project that is exported: its files, its manifest, and that its C++ compiles."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import jinja2.meta
import pytest

from spcomp.backends.ascendc import BACKEND
from spcomp.backends.ascendc.contexts.project import ProjectContext
from spcomp.backends.ascendc.emulate import HEADERS
from spcomp.backends.ascendc.executor import EmulatedExecutable
from spcomp.backends.ascendc.project import PLACES
from spcomp.backends.ascendc.project_case import Case, ProjectIsWrong, case_of
from spcomp.codegen.render import TEMPLATES, environment
from spcomp.ir.plan import Phase
from tests.ascendc.projects import (
    PATTERNS,
    WARNINGS,
    accepts,
    needs_gxx,
    source_of,
    unproven,
    written,
)

pytestmark = needs_gxx

EACH = [(name, phase) for name in PATTERNS for phase in ("prefill", "decode")]


@pytest.mark.parametrize(("name", "phase"), EACH)
def test_a_project_has_the_files_an_npu_engineer_looks_for(
    name: str, phase: Phase, tmp_path: Path
) -> None:
    op = f"{name}_{phase}"
    folder = written(name, phase, tmp_path)
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    kernels = [f"{op}_{file.launch:02d}_{file.kernel}" for file in source_of(name, phase).files]
    assert found == {
        "CMakeLists.txt",
        "README.md",
        "manifest.json",
        f"include/{op}_launch.h",
        f"include/{op}_tiling.h",
        f"op_host/{op}_run.cpp",
        f"op_host/{op}_tiling.cpp",
        f"op_kernel/{op}.asc",
        *(f"op_kernel/{kernel}.h" for kernel in kernels),
        f"torch/{op}_torch.cpp",
        "torch/stream.h",
        "tests/case.h",
        "tests/compare.py",
        "tests/device.h",
        "tests/emulated.cpp",
        "tests/host_driver.cpp",
        "tests/case/case.txt",
        *(f"tests/case/{n}.bin" for n in ("q", "k", "v", "expected_out", "expected_lse")),
        *(f"emulator/{path.name}" for path in HEADERS.glob("*.h")),
    }


@pytest.mark.parametrize(("name", "phase"), EACH)
def test_all_cpp_of_a_project_compiles_without_a_warning(
    name: str, phase: Phase, tmp_path: Path
) -> None:
    folder = written(name, phase, tmp_path)
    units = [*folder.glob("op_host/*.cpp"), *folder.glob("tests/*.cpp")]
    assert len(units) == 4
    includes = [f"-I{folder / name}" for name in ("include", "op_kernel", "emulator")]
    accepts("g++", *WARNINGS, "-fsyntax-only", *includes, *units, folder=folder)


LAUNCH = re.compile(r"(\w+)<<<blocks, nullptr, stream>>>\(")


@pytest.mark.parametrize(("name", "phase"), EACH)
def test_a_launch_gives_each_kernel_the_arguments_it_takes(
    name: str, phase: Phase, tmp_path: Path
) -> None:
    """As a call of the kernel's function; that the device's compiler takes `<<<>>>` is unproven."""
    folder = written(name, phase, tmp_path)
    text = (folder / f"op_kernel/{name}_{phase}.asc").read_text()
    called, launches = LAUNCH.subn(r"(void)blocks, (void)stream, \1(", text)
    assert launches == len(source_of(name, phase).files)
    assert "<<<" not in called
    (folder / "entries.cpp").write_text(called)
    includes = [f"-I{folder / name}" for name in ("include", "op_kernel", "emulator")]
    accepts("g++", *WARNINGS, "-fsyntax-only", *includes, "entries.cpp", folder=folder)


def test_contexts_hold_what_the_templates_name() -> None:
    """Also that each template is written somewhere."""
    folder = TEMPLATES / "ascendc/project"
    assert {path.name.removesuffix(".jinja") for path in folder.iterdir()} == set(PLACES)
    names: set[str] = set()
    for path in folder.iterdir():
        names |= jinja2.meta.find_undeclared_variables(environment().parse(path.read_text()))
    assert names == {field.name for field in fields(ProjectContext)}


@pytest.mark.parametrize(("name", "phase"), EACH)
def test_the_manifest_says_what_each_kernel_takes(name: str, phase: Phase) -> None:
    made = unproven(name, phase)
    manifest = made.manifest
    assert manifest["validated"] == "by emulation; not run on hardware"
    assert [a["name"] for a in manifest["arguments"]] == ["q", "k", "v", "out", "lse"]
    assert [k["kernel"] for k in manifest["kernels"]] == [
        file.kernel for file in source_of(name, phase).files
    ]
    for kernel, row in zip(manifest["kernels"], made.rows, strict=True):
        text = made.files[kernel["source"]]
        assert hashlib.sha256(text).hexdigest() == kernel["source_sha256"]
        (taken,) = re.findall(rf"__aicore__ void {kernel['entry']}\((.*?)\)", text.decode(), re.S)
        assert len(taken.split(",")) == len(kernel["arguments"]) == row[2] + 1
        assert row[:2] == (kernel["entry"], kernel["cores"])


@pytest.mark.slow
def test_a_project_whose_kernels_ran_says_so() -> None:
    made = BACKEND.export(source_of("moba", "decode"), PATTERNS["moba"][0].program)
    assert made.manifest["rung"] == "matched in the emulator"
    assert b"Rung of this copy: matched in the emulator." in made.files["README.md"]


def test_without_a_compiler_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    made = BACKEND.export(source_of("moba", "decode"), PATTERNS["moba"][0].program)
    assert made.manifest["rung"] == "emitted"
    assert b"Rung of this copy: emitted." in made.files["README.md"]


def moba_case() -> Case:
    return case_of(source_of("moba", "decode"), PATTERNS["moba"][0].program)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out", "lse"])
def test_kernels_that_disagree_with_the_reference_are_not_exported(name: str) -> None:
    case, run = moba_case(), EmulatedExecutable(source_of("moba", "decode"))
    spoilt = getattr(case, name).clone()
    spoilt.flatten()[5] += 0.25
    with pytest.raises(ProjectIsWrong) as caught:
        replace(case, **{name: spoilt}).check(run, "moba")
    said = str(caught.value)
    assert re.match(
        r"ProjectIsWrong: the emulated kernels of moba are 0\.2\S* away from the reference in "
        rf"{name}, where 0\.0\S* is allowed\.",
        said,
    )


def test_a_case_is_small_and_the_same_each_time() -> None:
    files, again = (moba_case().files("moba_decode") for _ in range(2))
    assert files == again
    assert sum(map(len, files.values())) < 1 << 20
    assert len(files["q.bin"]) == 4 * 3 * 80 * 2
