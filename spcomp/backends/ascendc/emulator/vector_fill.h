// Duplicate, CreateVecIndex and Brcb: filling lanes from a scalar, from their number, and from one
// element per block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vector_lanes.h"
#include "vector_math.h"
#include "vector_overlap.h"
#include "vector_params.h"

namespace AscendC {
namespace emulator {

// Writes value(n) to every active lane, where n counts all lanes from the first repeat's first.
template <class T, class Value>
void fill(Instr& in, const LocalTensor<T>& dst, const Form& form, Stride stride, Value value) {
  const Lanes lanes = form.lanes(in, kLanesPerRepeat<T>);
  const Operand<T> to{"dst", dst, stride};
  in_unified_buffer(in, to);
  require_own_repeats(in, lanes, to);
  T* write = write_lanes(in, lanes, to);
  for (const Segment& segment : lanes.segments()) {
    const int64_t number = segment.repeat * kLanesPerRepeat<T> + segment.lane;
    const int64_t first = to.first(segment);
    for (int64_t i = 0; i < segment.count; ++i) write[first + i] = value(number + i);
  }
}

template <class T>
void duplicate(const LocalTensor<T>& dst, const T& scalar, const Form& form, Stride stride) {
  static_assert(is_movable<T>, "Duplicate takes 16-bit and 32-bit types");
  Instr in("Duplicate", PIPE_V);
  fill(in, dst, form, stride, [scalar](int64_t) { return scalar; });
}

// The numbers must be exact in the type, or two lanes would get the same one.
template <class T>
void create_index(const LocalTensor<T>& dst, const T& first, const Form& form, Stride stride) {
  static_assert(is_number<T>, "CreateVecIndex takes int16, half, int32 and float");
  Instr in("CreateVecIndex", PIPE_V);
  fill(in, dst, form, stride, [&in, first](int64_t number) {
    const double exact = static_cast<double>(first) + static_cast<double>(number);
    if constexpr (is_real<T>) {
      const T value = static_cast<T>(static_cast<float>(exact));
      in.require(static_cast<double>(value) == exact, "the index %.0f is not exact", exact);
      return value;
    } else {
      return narrowed<T>(in, static_cast<int64_t>(exact));
    }
  });
}

}  // namespace emulator

template <class T>
void Duplicate(const LocalTensor<T>& dst, const T& scalar, const int32_t& count) {
  emulator::duplicate(dst, scalar, {int64_t{count}}, {});
}
template <class T>
void Duplicate(const LocalTensor<T>& dst, const T& scalar, uint64_t mask,
               emulator::Narrow<uint8_t> repeat, emulator::Narrow<uint16_t> dst_block,
               emulator::Narrow<uint8_t> dst_repeat) {
  emulator::duplicate(dst, scalar, {mask, repeat}, {dst_block, dst_repeat});
}
template <class T>
void Duplicate(const LocalTensor<T>& dst, const T& scalar, uint64_t mask[],
               emulator::Narrow<uint8_t> repeat, emulator::Narrow<uint16_t> dst_block,
               emulator::Narrow<uint8_t> dst_repeat) {
  emulator::duplicate(dst, scalar, {mask, repeat}, {dst_block, dst_repeat});
}

template <class T>
void CreateVecIndex(LocalTensor<T> dst, const T& first, uint32_t count) {
  emulator::create_index(dst, first, {int64_t{count}}, {});
}
template <class T>
void CreateVecIndex(LocalTensor<T> dst, const T& first, uint64_t mask,
                    emulator::Narrow<uint8_t> repeat, emulator::Narrow<uint16_t> dst_block,
                    emulator::Narrow<uint8_t> dst_repeat) {
  emulator::create_index(dst, first, {mask, repeat}, {dst_block, dst_repeat});
}
template <class T>
void CreateVecIndex(LocalTensor<T> dst, const T& first, uint64_t mask[],
                    emulator::Narrow<uint8_t> repeat, emulator::Narrow<uint16_t> dst_block,
                    emulator::Narrow<uint8_t> dst_repeat) {
  emulator::create_index(dst, first, {mask, repeat}, {dst_block, dst_repeat});
}

// Eight source elements a repeat, contiguous over the repeats; each fills one block of dst.
template <class T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, emulator::Narrow<uint8_t> repeat,
          const BrcbRepeatParams& params) {
  using namespace emulator;
  static_assert(is_movable<T>, "Brcb takes 16-bit and 32-bit types");
  Instr in("Brcb", PIPE_V);
  const int64_t repeats = uint8_t{repeat};
  const Lanes lanes = Lanes::leading(repeats, kLanesPerRepeat<T>, kLanesPerBlock<T>);
  const Operand<T> to{"dst", dst, {params.dstBlkStride, params.dstRepStride}};
  const Operand<T> from{"src", src};
  in_unified_buffer(in, to);
  in_unified_buffer(in, from);
  require_own_repeats(in, lanes, to);
  const int64_t elements = repeats * kBlocksPerRepeat;
  require_apart(in, to, extent(lanes, to), from, elements);
  const T* read = in.read(from.name, src, 0, elements);
  T* write = write_lanes(in, lanes, to);
  for (const Segment& segment : lanes.segments()) {
    const int64_t block = segment.repeat * kBlocksPerRepeat + segment.lane / kLanesPerBlock<T>;
    std::fill_n(write + to.first(segment), segment.count, read[block]);
  }
}

}  // namespace AscendC
