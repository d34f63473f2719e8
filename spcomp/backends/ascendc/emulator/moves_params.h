// The parameter structs of data movement. Their members are as wide as the hardware's fields and
// fault on a value that does not fit, where the hardware would keep its low bits.
#pragma once

#include <cstdint>

#include "narrow.h"

namespace AscendC {

// Rows of 32 B blocks. The strides are gaps: from the end of one row to the start of the next.
struct DataCopyParams {
  DataCopyParams() = default;
  DataCopyParams(emulator::Narrow<uint16_t> count, emulator::Narrow<uint16_t> length,
                 emulator::Narrow<uint16_t> src_gap, emulator::Narrow<uint16_t> dst_gap)
      : blockCount(count), blockLen(length), srcStride(src_gap), dstStride(dst_gap) {}

  emulator::Narrow<uint16_t> blockCount = 1;  // rows
  emulator::Narrow<uint16_t> blockLen = 0;    // 32 B blocks in a row
  emulator::Narrow<uint16_t> srcStride = 0;   // 32 B blocks between two rows
  emulator::Narrow<uint16_t> dstStride = 0;   // likewise
};

// Rows of bytes. The gap counts bytes on the side of global memory and 32 B blocks on chip.
struct DataCopyExtParams {
  DataCopyExtParams() = default;
  DataCopyExtParams(emulator::Narrow<uint16_t> count, emulator::Narrow<uint32_t> length,
                    emulator::Narrow<uint32_t> src_gap, emulator::Narrow<uint32_t> dst_gap,
                    emulator::Narrow<uint32_t> reserved)
      : blockCount(count),
        blockLen(length),
        srcStride(src_gap),
        dstStride(dst_gap),
        rsv(reserved) {}

  emulator::Narrow<uint16_t> blockCount = 1;
  emulator::Narrow<uint32_t> blockLen = 0;
  emulator::Narrow<uint32_t> srcStride = 0;
  emulator::Narrow<uint32_t> dstStride = 0;
  emulator::Narrow<uint32_t> rsv = 0;
};

// What surrounds a padded row: `leftPadding` elements before it and `rightPadding` behind it.
template <class T>
struct DataCopyPadExtParams {
  DataCopyPadExtParams() = default;
  DataCopyPadExtParams(bool pad, emulator::Narrow<uint8_t> left, emulator::Narrow<uint8_t> right,
                       T value)
      : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value) {}

  bool isPad = false;
  emulator::Narrow<uint8_t> leftPadding = 0;
  emulator::Narrow<uint8_t> rightPadding = 0;
  T paddingValue = T();
};

// `ndNum` row-major matrices of nValue x dValue, each turned into columns of 32 B blocks.
struct Nd2NzParams {
  Nd2NzParams() = default;
  Nd2NzParams(emulator::Narrow<uint16_t> matrices, emulator::Narrow<uint16_t> rows,
              emulator::Narrow<uint16_t> columns, emulator::Narrow<uint16_t> src_matrix_stride,
              emulator::Narrow<uint16_t> src_row_stride, emulator::Narrow<uint16_t> dst_c0_stride,
              emulator::Narrow<uint16_t> dst_n_stride, emulator::Narrow<uint16_t> dst_matrix_stride)
      : ndNum(matrices),
        nValue(rows),
        dValue(columns),
        srcNdMatrixStride(src_matrix_stride),
        srcDValue(src_row_stride),
        dstNzC0Stride(dst_c0_stride),
        dstNzNStride(dst_n_stride),
        dstNzMatrixStride(dst_matrix_stride) {}

  emulator::Narrow<uint16_t> ndNum = 1;
  emulator::Narrow<uint16_t> nValue = 0;
  emulator::Narrow<uint16_t> dValue = 0;
  emulator::Narrow<uint16_t> srcNdMatrixStride = 0;  // elements
  emulator::Narrow<uint16_t> srcDValue = 0;          // elements from one row to the next
  emulator::Narrow<uint16_t> dstNzC0Stride = 0;      // 32 B, one column of blocks to the next
  emulator::Narrow<uint16_t> dstNzNStride = 0;       // 32 B, one row to the next
  emulator::Narrow<uint16_t> dstNzMatrixStride = 0;  // elements
};

