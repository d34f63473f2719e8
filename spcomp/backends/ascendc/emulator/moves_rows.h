// What the moves share: rows of equal length, how a row reaches global memory, and overlap.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "half.h"
#include "instr.h"
#include "tensors.h"

namespace AscendC {
namespace emulator {

constexpr int64_t kBlockBytes = 32;     // the unit of on-chip addresses
constexpr int64_t kFractalBytes = 512;  // one 16-row operand tile of the cube

constexpr int64_t ceil_to(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

template <class T>
constexpr int64_t elements_per_block() {
  return kBlockBytes / static_cast<int64_t>(sizeof(T));
}

// Rows of `length` elements whose starts are `pitch` elements apart.
struct Rows {
  int64_t count;
  int64_t length;
  int64_t pitch;
};

// A float as an element; 16-bit floats round to the nearest, ties to even.
template <class T>
T element_of(float value) {
  if constexpr (std::is_same_v<T, half> || std::is_same_v<T, bfloat16_t>) {
    return T::rounded(value, RoundMode::CAST_RINT);
  } else {
    return static_cast<T>(value);
  }
}

// What an atomic add leaves; integers wrap.
template <class T>
T sum(T old, T added) {
  if constexpr (std::is_integral_v<T>) {
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<Unsigned>(old) + static_cast<Unsigned>(added));
  } else {
    return element_of<T>(static_cast<float>(old) + static_cast<float>(added));
  }
}

// Whether something has written each of `count` elements from element `first` on.
template <class T>
bool is_written(const LocalTensor<T>& tensor, int64_t first, int64_t count) {
  const int64_t size = sizeof(T);
  const int64_t byte = tensor.byte_offset() + first * size;
  return core().chip(tensor.store()).uninitialised(byte, byte + count * size) < 0;
}

// After a copy on chip: an element of dst is as undefined as the one of src that it came from.
// `from(i)` is the place within the window of src of element i of the window of dst.
template <class T, class From>
void carry_undefined(const LocalTensor<T>& dst, int64_t dst_first, const LocalTensor<T>& src,
                     int64_t src_first, int64_t count, From from) {
  if (is_written(src, src_first, count)) return;
  const int64_t size = sizeof(T);
  for (int64_t i = 0; i < count; ++i) {
    if (is_written(src, src_first + from(i), 1)) continue;
    const int64_t byte = dst.byte_offset() + (dst_first + i) * size;
    core().chip(dst.store()).poison(byte, byte + size);
  }
}

// A plain copy needs elements at multiples of their size in global memory.
template <class T>
void require_whole_elements(const Instr& instr, const char* operand,
                            const GlobalTensor<T>& tensor) {
  instr.require(tensor.byte_offset() % static_cast<int64_t>(sizeof(T)) == 0,
                "%s starts at byte %lld of its tensor, which is no multiple of an element of %d "
                "bytes",
                operand, static_cast<long long>(tensor.byte_offset()), static_cast<int>(sizeof(T)));
}

// Store one run of elements in global memory, or add it while SetAtomicAdd holds.
template <class T>
void put(Instr& instr, const char* operand, const GlobalTensor<T>& dst, int64_t first,
         const T* values, int64_t count) {
  T* out = instr.write(operand, dst, first, count);
  if (!instr.atomic_add()) {
    std::copy(values, values + count, out);
    return;
  }
  for (int64_t i = 0; i < count; ++i) out[i] = sum(out[i], values[i]);
}

// Remembers which 32 B blocks of one store an instruction has used, to find overlaps.
class BlockSet {
 public:
  // False when one of the blocks was added before.
  bool add(int64_t first, int64_t count) {
    if (static_cast<int64_t>(used_.size()) < first + count) {
      used_.resize(static_cast<size_t>(first + count));
    }
    bool fresh = true;
    for (int64_t i = first; i < first + count; ++i) {
      fresh = fresh && !used_[static_cast<size_t>(i)];
      used_[static_cast<size_t>(i)] = true;
    }
    return fresh;
  }

 private:
  std::vector<bool> used_;
};

}  // namespace emulator
}  // namespace AscendC
