// LoadData, two-dimensional form: fractals of 512 B from L1 to L0A or L0B, on the way transposed
// when asked. In L1 fractal i lies at startIndex + i * srcStride, in L0 at i * (1 + dstGap).
#pragma once

#include <cstdint>
#include <vector>

#include "moves_params.h"
#include "moves_rows.h"

namespace AscendC {
namespace emulator {

// Where element i of a fractal comes from; 16 x 16 elements when transposed.
inline int64_t fractal_source(int64_t i, bool transpose) {
  return transpose ? i % 16 * 16 + i / 16 : i;
}

}  // namespace emulator

template <class T>
void LoadData(const LocalTensor<T>& dst, const LocalTensor<T>& src,
              const LoadData2DParams& params) {
  using namespace emulator;
  Instr instr("LoadData", PIPE_MTE1);
  instr.at("dst", dst, {Store::L0A, Store::L0B}, kFractalBytes);
  instr.at("src", src, {Store::L1}, kBlockBytes);
  const int64_t repeat = params.repeatTimes;
  instr.require(repeat >= 1, "repeatTimes is 0; it must be 1 to 255");
  instr.require(!params.ifTranspose || sizeof(T) == 2,
                "ifTranspose needs elements of 16 bits; these have %d",
                static_cast<int>(sizeof(T)) * 8);
  instr.require(params.sid == 0 && params.addrMode == 0,
                "sid is %d and addrMode %d; only 0 is emulated", static_cast<int>(params.sid),
                static_cast<int>(params.addrMode));
  constexpr int64_t kElements = kFractalBytes / static_cast<int64_t>(sizeof(T));
  const int64_t first = params.startIndex;
  const int64_t src_pitch = params.srcStride;
  const int64_t dst_pitch = 1 + static_cast<int64_t>(params.dstGap);

  std::vector<const T*> source;
  for (int64_t i = 0; i < repeat; ++i) {
    source.push_back(instr.read("src", src, (first + i * src_pitch) * kElements, kElements));
  }
  for (int64_t i = 0; i < repeat; ++i) {
    const auto from = [&](int64_t element) { return fractal_source(element, params.ifTranspose); };
    const T* fractal = source[static_cast<size_t>(i)];
    T* out = instr.write("dst", dst, i * dst_pitch * kElements, kElements);
    for (int64_t element = 0; element < kElements; ++element) out[element] = fractal[from(element)];
    // Rows that Nd2Nz did not reach stay undefined, and the cube knows them as padding.
    carry_undefined(dst, i * dst_pitch * kElements, src, (first + i * src_pitch) * kElements,
                    kElements, from);
  }
}

}  // namespace AscendC
