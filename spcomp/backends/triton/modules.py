"""Generated files as Python modules, each imported once a process."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

from spcomp.cache import store_source


@cache
def kernel_of(kernel: str, text: str) -> Any:
    """Give the `@triton.jit` function of a generated file."""
    return kernel_in(store_source(kernel, text), kernel)


def kernel_in(path: Path, kernel: str) -> Any:
    """Import a generated file and give its entry, `<kernel>_kernel`."""
    name = f"spcomp_generated_{path.parent.name}_{kernel}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return getattr(sys.modules[name], f"{kernel}_kernel")
