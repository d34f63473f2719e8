// Which elements a vector instruction touches.
//
// An instruction runs `repeat` times over 8 blocks of 32 bytes. Lane j of a repeat lies in block
// j / (lanes per block); block b of repeat r starts (r * repeat stride + b * block stride) blocks
// after the operand. The count form is one long run of lanes at the default strides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "instr.h"
#include "narrow.h"
#include "tensors.h"

namespace AscendC::emulator {

constexpr int64_t kVectorBlockBytes = 32;
constexpr int64_t kBlocksPerRepeat = 8;

template <class T>
constexpr int64_t kLanesPerBlock = kVectorBlockBytes / int64_t{sizeof(T)};
template <class T>
constexpr int64_t kLanesPerRepeat = kBlocksPerRepeat * kLanesPerBlock<T>;

struct Stride {
  int64_t block = 1;
  int64_t repeat = kBlocksPerRepeat;
};

// `count` consecutive active lanes of one repeat, from `lane` on; in the mask form within one
// block.
struct Segment {
  int64_t repeat;
  int64_t lane;
  int64_t count;
};

class Lanes {
 public:
  // The count form: the first `count` elements.
  static Lanes contiguous(Instr& in, int64_t count) {
    in.require(count >= 0, "the count is %lld, below 0", static_cast<long long>(count));
    Lanes lanes;
    if (count > 0) lanes.segments_.push_back({0, 0, count});
    lanes.repeats_ = count > 0 ? 1 : 0;
    return lanes;
  }

  // The mask form with a number: the first `mask` of `width` lanes, `width / 8` to a block.
  static Lanes masked(Instr& in, uint64_t mask, int64_t repeats, int64_t width) {
    in.require(mask >= 1 && mask <= static_cast<uint64_t>(width),
               "the mask is %lld; a repeat has lanes 1 to %lld", static_cast<long long>(mask),
               static_cast<long long>(width));
    const auto on = [mask](int64_t lane) { return static_cast<uint64_t>(lane) < mask; };
    return of(on, repeats, width, width / kBlocksPerRepeat);
  }

  // The mask form with bits: two words for 16-bit lanes, the first word alone for 32-bit lanes.
  static Lanes masked(Instr& in, const uint64_t* mask, int64_t repeats, int64_t width) {
    const bool second_word = width > 64;
    in.require(mask[0] != 0 || (second_word && mask[1] != 0), "no bit of the mask is set");
    in.require(second_word || mask[1] == 0, "a 32-bit type has 64 lanes, but mask[1] is not 0");
    const auto on = [mask](int64_t lane) { return (mask[lane / 64] >> (lane % 64) & 1) != 0; };
    return of(on, repeats, width, width / kBlocksPerRepeat);
  }

  // The first `count` lanes of every repeat, be they more than 8 blocks hold.
  static Lanes leading(int64_t repeats, int64_t count, int64_t per_block) {
    return of([](int64_t) { return true; }, repeats, count, per_block);
  }

  const std::vector<Segment>& segments() const { return segments_; }
  int64_t repeats() const { return repeats_; }

 private:
  template <class Active>
  static Lanes of(Active on, int64_t repeats, int64_t width, int64_t per_block) {
    std::vector<Segment> one;
    for (int64_t lane = 0; lane < width; ++lane) {
      if (!on(lane)) continue;
      const bool goes_on =
          !one.empty() && lane % per_block != 0 && one.back().lane + one.back().count == lane;
      if (goes_on)
        ++one.back().count;
      else
        one.push_back({0, lane, 1});
    }
    Lanes lanes;
    lanes.repeats_ = repeats;
    lanes.segments_.reserve(one.size() * static_cast<size_t>(repeats));
    for (int64_t repeat = 0; repeat < repeats; ++repeat)
      for (const Segment& segment : one)
        lanes.segments_.push_back({repeat, segment.lane, segment.count});
    return lanes;
  }

