// The memories: on-chip stores of one core, with their exact usable sizes, and the tensors in GM.
#pragma once

#include <sys/mman.h>

#include <cstring>

#include "fault.h"
#include "order.h"

namespace AscendC {
namespace emulator {

enum class Store { UB, L1, L0A, L0B, L0C, BT };

constexpr int kStores = 6;
constexpr int64_t kReservedUb = 8192;  // kept back for some vector instructions
constexpr int64_t kCacheLine = 64;
constexpr int64_t kFarthest = int64_t{1} << 48;  // no offset in GM is wider

inline const char* store_name(Store store) {
  static const char* const names[] = {"UB", "L1", "L0A", "L0B", "L0C", "the bias table"};
  return names[static_cast<int>(store)];
}

// Bytes a kernel may use. A vector core has only UB, a cube core all the others.
inline int64_t store_bytes(Store store, bool cube, bool keep_reserved_ub) {
  if (cube == (store == Store::UB)) return 0;
  switch (store) {
    case Store::UB:
      return 196352 - (keep_reserved_ub ? kReservedUb : 0);
    case Store::L1:
      return 524032;
    case Store::L0A:
      return 65536;
    case Store::L0B:
      return 65536;
    case Store::L0C:
      return 131072;
    case Store::BT:
      return 1024;
  }
  return 0;
}

// One on-chip store. Undefined bytes are 0xFF, a NaN in every floating-point type.
class Chip {
 public:
  void resize(int64_t bytes) {
    bytes_.assign(static_cast<size_t>(bytes), 0xFF);
    initialised_.assign(static_cast<size_t>((bytes + 1) / 2), 0);
    cells.resize(bytes);
  }
  int64_t bytes() const { return static_cast<int64_t>(bytes_.size()); }
  uint8_t* at(int64_t byte) { return bytes_.data() + byte; }

  void mark_initialised(int64_t first, int64_t end) { mark(first / 2, (end + 1) / 2, 1); }
  void poison(int64_t first, int64_t end) {
    std::memset(at(first), 0xFF, static_cast<size_t>(end - first));
    mark((first + 1) / 2, end / 2, 0);
  }
  // The first byte of the window that nothing has written, or -1.
  int64_t uninitialised(int64_t first, int64_t end) const {
    for (int64_t half_word = first / 2; half_word * 2 < end; ++half_word) {
      if (!initialised_[static_cast<size_t>(half_word)]) return half_word * 2;
    }
    return -1;
  }

  Cells cells;

 private:
  void mark(int64_t first_flag, int64_t end_flag, uint8_t value) {
    if (first_flag >= end_flag) return;
    std::memset(initialised_.data() + first_flag, value,
                static_cast<size_t>(end_flag - first_flag));
  }

  std::vector<uint8_t> bytes_;
  std::vector<uint8_t> initialised_;  // one flag for every two bytes
};

// A tensor in GM. It lives in its own mapping between two wide gaps, so that a wrong offset never
// lands in a neighbour and is reported against the tensor it started from.
class GmTensor {
 public:
  GmTensor(const char* name, int64_t bytes, bool read_only)
      : name(name), bytes(bytes), read_only(read_only) {
    mapped_ = static_cast<size_t>(2 * kGap + bytes);
    void* whole =
        mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (whole == MAP_FAILED) fail("no address space for the tensor '%s'", name);
    base = static_cast<uint8_t*>(whole) + kGap;
    if (bytes > 0 && mprotect(base, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE) != 0) {
      munmap(whole, mapped_);
      fail("no memory for the tensor '%s' of %lld bytes", name, static_cast<long long>(bytes));
    }
    ranges.resize(bytes);
  }
  GmTensor(const GmTensor&) = delete;
  GmTensor& operator=(const GmTensor&) = delete;
  ~GmTensor() { munmap(base - kGap, mapped_); }

  std::string name;
  int64_t bytes;
  bool read_only;
  uint8_t* base = nullptr;
  Ranges ranges;
  std::map<int64_t, int> dirty_lines;  // cache line -> core whose data cache holds its new content

 private:
  static constexpr int64_t kGap = int64_t{1} << 30;
  size_t mapped_ = 0;
};

}  // namespace emulator
}  // namespace AscendC
