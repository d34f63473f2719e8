// One instruction of the running core: where its operands may lie, how much of them it touches, and
// whether everything it depends on has certainly finished.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "machine.h"

namespace AscendC {

enum class TPosition { GM, A1, A2, B1, B2, C1, C2, CO1, CO2, VECIN, VECOUT, VECCALC };

template <class T>
class LocalTensor;
template <class T>
class GlobalTensor;

namespace emulator {

// A number that stands for an element type, to compare types across calls.
template <class T>
inline const char kTypeMark = 0;

inline bool has_pipe(const Core& core, pipe_t pipe) {
  if (pipe == PIPE_S || pipe == PIPE_MTE2) return true;
  const bool on_cube = pipe == PIPE_MTE1 || pipe == PIPE_M || pipe == PIPE_FIX;
  return core.cube == on_cube;
}

// The registered tensor whose bytes hold this address (its end counts as inside).
inline GmTensor* tensor_at(const uint8_t* address) {
  core();
  for (auto& tensor : machine->tensors) {
    if (address >= tensor->base && address <= tensor->base + tensor->bytes) return tensor.get();
  }
  fail("SetGlobalBuffer: the address %p belongs to no tensor of the call",
       static_cast<const void*>(address));
}

// Use: construct, at(), require(), then every read(), then every write(). Values are computed on
// the pointers that read() and write() return. Touches of one instruction never conflict.
class Instr {
 public:
  Instr(const char* api, pipe_t pipe) : api_(api), pipe_(pipe), core_(core()) {
    require(has_pipe(core_, pipe), "this core has no pipe %s", pipe_name(pipe));
    issued_.pipes = &core_.pipes;
    issued_.pipe = pipe;
    issued_.place = core_.pipes.issue(pipe, api);
    issued_.own_pipe_in_order =
        pipe == PIPE_S || (pipe == PIPE_V && machine->options.vector_in_order);
    ++machine->instructions;
  }
  Instr(const Instr&) = delete;
  Instr& operator=(const Instr&) = delete;
  ~Instr() { machine->checks += issued_.checks; }

  // The hardware finishes what it depends on in its own pipe first, as the cube does for large
  // tiles.
  void own_pipe_in_order() { issued_.own_pipe_in_order = true; }

  bool atomic_add() const {
    return core_.atomic_type != nullptr && (pipe_ == PIPE_MTE3 || pipe_ == PIPE_FIX);
  }

  SPCOMP_PRINTF(3, 4) void require(bool holds, const char* format, ...) const {
    if (holds) return;
    va_list arguments;
    va_start(arguments, format);
    const std::string sentence = vtext(format, arguments);
    va_end(arguments);
    refuse(sentence);
  }

  // Placement of an operand and alignment of its first byte.
  template <class T>
  void at(const char* operand, const LocalTensor<T>& tensor, std::initializer_list<Store> allowed,
          unsigned align_bytes) const {
    require(tensor.made(), "%s is a tensor nobody has allocated", operand);
    bool placed = false;
    for (const Store store : allowed) placed = placed || store == tensor.store();
    if (!placed) refuse_place(operand, tensor.store(), allowed);
    require(tensor.byte_offset() % align_bytes == 0,
            "%s starts at byte %lld of %s, which is no multiple of %u", operand,
            static_cast<long long>(tensor.byte_offset()), store_name(tensor.store()), align_bytes);
  }

  // A window of `count` elements from element `first` of the tensor.
  template <class T>
  const T* read(const char* operand, const LocalTensor<T>& tensor, int64_t first, int64_t count,
                bool must_be_initialised = false) {
    const Window window = place(operand, tensor, first, count);
    touch(operand, window, false);
    Chip& chip = core_.chip(window.store);
    if (must_be_initialised) {
      const int64_t byte = chip.uninitialised(window.first, window.end);
      require(byte < 0, "%s reads byte %lld of %s, which nothing has written", operand,
              static_cast<long long>(byte), store_name(window.store));
    }
    return reinterpret_cast<const T*>(chip.at(window.first));
  }

