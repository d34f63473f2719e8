// The 16-bit float types and every rounding of the Cast instruction, bit by bit.
//
// half computes through float: float holds every sum, product, quotient and root of two halves
// exactly enough that rounding twice equals rounding once. bfloat16_t has no arithmetic at all,
// because the vector unit has none: such code must not compile.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace AscendC {

enum class RoundMode {
  CAST_NONE,   // the nearest value, ties to even, where the conversion loses bits
  CAST_RINT,   // the nearest value, ties to even
  CAST_FLOOR,  // towards minus infinity
  CAST_CEIL,   // towards plus infinity
  CAST_ROUND,  // the nearest value, ties away from zero
  CAST_TRUNC,  // towards zero
  CAST_ODD,    // an inexact value takes the neighbour whose last bit is one
};

namespace emulator {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Whether a magnitude cut to `kept` moves one up; `rest` is what was cut and `half` its midpoint.
inline bool rounds_up(RoundMode mode, bool negative, uint64_t kept, uint64_t rest, uint64_t half) {
  if (rest == 0) return false;
  switch (mode) {
    case RoundMode::CAST_FLOOR:
      return negative;
    case RoundMode::CAST_CEIL:
      return !negative;
    case RoundMode::CAST_TRUNC:
      return false;
    case RoundMode::CAST_ROUND:
      return rest >= half;
    case RoundMode::CAST_ODD:
      return (kept & 1) == 0;
    case RoundMode::CAST_NONE:
    case RoundMode::CAST_RINT:
      break;
  }
  return rest > half || (rest == half && (kept & 1) != 0);
}

inline uint64_t shift_right(uint64_t magnitude, unsigned shift, RoundMode mode, bool negative) {
  if (shift == 0) return magnitude;
  const uint64_t kept = magnitude >> shift;
  const uint64_t rest = magnitude - (kept << shift);
  return kept + (rounds_up(mode, negative, kept, rest, uint64_t{1} << (shift - 1)) ? 1 : 0);
}

// A carry out of the mantissa runs into the exponent, which is what rounding to the next power of
// two (and, from the largest finite value, to infinity) means.
inline uint16_t half_bits(float value, RoundMode mode) {
  const uint32_t bits = bits_of(value);
  const bool negative = (bits >> 31) != 0;
  const uint32_t sign = negative ? 0x8000U : 0U;
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return static_cast<uint16_t>(sign | 0x7E00U);
  if (magnitude >= 0x47800000U) return static_cast<uint16_t>(sign | 0x7C00U);  // 65536 and above
  const int exponent = static_cast<int>(magnitude >> 23);
  if (exponent >= 113) {  // 2^-14 and above: a normal half
    const uint64_t shifted = magnitude - (uint32_t{112} << 23);
    return static_cast<uint16_t>(sign | shift_right(shifted, 13, mode, negative));
  }
  if (magnitude == 0) return static_cast<uint16_t>(sign);
  // Below that the unit is 2^-24. A float subnormal lies far under the midpoint of the first unit,
  // so any shift that leaves nothing of it rounds it the same.
  const uint64_t mantissa = exponent == 0 ? magnitude : (magnitude & 0x7FFFFFU) | 0x800000U;
  const int shift = 126 - (exponent == 0 ? 1 : exponent);
  const unsigned cut = shift > 40 ? 40U : static_cast<unsigned>(shift);
  return static_cast<uint16_t>(sign | shift_right(mantissa, cut, mode, negative));
}

inline float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t exponent = (half >> 10) & 0x1FU;
  const uint32_t mantissa = half & 0x3FFU;
  if (exponent == 31) return float_of(sign | 0x7F800000U | (mantissa << 13));
  if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  return sign != 0 ? -magnitude : magnitude;
}

inline uint16_t bfloat16_bits(float value, RoundMode mode) {
  const uint32_t bits = bits_of(value);
  const bool negative = (bits >> 31) != 0;
  const uint32_t sign = negative ? 0x8000U : 0U;
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return static_cast<uint16_t>(sign | 0x7FC0U);
  return static_cast<uint16_t>(sign | shift_right(magnitude, 16, mode, negative));
}

// The integer nearest to `value` in the given direction; `value` is finite.
inline double whole(double value, RoundMode mode) {
  switch (mode) {
    case RoundMode::CAST_FLOOR:
      return std::floor(value);
    case RoundMode::CAST_CEIL:
      return std::ceil(value);
    case RoundMode::CAST_TRUNC:
      return std::trunc(value);
    case RoundMode::CAST_ROUND:
      return std::round(value);
    case RoundMode::CAST_ODD:
    case RoundMode::CAST_NONE:
    case RoundMode::CAST_RINT:
      break;
  }
  const double below = std::floor(value);
  const double rest = value - below;
  if (rest != 0.5) return rest < 0.5 ? below : below + 1;
  return std::fmod(below, 2.0) == 0.0 ? below : below + 1;
}

// int32 to float: 24 bits of the magnitude stay.
inline float float_of_int(int32_t value, RoundMode mode) {
  const bool negative = value < 0;
  uint64_t magnitude = static_cast<uint64_t>(negative ? -static_cast<int64_t>(value) : value);
  unsigned shift = 0;
  while ((magnitude >> shift) >= (uint64_t{1} << 24)) ++shift;
  magnitude = shift_right(magnitude, shift, mode, negative);
  const float result = std::ldexp(static_cast<float>(magnitude), static_cast<int>(shift));
  return negative ? -result : result;
}

}  // namespace emulator

class half {
 public:
  half() = default;
  template <class N, class = std::enable_if_t<std::is_arithmetic_v<N>>>
  half(N number) : bits_(emulator::half_bits(static_cast<float>(number), RoundMode::CAST_RINT)) {}

  static half rounded(float value, RoundMode mode) {
    return from_bits(emulator::half_bits(value, mode));
  }
  static half from_bits(uint16_t bits) {
    half result;
    result.bits_ = bits;
    return result;
  }

  operator float() const { return emulator::float_of_half(bits_); }
  uint16_t bits() const { return bits_; }

 private:
  uint16_t bits_;
};

class bfloat16_t {
 public:
  bfloat16_t() = default;

  static bfloat16_t rounded(float value, RoundMode mode) {
    return from_bits(emulator::bfloat16_bits(value, mode));
  }
  static bfloat16_t from_bits(uint16_t bits) {
    bfloat16_t result;
    result.bits_ = bits;
    return result;
  }

  explicit operator float() const { return emulator::float_of(static_cast<uint32_t>(bits_) << 16); }
  uint16_t bits() const { return bits_; }

 private:
  uint16_t bits_;
};

static_assert(sizeof(half) == 2 && std::is_trivially_copyable_v<half>);
static_assert(sizeof(bfloat16_t) == 2 && std::is_trivially_copyable_v<bfloat16_t>);

}  // namespace AscendC

// The device compiler knows both names without a namespace.
using AscendC::bfloat16_t;
using AscendC::half;
