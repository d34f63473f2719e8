// Gather by byte offsets and GatherMask by lane pattern, both within the unified buffer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "vector_lanes.h"
#include "vector_math.h"
#include "vector_overlap.h"
#include "vector_params.h"

namespace AscendC {
namespace emulator {

// The offset of lane n is element n of `offsets`, whatever the strides of dst.
template <class T>
void gather(const LocalTensor<T>& dst, const LocalTensor<T>& src,
            const LocalTensor<uint32_t>& offsets, uint32_t base_bytes, const Form& form,
            int64_t dst_repeat) {
  static_assert(is_movable<T>, "Gather takes 16-bit and 32-bit types");
  Instr in("Gather", PIPE_V);
  const Lanes lanes = form.lanes(in, kLanesPerRepeat<T>);
  const Operand<T> to{"dst", dst, {1, dst_repeat}};
  const Operand<T> from{"src", src};
  const Operand<uint32_t> where{"srcOffset", offsets};
  in_unified_buffer(in, to);
  in_unified_buffer(in, from);
  in_unified_buffer(in, where);
  require_own_repeats(in, lanes, to);

  const auto number = [](const Segment& segment) {
    return segment.repeat * kLanesPerRepeat<T> + segment.lane;
  };
  std::vector<T> taken;
  int64_t reach = 0;
  int64_t source = 0;
  for (const Segment& segment : lanes.segments()) {
    const int64_t first = number(segment);
    reach = std::max(reach, first + segment.count);
    const uint32_t* offset = in.read(where.name, offsets, first, segment.count, true);
    for (int64_t i = 0; i < segment.count; ++i) {
      const int64_t byte = int64_t{base_bytes} + int64_t{offset[i]};
      in.require(byte % int64_t{sizeof(T)} == 0,
                 "the offset of lane %lld, %lld bytes, falls inside an element",
                 static_cast<long long>(first + i), static_cast<long long>(byte));
      const int64_t element = byte / int64_t{sizeof(T)};
      taken.push_back(*in.read(from.name, src, element, 1));
      source = std::max(source, element + 1);
    }
  }
  require_apart(in, to, extent(lanes, to), from, source);
  require_apart(in, to, extent(lanes, to), where, reach);
  T* write = write_lanes(in, lanes, to);
  auto value = taken.begin();
  for (const Segment& segment : lanes.segments()) {
    std::copy_n(value, segment.count, write + to.first(segment));
    value += segment.count;
  }
}

// Whether a fixed pattern keeps a lane.
inline bool pattern_keeps(int64_t pattern, int64_t lane) {
  if (pattern == 1) return lane % 2 == 0;
  if (pattern == 2) return lane % 2 == 1;
  return pattern == 7 || lane % 4 == pattern - 3;
}

// Packs the lanes that keeps(repeat, lane) names; returns how many. `counted` is the counter mode,
// in which a repeat takes `mask` lanes, more than 8 blocks if it says so.
template <class T>
class Packing {
 public:
  Packing(const LocalTensor<T>& dst, const LocalTensor<T>& src, bool counted, uint32_t mask,
          const GatherMaskParams& p)
      : in_("GatherMask", PIPE_V),
        dst_{"dst", dst},
        src_{"src0", src, {p.src0BlockStride, p.src0RepeatStride}},
        repeats_(uint16_t{p.repeatTimes}),
        width_(counted ? int64_t{mask} : kLanesPerRepeat<T>),
        lanes_(Lanes::leading(repeats_, width_, kLanesPerBlock<T>)) {
    static_assert(is_movable<T>, "GatherMask takes 16-bit and 32-bit types");
    in_.require(counted || mask == 0, "the mask is %u; outside the counter mode it must be 0",
                mask);
    in_.require(width_ <= kLanesPerRepeat<T> || src_.stride.block == 1,
                "a repeat of more than 8 blocks with a block stride is not modelled");
    in_unified_buffer(in_, dst_);
    in_unified_buffer(in_, src_);
  }

