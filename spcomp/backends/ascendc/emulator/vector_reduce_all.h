// ReduceMax, ReduceMin and ReduceSum: one result for all lanes of a call, by way of scratch memory.
#pragma once

#include <cstdint>
#include <vector>

#include "vector_reduce.h"

namespace AscendC {
namespace emulator {

// Scratch elements for `repeats` repeats: two per repeat, rounded up to blocks. With the index the
// library reduces the pairs of each level again, and keeps three levels.
template <class T>
int64_t scratch_elements(int64_t repeats, bool with_index) {
  const auto up = [](int64_t count, int64_t step) { return (count + step - 1) / step; };
  int64_t total = 0;
  for (int level = 0; level < (with_index ? 3 : 1); ++level) {
    const int64_t pairs = 2 * repeats;
    total += up(pairs, kLanesPerBlock<T>) * kLanesPerBlock<T>;
    repeats = up(pairs, kLanesPerRepeat<T>);
  }
  return total;
}

// Calls visit(number of the lane, value) for each lane, then leaves the result at the head of dst.
// dst may lie in the scratch, because it is written last.
template <class T, class Visit, class Result>
void reduce_all(Instr& in, const LocalTensor<T>& dst, const LocalTensor<T>& src,
                const LocalTensor<T>& scratch, const Form& form, int64_t src_repeat,
                bool with_index, Visit visit, Result result) {
  static_assert(is_real<T>, "reductions take half and float");
  const Lanes lanes = form.lanes(in, kLanesPerRepeat<T>);
  if (lanes.segments().empty()) return;
  const Operand<T> to{"dst", dst};
  const Operand<T> from{"src", src, {1, src_repeat}};
  const Operand<T> work{"the scratch tensor", scratch};
  in_unified_buffer(in, to);
  in_unified_buffer(in, from);
  in_unified_buffer(in, work);
  const int64_t reach = form.is_count() ? form.count() : lanes.repeats() * kLanesPerRepeat<T>;
  const int64_t repeats = (reach + kLanesPerRepeat<T> - 1) / kLanesPerRepeat<T>;
  const int64_t needed = scratch_elements<T>(repeats, with_index);
  const int64_t slots = with_index ? 2 : 1;
  require_apart(in, to, slots, from, extent(lanes, from));
  require_apart(in, work, needed, from, extent(lanes, from));
  const T* read = read_lanes(in, lanes, from);
  each_lane(lanes, from, read, [&](int64_t repeat, int64_t lane, T value) {
    visit(repeat * kLanesPerRepeat<T> + lane, value);
  });
  in.write_undefined(work.name, scratch, 0, needed);
  T* write = in.write(to.name, dst, 0, slots);
  result(write);
}

template <class Order, class T>
void reduce_best(const char* api, const LocalTensor<T>& dst, const LocalTensor<T>& src,
                 const LocalTensor<T>& scratch, const Form& form, int64_t src_repeat,
                 bool with_index) {
  Instr in(api, PIPE_V);
  Best<T> best;
  reduce_all(
      in, dst, src, scratch, form, src_repeat, with_index,
      [&](int64_t lane, T value) { best.template offer<Order>(value, lane); },
      [&](T* write) {
        write[0] = best.value;
        if (with_index) write[1] = index_slot<T>(in, best.lane);
      });
}

template <class T>
void reduce_sum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& scratch,
                const Form& form, int64_t src_repeat) {
  Instr in("ReduceSum", PIPE_V);
  float sum = 0.0F;
  reduce_all(
      in, dst, src, scratch, form, src_repeat, false,
      [&](int64_t, T value) { sum += static_cast<float>(value); },
      [&](T* write) { write[0] = static_cast<T>(sum); });
}

}  // namespace emulator

#define ASCENDC_REDUCE(Name, Order)                                                              \
  template <class T>                                                                             \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& scratch, \
            const int32_t count, bool with_index = false) {                                      \
    emulator::reduce_best<emulator::Order>(#Name, dst, src, scratch, {int64_t{count}},           \
                                           emulator::kBlocksPerRepeat, with_index);              \
  }                                                                                              \
  template <class T>                                                                             \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& scratch, \
            const int32_t mask, emulator::Narrow<uint8_t> repeat,                                \
            emulator::Narrow<uint16_t> src_repeat, bool with_index = false) {                    \
    emulator::reduce_best<emulator::Order>(                                                      \
        #Name, dst, src, scratch, {emulator::lane_mask(mask), repeat}, src_repeat, with_index);  \
  }                                                                                              \
  template <class T>                                                                             \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& scratch, \
            uint64_t mask[], emulator::Narrow<uint8_t> repeat,                                   \
            emulator::Narrow<uint16_t> src_repeat, bool with_index = false) {                    \
    emulator::reduce_best<emulator::Order>(#Name, dst, src, scratch, {mask, repeat}, src_repeat, \
                                           with_index);                                          \
  }

ASCENDC_REDUCE(ReduceMax, Larger)
ASCENDC_REDUCE(ReduceMin, Smaller)
#undef ASCENDC_REDUCE

template <class T>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& scratch,
               const int32_t count) {
  emulator::reduce_sum(dst, src, scratch, {int64_t{count}}, emulator::kBlocksPerRepeat);
}
template <class T>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& scratch,
               const int32_t mask, emulator::Narrow<uint8_t> repeat,
               emulator::Narrow<uint16_t> src_repeat) {
  emulator::reduce_sum(dst, src, scratch, {emulator::lane_mask(mask), repeat}, src_repeat);
}
template <class T>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& scratch,
               uint64_t mask[], emulator::Narrow<uint8_t> repeat,
               emulator::Narrow<uint16_t> src_repeat) {
  emulator::reduce_sum(dst, src, scratch, {mask, repeat}, src_repeat);
}

}  // namespace AscendC
