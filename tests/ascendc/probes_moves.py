"""What the tests of the moves share: C++ that sees every store, case tables, wrong-use batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from spcomp.backends.ascendc.emulate import Kind
from tests.ascendc.harness import EmulatorFault, run

# L1 and L0 have no way back to global memory, so the tests step behind the instruction set: `place`
# and `peek` carry raw elements between GM and any store, past every check but the bounds.
PROBES = """
template <class T>
GlobalTensor<T> gm(GM_ADDR base, int64_t elements) {
    GlobalTensor<T> tensor;
    tensor.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(base), elements);
    return tensor;
}

template <class T>
void place(const LocalTensor<T>& dst, const GlobalTensor<T>& src, int64_t first, int64_t count) {
    PipeBarrier<PIPE_ALL>();
    {
        emulator::Instr instr("place", PIPE_MTE2);
        const T* from = instr.read("src", src, first, count);
        T* to = instr.write("dst", dst, 0, count);
        for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    }
    PipeBarrier<PIPE_ALL>();
}

template <class T>
void peek(const GlobalTensor<T>& dst, int64_t first, const LocalTensor<T>& src, int64_t count) {
    PipeBarrier<PIPE_ALL>();
    {
        emulator::Instr instr("peek", PIPE_MTE2);
        const T* from = instr.read("src", src, 0, count);
        T* to = instr.write("dst", dst, first, count);
        for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    }
    PipeBarrier<PIPE_ALL>();
}

// One row of the table of cases.
struct Case {
    GlobalTensor<int32_t> table;
    int64_t first;
    int32_t operator()(int column) const { return table.GetValue(first + column); }
};
"""


def table_of(cases: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """The cases as the kernel reads them, one row each."""
    return np.array(cases, np.int32)


def random_bytes(rng: np.random.Generator, count: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, count, np.uint8)


class WrongUses:
    """Wrong calls, each with the words that must report it, compiled once as one switch."""

    def __init__(self, kind: Kind, setup: str, gm_bytes: int = 65536) -> None:
        self.kind = kind
        self.setup = setup
        self.gm_bytes = gm_bytes
        self.names: list[str] = []
        self.codes: list[str] = []
        self.words: list[str] = []

    def add(self, name: str, code: str, words: str) -> None:
        self.names.append(name)
        self.codes.append(code)
        self.words.append(words)

    def run(self, which: int) -> None:
        cases = "\n".join(
            f"        case {i}: {{ {code} }} break;" for i, code in enumerate(self.codes)
        )
        body = f"{self.setup}\n    switch (which) {{\n{cases}\n    }}\n"
        run(
            body,
            {"src": np.zeros(self.gm_bytes, np.uint8)},
            {"out": np.zeros(self.gm_bytes, np.uint8)},
            kind=self.kind,
            scalars={"which": which},
            globals=PROBES,
        )

    def check(self, name: str) -> None:
        which = self.names.index(name)
        with pytest.raises(EmulatorFault) as caught:
            self.run(which)
        assert self.words[which] in str(caught.value)
