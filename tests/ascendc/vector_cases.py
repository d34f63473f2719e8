"""Cases of vector instructions as rows of numbers, and the kernel that reads and runs one.

A case is an image of the unified buffer and one instruction on it. The kernel loads the image, runs
the instruction whose number and parameters the row holds, and gives the whole image back. So one
compiled kernel serves every case of a family of instructions.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from spcomp.backends.ascendc.emulate import Launch
from tests.ascendc.harness import run_counted
from tests.ascendc.models_vector import Bytes, Lanes, Operand

IMAGE = 65536

DTYPES: dict[str, DTypeLike] = {
    "half": np.float16,
    "bfloat16_t": np.uint16,
    "float": np.float32,
    "int16_t": np.int16,
    "uint16_t": np.uint16,
    "int32_t": np.int32,
    "uint32_t": np.uint32,
}

COUNT, MASK, BITS = range(3)


@dataclass(frozen=True)
class Form:
    """How a call names its lanes: by a count, by leading lanes, or by mask bits."""

    kind: int
    count: int = 0
    repeats: int = 0
    bits: tuple[int, int] = (0, 0)

    def lanes(self, width: int) -> Lanes:
        if self.kind == COUNT:
            return Lanes.counted(self.count, width)
        if self.kind == MASK:
            return Lanes.leading(self.count, self.repeats, width)
        return Lanes.of_bits(self.bits, self.repeats, width)


def counted(count: int) -> Form:
    return Form(COUNT, count)


def leading(mask: int, repeats: int) -> Form:
    return Form(MASK, mask, repeats)


def with_bits(bits: Sequence[int], repeats: int) -> Form:
    return Form(BITS, 0, repeats, (bits[0], bits[1]))


def random_form(rng: np.random.Generator, kind: int, width: int, most: int = 700) -> Form:
    repeats = int(rng.integers(1, 5))
    if kind == COUNT:
        return counted(int(rng.integers(1, most)))
    if kind == MASK:
        return leading(int(rng.integers(1, width + 1)), repeats)
    words = [int(word) for word in rng.integers(1, 2**63, 2)]
    return with_bits((words[0], words[1] if width > 64 else 0), repeats)


PRELUDE = f"""
constexpr int64_t IMAGE = {IMAGE};

struct Case {{
  GlobalTensor<int64_t> row;
  TBuf<TPosition::VECCALC>& memory;
  uint64_t bits[2];

  int64_t number(int column) const {{ return row.GetValue(column); }}
  int64_t form() const {{ return number(1); }}
  int64_t count() const {{ return number(2); }}
  int64_t repeats() const {{ return number(3); }}
  int64_t block(int k) const {{ return number(7 + 3 * k); }}
  int64_t repeat(int k) const {{ return number(8 + 3 * k); }}
  int64_t extra(int k) const {{ return number(18 + k); }}
  uint64_t* mask() {{
    bits[0] = static_cast<uint64_t>(number(4));
    bits[1] = static_cast<uint64_t>(number(5));
    return bits;
  }}
  // From the operand's first byte to the end of the image.
  template <class T>
  LocalTensor<T> at(int k) const {{
    const int64_t offset = number(6 + 3 * k);
    return memory.GetWithOffset<uint8_t>(IMAGE, 0)[offset].template ReinterpretCast<T>();
  }}
  template <class T>
  T scalar() const {{ return static_cast<T>(static_cast<float>(extra(0)) / 8.0F); }}
  BinaryRepeatParams binary() const {{
    return {{block(0), block(1), block(2), repeat(0), repeat(1), repeat(2)}};
  }}
  UnaryRepeatParams unary() const {{ return {{block(0), block(1), repeat(0), repeat(1)}}; }}
}};
"""

BODY = """
  TPipe pipe;
  TBuf<TPosition::VECCALC> memory;
  pipe.InitBuffer(memory, IMAGE);
  LocalTensor<uint8_t> whole = memory.Get<uint8_t>();
  GlobalTensor<uint8_t> from, to;
  from.SetGlobalBuffer(image, IMAGE);
  to.SetGlobalBuffer(result, IMAGE);
  Case c{{}, memory, {0, 0}};
  c.row.SetGlobalBuffer(reinterpret_cast<int64_t*>(row), 32);
  {
    emulator::Instr in("load", PIPE_MTE2);
    const uint8_t* read = in.read("image", from, 0, IMAGE);
    std::copy_n(read, IMAGE, in.write("whole", whole, 0, IMAGE));
  }
  PipeBarrier<PIPE_ALL>();
  uint64_t kept = 0;
  switch (c.number(0)) {
%s
  }
  PipeBarrier<PIPE_ALL>();
  GlobalTensor<uint64_t> answer;
  answer.SetGlobalBuffer(reinterpret_cast<uint64_t*>(count), 1);
  emulator::Instr in("save", PIPE_MTE3);
  const uint8_t* read = in.read("whole", whole, 0, IMAGE);
  std::copy_n(read, IMAGE, in.write("result", to, 0, IMAGE));
  *in.write("count", answer, 0, 1) = kept;
