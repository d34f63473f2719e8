// Add to Min on two tensors, Adds to Mins on a tensor and a scalar, Exp to Reciprocal on one
// tensor, And, Or and Not on bits: each in the count form and in both mask forms.
#pragma once

#include <cstdint>

#include "vector_lanes.h"
#include "vector_math.h"
#include "vector_overlap.h"
#include "vector_params.h"

namespace AscendC {
namespace emulator {

// Whether a repeat adds onto the result of the one before it: dst and src1 stay in one place.
template <class T>
bool accumulates(const Lanes& lanes, const Operand<T>& dst, const Operand<T>& src1) {
  return lanes.repeats() > 1 && dst.tensor.store() == src1.tensor.store() &&
         dst.tensor.byte_offset() == src1.tensor.byte_offset() && dst.stride.repeat == 0 &&
         src1.stride.repeat == 0 && dst.stride.block == src1.stride.block;
}

// The lanes are computed in order, repeat by repeat, which the accumulating form relies on.
template <class Of, class T>
void binary(Instr& in, const Lanes& lanes, const Operand<T>& dst, const Operand<T>& src0,
            const Operand<T>& src1) {
  in_unified_buffer(in, dst);
  in_unified_buffer(in, src0);
  in_unified_buffer(in, src1);
  if (Of::may_accumulate && accumulates(lanes, dst, src1)) {
    require_own_blocks(in, lanes, dst);
    require_apart(in, dst, extent(lanes, dst), src0, extent(lanes, src0));
  } else {
    require_own_repeats(in, lanes, dst);
    require_same_or_apart(in, lanes, dst, src0);
    require_same_or_apart(in, lanes, dst, src1);
  }
  const T* a = read_lanes(in, lanes, src0);
  const T* b = read_lanes(in, lanes, src1);
  T* out = write_lanes(in, lanes, dst);
  for (const Segment& segment : lanes.segments()) {
    const int64_t to = dst.first(segment);
    const int64_t from0 = src0.first(segment);
    const int64_t from1 = src1.first(segment);
    for (int64_t i = 0; i < segment.count; ++i)
      out[to + i] = lane<Of>(in, a[from0 + i], b[from1 + i]);
  }
}

template <class T, class Lane>
void unary(Instr& in, const Lanes& lanes, const Operand<T>& dst, const Operand<T>& src,
           Lane one_lane) {
  in_unified_buffer(in, dst);
  in_unified_buffer(in, src);
  require_own_repeats(in, lanes, dst);
  require_same_or_apart(in, lanes, dst, src);
  const T* from = read_lanes(in, lanes, src);
  T* to = write_lanes(in, lanes, dst);
  for (const Segment& segment : lanes.segments()) {
    const int64_t write = dst.first(segment);
    const int64_t read = src.first(segment);
    for (int64_t i = 0; i < segment.count; ++i) to[write + i] = one_lane(from[read + i]);
  }
}

template <class Of, class T>
void binary_instruction(const char* api, const LocalTensor<T>& dst, const LocalTensor<T>& src0,
                        const LocalTensor<T>& src1, const Form& form, const BinaryRepeatParams& p) {
  static_assert(Of::template takes<T>, "the vector unit lacks this instruction for this type");
  Instr in(api, PIPE_V);
  const Lanes lanes = form.lanes(in, kLanesPerRepeat<T>);
  binary<Of, T>(in, lanes, {"dst", dst, {p.dstBlkStride, p.dstRepStride}},
                {"src0", src0, {p.src0BlkStride, p.src0RepStride}},
                {"src1", src1, {p.src1BlkStride, p.src1RepStride}});
}

template <class Of, class T>
void scalar_instruction(const char* api, const LocalTensor<T>& dst, const LocalTensor<T>& src,
                        const T& scalar, const Form& form, const UnaryRepeatParams& p) {
  static_assert(Of::template takes<T>, "the vector unit lacks this instruction for this type");
  Instr in(api, PIPE_V);
  const Lanes lanes = form.lanes(in, kLanesPerRepeat<T>);
  unary<T>(in, lanes, {"dst", dst, {p.dstBlkStride, p.dstRepStride}},
           {"src", src, {p.srcBlkStride, p.srcRepStride}},
           [&](T value) { return lane<Of>(in, value, scalar); });
}

template <class Of, class T>
void unary_instruction(const char* api, const LocalTensor<T>& dst, const LocalTensor<T>& src,
                       const Form& form, const UnaryRepeatParams& p) {
  static_assert(Of::template takes<T>, "the vector unit lacks this instruction for this type");
  Instr in(api, PIPE_V);
  const Lanes lanes = form.lanes(in, kLanesPerRepeat<T>);
  unary<T>(in, lanes, {"dst", dst, {p.dstBlkStride, p.dstRepStride}},
           {"src", src, {p.srcBlkStride, p.srcRepStride}},
           [&](T value) { return lane<Of>(in, value); });
}

}  // namespace emulator

// The forms are spelt out, not variadic, so that `{1, 1, 1, 8, 8, 8}` finds its parameter struct.
#define ASCENDC_BINARY(Name, Of)                                                                   \
  template <class T>                                                                               \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,     \
            const int32_t& count) {                                                                \
    emulator::binary_instruction<emulator::Of>(#Name, dst, src0, src1, {int64_t{count}}, {});      \
  }                                                                                                \
  template <class T>                                                                               \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,     \
            uint64_t mask, emulator::Narrow<uint8_t> repeat, const BinaryRepeatParams& params) {   \
    emulator::binary_instruction<emulator::Of>(#Name, dst, src0, src1, {mask, repeat}, params);    \
  }                                                                                                \
  template <class T>                                                                               \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,     \
            uint64_t mask[], emulator::Narrow<uint8_t> repeat, const BinaryRepeatParams& params) { \
    emulator::binary_instruction<emulator::Of>(#Name, dst, src0, src1, {mask, repeat}, params);    \
  }

#define ASCENDC_SCALAR(Name, Of)                                                                  \
  template <class T>                                                                              \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar,                \
            const int32_t& count) {                                                               \
    emulator::scalar_instruction<emulator::Of>(#Name, dst, src, scalar, {int64_t{count}}, {});    \
  }                                                                                               \
  template <class T>                                                                              \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, uint64_t mask, \
            emulator::Narrow<uint8_t> repeat, const UnaryRepeatParams& params) {                  \
    emulator::scalar_instruction<emulator::Of>(#Name, dst, src, scalar, {mask, repeat}, params);  \
  }                                                                                               \
  template <class T>                                                                              \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar,                \
            uint64_t mask[], emulator::Narrow<uint8_t> repeat, const UnaryRepeatParams& params) { \
    emulator::scalar_instruction<emulator::Of>(#Name, dst, src, scalar, {mask, repeat}, params);  \
  }

#define ASCENDC_UNARY(Name, Of)                                                           \
  template <class T>                                                                      \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count) { \
    emulator::unary_instruction<emulator::Of>(#Name, dst, src, {int64_t{count}}, {});     \
  }                                                                                       \
  template <class T>                                                                      \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask,          \
            emulator::Narrow<uint8_t> repeat, const UnaryRepeatParams& params) {          \
    emulator::unary_instruction<emulator::Of>(#Name, dst, src, {mask, repeat}, params);   \
  }                                                                                       \
  template <class T>                                                                      \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask[],        \
            emulator::Narrow<uint8_t> repeat, const UnaryRepeatParams& params) {          \
    emulator::unary_instruction<emulator::Of>(#Name, dst, src, {mask, repeat}, params);   \
  }

ASCENDC_BINARY(Add, AddOf)
ASCENDC_BINARY(Sub, SubOf)
ASCENDC_BINARY(Mul, MulOf)
ASCENDC_BINARY(Div, DivOf)
ASCENDC_BINARY(Max, MaxOf)
ASCENDC_BINARY(Min, MinOf)
ASCENDC_BINARY(And, AndOf)
ASCENDC_BINARY(Or, OrOf)

ASCENDC_SCALAR(Adds, AddOf)
ASCENDC_SCALAR(Muls, MulOf)
ASCENDC_SCALAR(Maxs, MaxOf)
ASCENDC_SCALAR(Mins, MinOf)

ASCENDC_UNARY(Exp, ExpOf)
ASCENDC_UNARY(Ln, LnOf)
ASCENDC_UNARY(Abs, AbsOf)
ASCENDC_UNARY(Sqrt, SqrtOf)
ASCENDC_UNARY(Relu, ReluOf)
ASCENDC_UNARY(Reciprocal, ReciprocalOf)
ASCENDC_UNARY(Not, NotOf)

#undef ASCENDC_BINARY
#undef ASCENDC_SCALAR
#undef ASCENDC_UNARY

}  // namespace AscendC
