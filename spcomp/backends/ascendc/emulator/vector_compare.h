// Compare, CompareScalar and Select. Bit i of a mask stream belongs to lane i, least significant
// bit of the first byte first.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vector_lanes.h"
#include "vector_math.h"
#include "vector_overlap.h"
#include "vector_params.h"

namespace AscendC {
namespace emulator {

constexpr int64_t kRepeatBytes = kVectorBlockBytes * kBlocksPerRepeat;

template <class T>
bool compares(T a, T b, CMPMODE mode) {
  switch (mode) {
    case CMPMODE::LT:
      return a < b;
    case CMPMODE::GT:
      return a > b;
    case CMPMODE::EQ:
      return a == b;
    case CMPMODE::LE:
      return a <= b;
    case CMPMODE::GE:
      return a >= b;
    case CMPMODE::NE:
      break;
  }
  return a != b;
}

// One result bit per lane. The mask form asks for every lane, because what it leaves in the bits of
// masked lanes is not documented. `other` gives the address to compare with, after its own checks.
template <class T>
class Comparison {
 public:
  Comparison(const char* api, const LocalTensor<uint8_t>& dst, const LocalTensor<T>& src0,
             CMPMODE mode, const Form& form, Stride stride)
      : in_(api, PIPE_V),
        dst_{"dst", dst},
        src0_{"src0", src0, stride},
        mode_(mode),
        lanes_(form.lanes(in_, kLanesPerRepeat<T>)) {
    static_assert(is_one_of<T, half, float, int32_t>, "comparisons take half, float and int32");
    in_.require(!is_one_of<T, int32_t> || mode == CMPMODE::EQ, "int32 compares with EQ alone");
    bits_ = form.is_count() ? form.count() : lanes_.repeats() * kLanesPerRepeat<T>;
    in_.require(bits_ * int64_t{sizeof(T)} % kRepeatBytes == 0,
                "%lld elements are no multiple of 256 bytes", static_cast<long long>(bits_));
    int64_t active = 0;
    for (const Segment& segment : lanes_.segments()) active += segment.count;
    in_.require(active == bits_, "the mask leaves lanes out, whose result bits are undefined");
    in_unified_buffer(in_, dst_);
    in_unified_buffer(in_, src0_);
    require_apart(in_, dst_, bits_ / 8, src0_, extent(lanes_, src0_));
  }

  void with(const LocalTensor<T>& src1, Stride stride) {
    const Operand<T> other{"src1", src1, stride};
    in_unified_buffer(in_, other);
    require_apart(in_, dst_, bits_ / 8, other, extent(lanes_, other));
    const T* a = read_lanes(in_, lanes_, src0_);
    const T* b = read_lanes(in_, lanes_, other);
    store([&](const Segment& segment, int64_t i) {
      return compares(a[src0_.first(segment) + i], b[other.first(segment) + i], mode_);
    });
  }

  void with(T scalar) {
    const T* a = read_lanes(in_, lanes_, src0_);
    store([&](const Segment& segment, int64_t i) {
      return compares(a[src0_.first(segment) + i], scalar, mode_);
    });
  }

 private:
  template <class Bit>
  void store(Bit bit) {
    if (bits_ == 0) return;
    uint8_t* write = in_.write(dst_.name, dst_.tensor, 0, bits_ / 8);
    std::fill_n(write, bits_ / 8, uint8_t{0});
    for (const Segment& segment : lanes_.segments())
      for (int64_t i = 0; i < segment.count; ++i) {
        const int64_t at = segment.repeat * kLanesPerRepeat<T> + segment.lane + i;
        if (bit(segment, i)) write[at / 8] |= static_cast<uint8_t>(1U << (at % 8));
      }
  }

