// LocalTensor and GlobalTensor: views that remember which memory they belong to.
#pragma once

#include "instr.h"

namespace AscendC {

template <class T>
class LocalTensor {
 public:
  using PrimType = T;

  LocalTensor() = default;
  // Emulator side: a window of a store; buffer is the core's buffer it was taken from, or -1.
  LocalTensor(emulator::Store store, int64_t byte_offset, int64_t bytes, int buffer,
              uint32_t generation)
      : store_(store),
        byte_offset_(byte_offset),
        bytes_(bytes),
        buffer_(buffer),
        generation_(generation),
        made_(true) {}

  uint32_t GetSize() const { return static_cast<uint32_t>(bytes_ / kElement); }

  LocalTensor operator[](uint32_t offset) const {
    const int64_t skipped = static_cast<int64_t>(offset) * kElement;
    if (skipped > bytes_) {
      emulator::fail("LocalTensor: element %lld is past the end of a tensor of %u elements",
                     static_cast<long long>(offset), GetSize());
    }
    return LocalTensor(store_, byte_offset_ + skipped, bytes_ - skipped, buffer_, generation_);
  }

  T GetValue(uint32_t index) const {
    emulator::Instr instr("GetValue", PIPE_S);
    instr.at("the tensor", *this, {emulator::Store::UB}, sizeof(T));
    return *instr.read("the tensor", *this, index, 1, true);
  }
  void SetValue(uint32_t index, T value) const {
    emulator::Instr instr("SetValue", PIPE_S);
    instr.at("the tensor", *this, {emulator::Store::UB}, sizeof(T));
    *instr.write("the tensor", *this, index, 1) = value;
  }

  template <class U>
  LocalTensor<U> ReinterpretCast() const {
    if (!made_) return LocalTensor<U>();
    return LocalTensor<U>(store_, byte_offset_, bytes_, buffer_, generation_);
  }

  emulator::Store store() const { return store_; }
  int64_t byte_offset() const { return byte_offset_; }
  int64_t bytes() const { return bytes_; }
  int buffer() const { return buffer_; }
  uint32_t generation() const { return generation_; }
  bool made() const { return made_; }

 private:
  static constexpr int64_t kElement = sizeof(T);
  emulator::Store store_ = emulator::Store::UB;
  int64_t byte_offset_ = 0;
  int64_t bytes_ = 0;
  int buffer_ = -1;
  uint32_t generation_ = 0;
  bool made_ = false;
};

template <class T>
class GlobalTensor {
 public:
  using PrimType = T;

  void SetGlobalBuffer(T* address, uint64_t elements) {
    SetGlobalBuffer(address);
    elements_ = elements;
  }
  void SetGlobalBuffer(T* address) {
    auto* byte = reinterpret_cast<uint8_t*>(const_cast<std::remove_const_t<T>*>(address));
    tensor_ = emulator::tensor_at(byte);
    byte_offset_ = byte - tensor_->base;
    elements_ = static_cast<uint64_t>(tensor_->bytes - byte_offset_) / sizeof(T);
  }

  // A negative offset wraps, as on the device; what counts is where an access lands.
  GlobalTensor operator[](uint64_t offset) const {
    const int64_t skipped = static_cast<int64_t>(offset);
    if (skipped <= -emulator::kFarthest || skipped >= emulator::kFarthest) {
      emulator::fail("GlobalTensor: the offset %lld lies in no tensor",
                     static_cast<long long>(skipped));
    }
    GlobalTensor moved = *this;
    moved.byte_offset_ += skipped * static_cast<int64_t>(sizeof(T));
    moved.elements_ = offset < elements_ ? elements_ - offset : 0;
    return moved;
  }
  uint64_t GetSize() const { return elements_; }

  // Scalar access goes through the data cache of the core, which nothing keeps coherent.
  T GetValue(uint64_t index) const {
    emulator::Instr instr("GetValue", PIPE_S);
    require_aligned(instr);
    return *instr.read("the tensor", *this, static_cast<int64_t>(index), 1);
  }
  void SetValue(uint64_t index, T value) const {
    emulator::Instr instr("SetValue", PIPE_S);
    require_aligned(instr);
    *instr.write("the tensor", *this, static_cast<int64_t>(index), 1) = value;
  }

  emulator::GmTensor* tensor() const { return tensor_; }
  int64_t byte_offset() const { return byte_offset_; }

 private:
  void require_aligned(const emulator::Instr& instr) const {
    instr.require(byte_offset_ % static_cast<int64_t>(sizeof(T)) == 0,
                  "the tensor starts at byte %lld, which is no multiple of its element",
                  static_cast<long long>(byte_offset_));
  }

  emulator::GmTensor* tensor_ = nullptr;
  int64_t byte_offset_ = 0;
  uint64_t elements_ = 0;
};

}  // namespace AscendC
