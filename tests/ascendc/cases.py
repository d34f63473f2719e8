"""Many small kernels in one compiled one, chosen by number, and instructions without arithmetic.

Compiling costs seconds and running costs nothing, so each test module compiles its cases together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from spcomp.backends.ascendc.emulate import Launch, Statistics
from tests.ascendc.harness import Array, run_counted

PROBES = """
inline void Want(bool holds) { if (!holds) emulator::fail("the test wants something else"); }
template <pipe_t pipe, class Tensor>
void Read(const Tensor& tensor, int64_t first, int64_t count) {
  emulator::Instr instr("Read", pipe);
  instr.read("src", tensor, first, count);
}
template <pipe_t pipe, class Tensor>
void Write(const Tensor& tensor, int64_t first, int64_t count) {
  emulator::Instr instr("Write", pipe);
  instr.write("dst", tensor, first, count);
}
template <pipe_t pipe, class Dst, class Src>
void Copy(const Dst& dst, const Src& src, int64_t count) {
  emulator::Instr instr("Copy", pipe);
  const auto* from = instr.read("src", src, 0, count);
  auto* to = instr.write("dst", dst, 0, count);
  for (int64_t i = 0; i < count; ++i) to[i] = instr.atomic_add() ? to[i] + from[i] : from[i];
}
template <HardEvent event>
void Order(int id = 0) {
  SetFlag<event>(id);
  WaitFlag<event>(id);
}
template <class T>
GlobalTensor<T> Gm(GM_ADDR address) {
  GlobalTensor<T> tensor;
  tensor.SetGlobalBuffer((__gm__ T*)address);
  return tensor;
}
using UbBuf = TBuf<TPosition::VECCALC>;
constexpr auto kClean = DcciDst::CACHELINE_OUT;
constexpr auto kWhole = CacheLine::ENTIRE_DATA_CACHE;
constexpr auto kLine = CacheLine::SINGLE_CACHE_LINE;
"""
"""Instructions that only touch, and short names for what every case needs."""

X = np.arange(64, dtype=np.float32)


@dataclass(frozen=True)
class Cases:
    """Bodies by name, compiled as one kernel over x (read only), y and w (written)."""

    bodies: Mapping[str, str]
    launch: Launch = field(default_factory=Launch)
    globals: str = PROBES

    def run(self, name: str, launch: Launch | None = None) -> tuple[dict[str, Array], Statistics]:
        """Run one case; Raises: EmulatorFault."""
        cases = "\n".join(f"case {n}: {{{b}}} break;" for n, b in enumerate(self.bodies.values()))
        return run_counted(
            f"switch (which) {{\n{cases}\n}}",
            {"x": X},
            {"y": np.zeros(64, np.float32), "w": np.zeros(1024, np.float32)},
            launch or self.launch,
            scalars={"which": list(self.bodies).index(name)},
            globals=self.globals,
        )
