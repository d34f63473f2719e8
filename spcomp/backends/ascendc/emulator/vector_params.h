// The parameter structs and enumerations of the vector instructions.
//
// Strides count 32-byte blocks. A field is as narrow as the hardware's and faults when a value does
// not fit. The constructors take all fields or none, as the real ones do.
#pragma once

#include <cstdint>

#include "narrow.h"
#include "tensors.h"

namespace AscendC {

enum class CMPMODE { LT, GT, EQ, LE, GE, NE };

enum class SELMODE {
  VSEL_CMPMASK_SPR,         // every repeat reads the same first 256 B worth of mask bits
  VSEL_TENSOR_SCALAR_MODE,  // bit 0 takes a scalar
  VSEL_TENSOR_TENSOR_MODE,  // bit 0 takes the second tensor
};

enum class ReduceOrder { ORDER_VALUE_INDEX, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };

struct UnaryRepeatParams {
  using Wide = emulator::Narrow<uint16_t>;
  using Small = emulator::Narrow<uint8_t>;

  UnaryRepeatParams() = default;
  UnaryRepeatParams(Wide dst_block, Wide src_block, Small dst_repeat, Small src_repeat)
      : dstBlkStride(dst_block),
        srcBlkStride(src_block),
        dstRepStride(dst_repeat),
        srcRepStride(src_repeat) {}

  Wide dstBlkStride = 1;
  Wide srcBlkStride = 1;
  Small dstRepStride = 8;
  Small srcRepStride = 8;
};

struct BinaryRepeatParams {
  using Small = emulator::Narrow<uint8_t>;

  BinaryRepeatParams() = default;
  BinaryRepeatParams(Small dst_block, Small src0_block, Small src1_block, Small dst_repeat,
                     Small src0_repeat, Small src1_repeat)
      : dstBlkStride(dst_block),
        src0BlkStride(src0_block),
        src1BlkStride(src1_block),
        dstRepStride(dst_repeat),
        src0RepStride(src0_repeat),
        src1RepStride(src1_repeat) {}

  Small dstBlkStride = 1;
  Small src0BlkStride = 1;
  Small src1BlkStride = 1;
  Small dstRepStride = 8;
  Small src0RepStride = 8;
  Small src1RepStride = 8;
};

struct BrcbRepeatParams {
  using Wide = emulator::Narrow<uint16_t>;

  BrcbRepeatParams() = default;
  BrcbRepeatParams(Wide dst_block, Wide dst_repeat)
      : dstBlkStride(dst_block), dstRepStride(dst_repeat) {}

  Wide dstBlkStride = 1;
  Wide dstRepStride = 8;
};

struct GatherMaskParams {
  using Wide = emulator::Narrow<uint16_t>;
  using Small = emulator::Narrow<uint8_t>;

  GatherMaskParams() = default;
  GatherMaskParams(Small src0_block, Wide repeat, Wide src0_repeat, Small src1_repeat)
      : src0BlockStride(src0_block),
        repeatTimes(repeat),
        src0RepeatStride(src0_repeat),
        src1RepeatStride(src1_repeat) {}

  Small src0BlockStride = 1;
  Wide repeatTimes = 0;
  Wide src0RepeatStride = 0;
  Small src1RepeatStride = 0;
};

// Lengths count (score, index) pairs. validBit has one bit per list in use.
struct MrgSort4Info {
  using Wide = emulator::Narrow<uint16_t>;
  using Small = emulator::Narrow<uint8_t>;

  MrgSort4Info() = default;
  MrgSort4Info(const uint16_t lengths[4], bool suspend, Wide valid, Small repeat)
      : ifExhaustedSuspension(suspend), validBit(valid), repeatTimes(repeat) {
    for (int i = 0; i < 4; ++i) elementLengths[i] = lengths[i];
  }

  Wide elementLengths[4] = {0, 0, 0, 0};
  bool ifExhaustedSuspension = false;
  Wide validBit = 0;
  Small repeatTimes = 1;
};

template <class T>
struct MrgSortSrcList {
  MrgSortSrcList() = default;
  MrgSortSrcList(const LocalTensor<T>& first, const LocalTensor<T>& second,
                 const LocalTensor<T>& third, const LocalTensor<T>& fourth)
      : src1(first), src2(second), src3(third), src4(fourth) {}

  LocalTensor<T> src1;
  LocalTensor<T> src2;
  LocalTensor<T> src3;
  LocalTensor<T> src4;
};

}  // namespace AscendC
