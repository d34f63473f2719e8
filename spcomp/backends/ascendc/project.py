"""The project that `spcomp compile` writes for this backend: kernels, host code, the operator of
torch, a driver with a case, and the emulator, so that it proves itself without a device."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

from spcomp.backends.ascendc.contexts.host import TilingContext
from spcomp.backends.ascendc.contexts.project import ProjectContext, project_context
from spcomp.backends.ascendc.emit import (
    forms,
    project_header,
    tiling,
    tiling_header,
    tiling_source,
)
from spcomp.backends.ascendc.emulate import HEADERS
from spcomp.backends.ascendc.executor import EmulatedExecutable
from spcomp.backends.ascendc.forms import Form
from spcomp.backends.ascendc.project_case import Case, case_of
from spcomp.backends.ascendc.project_manifest import manifest
from spcomp.backends.base import Export, Source
from spcomp.codegen.render import render
from spcomp.ir.program import Program

EMITTED = "emitted"
MATCHED = "matched in the emulator"

PLACES = {
    "CMakeLists.txt": "CMakeLists.txt",
    "README.md": "README.md",
    "launch.h": "include/{op}_launch.h",
    "run.cpp": "op_host/{op}_run.cpp",
    "entries.asc": "op_kernel/{op}.asc",
    "torch.cpp": "torch/{op}_torch.cpp",
    "stream.h": "torch/stream.h",
    "emulated.cpp": "tests/emulated.cpp",
    "host_driver.cpp": "tests/host_driver.cpp",
    "case.h": "tests/case.h",
    "device.h": "tests/device.h",
    "compare.py": "tests/compare.py",
}
"""Where each template of `ascendc/project` is written."""


def export(source: Source, program: Program) -> Export:
    """Give the project of a plan; its kernels are run in the emulator first, where there is g++.

    Raises: ProjectIsWrong, EmulatorFault, KernelDoesNotCompile, CacheNotWritable.
    """
    return project_of(source, program, proven)


def project_of(source: Source, program: Program, prove: Callable[[Source, Case], str]) -> Export:
    """Give the project of a plan; prove: gives the rung that the kernels stand on.

    Raises: what `prove` raises.
    """
    made = forms(source.plan, source.target, source.spec)
    host = tiling(source.plan, source.target, source.spec, made)
    case = case_of(source, program)
    rung = prove(source, case)
    lines = project_header(source.plan, source.target, source.spec)
    context = project_context(source, host, made, lines, rung)
    files = {
        **{place.format(op=host.op): _rendered(name, context) for name, place in PLACES.items()},
        **_kernels(source, made, host),
        **{f"tests/case/{name}": content for name, content in case.files(host.op).items()},
        **{f"emulator/{path.name}": path.read_bytes() for path in sorted(HEADERS.glob("*.h"))},
    }
    columns = ("kernel", "cores", "arguments", "tiling bytes", "workspace bytes of a core")
    rows = ((f.name, f.kind, len(f.buffers), f.struct_bytes, f.workspace_bytes) for f in made)
    return Export(files, manifest(source, host, made, files, rung), columns, tuple(rows))


def proven(source: Source, case: Case) -> str:
    """Run the case in the emulator and give the rung that the kernels stand on.

    Raises: ProjectIsWrong, EmulatorFault, KernelDoesNotCompile.
    """
    if shutil.which("g++") is None:
        return EMITTED
    case.check(EmulatedExecutable(source), source.plan.pattern)
    return MATCHED


def _kernels(source: Source, made: Sequence[Form], host: TilingContext) -> dict[str, bytes]:
    kernels = {
        f"op_kernel/{form.name}.h": file.text.encode()
        for file, form in zip(source.files, made, strict=True)
    }
    return {
        f"include/{host.op}_tiling.h": tiling_header(host).encode(),
        f"op_host/{host.op}_tiling.cpp": tiling_source(host).encode(),
        **kernels,
    }


def _rendered(name: str, context: ProjectContext) -> bytes:
    return render(f"ascendc/project/{name}.jinja", context).encode()
