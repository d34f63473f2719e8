"""Compiling generated kernels for a chip that is not here: binaries, registers, spills, shared
memory.

What the cache holds is not compiled again. The rest is compiled in a process of its own, without
Triton's interpreter and without torch, so that it does the same on a laptop, in a test run under
the interpreter, and on a GPU machine. `python -m spcomp.backends.triton.offline FOLDER` is that
process: it reads `jobs.json` and writes the files of each entry beside it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spcomp.backends.base import BuiltKernel, Source
from spcomp.backends.triton import generated
from spcomp.backends.triton.bind import bind
from spcomp.backends.triton.manifest import Signature, best_class, manifest_of, signature_of
from spcomp.backends.triton.sites import options_of
from spcomp.backends.triton.store import (
    Form,
    compile_form,
    files_of,
    gpu_target,
    usage_in,
)
from spcomp.cache import Entry, default_store
from spcomp.errors import Refused
from spcomp.ir.plan import Launch


def build_offline(source: Source) -> tuple[BuiltKernel, ...]:
    """Compile every kernel of a plan for its target, without a card, for dense tensors of a usual
    size.

    Raises: Refused with the compiler's last words when a kernel does not compile.
    """
    launches = list(source.plan.launches())
    forms = [_form(source, *pair) for pair in zip(source.files, launches, strict=True)]
    entries = _entries(forms, source)
    return tuple(
        _row(number, form, entry, source)
        for number, (form, entry) in enumerate(zip(forms, entries, strict=True))
    )


def _form(source: Source, file: Any, launch: Launch) -> Form:
    text = generated.read(launch.kernel, file.text)
    manifest = manifest_of(bind(launch, source.plan), source.plan, source.spec.dtype)
    target = gpu_target(source.target.arch, source.target.warp_size)
    signature = signature_of(text, manifest, best_class(manifest))
    return Form(text, signature, target, options_of(launch))


def _entries(forms: Sequence[Form], source: Source) -> list[Entry]:
    """Give the entries of all forms; those the cache lacks are compiled together."""
    store = default_store()
    found = {form.key.digest: store.load(form.key) for form in forms}
    missing = {f.key.digest: f for f in forms if found[f.key.digest] is None}
    if missing:
        with tempfile.TemporaryDirectory(prefix="spcomp-build-") as name:
            folder = Path(name)
            _compile_in_process(folder, missing, source)
            for digest, form in missing.items():
                found[digest] = store.load_or_build(form.key, partial(_files, folder / digest))
    return [entry for form in forms if (entry := found[form.key.digest]) is not None]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _compile_in_process(folder: Path, missing: dict[str, Form], source: Source) -> None:
    jobs = {digest: _written(form) for digest, form in missing.items()}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[3])
    env["PYTHONPATH"] = os.pathsep.join([root, env.get("PYTHONPATH", "")])
    env["TRITON_DUMP_PTXAS_LOG"] = "1"
    env["TRITON_CACHE_DIR"] = str(folder / "triton")  # ours keeps what is worth keeping
    done = subprocess.run(
        [sys.executable, "-m", "spcomp.backends.triton.offline", str(folder)],
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


def _row(number: int, form: Form, entry: Entry, source: Source) -> BuiltKernel:
    usage, options = usage_in(entry), dict(form.options)
    binary = entry.files[form.binary_name]
    return BuiltKernel(
        kernel=form.generated.kernel,
        launch=number,
        target=source.target.name,
        registers=usage.registers,
        spill_bytes=usage.spill_bytes,
        shared_bytes=usage.shared_bytes,
        binary_bytes=len(binary),
        binary=binary,
        warps=options["num_warps"],
        stages=options["num_stages"],
        warnings=usage.warnings,
    )


# ---- a form as JSON ------------------------------------------------------------------------------


def _written(form: Form) -> dict[str, Any]:
    return {
        "kernel": form.generated.kernel,
        "text": form.generated.text,
        "types": form.signature.types,
        "divisible": sorted(form.signature.divisible),
        "arch": f"{form.target.backend}:{form.target.arch}",
        "warp_size": form.target.warp_size,
        "options": form.options,
    }


def _read(job: dict[str, Any]) -> Form:
    types = tuple((name, kind) for name, kind in job["types"])
    return Form(
        generated.read(job["kernel"], job["text"]),
        Signature(types, frozenset(job["divisible"])),
        gpu_target(job["arch"], job["warp_size"]),
        tuple((name, value) for name, value in job["options"]),
    )


# ---- inside the process --------------------------------------------------------------------------


def main(folder: Path) -> None:
    """Compile the jobs of a folder; each writes the files of its entry below its digest."""
    import contextlib
    import io

    for digest, job in json.loads((folder / "jobs.json").read_text()).items():
        form, log = _read(job), io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = compile_form(form)
        warnings = tuple(sorted(set(re.findall(r"C75\d\d", log.getvalue()))))
        (folder / digest).mkdir()
        for name, data in files_of(form, compiled, warnings).items():
            (folder / digest / name).write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
