// Mmad: L0C (+)= L0A * L0B. Operands lie in fractals of 16 rows by 32 B:
//   L0A [m/16][k/w][16 m][w k]   L0B [k/w][n/16][16 n][w k]   L0C [n/16][m/16][16 m][16 n]
// with w = 16 for 16-bit types, 8 for float and 32 for int8. Ragged m, n and k occupy whole
// fractals; results beyond m and n are undefined.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "half.h"
#include "instr.h"
#include "moves_rows.h"
#include "narrow.h"
#include "tensors.h"

namespace AscendC {

struct MmadParams {
  MmadParams() = default;
  MmadParams(emulator::Narrow<uint16_t> rows, emulator::Narrow<uint16_t> columns,
             emulator::Narrow<uint16_t> depth, emulator::Narrow<uint8_t> unit_flag,
             bool from_bias_table, bool from_zero)
      : m(rows),
        n(columns),
        k(depth),
        unitFlag(unit_flag),
        cmatrixSource(from_bias_table),
        cmatrixInitVal(from_zero) {}

  emulator::Narrow<uint16_t> m = 0;
  emulator::Narrow<uint16_t> n = 0;
  emulator::Narrow<uint16_t> k = 0;
  emulator::Narrow<uint8_t> unitFlag = 0;
  bool cmatrixSource = false;  // start from the bias table; not emulated
  bool cmatrixInitVal = true;  // start from zero, else add to what L0C holds
};

namespace emulator {

constexpr int64_t kSide = 16;  // rows of a fractal, and columns of one in L0C

// Float accumulates products that are exact for 16-bit types, in ascending k.
template <class C, class A, class B>
constexpr bool mmad_types() {
  if constexpr (std::is_same_v<C, float>) {
    return std::is_same_v<A, B> &&
           (std::is_same_v<A, half> || std::is_same_v<A, bfloat16_t> || std::is_same_v<A, float>);
  }
  return std::is_same_v<C, int32_t> && std::is_same_v<A, int8_t> && std::is_same_v<B, int8_t>;
}

inline void check_mmad(Instr& instr, const MmadParams& params) {
  const auto within = [&instr](const char* name, int64_t value) {
    instr.require(value >= 1 && value <= 4095, "%s is %lld; it must be 1 to 4095", name,
                  static_cast<long long>(value));
  };
  within("m", params.m);
  within("n", params.n);
  within("k", params.k);
  instr.require(params.m != 1,
                "m is 1, which makes the cube read A as one plain vector instead of fractals; "
                "pad m to 16");
  instr.require(params.unitFlag == 0, "unitFlag is %d; only 0 is emulated",
                static_cast<int>(params.unitFlag));
  instr.require(!params.cmatrixSource, "cmatrixSource is true; the bias table is not emulated");
}

// An operand of the cube as [k][lines] in the type of the accumulator; a line is a row of A or a
// column of B. A line without a single written element is padding.
template <class C>
struct CubeOperand {
  std::vector<C> values;
  std::vector<int64_t> written;  // elements of each line that something has written
};

template <class T>
int64_t count_written(const LocalTensor<T>& tensor, int64_t first, int64_t count) {
  if (is_written(tensor, first, count)) return count;
  int64_t written = 0;
  for (int64_t i = first; i < first + count; ++i) written += is_written(tensor, i, 1) ? 1 : 0;
  return written;
}

// `place` maps (block of lines, block of k) to the number of the fractal.
template <class C, class T, class Place>
CubeOperand<C> unpack_operand(Instr& instr, const char* operand, const LocalTensor<T>& tensor,
                              int64_t lines, int64_t depth, Place place) {
  const int64_t width = elements_per_block<T>();
  CubeOperand<C> result{std::vector<C>(static_cast<size_t>(lines * depth)),
                        std::vector<int64_t>(static_cast<size_t>(lines))};
  for (int64_t l = 0; l < lines; l += kSide) {
    for (int64_t d = 0; d < depth; d += width) {
      const int64_t first = place(l / kSide, d / width) * kSide * width;
      const int64_t used_lines = std::min(kSide, lines - l);
      const int64_t used_depth = std::min(width, depth - d);
      const T* fractal = instr.read(operand, tensor, first, (used_lines - 1) * width + used_depth);
      for (int64_t i = 0; i < used_lines; ++i) {
        result.written[static_cast<size_t>(l + i)] +=
            count_written(tensor, first + i * width, used_depth);
        for (int64_t j = 0; j < used_depth; ++j) {
          result.values[static_cast<size_t>((d + j) * lines + l + i)] =
              static_cast<C>(fractal[i * width + j]);
        }
      }
    }
  }
  return result;
}

// Padding lines make results undefined that nobody may store. A line written in part, or an operand
// of padding alone, is a load that is missing or too short.
template <class C>
void require_written(const Instr& instr, const char* operand, const char* line_name,
                     const CubeOperand<C>& values, int64_t depth) {
  bool any = false;
  for (size_t line = 0; line < values.written.size(); ++line) {
    const int64_t written = values.written[line];
    any = any || written > 0;
    instr.require(written == 0 || written == depth,
                  "%s reads %s %zu, of whose %lld elements along k only %lld have been written",
                  operand, line_name, line, static_cast<long long>(depth),
                  static_cast<long long>(written));
  }
  instr.require(any, "%s reads a tile that nothing has written", operand);
}

// The windows of L0C that lie inside m and n, as (first element, row, column, columns).
template <class Visit>
void for_each_line(int64_t rows, int64_t columns, Visit visit) {
  const int64_t strip = ceil_to(rows, kSide) * kSide;
  for (int64_t c = 0; c < columns; c += kSide) {
    for (int64_t r = 0; r < rows; ++r) {
      visit(c / kSide * strip + r * kSide, r, c, std::min(kSide, columns - c));
    }
  }
}

// c [m][n] += a [k][m] transposed times b [k][n], each sum in ascending k. Most of a run's time is
// spent here: the columns are worth vectors, which the rest is compiled without.
template <class C>
__attribute__((optimize("O3"))) void multiply_tiles(
    const std::vector<C>& a, const std::vector<C>& b, std::vector<C>& c, int64_t m, int64_t n,
    int64_t k) {
  for (int64_t row = 0; row < m; ++row) {
    C* __restrict out = c.data() + row * n;
    for (int64_t depth = 0; depth < k; ++depth) {
      const C scale = a[static_cast<size_t>(depth * m + row)];
      const C* __restrict right = b.data() + depth * n;
      for (int64_t column = 0; column < n; ++column) out[column] += scale * right[column];
    }
  }
}

}  // namespace emulator

template <class C, class A, class B>
void Mmad(const LocalTensor<C>& dst, const LocalTensor<A>& fm, const LocalTensor<B>& filter,
          const MmadParams& params) {
  using namespace emulator;
  static_assert(mmad_types<C, A, B>(), "the cube does not multiply these element types");
  constexpr int64_t kDstAlignBytes = 1024;

  Instr instr("Mmad", PIPE_M);
  instr.at("dst", dst, {Store::L0C}, kDstAlignBytes);
  instr.at("fm", fm, {Store::L0A}, kFractalBytes);
  instr.at("filter", filter, {Store::L0B}, kFractalBytes);
  check_mmad(instr, params);
  const int64_t m = params.m;
  const int64_t n = params.n;
  const int64_t k = params.k;
  // Large tiles take the unit long enough to finish one product before the next one adds to it.
  if (ceil_to(m, kSide) / kSide * (ceil_to(n, kSide) / kSide) >= 10) instr.own_pipe_in_order();
  const int64_t width = elements_per_block<A>();
  const int64_t depth_blocks = ceil_to(k, width) / width;
  const int64_t column_blocks = ceil_to(n, kSide) / kSide;

  const CubeOperand<C> a =
      unpack_operand<C>(instr, "fm", fm, m, k,
                        [=](int64_t line, int64_t depth) { return line * depth_blocks + depth; });
  const CubeOperand<C> b =
      unpack_operand<C>(instr, "filter", filter, n, k,
                        [=](int64_t line, int64_t depth) { return depth * column_blocks + line; });
  require_written(instr, "fm", "row", a, k);
  require_written(instr, "filter", "column", b, k);
  const auto is_padding = [&](int64_t row, int64_t column) {
    return a.written[static_cast<size_t>(row)] == 0 || b.written[static_cast<size_t>(column)] == 0;
  };

  std::vector<C> c(static_cast<size_t>(m * n), C(0));
  if (!params.cmatrixInitVal) {
    for_each_line(m, n, [&](int64_t first, int64_t row, int64_t column, int64_t count) {
      const C* line = instr.read("dst", dst, first, count);
      for (int64_t i = 0; i < count; ++i) {
        instr.require(is_padding(row, column + i) || is_written(dst, first + i, 1),
                      "dst adds to row %lld, column %lld, which nothing has written",
                      static_cast<long long>(row), static_cast<long long>(column + i));
      }
      std::copy(line, line + count, c.begin() + row * n + column);
    });
  }
  multiply_tiles(a.values, b.values, c, m, n, k);

  instr.write_undefined("dst", dst, 0, ceil_to(m, kSide) * ceil_to(n, kSide));
  for_each_line(m, n, [&](int64_t first, int64_t row, int64_t column, int64_t count) {
    const C* from = c.data() + row * n + column;
    for (int64_t i = 0; i < count;) {
      int64_t run = 0;
      while (i + run < count && !is_padding(row, column + i + run)) ++run;
      if (run > 0) std::copy_n(from + i, run, instr.write("dst", dst, first + i, run));
      i += run + 1;
    }
  });
}

}  // namespace AscendC