  Instr& instr() { return in_; }
  int64_t repeats() const { return repeats_; }
  int64_t width() const { return width_; }

  template <class Keeps>
  uint64_t pack(Keeps keeps) {
    const T* read = read_lanes(in_, lanes_, src_);
    std::vector<T> kept;
    each_lane(lanes_, src_, read, [&](int64_t repeat, int64_t lane, T value) {
      if (keeps(repeat, lane)) kept.push_back(value);
    });
    const auto count = static_cast<int64_t>(kept.size());
    require_apart(in_, dst_, count, src_, extent(lanes_, src_));
    std::copy(kept.begin(), kept.end(), in_.write(dst_.name, dst_.tensor, 0, count));
    return kept.size();
  }

 private:
  Instr in_;
  Operand<T> dst_;
  Operand<T> src_;
  int64_t repeats_;
  int64_t width_;
  Lanes lanes_;
};

}  // namespace emulator

template <class T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src,
            const LocalTensor<uint32_t>& offsets, const uint32_t base_bytes, const uint32_t count) {
  emulator::gather(dst, src, offsets, base_bytes, {int64_t{count}}, emulator::kBlocksPerRepeat);
}
template <class T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src,
            const LocalTensor<uint32_t>& offsets, const uint32_t base_bytes, const uint64_t mask,
            emulator::Narrow<uint8_t> repeat, emulator::Narrow<uint16_t> dst_repeat) {
  emulator::gather(dst, src, offsets, base_bytes, {mask, repeat}, dst_repeat);
}
template <class T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src,
            const LocalTensor<uint32_t>& offsets, const uint32_t base_bytes, uint64_t mask[],
            emulator::Narrow<uint8_t> repeat, emulator::Narrow<uint16_t> dst_repeat) {
  emulator::gather(dst, src, offsets, base_bytes, {mask, repeat}, dst_repeat);
}

// One of the patterns 1 to 7.
template <class T>
void GatherMask(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const uint8_t pattern,
                const bool counted, const uint32_t mask, const GatherMaskParams& params,
                uint64_t& kept) {
  emulator::Packing<T> packing(dst, src0, counted, mask, params);
  packing.instr().require(pattern >= 1 && pattern <= 7, "there is no pattern %d; 1 to 7 exist",
                          pattern);
  packing.instr().require(params.src1RepeatStride == 0,
                          "the stride of src1 is %d, but a pattern by number has no src1; it must "
                          "be 0",
                          int{params.src1RepeatStride});
  kept = packing.pack(
      [pattern](int64_t, int64_t lane) { return emulator::pattern_keeps(pattern, lane); });
}

// The pattern as bits: bit i of a repeat keeps its lane i. The bits of the next repeat start
// src1RepeatStride blocks on.
template <class T, class U>
void GatherMask(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<U>& src1,
                const bool counted, const uint32_t mask, const GatherMaskParams& params,
                uint64_t& kept) {
  using namespace emulator;
  static_assert(std::is_unsigned_v<U> && sizeof(U) == sizeof(T),
                "the pattern is uint16 for 16-bit and uint32 for 32-bit elements");
  constexpr int64_t bits = 8 * int64_t{sizeof(U)};
  Packing<T> packing(dst, src0, counted, mask, params);
  const Operand<U> pattern{"src1Pattern", src1, {1, uint8_t{params.src1RepeatStride}}};
  in_unified_buffer(packing.instr(), pattern);
  std::vector<const U*> words;
  for (int64_t repeat = 0; repeat < packing.repeats(); ++repeat)
    words.push_back(packing.instr().read(pattern.name, src1, pattern.first({repeat, 0, 0}),
                                         (packing.width() + bits - 1) / bits, true));
  kept = packing.pack([&words](int64_t repeat, int64_t lane) {
    return (words[static_cast<size_t>(repeat)][lane / bits] >> (lane % bits) & 1) != 0;
  });
}

}  // namespace AscendC
