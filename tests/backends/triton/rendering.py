"""Render a kernel and run it in Triton's interpreter, or compile it for a card that is not here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2.meta

from spcomp.backends.triton.expr_text import to_triton
from spcomp.codegen.render import environment, register_filter, render

register_filter("triton", to_triton)

# Runs in a process without TRITON_INTERPRET: argv = module file, kernel, JSON of options.
_COMPILE = """
import importlib.util, json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget

path, kernel, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
spec = importlib.util.spec_from_file_location("rendered", path)
module = importlib.util.module_from_spec(spec)
sys.modules["rendered"] = module
spec.loader.exec_module(module)
fn = getattr(module, kernel)
unspecialised = {p.name for p in fn.params if p.do_not_specialize}
signature, attrs = {}, {}
for index, name in enumerate(fn.arg_names):
    kind = options["types"].get(name)
    if kind is None:
        kind = "*" + options["element"] if name.endswith("_ptr") else "i32"
    signature[name] = kind
    # As the launcher specialises: pointers and strides are multiples of 16, lengths are not.
    if kind != "fp32" and name not in unspecialised:
        attrs[(index,)] = [["tt.divisibility", 16]]
source = triton.compiler.ASTSource(fn=fn, signature=signature, constexprs={}, attrs=attrs)
built = triton.compile(
    source,
    target=GPUTarget("cuda", options["capability"], 32),
    options={"num_warps": options["num_warps"], "num_stages": options["num_stages"]},
)
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(built.asm["cubin"])
    file.flush()
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
if options["keep"]:
    for stage in ("ttir", "ttgir", "ptx"):
        with open(os.path.join(options["keep"], kernel + "." + stage), "w") as out:
            out.write(built.asm[stage])
    with open(os.path.join(options["keep"], kernel + ".cubin"), "wb") as out:
        out.write(built.asm["cubin"])
count = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage)}
print("RESULT " + json.dumps({
    "registers": count["REG"],
    "stack_bytes": count["STACK"] + count["LOCAL"],
    "shared_bytes": built.metadata.shared,
}))
"""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler says about one kernel."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    warnings: tuple[str, ...]  # ptxas's C75xx lines: wgmma that had to be serialised


def import_rendered(template: str, context: Any, folder: Path) -> ModuleType:
    """Render a kernel into a file (Triton reads source from disk) and import it."""
    return import_file(write_rendered(template, context, folder))


def write_rendered(template: str, context: Any, folder: Path) -> Path:
    """Render a kernel into a file of `folder`."""
    path = folder / (template.rsplit("/", 1)[-1].removesuffix(".py.jinja") + ".py")
    path.write_text(render(template, context))
    return path


def import_file(path: Path) -> ModuleType:
    """Import a module by its path."""
    spec = importlib.util.spec_from_file_location(f"rendered_{path.stem}_{abs(hash(path))}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def variables_of(template: str) -> set[str]:
    """Name the variables a template reads; imported macros are not among them."""
    loader = environment().loader
    assert loader is not None
    source, _, _ = loader.get_source(environment(), template)
    return set(jinja2.meta.find_undeclared_variables(environment().parse(source)))


def field_names(context_class: type[Any]) -> set[str]:
    """Name the fields of a context."""
    return {f.name for f in fields(context_class)}


def compile_kernel(
    path: Path,
    kernel: str,
    *,
    element: str = "bf16",
    types: Mapping[str, str] | None = None,
    capability: int = 90,
    num_warps: int = 8,
    num_stages: int = 2,
    keep: Path | None = None,
) -> Compiled:
    """Compile a rendered file without a card.

    element: type of pointers that `types` does not name; `types`: argument -> Triton type.
    keep: folder for the intermediate forms.
    """
    options = {
        "element": element,
        "types": dict(types or {}),
        "capability": capability,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "keep": str(keep) if keep else "",
    }
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _COMPILE, str(path), kernel, json.dumps(options)],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
        check=False,
    )
    lines = (run.stdout + run.stderr).splitlines()
    results = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    assert results, run.stdout + run.stderr
    result = json.loads(results[-1])
    return Compiled(
        registers=result["registers"],
        spill_bytes=result["stack_bytes"],
        shared_bytes=result["shared_bytes"],
        warnings=tuple(line for line in lines if "C75" in line),
    )
