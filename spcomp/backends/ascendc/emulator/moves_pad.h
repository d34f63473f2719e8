// DataCopyPad: rows of any byte length between global memory and UB. On chip each row starts on a
// 32 B boundary; what fills it up to the next one is defined only in two cases (see pad_row).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "moves_copy.h"
#include "moves_params.h"
#include "moves_rows.h"

namespace AscendC {
namespace emulator {

struct PadShape {
  Rows global;    // `length` elements, without padding
  Rows chip;      // `length` elements with padding and filler, a whole number of blocks
  int64_t left;   // elements of padding before the row
  int64_t right;  // elements of padding behind it
};

// `chip_gap` counts 32 B blocks and `global_gap` bytes. Elements move whole: the emulator refuses
// the lengths that would split one, which the hardware allows and nobody needs.
template <class T>
PadShape pad_shape(Instr& instr, const DataCopyExtParams& params, int64_t chip_gap,
                   int64_t global_gap, int64_t left, int64_t right) {
  const int64_t size = sizeof(T);
  const int64_t count = params.blockCount;
  const int64_t bytes = params.blockLen;
  instr.require(count >= 1 && count <= 4095, "blockCount is %lld; it must be 1 to 4095",
                static_cast<long long>(count));
  instr.require(bytes >= 1 && bytes <= 2097151, "blockLen is %lld bytes; it must be 1 to 2097151",
                static_cast<long long>(bytes));
  instr.require(bytes % size == 0, "blockLen is %lld bytes, which splits an element of %lld bytes",
                static_cast<long long>(bytes), static_cast<long long>(size));
  instr.require(global_gap % size == 0,
                "the gap in global memory is %lld bytes, which splits an element of %lld bytes",
                static_cast<long long>(global_gap), static_cast<long long>(size));
  instr.require(params.rsv == 0, "the reserved field is %lld; it must be 0",
                static_cast<long long>(params.rsv));
  const int64_t length = bytes / size;
  const int64_t padded = ceil_to(bytes + (left + right) * size, kBlockBytes) / size;
  return {{count, length, length + global_gap / size},
          {count, padded, padded + chip_gap * elements_per_block<T>()},
          left,
          right};
}

// One row in UB: padding, data, padding, filler to the block's end.
//   no padding asked:          the filler repeats the row's first element
//   padding with isPad:        the padding is the value, the filler behind it is undefined
//   padding without isPad:     padding and filler are undefined
template <class T>
void pad_row(Instr& instr, const LocalTensor<T>& dst, int64_t first, const T* row,
             const PadShape& shape, const DataCopyPadExtParams<T>& pad) {
  const int64_t length = shape.global.length;
  const int64_t total = shape.chip.length;
  if (shape.left == 0 && shape.right == 0) {
    T* out = instr.write("dst", dst, first, total);
    std::copy(row, row + length, out);
    std::fill(out + length, out + total, row[0]);
    return;
  }
  instr.write_undefined("dst", dst, first, total);
  const int64_t lead = pad.isPad ? 0 : shape.left;
  const int64_t used = pad.isPad ? shape.left + length + shape.right : length;
  T* out = instr.write("dst", dst, first + lead, used);
  if (pad.isPad) {
    std::fill(out, out + used, pad.paddingValue);
    out += shape.left;
  }
  std::copy(row, row + length, out);
}

}  // namespace emulator

template <class T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src,
                 const DataCopyExtParams& params, const DataCopyPadExtParams<T>& pad) {
  using namespace emulator;
  Instr instr("DataCopyPad", PIPE_MTE2);
  instr.at("dst", dst, {Store::UB}, kBlockBytes);
  const int64_t left = pad.leftPadding;
  const int64_t right = pad.rightPadding;
  const int64_t most = elements_per_block<T>();
  instr.require(left <= most && right <= most,
                "padding is %lld elements left and %lld right; each side has at most 32 B, "
                "%lld elements",
                static_cast<long long>(left), static_cast<long long>(right),
                static_cast<long long>(most));
  if constexpr (sizeof(T) == 8) {
    instr.require(!pad.isPad || pad.paddingValue == T(0),
                  "the padding of a 64-bit type can only be 0");
  }
  const PadShape shape =
      pad_shape<T>(instr, params, params.dstStride, params.srcStride, left, right);
  const std::vector<const T*> rows = read_rows(instr, src, shape.global);
  for (int64_t r = 0; r < shape.chip.count; ++r) {
    pad_row(instr, dst, r * shape.chip.pitch, rows[r], shape, pad);
  }
}

template <class T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src,
                 const DataCopyExtParams& params) {
  using namespace emulator;
  Instr instr("DataCopyPad", PIPE_MTE3);
  instr.at("src", src, {Store::UB}, kBlockBytes);
  const PadShape shape = pad_shape<T>(instr, params, params.srcStride, params.dstStride, 0, 0);
  const Rows data = {shape.chip.count, shape.global.length, shape.chip.pitch};
  const std::vector<const T*> rows = read_rows(instr, src, data, true);
  for (int64_t r = 0; r < data.count; ++r) {
    put(instr, "dst", dst, r * shape.global.pitch, rows[r], data.length);
  }
}

}  // namespace AscendC
