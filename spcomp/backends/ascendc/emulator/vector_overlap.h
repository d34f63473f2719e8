// The overlap rules of vector operands.
//
// A destination may be its own source when both walk the very same addresses. Any other overlap
// reads data at a moment the hardware does not define.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vector_lanes.h"

namespace AscendC::emulator {

// How many elements from the tensor's first on the lanes reach.
template <class T>
int64_t extent(const Lanes& lanes, const Operand<T>& operand) {
  int64_t end = 0;
  for (const Segment& segment : lanes.segments())
    end = std::max(end, operand.first(segment) + segment.count);
  return end;
}

// Whether the first dst_count and src_count elements of two tensors share no byte.
template <class D, class S>
bool ranges_apart(const Operand<D>& dst, int64_t dst_count, const Operand<S>& src,
                  int64_t src_count) {
  if (dst.tensor.store() != src.tensor.store() || dst_count <= 0 || src_count <= 0) return true;
  const int64_t dst_begin = dst.tensor.byte_offset();
  const int64_t src_begin = src.tensor.byte_offset();
  return dst_begin + dst_count * int64_t{sizeof(D)} <= src_begin ||
         src_begin + src_count * int64_t{sizeof(S)} <= dst_begin;
}

// The bytes that segment number `segment` covers within its store.
struct Span {
  int64_t begin;
  int64_t end;
  size_t segment;
};

template <class T>
std::vector<Span> spans_of(const Lanes& lanes, const Operand<T>& operand) {
  std::vector<Span> spans;
  spans.reserve(lanes.segments().size());
  const int64_t base = operand.tensor.byte_offset();
  for (size_t i = 0; i < lanes.segments().size(); ++i) {
    const Segment& segment = lanes.segments()[i];
    const int64_t begin = base + operand.first(segment) * int64_t{sizeof(T)};
    spans.push_back({begin, begin + segment.count * int64_t{sizeof(T)}, i});
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

// Whether the same lanes meet at each common byte. The destination's spans are sorted and disjoint.
inline bool same_or_apart(const std::vector<Span>& dst, const std::vector<Span>& src) {
  for (const Span& read : src) {
    auto write = std::upper_bound(dst.begin(), dst.end(), read.begin,
                                  [](int64_t begin, const Span& span) { return begin < span.end; });
    for (; write != dst.end() && write->begin < read.end; ++write) {
      const bool same =
          write->begin == read.begin && write->end == read.end && write->segment == read.segment;
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
  const int64_t reach = (kBlocksPerRepeat - 1) * dst.stride.block + 1;
  if (lanes.repeats() <= 1 || dst.stride.repeat >= reach) return;
  in.require(apart(spans_of(lanes, dst)), "two repeats write the same bytes of %s", dst.name);
}

// The destination equals a source exactly, or does not meet it.
template <class D, class S>
void require_same_or_apart(Instr& in, const Lanes& lanes, const Operand<D>& dst,
                           const Operand<S>& src) {
  if (ranges_apart(dst, extent(lanes, dst), src, extent(lanes, src))) return;
  in.require(same_or_apart(spans_of(lanes, dst), spans_of(lanes, src)),
             "%s and %s overlap without being the same in every lane", dst.name, src.name);
}

// For instructions whose destination may share no byte with an operand.
template <class D, class S>
void require_apart(Instr& in, const Operand<D>& dst, int64_t dst_count, const Operand<S>& src,
                   int64_t src_count) {
  in.require(ranges_apart(dst, dst_count, src, src_count), "%s overlaps %s", dst.name, src.name);
}

}  // namespace AscendC::emulator