"""


def in_forms(name: str, arguments: str, params: str) -> str:
    """The call in its count form and both mask forms, by the form of the case."""
    return (
        f"if (c.form() == {COUNT}) {name}({arguments}, c.count()); "
        f"else if (c.form() == {MASK}) {name}({arguments}, c.count(), c.repeats(), {params}); "
        f"else {name}({arguments}, c.mask(), c.repeats(), {params});"
    )


@dataclass(frozen=True)
class Family:
    """Instructions that share a compiled kernel, each under a key."""

    calls: dict[str, str]

    def body(self) -> str:
        lines = [f"  case {n}: {{ {call} break; }}" for n, call in enumerate(self.calls.values())]
        return BODY % "\n".join(lines)

    def run(
        self,
        key: str,
        image: Bytes,
        form: Form,
        operands: Sequence[Operand],
        extras: Sequence[int] = (),
        launch: Launch | None = None,
    ) -> tuple[Bytes, int]:
        """The image after the instruction, and what GatherMask says it kept."""
        row = np.zeros(32, np.int64)
        words = np.array(form.bits, np.uint64).view(np.int64)
        number = list(self.calls).index(key)
        row[:6] = [number, form.kind, form.count, form.repeats, *words]
        for k, operand in enumerate(operands):
            row[6 + 3 * k : 9 + 3 * k] = [operand.offset, operand.block, operand.repeat]
        row[18 : 18 + len(extras)] = extras
        out, _ = run_counted(
            self.body(),
            {"image": image, "row": row},
            {"result": np.zeros(IMAGE, np.uint8), "count": np.zeros(1, np.uint64)},
            launch or Launch(),
            globals=PRELUDE,
        )
        return out["result"], int(out["count"][0])


def seeded(*names: object) -> np.random.Generator:
    """The same random numbers for the same names in every run."""
    return np.random.default_rng(zlib.crc32(repr(names).encode()))


def image_of(rng: np.random.Generator, dtype: str) -> Bytes:
    """A buffer full of moderate values of one type."""
    if dtype == "bfloat16_t":
        return (
            (rng.normal(0, 4, IMAGE // 2).astype(np.float32).view(np.uint32) >> 16)
            .astype(np.uint16)
            .view(np.uint8)
        )
    kind = np.dtype(DTYPES[dtype])
    count = IMAGE // kind.itemsize
    if kind.kind == "f":
        return rng.normal(0, 4, count).astype(kind).view(np.uint8)
    low = 0 if kind.kind == "u" else -180
    return rng.integers(low, 180, count).astype(kind).view(np.uint8)


def difference(got: Bytes, want: Bytes, dtype: DTypeLike | None = None, ulps: int = 0) -> str:
    """Empty where both images agree; of a float type within so many units in the last place."""
    differs = got != want
    if dtype is not None and ulps > 0:
        a, b = got.view(dtype), want.view(dtype)
        signed = np.int16 if a.dtype.itemsize == 2 else np.int32
        apart = np.abs(a.view(signed).astype(np.int64) - b.view(signed).astype(np.int64)) > ulps
        differs = np.repeat(apart & ~(np.isnan(a) & np.isnan(b)), a.dtype.itemsize)
    elif dtype is not None:
        a, b = got.view(dtype), want.view(dtype)
        both_nan = np.isnan(a) & np.isnan(b)
        differs &= ~np.repeat(both_nan, a.dtype.itemsize)
    where = np.flatnonzero(differs)
    if len(where) == 0:
        return ""
    first = int(where[0])
    block = slice(first // 32 * 32, first // 32 * 32 + 32)
    return f"{len(where)} bytes differ, the first at {first}: {got[block]} for {want[block]}"
