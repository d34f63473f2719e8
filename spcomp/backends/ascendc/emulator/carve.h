// Who owns which bytes of the on-chip stores: where a position lies, and what is given out so far.
#pragma once

#include "tensors.h"

namespace AscendC {

using QuePosition = TPosition;

enum class Hardware { GM, UB, L1, L0A, L0B, L0C, BIAS, FIXBUF };

namespace emulator {

constexpr Store store_of(TPosition position) {
  switch (position) {
    case TPosition::A1:
    case TPosition::B1:
    case TPosition::C1:
      return Store::L1;
    case TPosition::A2:
      return Store::L0A;
    case TPosition::B2:
      return Store::L0B;
    case TPosition::C2:
      return Store::BT;
    case TPosition::CO1:
      return Store::L0C;
    default:
      return Store::UB;
  }
}

constexpr Store store_of(Hardware hardware) {
  switch (hardware) {
    case Hardware::L1:
      return Store::L1;
    case Hardware::L0A:
      return Store::L0A;
    case Hardware::L0B:
      return Store::L0B;
    case Hardware::L0C:
      return Store::L0C;
    case Hardware::BIAS:
      return Store::BT;
    default:
      return Store::UB;
  }
}

inline const char* position_name(TPosition position) {
  static const char* const names[] = {"GM", "A1",  "A2",  "B1",    "B2",     "C1",
                                      "C2", "CO1", "CO2", "VECIN", "VECOUT", "VECCALC"};
  return names[static_cast<int>(position)];
}

constexpr bool is_on_chip(TPosition position) {
  return position != TPosition::GM && position != TPosition::CO2;
}

constexpr bool is_queue_position(TPosition position) {
  switch (position) {
    case TPosition::VECIN:
    case TPosition::VECOUT:
    case TPosition::A1:
    case TPosition::B1:
    case TPosition::C1:
    case TPosition::A2:
    case TPosition::B2:
    case TPosition::C2:
    case TPosition::CO1:
      return true;
    default:
      return false;
  }
}

constexpr pipe_t producer_of(TPosition position) {
  switch (position) {
    case TPosition::VECOUT:
      return PIPE_V;
    case TPosition::A2:
    case TPosition::B2:
    case TPosition::C2:
      return PIPE_MTE1;
    case TPosition::CO1:
      return PIPE_M;
    default:
      return PIPE_MTE2;
  }
}

constexpr pipe_t consumer_of(TPosition position) {
  switch (position) {
    case TPosition::VECIN:
      return PIPE_V;
    case TPosition::VECOUT:
      return PIPE_MTE3;
    case TPosition::A2:
    case TPosition::B2:
    case TPosition::C2:
      return PIPE_M;
    case TPosition::CO1:
      return PIPE_FIX;
    default:
      return PIPE_MTE1;
  }
}

// Takes the next bytes of a store; `owner` keeps TPipe and LocalMemAllocator from sharing one.
inline int64_t carve(const char* owner, const char* what, Store store, int64_t bytes, int64_t& used,
                     std::string& parts) {
  Core& me = core();
  Plan& plan = me.plans[static_cast<int>(store)];
  if (plan.owner && plan.owner != owner) {
    fail("%s gives out %s, which %s gives out already", owner, store_name(store), plan.owner);
  }
  plan.owner = owner;
  const int64_t first = used;
  used += bytes;
  parts += text("%s%s %lld", parts.empty() ? "" : " + ", what, static_cast<long long>(bytes));
  if (used > me.chip(store).bytes()) {
    fail("%s overflows %s: %s = %lld bytes, and it has %lld", owner, store_name(store),
         parts.c_str(), static_cast<long long>(used),
         static_cast<long long>(me.chip(store).bytes()));
  }
  return first;
}

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

inline int add_buffer(Store store, const char* what, int64_t bytes) {
  if (bytes <= 0) fail("InitBuffer: %s is given %lld bytes", what, static_cast<long long>(bytes));
  Core& me = core();
  Plan& plan = me.plans[static_cast<int>(store)];
  Buffer buffer;
  buffer.store = store;
  buffer.bytes = round_up(bytes, 32);
  buffer.first_byte = carve("TPipe", what, store, buffer.bytes, plan.used, plan.parts);
  me.buffers.push_back(buffer);
  return static_cast<int>(me.buffers.size()) - 1;
}

template <class T>
LocalTensor<T> tensor_of(int index, int64_t byte_offset, int64_t bytes) {
  const Buffer& buffer = core().buffers[static_cast<size_t>(index)];
  return LocalTensor<T>(buffer.store, buffer.first_byte + byte_offset, bytes, index,
                        buffer.generation);
}

}  // namespace emulator

// Gives out a store from its first byte on, without queues; the kernel sets its own flags.
template <Hardware hardware = Hardware::UB>
class LocalMemAllocator {
 public:
  template <class T, uint32_t elements>
  LocalTensor<T> Alloc() {
    return take<T>(elements);
  }
  template <TPosition position, class T>
  LocalTensor<T> Alloc(uint32_t elements) {
    static_assert(emulator::store_of(position) == emulator::store_of(hardware),
                  "this position lies in another store than the allocator");
    return take<T>(elements);
  }
  template <TPosition position, class T, uint32_t elements>
  LocalTensor<T> Alloc() {
    return Alloc<position, T>(elements);
  }

 private:
  template <class T>
  LocalTensor<T> take(int64_t elements) {
    const emulator::Store store = emulator::store_of(hardware);
    const int64_t bytes = elements * static_cast<int64_t>(sizeof(T));
    const int64_t whole = emulator::round_up(bytes, 32);
    const int64_t first =
        emulator::carve("LocalMemAllocator", "Alloc", store, whole, used_, parts_);
    return LocalTensor<T>(store, first, bytes, -1, 0);
  }

  int64_t used_ = 0;
  std::string parts_;
};

}  // namespace AscendC
