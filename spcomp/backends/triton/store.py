"""Compiled kernels and the cache: what makes a key, what an entry holds, how it is loaded again.

An entry holds `<kernel>.py`, the binary, Triton's description of it as `<kernel>.json`, and what it
uses on chip as `usage.json`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from spcomp.backends.triton.generated import Generated
from spcomp.backends.triton.manifest import CONSTANT, Signature
from spcomp.backends.triton.usage import Usage, usage_of
from spcomp.cache import Entry, Key, default_store

USAGE = "usage.json"
DIVISIBLE = [["tt.divisibility", 16]]
BINARIES = {"cuda": "cubin", "hip": "hsaco"}


@dataclass(frozen=True, slots=True)
class Form:
    """A kernel for one class of arguments and one target: what is compiled, and so what is kept.

    target: Triton's GPUTarget; options: of Triton's compiler, by name."""

    generated: Generated
    signature: Signature
    target: Any
    options: tuple[tuple[str, int], ...]

    @property
    def key(self) -> Key:
        """Give everything that makes this binary another one than the next."""
        fields = {
            "backend": "triton",
            "target": f"{self.target.backend}:{self.target.arch}",
            "warp_size": str(self.target.warp_size),
            "arguments": str(self.signature),
            **{name: str(value) for name, value in self.options},
            **toolchain(self.target),
        }
        return Key(self.generated.kernel, self.generated.source_sha256, fields)

    @property
    def binary_name(self) -> str:
        """Give the name of the binary in an entry."""
        return f"{self.generated.kernel}.{BINARIES[self.target.backend]}"


def obtain(form: Form) -> Any:
    """Give Triton's compiled kernel of a form: from the cache, else compiled and kept.

    Raises: what Triton's compiler raises, CacheNotWritable.
    """
    made: list[Any] = []

    def build() -> Mapping[str, bytes]:
        made.append(compile_form(form, default_store().path_of(form.key)))
        return files_of(form, made[-1])

    entry = default_store().load_or_build(form.key, build)
    return made[-1] if made else restored(form, entry)


def compile_form(form: Form, folder: Path) -> Any:
    """Compile a form with Triton; its lines are those of the file in the folder of its entry."""
    import triton

    generated, signature = form.generated, form.signature
    path = folder / f"{generated.kernel}.py"
    place = {name: (n,) for n, name in enumerate(generated.arg_names)}
    source = _source_class(generated)(
        fn=generated.function(str(path)),
        signature=dict(signature.types),
        constexprs=constants_of(signature),
        attrs={place[name]: DIVISIBLE for name in signature.divisible},
    )
    return triton.compile(source, target=form.target, options=dict(form.options))


def _source_class(generated: Generated) -> Any:
    """Give Triton's class of source texts for the language of a file."""
    if generated.is_gluon:
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def constants_of(signature: Signature) -> dict[tuple[int, ...], int]:
    """Give the arguments that are fixed, by position."""
    return {(n,): 1 for n, (_, kind) in enumerate(signature.types) if kind == CONSTANT}


def files_of(form: Form, compiled: Any, warnings: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Give the files an entry keeps of a compiled kernel; warnings: of its assembler."""
    name = form.generated.kernel
    description = json.dumps(compiled.metadata._asdict(), default=_plain, indent=1, sort_keys=True)
    return {
        f"{name}.py": form.generated.text.encode(),
        f"{name}.json": description.encode(),
        form.binary_name: compiled.kernel,
        USAGE: json.dumps(asdict(usage_of(compiled, warnings)), indent=1).encode(),
    }


def usage_in(entry: Entry) -> Usage:
    """Give what the kernel of an entry uses on chip."""
    fields = json.loads(entry.files[USAGE])
    return Usage(**{**fields, "warnings": tuple(fields["warnings"])})


def restored(form: Form, entry: Entry) -> Any:
    """Give Triton's compiled kernel from an entry, without its compiler and its source.

    Triton reads files, and those of the entry may change or go: it gets copies of what was
    verified."""
    from triton.compiler import CompiledKernel

    arguments = SimpleNamespace(
        signature=dict(form.signature.types),
        constants=constants_of(form.signature),
        fn=SimpleNamespace(arg_names=list(form.generated.arg_names), launch_metadata=None),
    )
    names = (f"{form.generated.kernel}.json", form.binary_name)
    with tempfile.TemporaryDirectory(prefix="spcomp-kernel-") as folder:
        group = {name: str(Path(folder) / name) for name in names}
        for name, path in group.items():
            Path(path).write_bytes(entry.files[name])
        return CompiledKernel(arguments, group, entry.key.digest)


def gpu_target(arch: str, warp_size: int) -> Any:
    """Give Triton's target of an arch as `ir.target` writes it, `cuda:90` or `hip:gfx942`."""
    from triton.backends.compiler import GPUTarget

    kind, _, number = arch.partition(":")
    return GPUTarget(kind, int(number) if kind == "cuda" else number, warp_size)


@cache
def toolchain(target: Any) -> dict[str, str]:
    """Give what else decides a binary: versions, and the settings Triton reads from the
    environment."""
    import triton
    from triton import knobs
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend

    settings = sorted(get_cache_invalidating_env_vars().items())
    return {
        "triton": triton.__version__,
        "assembler": make_backend(target).hash(),
        "fp_fusion": str(bool(knobs.language.default_fp_fusion)),
        "environment": ", ".join(f"{name}={value}" for name, value in settings),
    }


def _plain(value: Any) -> Any:
    return vars(value) if hasattr(value, "__dict__") else str(value)