  Instr in_;
  Operand<uint8_t> dst_;
  Operand<T> src0_;
  CMPMODE mode_;
  Lanes lanes_;
  int64_t bits_ = 0;
};

template <class T>
void compare(const LocalTensor<uint8_t>& dst, const LocalTensor<T>& src0,
             const LocalTensor<T>& src1, CMPMODE mode, const Form& form,
             const BinaryRepeatParams& p) {
  Comparison<T> comparison("Compare", dst, src0, mode, form, {p.src0BlkStride, p.src0RepStride});
  comparison.with(src1, {p.src1BlkStride, p.src1RepStride});
}

template <class T>
void compare_scalar(const LocalTensor<uint8_t>& dst, const LocalTensor<T>& src, const T& scalar,
                    CMPMODE mode, const Form& form, const UnaryRepeatParams& p) {
  Comparison<T> comparison("CompareScalar", dst, src, mode, form, {p.srcBlkStride, p.srcRepStride});
  comparison.with(scalar);
}

// Whether the bit of a lane is set. The stream must be initialised: no lane shows that a wrong bit
// has chosen it.
template <class T, class U>
class SelectBits {
 public:
  SelectBits(Instr& in, const LocalTensor<U>& bits, const Lanes& lanes, SELMODE mode)
      : repeats_share_(mode == SELMODE::VSEL_CMPMASK_SPR) {
    static_assert(is_one_of<U, uint8_t, uint16_t, uint32_t, uint64_t>,
                  "the mask of Select is a tensor of unsigned integers");
    for (const Segment& segment : lanes.segments())
      count_ = std::max(count_, number(segment.repeat, segment.lane + segment.count - 1) + 1);
    if (repeats_share_) count_ = std::min(count_, kLanesPerRepeat<T>);
    elements_ = (count_ + 8 * int64_t{sizeof(U)} - 1) / (8 * int64_t{sizeof(U)});
    stream_ = reinterpret_cast<const uint8_t*>(in.read("selMask", bits, 0, elements_, true));
  }

  int64_t elements() const { return elements_; }

  bool operator()(int64_t repeat, int64_t lane) const {
    const int64_t at = number(repeat, lane);
    return (stream_[at / 8] >> (at % 8) & 1) != 0;
  }

 private:
  int64_t number(int64_t repeat, int64_t lane) const {
    if (repeats_share_) return lane % kLanesPerRepeat<T>;
    return repeat * kLanesPerRepeat<T> + lane;
  }