  std::vector<Segment> segments_;
  int64_t repeats_ = 0;
};

// The ways a call names its lanes: a count, a number of leading lanes, or mask bits.
class Form {
 public:
  Form(int64_t count) : count_(count), is_count_(true) {}
  Form(uint64_t first_lanes, Narrow<uint8_t> repeats) : mask_(first_lanes), repeats_(repeats) {}
  Form(const uint64_t* bits, Narrow<uint8_t> repeats) : bits_(bits), repeats_(repeats) {}

  bool is_count() const { return is_count_; }
  int64_t count() const { return count_; }

  Lanes lanes(Instr& in, int64_t width) const {
    if (is_count_) return Lanes::contiguous(in, count_);
    if (bits_ != nullptr) return Lanes::masked(in, bits_, repeats_, width);
    return Lanes::masked(in, mask_, repeats_, width);
  }

 private:
  int64_t count_ = 0;
  bool is_count_ = false;
  uint64_t mask_ = 0;
  const uint64_t* bits_ = nullptr;
  uint8_t repeats_ = 0;
};

// The mask of calls that take it as int32: a negative one becomes a number no repeat has.
inline uint64_t lane_mask(int32_t first_lanes) { return static_cast<uint64_t>(first_lanes); }
inline const uint64_t* lane_mask(const uint64_t* bits) { return bits; }

// One operand of an instruction: a tensor walked at a stride, under the name a fault gives it.
template <class T>
struct Operand {
  const char* name;
  const LocalTensor<T>& tensor;
  Stride stride = {};

  // The element of the tensor under the segment's first lane.
  int64_t first(const Segment& segment) const {
    const int64_t block =
        segment.repeat * stride.repeat + segment.lane / kLanesPerBlock<T> * stride.block;
    return block * kLanesPerBlock<T> + segment.lane % kLanesPerBlock<T>;
  }
};

// Calls visit(first, count) for the elements under the lanes, neighbouring segments joined.
template <class T, class Visit>
void each_window(const Lanes& lanes, const Operand<T>& operand, Visit visit) {
  int64_t first = 0;
  int64_t count = 0;
  for (const Segment& segment : lanes.segments()) {
    const int64_t next = operand.first(segment);
    if (count > 0 && next == first + count) {
      count += segment.count;
      continue;
    }
    if (count > 0) visit(first, count);
    first = next;
    count = segment.count;
  }
  if (count > 0) visit(first, count);
}

// Touches the lanes and returns the address of the tensor's element 0; nullptr without lanes.
template <class T>
const T* read_lanes(Instr& in, const Lanes& lanes, const Operand<T>& operand,
                    bool must_be_initialised = false) {
  const T* base = nullptr;
  each_window(lanes, operand, [&](int64_t first, int64_t count) {
    base = in.read(operand.name, operand.tensor, first, count, must_be_initialised) - first;
  });
  return base;
}

template <class T>
T* write_lanes(Instr& in, const Lanes& lanes, const Operand<T>& operand) {
  T* base = nullptr;
  each_window(lanes, operand, [&](int64_t first, int64_t count) {
    base = in.write(operand.name, operand.tensor, first, count) - first;
  });
  return base;
}

// Calls visit(segment's repeat, lane, value) for every active lane in order.
template <class T, class Visit>
void each_lane(const Lanes& lanes, const Operand<T>& operand, const T* base, Visit visit) {
  for (const Segment& segment : lanes.segments()) {
    const T* values = base + operand.first(segment);
    for (int64_t i = 0; i < segment.count; ++i) visit(segment.repeat, segment.lane + i, values[i]);
  }
}

template <class T>
void in_unified_buffer(Instr& in, const Operand<T>& operand, unsigned align_bytes = 32) {
  in.at(operand.name, operand.tensor, {Store::UB}, align_bytes);
}

}  // namespace AscendC::emulator
