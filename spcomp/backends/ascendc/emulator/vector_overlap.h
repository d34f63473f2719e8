// The overlap rules of vector operands.
//
// A destination may be its own source when both walk the very same addresses. Any other overlap
// reads data at a moment the hardware does not define.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "vector_lanes.h"

namespace AscendC::emulator {

// The bytes one segment covers within its store.
struct Span {
  int64_t begin;
  int64_t end;
  int64_t repeat;
};

template <class T>
std::vector<Span> spans_of(const Lanes& lanes, const Operand<T>& operand) {
  std::vector<Span> spans;
  spans.reserve(lanes.segments().size());
  const auto base = static_cast<int64_t>(operand.tensor.byte_offset());
  for (const Segment& segment : lanes.segments()) {
    const int64_t begin = base + operand.first(segment) * int64_t{sizeof(T)};
    spans.push_back({begin, begin + segment.count * int64_t{sizeof(T)}, segment.repeat});
  }
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  return spans;
}

// Whether every repeat writes bytes of its own.
inline bool apart(const std::vector<Span>& sorted) {
  for (size_t i = 1; i < sorted.size(); ++i)
    if (sorted[i].begin < sorted[i - 1].end) return false;
  return true;
}

// Whether each common byte of two sorted lists of disjoint spans is met by both in the same span.
inline bool same_or_apart(const std::vector<Span>& dst, const std::vector<Span>& src) {
  for (const Span& read : src) {
    auto write = std::upper_bound(dst.begin(), dst.end(), read.begin,
                                  [](int64_t begin, const Span& span) { return begin < span.end; });
    for (; write != dst.end() && write->begin < read.end; ++write) {
      const bool same =
          write->begin == read.begin && write->end == read.end && write->repeat == read.repeat;
      if (!same) return false;
    }
  }
  return true;
}

template <class T>
void require_own_blocks(Instr& in, const Lanes& lanes, const Operand<T>& dst) {
  in.require(dst.stride.block != 0 || lanes.repeats() == 0,
             "the block stride of %s is 0, which is undefined for a destination", dst.name);
}

// A later repeat must not write what an earlier one wrote.
template <class T>
void require_own_repeats(Instr& in, const Lanes& lanes, const Operand<T>& dst) {
  require_own_blocks(in, lanes, dst);
  const int64_t reach = (blocks_per_repeat - 1) * dst.stride.block + 1;
  if (lanes.repeats() <= 1 || dst.stride.repeat >= reach) return;
  in.require(apart(spans_of(lanes, dst)), "two repeats write the same bytes of %s", dst.name);
}

// The destination equals a source exactly, or does not meet it.
template <class D, class S>
void require_same_or_apart(Instr& in, const Lanes& lanes, const Operand<D>& dst,
                           const Operand<S>& src) {
  if (dst.tensor.store() != src.tensor.store() || lanes.segments().empty()) return;
  const std::vector<Span> writes = spans_of(lanes, dst);
  const std::vector<Span> reads = spans_of(lanes, src);
  if (writes.back().end <= reads.front().begin) return;
  in.require(same_or_apart(writes, reads),
             "%s and %s overlap without being the same in every repeat", dst.name, src.name);
}

// For instructions whose destination may share no byte with an operand.
template <class D, class S>
void require_apart(Instr& in, const Operand<D>& dst, int64_t dst_count, const Operand<S>& src,
                   int64_t src_count) {
  if (dst.tensor.store() != src.tensor.store() || dst_count <= 0 || src_count <= 0) return;
  const auto dst_begin = static_cast<int64_t>(dst.tensor.byte_offset());
  const auto src_begin = static_cast<int64_t>(src.tensor.byte_offset());
  const bool free = dst_begin + dst_count * int64_t{sizeof(D)} <= src_begin ||
                    src_begin + src_count * int64_t{sizeof(S)} <= dst_begin;
  in.require(free, "%s overlaps %s", dst.name, src.name);
}

// How many elements from the tensor's first on the lanes reach.
template <class T>
int64_t extent(const Lanes& lanes, const Operand<T>& operand) {
  int64_t end = 0;
  for (const Segment& segment : lanes.segments())
    end = std::max(end, operand.first(segment) + segment.count);
  return end;
}

}  // namespace AscendC::emulator
