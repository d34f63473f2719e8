// DataCopy with Nd2NzParams: a row-major matrix in global memory becomes NZ in L1, columns of
// 32 B blocks. Row r, block b of columns goes to b * dstNzC0Stride + r * dstNzNStride.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "moves_params.h"
#include "moves_rows.h"

namespace AscendC {
namespace emulator {

inline void check_nd2nz(Instr& instr, const Nd2NzParams& params) {
  const auto within = [&instr](const char* name, int64_t value, int64_t most) {
    instr.require(value >= 1 && value <= most, "%s is %lld; it must be 1 to %lld", name,
                  static_cast<long long>(value), static_cast<long long>(most));
  };
  within("ndNum", params.ndNum, 4095);
  within("nValue", params.nValue, 16384);
  within("dValue", params.dValue, 65535);
  within("srcDValue", params.srcDValue, 65535);
  within("dstNzC0Stride", params.dstNzC0Stride, 16384);
  within("dstNzNStride", params.dstNzNStride, 16384);
  if (params.ndNum > 1) {
    within("srcNdMatrixStride", params.srcNdMatrixStride, 65535);
    within("dstNzMatrixStride", params.dstNzMatrixStride, 65535);
  } else {
    instr.require(params.srcNdMatrixStride == 0 && params.dstNzMatrixStride == 0,
                  "the strides from matrix to matrix are %lld and %lld, but there is one matrix; "
                  "they must be 0",
                  static_cast<long long>(params.srcNdMatrixStride),
                  static_cast<long long>(params.dstNzMatrixStride));
  }
}

}  // namespace emulator

template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const Nd2NzParams& params) {
  using namespace emulator;
  Instr instr("DataCopy(Nd2Nz)", PIPE_MTE2);
  instr.at("dst", dst, {Store::L1}, kBlockBytes);
  require_whole_elements(instr, "src", src);
  check_nd2nz(instr, params);
  const int64_t matrices = params.ndNum;
  const int64_t rows = params.nValue;
  const int64_t columns = params.dValue;
  const int64_t src_pitch = params.srcDValue;
  const int64_t src_matrix = params.srcNdMatrixStride;
  const int64_t dst_matrix = params.dstNzMatrixStride;
  const int64_t width = elements_per_block<T>();
  const int64_t blocks = ceil_to(columns, width) / width;
  const int64_t block_pitch = params.dstNzC0Stride;
  const int64_t row_pitch = params.dstNzNStride;
  instr.require(matrices == 1 || dst_matrix % width == 0,
                "dstNzMatrixStride is %lld elements, which is no whole number of 32 B blocks",
                static_cast<long long>(dst_matrix));

  std::vector<const T*> source;
  for (int64_t i = 0; i < matrices * rows; ++i) {
    source.push_back(instr.read("src", src, i / rows * src_matrix + i % rows * src_pitch, columns));
  }

  BlockSet used;
  for (int64_t i = 0; i < matrices * blocks; ++i) {
    const int64_t matrix = i / blocks;
    const int64_t column = i % blocks * width;
    const int64_t taken = std::min(width, columns - column);
    const int64_t start = matrix * dst_matrix / width + i % blocks * block_pitch;
    // Rows that touch are one window; each window costs the checks of a call.
    T* out = row_pitch == 1 ? instr.write("dst", dst, start * width, rows * width) : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t place = start + r * row_pitch;
      instr.require(used.add(place, 1),
                    "row %lld, columns %lld to %lld of matrix %lld land on a block that this "
                    "copy has already written; the strides of dst are too short",
                    static_cast<long long>(r), static_cast<long long>(column),
                    static_cast<long long>(column + taken - 1), static_cast<long long>(matrix));
      T* block = out != nullptr ? out + r * width : instr.write("dst", dst, place * width, width);
      const T* values = source[static_cast<size_t>(matrix * rows + r)] + column;
      std::copy(values, values + taken, block);
      std::fill(block + taken, block + width, T());
    }
  }
}

}  // namespace AscendC