// Fractals of 512 B from L1 to L0. srcStride is start to start, dstGap end to start.
struct LoadData2DParams {
  LoadData2DParams() = default;
  LoadData2DParams(emulator::Narrow<uint16_t> start, emulator::Narrow<uint8_t> repeat,
                   emulator::Narrow<uint16_t> src_stride, emulator::Narrow<uint8_t> set_id,
                   emulator::Narrow<uint16_t> dst_gap, bool transpose,
                   emulator::Narrow<uint8_t> address_mode)
      : startIndex(start),
        repeatTimes(repeat),
        srcStride(src_stride),
        sid(set_id),
        dstGap(dst_gap),
        ifTranspose(transpose),
        addrMode(address_mode) {}

  emulator::Narrow<uint16_t> startIndex = 0;
  emulator::Narrow<uint8_t> repeatTimes = 0;
  emulator::Narrow<uint16_t> srcStride = 0;
  emulator::Narrow<uint8_t> sid = 0;
  emulator::Narrow<uint16_t> dstGap = 0;
  bool ifTranspose = false;
  emulator::Narrow<uint8_t> addrMode = 0;
};

// The conversion on the way out of L0C.
enum QuantMode_t { NoQuant, F322F16, F322BF16 };

enum class CO2Layout : uint8_t { NZ, ROW_MAJOR };

struct FixpipeConfig {
  CO2Layout format;
};
inline constexpr FixpipeConfig CFG_NZ = {CO2Layout::NZ};
inline constexpr FixpipeConfig CFG_ROW_MAJOR = {CO2Layout::ROW_MAJOR};

struct FixpipeParamsV220 {
  FixpipeParamsV220() = default;
  FixpipeParamsV220(emulator::Narrow<uint16_t> columns, emulator::Narrow<uint16_t> rows,
                    emulator::Narrow<uint16_t> src_stride, emulator::Narrow<uint32_t> dst_stride,
                    bool relu)
      : nSize(columns), mSize(rows), srcStride(src_stride), dstStride(dst_stride), reluEn(relu) {}
  FixpipeParamsV220(emulator::Narrow<uint16_t> columns, emulator::Narrow<uint16_t> rows,
                    emulator::Narrow<uint16_t> src_stride, emulator::Narrow<uint32_t> dst_stride,
                    bool relu, QuantMode_t quant, uint64_t scale,
                    emulator::Narrow<uint16_t> matrices,
                    emulator::Narrow<uint16_t> src_matrix_stride,
                    emulator::Narrow<uint16_t> dst_matrix_stride,
                    emulator::Narrow<uint8_t> unit_flag)
      : nSize(columns),
        mSize(rows),
        srcStride(src_stride),
        dstStride(dst_stride),
        reluEn(relu),
        quantPre(quant),
        deqScalar(scale),
        ndNum(matrices),
        srcNdStride(src_matrix_stride),
        dstNdStride(dst_matrix_stride),
        unitFlag(unit_flag) {}

  emulator::Narrow<uint16_t> nSize = 0;
  emulator::Narrow<uint16_t> mSize = 0;
  emulator::Narrow<uint16_t> srcStride = 0;  // rows of 16 values between two columns of fractals
  emulator::Narrow<uint32_t> dstStride = 0;  // elements between two rows in global memory
  bool reluEn = false;
  QuantMode_t quantPre = NoQuant;
  uint64_t deqScalar = 0;
  emulator::Narrow<uint16_t> ndNum = 1;
  emulator::Narrow<uint16_t> srcNdStride = 0;
  emulator::Narrow<uint16_t> dstNdStride = 0;
  emulator::Narrow<uint8_t> unitFlag = 0;
};

}  // namespace AscendC
