"""Compiling generated kernels for a chip that is not here: binaries, registers, spills, shared
memory. What the cache holds is not compiled again; the rest is compiled beside this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spcomp.backends.base import Source
from spcomp.backends.triton import generated
from spcomp.backends.triton.bind import bind
from spcomp.backends.triton.compilers import CompilerFailed, compilers
from spcomp.backends.triton.manifest import best_class, manifest_of, options_of, signature_of
from spcomp.backends.triton.store import Form, gpu_target, usage_in
from spcomp.cache import Entry, default_store
from spcomp.errors import Refused
from spcomp.ir.plan import Launch


@dataclass(frozen=True, slots=True)
class BuiltKernel:
    """What the compiler said about one kernel built without a card."""

    kernel: str
    launch: int
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    binary_bytes: int
    binary: bytes
    warps: int
    stages: int
    warnings: tuple[str, ...] = ()


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
    return Form(text, signature, target, options_of(launch, text))


def _entries(forms: Sequence[Form], source: Source) -> list[Entry]:
    """Give the entries of all forms; those the cache lacks are compiled together."""
    store = default_store()
    found = {form.key.digest: store.load(form.key) for form in forms}
    missing = {f.key.digest: f for f in forms if found[f.key.digest] is None}
    jobs = {digest: compilers().files(form) for digest, form in missing.items()}
    for digest, form in missing.items():
        try:
            found[digest] = store.load_or_build(form.key, jobs[digest].result)
        except CompilerFailed as failure:
            raise _refused(source, str(failure)) from None
    return [entry for form in forms if (entry := found[form.key.digest]) is not None]


def _refused(source: Source, said: str) -> Refused:
    return Refused(
        backend="triton",
        what=f"{source.plan.pattern} for {source.target.name}",
        reason="its compiler failed: " + said.splitlines()[-1],
        way_out="smaller tiles may help; the whole message: " + said[-2000:],
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
