"""What a compiled kernel uses on chip: registers, spills, shared memory, and the assembler's
warnings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one kernel. registers and spill_bytes: a thread; shared_bytes: a program; warnings: the
    numbers ptxas gave (C75xx: wgmma runs one after the other), empty also where nobody listened."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    warnings: tuple[str, ...] = ()


def usage_of(compiled: Any, warnings: tuple[str, ...] = ()) -> Usage:
    """Read the figures off Triton's compiled kernel, without a card."""
    is_cuda = "cubin" in compiled.asm
    found = _of_cubin(compiled.asm["cubin"]) if is_cuda else _of_assembly(compiled.asm["amdgcn"])
    return Usage(*found, compiled.metadata.shared, warnings)


def _of_cubin(binary: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return figures["REG"], figures["STACK"] + figures["LOCAL"]


def _of_assembly(text: str) -> tuple[int, int]:
    def read(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(match.group(1)) if match else 0

    return read("vgpr_count"), 4 * read("vgpr_spill_count")
