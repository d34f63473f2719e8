// Sort32 and MrgSort on (score, index) pairs of 8 bytes: the score in the low bytes, the index in
// the high four. Scores descend; of equal scores the earlier one, or the one of the earlier list,
// comes first. A NaN score is a fault, since no order is defined for it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "vector_lanes.h"
#include "vector_math.h"
#include "vector_overlap.h"
#include "vector_params.h"

namespace AscendC {
namespace emulator {

constexpr int64_t kPairBytes = 8;
constexpr int64_t kSortWidth = 32;
template <class T>
constexpr int64_t kPairElements = kPairBytes / int64_t{sizeof(T)};

template <class T>
struct Pair {
  T score;
  uint32_t index;
};

template <class T>
Pair<T> load_pair(const T* from) {
  Pair<T> pair;
  pair.score = *from;
  std::memcpy(&pair.index, reinterpret_cast<const char*>(from) + 4, sizeof pair.index);
  return pair;
}

// The two bytes between a half score and its index mean nothing: they become part of a NaN.
template <class T>
void store_pair(const Pair<T>& pair, T* to) {
  auto* bytes = reinterpret_cast<char*>(to);
  std::memset(bytes, 0xFF, kPairBytes);
  std::memcpy(bytes, &pair.score, sizeof pair.score);
  std::memcpy(bytes + 4, &pair.index, sizeof pair.index);
}

template <class T>
void require_score(Instr& in, T score, const char* operand, int64_t at) {
  in.require(score == score, "score %lld of %s is NaN, which has no place in the order",
             static_cast<long long>(at), operand);
}

// One sorted list of a merge.
template <class T>
struct List {
  std::vector<Pair<T>> pairs;
  size_t next = 0;

  bool exhausted() const { return next == pairs.size(); }
};

template <class T>
List<T> read_list(Instr& in, const Operand<T>& operand, int64_t first_pair, int64_t count) {
  const int64_t step = kPairElements<T>;
  const T* from = in.read(operand.name, operand.tensor, first_pair * step, count * step, true);
  List<T> list;
  for (int64_t i = 0; i < count; ++i) {
    const Pair<T> pair = load_pair(from + i * step);
    require_score(in, pair.score, operand.name, i);
    in.require(i == 0 || !(pair.score > list.pairs.back().score),
               "the scores of %s rise at pair %lld, but a list must descend", operand.name,
               static_cast<long long>(i));
    list.pairs.push_back(pair);
  }
  return list;
}

// Takes the largest head until all lists, or with `suspends` the first of them, are used up.
template <class T>
std::vector<Pair<T>> merged(std::vector<List<T>> lists, bool suspends) {
  std::vector<Pair<T>> result;
  while (true) {
    List<T>* best = nullptr;
    bool some_exhausted = false;
    for (List<T>& list : lists) {
      some_exhausted = some_exhausted || list.exhausted();
      if (list.exhausted()) continue;
      if (best == nullptr || list.pairs[list.next].score > best->pairs[best->next].score)
        best = &list;
    }
    if (best == nullptr || (suspends && some_exhausted)) return result;
    result.push_back(best->pairs[best->next++]);
  }
}

// How many lists validBit names: 2, 3 or 4, always the first ones.
inline int64_t lists_in_use(Instr& in, int64_t valid) {
  in.require(valid == 3 || valid == 7 || valid == 15,
             "validBit is %lld; 3, 7 and 15 name two, three and four lists",
             static_cast<long long>(valid));
  return valid == 3 ? 2 : valid == 7 ? 3 : 4;
}

// Several repeats merge groups of four lists that lie one behind the other.
template <class T>
void require_adjacent(Instr& in, const std::vector<Operand<T>>& sources, const MrgSort4Info& info) {
  const int64_t length = uint16_t{info.elementLengths[0]};
  bool regular = sources.size() == 4 && !info.ifExhaustedSuspension;
  for (size_t i = 0; regular && i < sources.size(); ++i) {
    const int64_t away = static_cast<int64_t>(sources[i].tensor.byte_offset()) -
                         static_cast<int64_t>(sources[0].tensor.byte_offset());
    regular = uint16_t{info.elementLengths[i]} == length &&
              away == static_cast<int64_t>(i) * length * kPairBytes;
  }
  in.require(regular, "more than one repeat needs four equally long lists, one behind the other");
}

template <class T>
void merge_sort(const LocalTensor<T>& dst, const std::vector<Operand<T>>& all,
                const MrgSort4Info& info) {
  static_assert(is_real<T>, "MrgSort takes half and float");
  Instr in("MrgSort", PIPE_V);
  const int64_t used = lists_in_use(in, uint16_t{info.validBit});
  const std::vector<Operand<T>> sources(all.begin(), all.begin() + used);
  const int64_t repeats = uint8_t{info.repeatTimes};
  if (repeats == 0) return;
  if (repeats > 1) require_adjacent(in, sources, info);
  for (int64_t i = used; i < 4; ++i) {
    in.require(info.elementLengths[i] == 0, "list %lld has %lld pairs, but validBit leaves it out",
               static_cast<long long>(i + 1), static_cast<long long>(info.elementLengths[i]));
  }
  const Operand<T> to{"dst", dst};
  in_unified_buffer(in, to);
  int64_t total = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const int64_t length = uint16_t{info.elementLengths[i]};
    in.require(length >= 1 && length <= 4095, "%s has %lld pairs; a list has 1 to 4095",
               sources[i].name, static_cast<long long>(length));
    in_unified_buffer(in, sources[i]);
    total += length;
  }
  std::vector<std::vector<Pair<T>>> results;
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    std::vector<List<T>> lists;
    for (size_t i = 0; i < sources.size(); ++i) {
      const int64_t length = uint16_t{info.elementLengths[i]};
      const int64_t first = repeat * total;
      require_apart(in, to, repeats * total * kPairElements<T>, sources[i],
                    (first + length) * kPairElements<T>);
      lists.push_back(read_list(in, sources[i], first, length));
    }
    results.push_back(merged(std::move(lists), info.ifExhaustedSuspension));
  }
  const int64_t step = kPairElements<T>;
  for (size_t repeat = 0; repeat < results.size(); ++repeat) {
    const std::vector<Pair<T>>& pairs = results[repeat];
    T* write = in.write(to.name, dst, static_cast<int64_t>(repeat) * total * step,
                        static_cast<int64_t>(pairs.size()) * step);
    for (size_t i = 0; i < pairs.size(); ++i)
      store_pair(pairs[i], write + static_cast<int64_t>(i) * step);
  }
}

}  // namespace emulator

