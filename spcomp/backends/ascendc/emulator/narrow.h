// Members of parameter structs are 8 or 16 bits wide on the device, which drops the upper bits in
// silence. Narrow<T> holds such a member and reports the value that does not fit.
#pragma once

#include <cstdint>
#include <limits>

#include "fault.h"

namespace AscendC {
namespace emulator {

template <class T>
class Narrow {
 public:
  constexpr Narrow() = default;
  constexpr Narrow(int64_t value) : value_(static_cast<T>(value)) {
    if (value < kLeast || value > kMost) {
      fail("a parameter of %d bits was given %lld; it holds %lld to %lld",
           static_cast<int>(8 * sizeof(T)), static_cast<long long>(value),
           static_cast<long long>(kLeast), static_cast<long long>(kMost));
    }
  }
  constexpr operator T() const { return value_; }

 private:
  static constexpr int64_t kLeast = std::numeric_limits<T>::min();
  static constexpr int64_t kMost = std::numeric_limits<T>::max();
  T value_ = 0;
};

}  // namespace emulator
}  // namespace AscendC
