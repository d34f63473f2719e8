"""Generated kernels beside their binaries, for somebody who launches them without this package."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from spcomp.backends.base import Export, Source, SourceFile
from spcomp.backends.triton.offline import BuiltKernel, build_offline
from spcomp.errors import Refused
from spcomp.ir.plan import Launch

BINARY = {"cuda": ".cubin", "hip": ".hsaco"}
COLUMNS = ("registers", "spill_bytes", "shared_bytes", "binary_bytes", "warps", "stages")


def export(source: Source) -> Export:
    """Compile every kernel of a plan and give sources, binaries and what the compiler said.

    Raises: Refused, for Triton's interpreter or when the compiler fails.
    """
    target = source.target
    if target.arch == "interpreter":
        raise Refused(
            backend="triton",
            what=f"to make binaries for {target.name}",
            reason="it has no compiler that works without the device",
            way_out="`spcomp show PATTERN --at source` prints the source.",
        )
    built = build_offline(source)
    suffix = BINARY[target.arch.partition(":")[0]]
    files: dict[str, bytes] = {}
    kernels: list[dict[str, Any]] = []
    for file, kernel, launch in zip(source.files, built, source.plan.launches(), strict=True):
        binary_name = file.file_name.removesuffix(file.suffix) + suffix
        files |= {file.file_name: file.text.encode(), binary_name: kernel.binary}
        kernels.append(_entry(file, binary_name, kernel, launch))
    return Export(
        files=files,
        manifest={"triton": _version(), "rung": "compiled", "kernels": kernels},
        columns=("kernel", *(c.replace("_", " ") for c in COLUMNS), "warnings"),
        rows=tuple(
            (k["source"], *(k[c] for c in COLUMNS), " ".join(k["warnings"]) or "-") for k in kernels
        ),
    )


def _entry(
    file: SourceFile, binary_name: str, kernel: BuiltKernel, launch: Launch
) -> dict[str, Any]:
    return {
        "launch": kernel.launch,
        "kernel": kernel.kernel,
        "source": file.file_name,
        "source_sha256": _sha256(file.text.encode()),
        "binary": binary_name,
        "binary_sha256": _sha256(kernel.binary),
        **{name: getattr(kernel, name) for name in ("binary_bytes", *COLUMNS[:3], *COLUMNS[4:])},
        "axes": dict(launch.axes),
        "warnings": list(kernel.warnings),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