// Sorts groups of 32 scores; the index of each travels with it.
template <class T>
void Sort32(const LocalTensor<T>& dst, const LocalTensor<T>& src0,
            const LocalTensor<uint32_t>& src1, emulator::Narrow<uint8_t> repeat) {
  using namespace emulator;
  static_assert(is_real<T>, "Sort32 takes half and float");
  Instr in("Sort32", PIPE_V);
  const Operand<T> to{"dst", dst};
  const Operand<T> scores{"src0", src0};
  const Operand<uint32_t> indices{"src1", src1};
  in_unified_buffer(in, to, kSortWidth * kPairBytes);
  in_unified_buffer(in, scores, kSortWidth * sizeof(T));
  in_unified_buffer(in, indices);
  const int64_t count = uint8_t{repeat} * kSortWidth;
  require_apart(in, to, count * kPairElements<T>, scores, count);
  require_apart(in, to, count * kPairElements<T>, indices, count);
  const T* score = in.read(scores.name, src0, 0, count, true);
  const uint32_t* index = in.read(indices.name, src1, 0, count, true);
  std::vector<Pair<T>> pairs;
  for (int64_t i = 0; i < count; ++i) {
    require_score(in, score[i], scores.name, i);
    pairs.push_back({score[i], index[i]});
  }
  for (auto group = pairs.begin(); group != pairs.end(); group += kSortWidth)
    std::stable_sort(group, group + kSortWidth,
                     [](const Pair<T>& a, const Pair<T>& b) { return a.score > b.score; });
  T* write = in.write(to.name, dst, 0, count * kPairElements<T>);
  for (size_t i = 0; i < pairs.size(); ++i)
    store_pair(pairs[i], write + static_cast<int64_t>(i) * kPairElements<T>);
}

template <class T>
void MrgSort(const LocalTensor<T>& dst, const MrgSortSrcList<T>& lists, const MrgSort4Info& info) {
  emulator::merge_sort<T>(
      dst, {{"src1", lists.src1}, {"src2", lists.src2}, {"src3", lists.src3}, {"src4", lists.src4}},
      info);
}

}  // namespace AscendC
