// Fixpipe, row-major: an L0C tile leaves its fractals and goes to global memory row by row, with
// the rectifier and the conversion applied on the way.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "half.h"
#include "moves_params.h"
#include "moves_rows.h"

namespace AscendC {
namespace emulator {

template <class Out, class In>
constexpr bool fixpipe_converts() {
  if constexpr (std::is_same_v<In, float>) {
    return std::is_same_v<Out, float> || std::is_same_v<Out, half> ||
           std::is_same_v<Out, bfloat16_t>;
  }
  return std::is_same_v<In, int32_t> && std::is_same_v<Out, int32_t>;
}

// The only quantPre that turns the type of L0C into Out.
template <class Out>
constexpr QuantMode_t quant_for() {
  if constexpr (std::is_same_v<Out, half>) return F322F16;
  if constexpr (std::is_same_v<Out, bfloat16_t>) return F322BF16;
  return NoQuant;
}

inline const char* quant_name(QuantMode_t mode) {
  return mode == F322F16 ? "F322F16" : mode == F322BF16 ? "F322BF16" : "NoQuant";
}

inline void check_fixpipe(Instr& instr, const FixpipeParamsV220& params, QuantMode_t needed) {
  const long long columns = params.nSize;
  const long long rows = params.mSize;
  const long long src_stride = params.srcStride;
  const long long dst_stride = params.dstStride;
  instr.require(columns >= 16 && columns <= 4095 && columns % 16 == 0,
                "nSize is %lld; it must be a multiple of 16 up to 4095", columns);
  instr.require(rows >= 1 && rows <= 8192, "mSize is %lld; it must be 1 to 8192", rows);
  instr.require(src_stride % 16 == 0 && src_stride >= rows,
                "srcStride is %lld with mSize %lld; it must be the tile's rows rounded up to 16",
                src_stride, rows);
  instr.require(rows == 1 || dst_stride >= columns,
                "dstStride is %lld with nSize %lld; the rows would overwrite each other",
                dst_stride, columns);
  instr.require(params.quantPre == needed, "quantPre is %s; these element types need %s",
                quant_name(params.quantPre), quant_name(needed));
  instr.require(params.ndNum == 1, "ndNum is %d; only 1 is emulated",
                static_cast<int>(params.ndNum));
  instr.require(params.unitFlag == 0, "unitFlag is %d; only 0 is emulated",
                static_cast<int>(params.unitFlag));
}

}  // namespace emulator

template <class T, class U, const FixpipeConfig& config = CFG_ROW_MAJOR>
void Fixpipe(const GlobalTensor<T>& dst, const LocalTensor<U>& src,
             const FixpipeParamsV220& params) {
  using namespace emulator;
  static_assert(config.format == CO2Layout::ROW_MAJOR, "only row-major output is emulated");
  static_assert(fixpipe_converts<T, U>(), "Fixpipe has no conversion between these types");
  constexpr int64_t kL0CAlignBytes = 64;
  constexpr int64_t kWidth = 16;  // columns of one fractal

  Instr instr("Fixpipe", PIPE_FIX);
  instr.at("src", src, {Store::L0C}, kL0CAlignBytes);
  require_whole_elements(instr, "dst", dst);
  check_fixpipe(instr, params, quant_for<T>());
  const int64_t rows = params.mSize;
  const int64_t columns = params.nSize;
  const int64_t column_pitch = static_cast<int64_t>(params.srcStride) * kWidth;

  std::vector<const U*> strips;  // 16 columns each, all rows
  for (int64_t c = 0; c < columns; c += kWidth) {
    strips.push_back(instr.read("src", src, c / kWidth * column_pitch, rows * kWidth, true));
  }
  std::vector<T> line(static_cast<size_t>(columns));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      U value = strips[static_cast<size_t>(c / kWidth)][r * kWidth + c % kWidth];
      // Written so that a NaN stays one.
      if (params.reluEn && value < U(0)) value = U(0);
      if constexpr (std::is_same_v<T, U>) {
        line[static_cast<size_t>(c)] = value;
      } else {
        line[static_cast<size_t>(c)] = element_of<T>(value);
      }
    }
    put(instr, "dst", dst, r * static_cast<int64_t>(params.dstStride), line.data(), columns);
  }
}

}  // namespace AscendC
