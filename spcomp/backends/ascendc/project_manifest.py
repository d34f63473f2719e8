"""What the manifest of a project says: arguments, kernels, workspace, tolerances, digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from spcomp.backends.ascendc.contexts.host import STRIDES, TilingContext
from spcomp.backends.ascendc.emulate import headers_digest
from spcomp.backends.ascendc.forms import Form
from spcomp.backends.ascendc.project_case import TOLERANCE
from spcomp.backends.base import Source
from spcomp.codegen.render import TEMPLATES

SHAPES = {
    "q": ["B", "Hq", "Sq", "D"],
    "k": ["B", "Hkv", "Skv", "D"],
    "v": ["B", "Hkv", "Skv", "Dv"],
    "out": ["B", "Hq", "Sq", "Dv"],
    "lse": ["B", "Hq", "Sq"],
}


def manifest(
    source: Source,
    tiling: TilingContext,
    forms: Sequence[Form],
    files: Mapping[str, bytes],
    rung: str,
) -> dict[str, Any]:
    """Give the manifest; files: those of the project, by path."""
    relative, absolute = TOLERANCE[source.spec.dtype]
    return {
        "rung": rung,
        "validated": "by emulation; not run on hardware",
        "operator": tiling.op,
        "arguments": [_argument(name, source) for name in STRIDES],
        "tolerance": {"relative": relative, "absolute": absolute},
        "workspace": {
            "function": f"{tiling.op}_workspace",
            "slab": {"rows_multiple_of": tiling.row_align, "most_bytes": tiling.scratch_limit},
            "scratch_of_a_slab": {b.name: b.bytes for b in tiling.scratch},
            "each_rounded_up_to": tiling.place_align,
            "bytes_of_an_ai_core": tiling.core_bytes,
        },
        "kernels": [_kernel(form, files) for form in forms],
        "templates_sha256": templates_digest(),
        "emulator_sha256": headers_digest(),
    }


def templates_digest() -> str:
    """Hash every template of this backend."""
    digest = hashlib.sha256()
    for path in sorted((TEMPLATES / "ascendc").rglob("*.jinja")):
        digest.update(path.relative_to(TEMPLATES).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _argument(name: str, source: Source) -> dict[str, Any]:
    return {
        "name": name,
        "is_written": name in ("out", "lse"),
        "dtype": "float32" if name == "lse" else source.spec.dtype,
        "shape": SHAPES[name],
    }


def _kernel(form: Form, files: Mapping[str, bytes]) -> dict[str, Any]:
    path = f"op_kernel/{form.name}.h"
    return {
        "launch": form.number,
        "kernel": form.kernel,
        "entry": form.name,
        "source": path,
        "source_sha256": hashlib.sha256(files[path]).hexdigest(),
        "cores": form.kind,
        "arguments": [*form.buffers, form.struct],
        "tiling": {field.name: field.c_type for field in form.fields},
        "tiling_bytes": form.struct_bytes,
        "workspace_bytes_of_an_ai_core": form.workspace_bytes,
    }
