// Cast between element types.
//
// A repeat has as many lanes as the wider type has in 256 bytes, so the narrower operand occupies
// half of its repeat: its default repeat stride is 4 blocks. Its block stride must be 1, because
// how half-filled blocks are spread is not documented.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "half.h"
#include "vector_lanes.h"
#include "vector_math.h"
#include "vector_overlap.h"
#include "vector_params.h"

namespace AscendC {
namespace emulator {

// One conversion: `allows` says which round modes the hardware has, `of` converts one lane. A pair
// of types without a specialisation has no Cast.
template <class D, class S>
struct Conversion {
  static constexpr bool exists = false;
};

struct Widening {
  static constexpr bool exists = true;
  static bool allows(RoundMode mode) { return mode == RoundMode::CAST_NONE; }
};
struct Rounding {
  static constexpr bool exists = true;
  static bool allows(RoundMode mode) { return mode != RoundMode::CAST_ODD; }
};

template <>
struct Conversion<float, half> : Widening {
  static float of(Instr&, half value, RoundMode) { return value; }
};
template <>
struct Conversion<float, bfloat16_t> : Widening {
  static float of(Instr&, bfloat16_t value, RoundMode) { return static_cast<float>(value); }
};
template <>
struct Conversion<half, float> {
  static constexpr bool exists = true;
  static bool allows(RoundMode) { return true; }
  static half of(Instr&, float value, RoundMode mode) { return half::rounded(value, mode); }
};
template <>
struct Conversion<bfloat16_t, float> : Rounding {
  static bool allows(RoundMode mode) {
    return mode != RoundMode::CAST_ODD && mode != RoundMode::CAST_NONE;
  }
  static bfloat16_t of(Instr&, float value, RoundMode mode) {
    return bfloat16_t::rounded(value, mode);
  }
};
template <>
struct Conversion<float, int32_t> : Rounding {
  static float of(Instr&, int32_t value, RoundMode mode) { return float_of_int(value, mode); }
};
// A value without an int32 is a fault: what the hardware gives for it is not documented.
template <>
struct Conversion<int32_t, float> : Rounding {
  static int32_t of(Instr& in, float value, RoundMode mode) {
    const double rounded = whole(value, mode);
    in.require(rounded >= -2147483648.0 && rounded <= 2147483647.0,
               "the value %g of a lane has no int32", static_cast<double>(value));
    return static_cast<int32_t>(rounded);
  }
};
template <>
struct Conversion<int32_t, half> : Conversion<int32_t, float> {};
template <>
struct Conversion<int32_t, bfloat16_t> : Rounding {
  static int32_t of(Instr& in, bfloat16_t value, RoundMode mode) {
    return Conversion<int32_t, float>::of(in, static_cast<float>(value), mode);
  }
};

template <class D, class S>
void cast(const LocalTensor<D>& dst, const LocalTensor<S>& src, RoundMode mode, const Form& form,
          const UnaryRepeatParams& p) {
  using Convert = Conversion<D, S>;
  static_assert(Convert::exists, "the vector unit has no Cast between these two types");
  Instr in("Cast", PIPE_V);
  in.require(Convert::allows(mode), "the round mode %d does not exist for these types",
             static_cast<int>(mode));
  const Lanes lanes = form.lanes(in, std::min(kLanesPerRepeat<D>, kLanesPerRepeat<S>));
  const Operand<D> to{"dst", dst, {p.dstBlkStride, p.dstRepStride}};
  const Operand<S> from{"src", src, {p.srcBlkStride, p.srcRepStride}};
  in_unified_buffer(in, to);
  in_unified_buffer(in, from);
  in.require(sizeof(D) >= sizeof(S) || to.stride.block == 1,
             "the block stride of dst, the narrower operand, is not 1");
  in.require(sizeof(S) >= sizeof(D) || from.stride.block == 1,
             "the block stride of src, the narrower operand, is not 1");
  require_own_repeats(in, lanes, to);
  require_same_or_apart(in, lanes, to, from);
  const S* read = read_lanes(in, lanes, from);
  std::vector<D> results;
  for (const Segment& segment : lanes.segments()) {
    const int64_t first = from.first(segment);
    for (int64_t i = 0; i < segment.count; ++i)
      results.push_back(Convert::of(in, read[first + i], mode));
  }
  D* write = write_lanes(in, lanes, to);
  auto result = results.begin();
  for (const Segment& segment : lanes.segments()) {
    std::copy_n(result, segment.count, write + to.first(segment));
    result += segment.count;
  }
}

}  // namespace emulator

template <class D, class S>
void Cast(const LocalTensor<D>& dst, const LocalTensor<S>& src, const RoundMode& mode,
          const uint32_t count) {
  emulator::cast(dst, src, mode, {int64_t{count}}, {});
}
template <class D, class S>
void Cast(const LocalTensor<D>& dst, const LocalTensor<S>& src, const RoundMode& mode,
          const uint64_t mask, emulator::Narrow<uint8_t> repeat, const UnaryRepeatParams& params) {
  emulator::cast(dst, src, mode, {mask, repeat}, params);
}
template <class D, class S>
void Cast(const LocalTensor<D>& dst, const LocalTensor<S>& src, const RoundMode& mode,
          uint64_t mask[], emulator::Narrow<uint8_t> repeat, const UnaryRepeatParams& params) {
  emulator::cast(dst, src, mode, {mask, repeat}, params);
}

}  // namespace AscendC