  template <class T>
  T* write(const char* operand, const LocalTensor<T>& tensor, int64_t first, int64_t count) {
    const Window window = place(operand, tensor, first, count);
    touch(operand, window, true);
    core_.chip(window.store).mark_initialised(window.first, window.end);
    return reinterpret_cast<T*>(core_.chip(window.store).at(window.first));
  }

  // A window that the hardware leaves undefined.
  template <class T>
  T* write_undefined(const char* operand, const LocalTensor<T>& tensor, int64_t first,
                     int64_t count) {
    const Window window = place(operand, tensor, first, count);
    touch(operand, window, true);
    core_.chip(window.store).poison(window.first, window.end);
    return reinterpret_cast<T*>(core_.chip(window.store).at(window.first));
  }

  template <class T>
  const T* read(const char* operand, const GlobalTensor<T>& tensor, int64_t first, int64_t count) {
    return reinterpret_cast<const T*>(touch_gm(operand, tensor, first, count, false));
  }

  template <class T>
  T* write(const char* operand, const GlobalTensor<T>& tensor, int64_t first, int64_t count) {
    require(!atomic_add() || core_.atomic_type == &kTypeMark<std::remove_const_t<T>>,
            "%s has another element type than SetAtomicAdd", operand);
    return reinterpret_cast<T*>(touch_gm(operand, tensor, first, count, true));
  }

 private:
  struct Window {
    Store store;
    int64_t first;
    int64_t end;
  };

  [[noreturn]] void refuse(const std::string& sentence) const {
    fail("%s on pipe %s: %s", api_, pipe_name(pipe_), sentence.c_str());
  }

  [[noreturn]] void refuse_place(const char* operand, Store found,
                                 std::initializer_list<Store> allowed) const {
    std::string names;
    for (const Store store : allowed)
      names += (names.empty() ? "" : " or ") + std::string(store_name(store));
    refuse(text("%s lies in %s and has to lie in %s", operand, store_name(found), names.c_str()));
  }

  template <class T>
  Window place(const char* operand, const LocalTensor<T>& tensor, int64_t first,
               int64_t count) const {
    require(tensor.made(), "%s is a tensor nobody has allocated", operand);
    if (tensor.buffer() >= 0) {
      const Buffer& buffer = core_.buffers[static_cast<size_t>(tensor.buffer())];
      require(buffer.generation == tensor.generation(), "%s is used after FreeTensor", operand);
    }
    const int64_t size = tensor.bytes() / static_cast<int64_t>(sizeof(T));
    require(first >= 0 && count >= 0 && first <= size && count <= size - first,
            "%s needs the elements %lld to %lld of a tensor of %lld elements", operand,
            static_cast<long long>(first), static_cast<long long>(first + count),
            static_cast<long long>(size));
    const int64_t byte = tensor.byte_offset() + first * static_cast<int64_t>(sizeof(T));
    return Window{tensor.store(), byte, byte + count * static_cast<int64_t>(sizeof(T))};
  }

  void touch(const char* operand, const Window& window, bool writes) {
    if (window.first == window.end) return;
    Conflict conflict;
    if (core_.chip(window.store).cells.touch(issued_, window.first, window.end, writes, conflict))
      return;
    refuse(text("%s %s the 32 bytes of %s at %lld, ", operand, writes ? "writes" : "reads",
                store_name(window.store), static_cast<long long>(conflict.first_byte)) +
           earlier(conflict));
  }

