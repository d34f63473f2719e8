"""What is written down while a pattern function runs: the user's lines and captured tensors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spcomp.errors import Where
from spcomp.ir.nodes import Captured

if TYPE_CHECKING:
    from torch import Tensor

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


@dataclass(slots=True)
class Recording:
    """The tensors one pattern captured, by the name they have in the IR."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def capture(self, tensor: Tensor) -> Captured:
        """Give the node of a captured tensor; the same tensor has one node."""
        for name, known in self.tensors.items():
            if known is tensor:
                return _node(name, tensor)
        name = f"table{len(self.tensors)}"
        self.tensors[name] = tensor
        return _node(name, tensor)


def _node(name: str, tensor: Tensor) -> Captured:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Captured(name, tuple(int(n) for n in tensor.shape), dtype, where=user_line())


_current: ContextVar[Recording | None] = ContextVar("spcomp_recording", default=None)


@contextmanager
def recording() -> Iterator[Recording]:
    """Open a recording for the pattern function that runs inside; a nested pattern joins it."""
    outer = _current.get()
    if outer is not None:
        yield outer
        return
    mine = Recording()
    token = _current.set(mine)
    try:
        yield mine
    finally:
        _current.reset(token)


def current() -> Recording | None:
    """Give the open recording, or None outside a pattern function."""
    return _current.get()


def user_line() -> Where | None:
    """Find the nearest line outside the DSL itself."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_HERE) and not file.startswith("<"):
            return Where(file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None
