"""Compiling generated kernels for a chip that is not here: binaries, registers, spills, shared
memory.

The work runs in a process of its own, without Triton's interpreter and without torch, so that it
does the same on a laptop, in a test run under the interpreter, and on a GPU machine. `python -m
spcomp.backends.triton.offline JOB.json` is that process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spcomp.backends.base import BuiltKernel, Source
from spcomp.backends.triton.bind import bind
from spcomp.backends.triton.launcher import Manifest, best_class, compile_kernel, manifest_of
from spcomp.errors import Refused


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel to compile: its file, what its arguments are, its target and options."""

    path: str
    kernel: str
    arch: str
    warp_size: int
    manifest: Manifest
    warps: int
    stages: int
    binary: str


def build_offline(source: Source) -> tuple[BuiltKernel, ...]:
    """Compile every kernel of a plan for its target, without a card.

    Raises: Refused with the compiler's last words when a kernel does not compile.
    """
    with tempfile.TemporaryDirectory(prefix="spcomp-build-") as folder:
        jobs = _jobs(source, Path(folder))
        (Path(folder) / "jobs.json").write_text(json.dumps([asdict(j) for j in jobs]))
        rows = _run(Path(folder) / "jobs.json", source)
        return tuple(
            _row(n, job, row, source) for n, (job, row) in enumerate(zip(jobs, rows, strict=True))
        )


def _jobs(source: Source, folder: Path) -> list[Job]:
    jobs = []
    for file, launch in zip(source.files, source.plan.launches(), strict=True):
        path = folder / file.file_name
        path.write_text(file.text)
        manifest = manifest_of(bind(launch, source.plan), source.plan, source.spec.dtype)
        axes = dict(launch.axes)
        jobs.append(
            Job(
                str(path),
                launch.kernel,
                source.target.arch,
                source.target.warp_size,
                manifest,
                axes["warps"],
                axes["stages"],
                str(path.with_suffix(".bin")),
            )
        )
    return jobs


def _run(jobs: Path, source: Source) -> list[dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[3])
    env["PYTHONPATH"] = os.pathsep.join([root, env.get("PYTHONPATH", "")])
    env["TRITON_DUMP_PTXAS_LOG"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "spcomp.backends.triton.offline", str(jobs)],
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise Refused(
            backend="triton",
            what=f"{source.plan.pattern} for {source.target.name}",
            reason="its compiler failed: "
            + (done.stderr.strip().splitlines() or ["no message"])[-1],
            way_out="smaller tiles may help; the whole message: " + done.stderr[-2000:],
        )
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def _row(number: int, job: Job, row: dict[str, Any], source: Source) -> BuiltKernel:
    binary = Path(job.binary).read_bytes()
    return BuiltKernel(
        kernel=job.kernel,
        launch=number,
        target=source.target.name,
        registers=row["registers"],
        spill_bytes=row["spill_bytes"],
        shared_bytes=row["shared_bytes"],
        binary_bytes=len(binary),
        binary=binary,
        warps=job.warps,
        stages=job.stages,
        warnings=tuple(row["warnings"]),
    )


# ---- inside the process
# ---------------------------------------------------------------------------


def _compile(job: Job) -> dict[str, Any]:
    from triton.backends.compiler import GPUTarget

    from spcomp.backends.triton.modules import kernel_in

    function = kernel_in(Path(job.path), job.kernel)
    kind, _, arch = job.arch.partition(":")
    target = GPUTarget(kind, int(arch) if kind == "cuda" else arch, job.warp_size)
    options = {"num_warps": job.warps, "num_stages": job.stages}
    built = compile_kernel(function, job.manifest, best_class(job.manifest), target, options)
    binary = built.asm["cubin" if kind == "cuda" else "hsaco"]
    Path(job.binary).write_bytes(binary)
    usage = _cuda_usage(job.binary) if kind == "cuda" else _hip_usage(str(built.asm["amdgcn"]))
    return {**usage, "shared_bytes": built.metadata.shared}


def _cuda_usage(binary: str) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([str(tool), "-res-usage", binary], capture_output=True, text=True).stdout
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spill_bytes": found["STACK"] + found["LOCAL"]}


def _hip_usage(assembly: str) -> dict[str, int]:
    def read(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(match.group(1)) if match else 0

    return {"registers": read("vgpr_count"), "spill_bytes": 4 * read("vgpr_spill_count")}


def _job(fields: dict[str, Any]) -> Job:
    """Read a job back from JSON, which knows no tuples."""
    kinds = fields.pop("manifest")
    manifest = Manifest(
        tuple((a, t) for a, t in kinds["pointers"]),
        tuple((a, p) for a, p in kinds["strides"]),
        tuple(kinds["last"]),
    )
    return Job(manifest=manifest, **fields)


def main(path: str) -> None:
    """Compile the jobs of a file and print their figures as one line of JSON."""
    import contextlib
    import io

    rows = []
    for fields in json.loads(Path(path).read_text()):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            row = _compile(_job(fields))
        row["warnings"] = sorted(set(re.findall(r"C75\d\d", log.getvalue())))
        rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1])