  template <class T>
  uint8_t* touch_gm(const char* operand, const GlobalTensor<T>& view, int64_t first, int64_t count,
                    bool writes) {
    GmTensor* tensor = view.tensor();
    require(tensor != nullptr, "%s is a GlobalTensor without SetGlobalBuffer", operand);
    require(first > -kFarthest && first < kFarthest && count < kFarthest,
            "%s needs the elements %lld to %lld, which no tensor has", operand,
            static_cast<long long>(first), static_cast<long long>(first + count));
    const int64_t byte = view.byte_offset() + first * static_cast<int64_t>(sizeof(T));
    const int64_t end = byte + count * static_cast<int64_t>(sizeof(T));
    require(count >= 0 && byte >= 0 && end <= tensor->bytes,
            "%s %s the bytes %lld to %lld of '%s', which has %lld", operand,
            writes ? "writes" : "reads", static_cast<long long>(byte), static_cast<long long>(end),
            tensor->name.c_str(), static_cast<long long>(tensor->bytes));
    require(!(writes && tensor->read_only), "%s writes '%s', which is read only", operand,
            tensor->name.c_str());
    if (count == 0 || tensor->read_only) return tensor->base + byte;
    check_cache(operand, *tensor, byte, end, writes);
    issued_.atomic = writes && atomic_add();
    Conflict conflict;
    if (!tensor->ranges.touch(issued_, byte, end, writes, conflict)) {
      refuse(text("%s %s '%s' at byte %lld, ", operand, writes ? "writes" : "reads",
                  tensor->name.c_str(), static_cast<long long>(conflict.first_byte)) +
             earlier(conflict));
    }
    return tensor->base + byte;
  }

  // Scalar access sees whole 64 B lines of the core's own data cache; everything else sees GM.
  void check_cache(const char* operand, GmTensor& tensor, int64_t first, int64_t end, bool writes) {
    const int64_t first_line = first / kCacheLine;
    const int64_t end_line = (end + kCacheLine - 1) / kCacheLine;
    auto dirty = tensor.dirty_lines.lower_bound(first_line);
    for (; dirty != tensor.dirty_lines.end() && dirty->first < end_line; ++dirty) {
      if (pipe_ == PIPE_S && dirty->second == core_.number) continue;
      require(false,
              "%s %s line %lld (64 B) of '%s', which %s has written with SetValue and not cleaned: "
              "DataCacheCleanAndInvalid is missing",
              operand, writes ? "writes" : "reads", static_cast<long long>(dirty->first),
              tensor.name.c_str(),
              machine->cores[static_cast<size_t>(dirty->second)]->name.c_str());
    }
    if (pipe_ != PIPE_S) return;
    const int own = core_.pipes.agent(PIPE_S);
    for (int64_t line = first_line; line < end_line; ++line) {
      const auto single = core_.line_invalidated.find({&tensor, line});
      for (const Place& writer :
           tensor.ranges.writers(line * kCacheLine, (line + 1) * kCacheLine)) {
        if (writer.agent == own || core_.cache_invalidated[writer.agent] >= writer.count) continue;
        const bool fresh =
            single != core_.line_invalidated.end() && single->second[writer.agent] >= writer.count;
        require(fresh,
                "%s %s line %lld (64 B) of '%s' through the data cache after %s wrote it: "
                "DataCacheCleanAndInvalid is missing",
                operand, writes ? "writes" : "reads", static_cast<long long>(line),
                tensor.name.c_str(), instruction(writer).c_str());
      }
      if (writes) tensor.dirty_lines[line] = core_.number;
    }
  }

  static std::string instruction(Place place) {
    const Core& core = *machine->cores[static_cast<size_t>(place.agent / kPipes)];
    const int pipe = place.agent % kPipes;
    return text("%s of %s (instruction %u of pipe %s)", core.pipes.api(pipe, place.count),
                core.name.c_str(), place.count, pipe_name(pipe));
  }

  std::string earlier(const Conflict& conflict) const {
    const int pipe = conflict.earlier.agent % kPipes;
    std::string missing;
    if (conflict.earlier.agent / kPipes != core_.number) {
      missing = "nothing between the two cores orders them";
    } else if (pipe == pipe_) {
      missing = text("PipeBarrier<PIPE_%s> is missing", pipe_name(pipe));
    } else {
      missing = text("a flag %s_%s is missing", pipe_name(pipe), pipe_name(pipe_));
    }
    return text("which %s %s and may not have finished: %s", instruction(conflict.earlier).c_str(),
                conflict.earlier_wrote ? "writes" : "reads", missing.c_str());
  }

  const char* api_;
  pipe_t pipe_;
  Core& core_;
  Issued issued_;
};

}  // namespace emulator
}  // namespace AscendC
