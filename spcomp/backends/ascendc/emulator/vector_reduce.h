// WholeReduce and BlockReduce: one result per repeat and per block.
//
// Sums run in ascending lane order, in float also for half. A maximum or minimum with its index
// keeps the lowest index; the index lies in a result slot as raw integer bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vector_lanes.h"
#include "vector_math.h"
#include "vector_overlap.h"
#include "vector_params.h"

namespace AscendC {
namespace emulator {

// Whether lane value a replaces the best so far. NaN wins, so that poison stays visible.
struct Larger {
  static bool better(float a, float best) { return a > best || (a != a && best == best); }
};
struct Smaller {
  static bool better(float a, float best) { return a < best || (a != a && best == best); }
};

// The best value of a set of lanes and the number of the lane that has it.
template <class T>
struct Best {
  T value;
  int64_t lane = -1;

  template <class Order>
  void offer(T candidate, int64_t at) {
    if (lane >= 0 && !Order::better(candidate, value)) return;
    value = candidate;
    lane = at;
  }
};

// An index as the bits of a result slot: 16 bits wide for half, 32 for float.
template <class T>
T index_slot(Instr& in, int64_t index) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  const auto bits = static_cast<Bits>(index);
  in.require(static_cast<int64_t>(bits) == index, "the index %lld does not fit a slot of %zu bytes",
             static_cast<long long>(index), sizeof(T));
  T slot;
  std::memcpy(static_cast<void*>(&slot), &bits, sizeof slot);
  return slot;
}

// Checks the operands of a reduction that leaves `unit` elements per repeat, `gap` units apart, and
// touches the source. Results may not lie on the source.
template <class T>
const T* reduction_source(Instr& in, const Lanes& lanes, const Operand<T>& dst, int64_t unit,
                          int64_t gap, const Operand<T>& src) {
  static_assert(is_real<T>, "reductions take half and float");
  in_unified_buffer(in, dst);
  in_unified_buffer(in, src);
  in.require(gap >= 1 || lanes.repeats() <= 1, "two repeats write the same bytes of %s", dst.name);
  const int64_t results = lanes.repeats() == 0 ? 0 : ((lanes.repeats() - 1) * gap + 1) * unit;
  require_apart(in, dst, results, src, extent(lanes, src));
  return read_lanes(in, lanes, src);
}

// The result slots of one repeat, in the order asked for.
template <class T>
std::vector<T> slots(Instr& in, const Best<T>& best, ReduceOrder order) {
  switch (order) {
    case ReduceOrder::ORDER_VALUE_INDEX:
      return {best.value, index_slot<T>(in, best.lane)};
    case ReduceOrder::ORDER_INDEX_VALUE:
      return {index_slot<T>(in, best.lane), best.value};
    case ReduceOrder::ORDER_ONLY_INDEX:
      return {index_slot<T>(in, best.lane)};
    case ReduceOrder::ORDER_ONLY_VALUE:
      break;
  }
  return {best.value};
}

template <class Order, class T>
void whole_reduce_best(const char* api, const LocalTensor<T>& dst, const LocalTensor<T>& src,
                       const Form& form, int64_t gap, Stride stride, ReduceOrder order) {
  Instr in(api, PIPE_V);
  in.require(order != ReduceOrder::ORDER_ONLY_INDEX || sizeof(T) == 4,
             "ORDER_ONLY_INDEX of half gives 32-bit results, which is not modelled");
  const Lanes lanes = form.lanes(in, kLanesPerRepeat<T>);
  const Operand<T> to{"dst", dst};
  const Operand<T> from{"src", src, stride};
  const bool pairs =
      order == ReduceOrder::ORDER_VALUE_INDEX || order == ReduceOrder::ORDER_INDEX_VALUE;
  const int64_t unit = pairs ? 2 : 1;
  const T* read = reduction_source(in, lanes, to, unit, gap, from);
  std::vector<Best<T>> best(static_cast<size_t>(lanes.repeats()));
  each_lane(lanes, from, read, [&](int64_t repeat, int64_t lane, T value) {
    best[static_cast<size_t>(repeat)].template offer<Order>(value, lane);
  });
  for (size_t repeat = 0; repeat < best.size(); ++repeat) {
    const std::vector<T> result = slots(in, best[repeat], order);
    T* write = in.write("dst", dst, static_cast<int64_t>(repeat) * gap * unit, unit);
    std::copy(result.begin(), result.end(), write);
  }
}

template <class T>
void whole_reduce_sum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const Form& form,
                      int64_t gap, Stride stride) {
  Instr in("WholeReduceSum", PIPE_V);
  const Lanes lanes = form.lanes(in, kLanesPerRepeat<T>);
  const Operand<T> from{"src", src, stride};
  const T* read = reduction_source(in, lanes, {"dst", dst}, 1, gap, from);
  std::vector<float> sums(static_cast<size_t>(lanes.repeats()), 0.0F);
  each_lane(lanes, from, read, [&](int64_t repeat, int64_t, T value) {
    sums[static_cast<size_t>(repeat)] += static_cast<float>(value);
  });
  for (size_t repeat = 0; repeat < sums.size(); ++repeat)
    *in.write("dst", dst, static_cast<int64_t>(repeat) * gap, 1) = static_cast<T>(sums[repeat]);
}