  bool repeats_share_;
  int64_t count_ = 0;
  int64_t elements_ = 0;
  const uint8_t* stream_ = nullptr;
};

// `src1` is null where bit 0 takes the scalar.
template <class T, class U>
void select(const LocalTensor<T>& dst, const LocalTensor<U>& bits, const LocalTensor<T>& src0,
            const LocalTensor<T>* src1, T scalar, SELMODE mode, const Form& form,
            const BinaryRepeatParams& p) {
  static_assert(is_real<T>, "Select takes half and float");
  Instr in("Select", PIPE_V);
  const bool scalar_mode = mode == SELMODE::VSEL_TENSOR_SCALAR_MODE;
  in.require(scalar_mode == (src1 == nullptr),
             "the mode asks for a %s in place of the second source",
             scalar_mode ? "scalar" : "tensor");
  in.require(mode == SELMODE::VSEL_CMPMASK_SPR || machine->options.keep_reserved_ub,
             "this mode works in the reserved 8 KiB of UB, which the kernel has taken for itself");
  const Lanes lanes = form.lanes(in, kLanesPerRepeat<T>);
  const Operand<T> to{"dst", dst, {p.dstBlkStride, p.dstRepStride}};
  const Operand<T> one{"src0", src0, {p.src0BlkStride, p.src0RepStride}};
  const Operand<T> zero{"src1", src1 != nullptr ? *src1 : src0, {p.src1BlkStride, p.src1RepStride}};
  const Operand<U> mask{"selMask", bits};
  in_unified_buffer(in, to);
  in_unified_buffer(in, mask);
  in_unified_buffer(in, one);
  if (src1 != nullptr) in_unified_buffer(in, zero);
  require_own_repeats(in, lanes, to);
  require_same_or_apart(in, lanes, to, one);
  if (src1 != nullptr) require_same_or_apart(in, lanes, to, zero);
  if (lanes.segments().empty()) return;
  const SelectBits<T, U> takes_first(in, bits, lanes, mode);
  require_apart(in, to, extent(lanes, to), mask, takes_first.elements());
  const T* a = read_lanes(in, lanes, one);
  const T* b = src1 != nullptr ? read_lanes(in, lanes, zero) : nullptr;
  T* write = write_lanes(in, lanes, to);
  for (const Segment& segment : lanes.segments())
    for (int64_t i = 0; i < segment.count; ++i) {
      const T other = b != nullptr ? b[zero.first(segment) + i] : scalar;
      const bool first = takes_first(segment.repeat, segment.lane + i);
      write[to.first(segment) + i] = first ? a[one.first(segment) + i] : other;
    }
}

}  // namespace emulator

template <class T>
void Compare(const LocalTensor<uint8_t>& dst, const LocalTensor<T>& src0,
             const LocalTensor<T>& src1, CMPMODE mode, uint32_t count) {
  emulator::compare(dst, src0, src1, mode, {int64_t{count}}, {});
}
template <class T>
void Compare(const LocalTensor<uint8_t>& dst, const LocalTensor<T>& src0,
             const LocalTensor<T>& src1, CMPMODE mode, uint64_t mask,
             emulator::Narrow<uint8_t> repeat, const BinaryRepeatParams& params) {
  emulator::compare(dst, src0, src1, mode, {mask, repeat}, params);
}
template <class T>
void Compare(const LocalTensor<uint8_t>& dst, const LocalTensor<T>& src0,
             const LocalTensor<T>& src1, CMPMODE mode, uint64_t mask[],
             emulator::Narrow<uint8_t> repeat, const BinaryRepeatParams& params) {
  emulator::compare(dst, src0, src1, mode, {mask, repeat}, params);
}

template <class T>
void CompareScalar(const LocalTensor<uint8_t>& dst, const LocalTensor<T>& src, const T scalar,
                   CMPMODE mode, uint32_t count) {
  emulator::compare_scalar(dst, src, scalar, mode, {int64_t{count}}, {});
}
template <class T>
void CompareScalar(const LocalTensor<uint8_t>& dst, const LocalTensor<T>& src, const T scalar,
                   CMPMODE mode, uint64_t mask, emulator::Narrow<uint8_t> repeat,
                   const UnaryRepeatParams& params) {
  emulator::compare_scalar(dst, src, scalar, mode, {mask, repeat}, params);
}
template <class T>
void CompareScalar(const LocalTensor<uint8_t>& dst, const LocalTensor<T>& src, const T scalar,
                   CMPMODE mode, uint64_t mask[], emulator::Narrow<uint8_t> repeat,
                   const UnaryRepeatParams& params) {
  emulator::compare_scalar(dst, src, scalar, mode, {mask, repeat}, params);
}

template <class T, class U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE mode, uint32_t count) {
  emulator::select(dst, selMask, src0, &src1, T{}, mode, {int64_t{count}}, {});
}
template <class T, class U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE mode, uint64_t mask,
            emulator::Narrow<uint8_t> repeat, const BinaryRepeatParams& params) {
  emulator::select(dst, selMask, src0, &src1, T{}, mode, {mask, repeat}, params);
}
template <class T, class U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE mode, uint64_t mask[],
            emulator::Narrow<uint8_t> repeat, const BinaryRepeatParams& params) {
  emulator::select(dst, selMask, src0, &src1, T{}, mode, {mask, repeat}, params);
}

template <class T, class U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
            T src1, SELMODE mode, uint32_t count) {
  emulator::select<T, U>(dst, selMask, src0, nullptr, src1, mode, {int64_t{count}}, {});
}
template <class T, class U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
            T src1, SELMODE mode, uint64_t mask, emulator::Narrow<uint8_t> repeat,
            const BinaryRepeatParams& params) {
  emulator::select<T, U>(dst, selMask, src0, nullptr, src1, mode, {mask, repeat}, params);
}
template <class T, class U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
            T src1, SELMODE mode, uint64_t mask[], emulator::Narrow<uint8_t> repeat,
            const BinaryRepeatParams& params) {
  emulator::select<T, U>(dst, selMask, src0, nullptr, src1, mode, {mask, repeat}, params);
}

}  // namespace AscendC
