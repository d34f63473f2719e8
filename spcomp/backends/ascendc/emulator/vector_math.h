// What the arithmetic instructions compute on one lane.
//
// half computes in float and rounds once to nearest even. Integers compute in 64 bits, and a result
// outside the type is a fault, because what the hardware then gives is not documented. NaN wins
// over every number, also in Max and Min, so that poisoned lanes stay visible.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "half.h"
#include "instr.h"

namespace AscendC::emulator {

template <class T, class... Allowed>
constexpr bool is_one_of = (std::is_same_v<T, Allowed> || ...);
template <class T>
constexpr bool is_real = is_one_of<T, half, float>;
template <class T>
constexpr bool is_number = is_one_of<T, half, float, int16_t, int32_t>;
// Types that only move: by their width.
template <class T>
constexpr bool is_movable =
    is_one_of<T, half, bfloat16_t, int16_t, uint16_t, float, int32_t, uint32_t>;

// The type a lane computes in.
template <class T>
using Wide = std::conditional_t<is_real<T>, float, int64_t>;

template <class T>
T narrowed(Instr& in, Wide<T> value) {
  if constexpr (!is_real<T>) {
    const bool fits =
        value >= std::numeric_limits<T>::min() && value <= std::numeric_limits<T>::max();
    in.require(fits, "a lane's result, %lld, does not fit the %zu-bit integer type",
               static_cast<long long>(value), 8 * sizeof(T));
  }
  return static_cast<T>(value);
}

// Each instruction: the types it takes, whether its repeats may add onto one place, and one lane in
// the wide type.
struct OnNumbers {
  static constexpr bool may_accumulate = true;
  template <class T>
  static constexpr bool takes = is_number<T>;
};
struct OnReals {
  static constexpr bool may_accumulate = false;
  template <class T>
  static constexpr bool takes = is_real<T>;
};
struct OnBits {
  static constexpr bool may_accumulate = false;
  template <class T>
  static constexpr bool takes = is_one_of<T, int16_t, uint16_t>;
};

struct AddOf : OnNumbers {
  template <class W>
  static W of(W a, W b) {
    return a + b;
  }
};
struct SubOf : OnNumbers {
  template <class W>
  static W of(W a, W b) {
    return a - b;
  }
};
struct MulOf : OnNumbers {
  template <class W>
  static W of(W a, W b) {
    return a * b;
  }
};
struct MaxOf : OnNumbers {
  template <class W>
  static W of(W a, W b) {
    return a != a || a > b ? a : b;
  }
};
struct MinOf : OnNumbers {
  template <class W>
  static W of(W a, W b) {
    return a != a || a < b ? a : b;
  }
};
struct DivOf : OnReals {
  static float of(float a, float b) { return a / b; }
};

// A double result rounded once more is the correctly rounded float in all but very rare cases.
struct ExpOf : OnReals {
  static float of(float a) { return static_cast<float>(std::exp(static_cast<double>(a))); }
};
struct LnOf : OnReals {
  static float of(float a) { return static_cast<float>(std::log(static_cast<double>(a))); }
};
struct SqrtOf : OnReals {
  static float of(float a) { return std::sqrt(a); }
};
struct AbsOf : OnReals {
  static float of(float a) { return std::fabs(a); }
};
struct ReluOf : OnReals {
  static float of(float a) { return a <= 0 ? 0.0F : a; }
};
struct ReciprocalOf : OnReals {
  static float of(float a) { return 1.0F / a; }
};

struct AndOf : OnBits {
  static int64_t of(int64_t a, int64_t b) { return a & b; }
};
struct OrOf : OnBits {
  static int64_t of(int64_t a, int64_t b) { return a | b; }
};
// Flipping all 64 bits of a sign-extended value flips its low 16; unsigned values are cut back.
struct NotOf : OnBits {
  static int64_t of(int64_t a) { return ~a; }
};

// One lane of T: computed wide, then narrowed.
template <class Of, class T>
T lane(Instr& in, T a) {
  if constexpr (std::is_same_v<T, uint16_t>)
    return static_cast<T>(Of::of(a));
  else
    return narrowed<T>(in, Of::of(static_cast<Wide<T>>(a)));
}
template <class Of, class T>
T lane(Instr& in, T a, T b) {
  return narrowed<T>(in, Of::of(static_cast<Wide<T>>(a), static_cast<Wide<T>>(b)));
}

}  // namespace AscendC::emulator