// Eight results a repeat; that of a block without an active lane is undefined.
template <class T, class Fold>
void block_reduce(const char* api, const LocalTensor<T>& dst, const LocalTensor<T>& src,
                  const Form& form, int64_t gap, Stride stride, Fold fold) {
  Instr in(api, PIPE_V);
  const Lanes lanes = form.lanes(in, kLanesPerRepeat<T>);
  const Operand<T> from{"src", src, stride};
  const T* read = reduction_source(in, lanes, {"dst", dst}, kBlocksPerRepeat, gap, from);
  const auto results = static_cast<size_t>(lanes.repeats() * kBlocksPerRepeat);
  std::vector<float> values(results, 0.0F);
  std::vector<bool> active(results, false);
  each_lane(lanes, from, read, [&](int64_t repeat, int64_t lane, T value) {
    const auto at = static_cast<size_t>(repeat * kBlocksPerRepeat + lane / kLanesPerBlock<T>);
    const auto number = static_cast<float>(value);
    values[at] = active[at] ? fold(values[at], number) : number;
    active[at] = true;
  });
  for (int64_t at = 0; at < static_cast<int64_t>(results); ++at) {
    const int64_t element = at / kBlocksPerRepeat * gap * kBlocksPerRepeat + at % kBlocksPerRepeat;
    const auto index = static_cast<size_t>(at);
    if (active[index])
      *in.write("dst", dst, element, 1) = static_cast<T>(values[index]);
    else
      in.write_undefined("dst", dst, element, 1);
  }
}

}  // namespace emulator

#define ASCENDC_WHOLE_REDUCE(Name, Order, Mask)                                                   \
  template <class T>                                                                              \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src, Mask,                           \
            emulator::Narrow<uint8_t> repeat, emulator::Narrow<uint16_t> dst_repeat,              \
            emulator::Narrow<uint16_t> src_block, emulator::Narrow<uint16_t> src_repeat,          \
            ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX) {                                 \
    emulator::whole_reduce_best<emulator::Order>(#Name, dst, src,                                 \
                                                 {emulator::lane_mask(mask), repeat}, dst_repeat, \
                                                 {src_block, src_repeat}, order);                 \
  }

ASCENDC_WHOLE_REDUCE(WholeReduceMax, Larger, const int32_t mask)
ASCENDC_WHOLE_REDUCE(WholeReduceMax, Larger, uint64_t mask[])
ASCENDC_WHOLE_REDUCE(WholeReduceMin, Smaller, const int32_t mask)
ASCENDC_WHOLE_REDUCE(WholeReduceMin, Smaller, uint64_t mask[])
#undef ASCENDC_WHOLE_REDUCE

template <class T>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask,
                    emulator::Narrow<uint8_t> repeat, emulator::Narrow<uint16_t> dst_repeat,
                    emulator::Narrow<uint16_t> src_block, emulator::Narrow<uint16_t> src_repeat) {
  emulator::whole_reduce_sum(dst, src, {emulator::lane_mask(mask), repeat}, dst_repeat,
                             {src_block, src_repeat});
}
template <class T>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask[],
                    emulator::Narrow<uint8_t> repeat, emulator::Narrow<uint16_t> dst_repeat,
                    emulator::Narrow<uint16_t> src_block, emulator::Narrow<uint16_t> src_repeat) {
  emulator::whole_reduce_sum(dst, src, {emulator::lane_mask(mask), repeat}, dst_repeat,
                             {src_block, src_repeat});
}

#define ASCENDC_BLOCK_REDUCE(Name, fold, Mask)                                               \
  template <class T>                                                                         \
  void Name(const LocalTensor<T>& dst, const LocalTensor<T>& src,                            \
            emulator::Narrow<uint8_t> repeat, Mask, emulator::Narrow<uint16_t> dst_repeat,   \
            emulator::Narrow<uint16_t> src_block, emulator::Narrow<uint16_t> src_repeat) {   \
    emulator::block_reduce(#Name, dst, src, {emulator::lane_mask(mask), repeat}, dst_repeat, \
                           {src_block, src_repeat}, emulator::fold::of<float>);              \
  }

ASCENDC_BLOCK_REDUCE(BlockReduceMax, MaxOf, const int32_t mask)
ASCENDC_BLOCK_REDUCE(BlockReduceMax, MaxOf, uint64_t mask[])
ASCENDC_BLOCK_REDUCE(BlockReduceSum, AddOf, const int32_t mask)
ASCENDC_BLOCK_REDUCE(BlockReduceSum, AddOf, uint64_t mask[])
#undef ASCENDC_BLOCK_REDUCE

}  // namespace AscendC
