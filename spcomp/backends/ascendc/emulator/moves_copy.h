// DataCopy without conversion: global memory to chip (MTE2), UB to global memory (MTE3), UB to UB
// (V).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "moves_params.h"
#include "moves_rows.h"

namespace AscendC {
namespace emulator {

struct CopyShape {
  Rows src;
  Rows dst;
};

// The two sides of a DataCopyParams in elements.
template <class T>
CopyShape copy_shape(Instr& instr, const DataCopyParams& params) {
  const int64_t count = params.blockCount;
  const int64_t blocks = params.blockLen;
  instr.require(count >= 1 && count <= 4095, "blockCount is %lld; it must be 1 to 4095",
                static_cast<long long>(count));
  instr.require(blocks >= 1, "blockLen is 0; a row has at least one block of 32 B");
  const int64_t unit = elements_per_block<T>();
  const int64_t length = blocks * unit;
  return {{count, length, length + int64_t(params.srcStride) * unit},
          {count, length, length + int64_t(params.dstStride) * unit}};
}

// One run of `count` elements; the hardware would round a broken block down and lose the tail.
template <class T>
CopyShape copy_run(Instr& instr, int64_t count) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  instr.require(bytes > 0 && bytes % kBlockBytes == 0,
                "%lld elements are %lld bytes; a plain copy moves whole blocks of 32 B "
                "(use DataCopyPad for a ragged row)",
                static_cast<long long>(count), static_cast<long long>(bytes));
  return {{1, count, count}, {1, count, count}};
}

template <class T>
std::vector<const T*> read_rows(Instr& instr, const LocalTensor<T>& src, const Rows& rows,
                                bool must_be_initialised) {
  std::vector<const T*> starts;
  for (int64_t r = 0; r < rows.count; ++r) {
    starts.push_back(instr.read("src", src, r * rows.pitch, rows.length, must_be_initialised));
  }
  return starts;
}

template <class T>
std::vector<const T*> read_rows(Instr& instr, const GlobalTensor<T>& src, const Rows& rows) {
  std::vector<const T*> starts;
  for (int64_t r = 0; r < rows.count; ++r) {
    starts.push_back(instr.read("src", src, r * rows.pitch, rows.length));
  }
  return starts;
}

template <class T>
void copy_in(Instr& instr, const LocalTensor<T>& dst, const GlobalTensor<T>& src,
             const CopyShape& shape) {
  instr.at("dst", dst, {Store::UB, Store::L1}, kBlockBytes);
  require_whole_elements(instr, "src", src);
  const std::vector<const T*> rows = read_rows(instr, src, shape.src);
  for (int64_t r = 0; r < shape.dst.count; ++r) {
    T* out = instr.write("dst", dst, r * shape.dst.pitch, shape.dst.length);
    std::copy(rows[r], rows[r] + shape.dst.length, out);
  }
}

template <class T>
void copy_out(Instr& instr, const GlobalTensor<T>& dst, const LocalTensor<T>& src,
              const CopyShape& shape) {
  instr.at("src", src, {Store::UB}, kBlockBytes);
  require_whole_elements(instr, "dst", dst);
  const std::vector<const T*> rows = read_rows(instr, src, shape.src, true);
  for (int64_t r = 0; r < shape.dst.count; ++r) {
    put(instr, "dst", dst, r * shape.dst.pitch, rows[r], shape.dst.length);
  }
}

// The rows of both sides may interleave, but no block may be read and written.
template <class T>
void require_disjoint(Instr& instr, const LocalTensor<T>& dst, const LocalTensor<T>& src,
                      const CopyShape& shape) {
  const auto block = [](const LocalTensor<T>& tensor, int64_t element) {
    return (static_cast<int64_t>(tensor.byte_offset()) +
            element * static_cast<int64_t>(sizeof(T))) /
           kBlockBytes;
  };
  const int64_t length = shape.src.length / elements_per_block<T>();
  BlockSet used;
  for (int64_t r = 0; r < shape.src.count; ++r) {
    used.add(block(src, r * shape.src.pitch), length);
  }
  for (int64_t r = 0; r < shape.dst.count; ++r) {
    instr.require(used.add(block(dst, r * shape.dst.pitch), length),
                  "row %lld of dst overlaps src; a copy within UB needs disjoint rows",
                  static_cast<long long>(r));
  }
}

template <class T>
void copy_within(Instr& instr, const LocalTensor<T>& dst, const LocalTensor<T>& src,
                 const CopyShape& shape) {
  instr.at("dst", dst, {Store::UB}, kBlockBytes);
  instr.at("src", src, {Store::UB}, kBlockBytes);
  require_disjoint(instr, dst, src, shape);
  const std::vector<const T*> rows = read_rows(instr, src, shape.src, false);
  for (int64_t r = 0; r < shape.dst.count; ++r) {
    T* out = instr.write("dst", dst, r * shape.dst.pitch, shape.dst.length);
    std::copy(rows[r], rows[r] + shape.dst.length, out);
    carry_undefined(dst, r * shape.dst.pitch, src, r * shape.src.pitch, shape.dst.length,
                    [](int64_t i) { return i; });
  }
}

}  // namespace emulator

template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count) {
  emulator::Instr instr("DataCopy", PIPE_MTE2);
  emulator::copy_in(instr, dst, src, emulator::copy_run<T>(instr, count));
}

template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& params) {
  emulator::Instr instr("DataCopy", PIPE_MTE2);
  emulator::copy_in(instr, dst, src, emulator::copy_shape<T>(instr, params));
}

template <class T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count) {
  emulator::Instr instr("DataCopy", PIPE_MTE3);
  emulator::copy_out(instr, dst, src, emulator::copy_run<T>(instr, count));
}

template <class T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params) {
  emulator::Instr instr("DataCopy", PIPE_MTE3);
  emulator::copy_out(instr, dst, src, emulator::copy_shape<T>(instr, params));
}

template <class T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count) {
  emulator::Instr instr("DataCopy", PIPE_V);
  emulator::copy_within(instr, dst, src, emulator::copy_run<T>(instr, count));
}

template <class T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params) {
  emulator::Instr instr("DataCopy", PIPE_V);
  emulator::copy_within(instr, dst, src, emulator::copy_shape<T>(instr, params));
}

}  // namespace AscendC
