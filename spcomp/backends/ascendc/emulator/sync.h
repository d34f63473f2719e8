// Order inside one core: flags, barriers, the data cache, atomic writes, and what has to be left
// tidy at the end.
#pragma once

#include "instr.h"

namespace AscendC {

namespace emulator {
constexpr int event_number(pipe_t from, pipe_t to) { return from * kPipes + to; }
}  // namespace emulator

#define SPCOMP_EVENT(from, to) from##_##to = emulator::event_number(PIPE_##from, PIPE_##to)
enum class HardEvent {
  SPCOMP_EVENT(S, V),
  SPCOMP_EVENT(S, MTE2),
  SPCOMP_EVENT(S, MTE3),
  SPCOMP_EVENT(V, S),
  SPCOMP_EVENT(V, MTE2),
  SPCOMP_EVENT(V, MTE3),
  SPCOMP_EVENT(MTE2, S),
  SPCOMP_EVENT(MTE2, V),
  SPCOMP_EVENT(MTE2, MTE3),
  SPCOMP_EVENT(MTE3, S),
  SPCOMP_EVENT(MTE3, V),
  SPCOMP_EVENT(MTE3, MTE2),
  SPCOMP_EVENT(MTE2, MTE1),
  SPCOMP_EVENT(MTE1, MTE2),
  SPCOMP_EVENT(MTE1, M),
  SPCOMP_EVENT(M, MTE1),
  SPCOMP_EVENT(M, FIX),
  SPCOMP_EVENT(FIX, M),
  SPCOMP_EVENT(MTE1, FIX),
  SPCOMP_EVENT(FIX, MTE1),
  SPCOMP_EVENT(MTE2, M),
  SPCOMP_EVENT(M, MTE2),
  SPCOMP_EVENT(MTE2, FIX),
  SPCOMP_EVENT(FIX, MTE2),
  SPCOMP_EVENT(MTE3, MTE1),
  SPCOMP_EVENT(MTE1, MTE3),
};
#undef SPCOMP_EVENT

enum class CacheLine { SINGLE_CACHE_LINE, ENTIRE_DATA_CACHE };
enum class DcciDst { CACHELINE_ALL, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };

namespace emulator {

constexpr int kLastFreeEventId = 5;  // 6 and 7 belong to the system

inline std::string event_name(HardEvent event) {
  const int number = static_cast<int>(event);
  return text("%s_%s", pipe_name(number / kPipes), pipe_name(number % kPipes));
}

inline bool has_event(const Core& me, pipe_t from, pipe_t to) {
  if (me.cube && (from == PIPE_S || to == PIPE_S)) return false;
  const auto known = [&](pipe_t pipe) {
    return has_pipe(me, pipe) || (me.cube && pipe == PIPE_MTE3);
  };
  return known(from) && known(to);
}

inline EventFlag& event_flag(const char* call, HardEvent event, int id) {
  Core& me = core();
  const int number = static_cast<int>(event);
  if (id < 0 || id >= kEventIds) {
    fail("%s<%s>: the id %d is not from 0 to 7", call, event_name(event).c_str(), id);
  }
  if (!has_event(me, pipe_t(number / kPipes), pipe_t(number % kPipes))) {
    fail("%s<%s>: this core has no such event", call, event_name(event).c_str());
  }
  if (id > kLastFreeEventId) {
    machine->warn(
        text("%s<%s>(%d): the ids 6 and 7 are reserved", call, event_name(event).c_str(), id));
  }
  return me.flags[number][id];
}

// On the device a queue takes ids of the events between its two pipes, so a fixed id may be its
// own.
inline void warn_of_queues(HardEvent event, int id) {
  for (const Queue& queue : core().queues) {
    const bool forth = static_cast<int>(event) == event_number(queue.producer, queue.consumer);
    const bool back = static_cast<int>(event) == event_number(queue.consumer, queue.producer);
    if (!forth && !back) continue;
    machine->warn(text("SetFlag<%s>(%d): a %s queue takes ids of this event too; use AllocEventID",
                       event_name(event).c_str(), id, queue.position));
  }
}

// What the kernel must not leave behind, for it would disturb the next kernel on this core.
inline void check_end_of_kernel(Core& me) {
  for (int event = 0; event < kEvents; ++event) {
    for (int id = 0; id < kEventIds; ++id) {
      if (!me.flags[event][id].set) continue;
      fail("end of kernel: the flag %s(%d) is still set; WaitFlag is missing",
           event_name(HardEvent(event)).c_str(), id);
    }
  }
  for (const Queue& queue : me.queues) {
    for (const int index : queue.buffers) {
      const Buffer::State state = me.buffers[static_cast<size_t>(index)].state;
      if (state == Buffer::State::free) continue;
      fail("end of kernel: a tensor of the %s queue is %s", queue.position,
           state == Buffer::State::enqueued ? "still in the queue; DeQue is missing"
                                            : "not freed; FreeTensor is missing");
    }
  }
  if (me.atomic_type) fail("end of kernel: SetAtomicAdd is still on; SetAtomicNone is missing");
  for (auto& tensor : machine->tensors) {
    for (const auto& [line, owner] : tensor->dirty_lines) {
      if (owner != me.number) continue;
      fail(
          "end of kernel: line %lld (64 B) of '%s' is written with SetValue and not cleaned: "
          "DataCacheCleanAndInvalid is missing",
          static_cast<long long>(line), tensor->name.c_str());
    }
  }
}

}  // namespace emulator

template <HardEvent event>
void SetFlag(int32_t id) {
  emulator::EventFlag& flag = emulator::event_flag("SetFlag", event, id);
  if (flag.set) {
    emulator::fail("SetFlag<%s>(%d): it is set already; WaitFlag is missing",
                   emulator::event_name(event).c_str(), id);
  }
  if (!flag.reserved) emulator::warn_of_queues(event, id);
  flag.set = true;
  flag.clock = emulator::core().pipes.after(pipe_t(static_cast<int>(event) / emulator::kPipes));
}

template <HardEvent event>
void WaitFlag(int32_t id) {
  emulator::EventFlag& flag = emulator::event_flag("WaitFlag", event, id);
  if (!flag.set) {
    emulator::fail("WaitFlag<%s>(%d): nothing has set it, so the core would hang",
                   emulator::event_name(event).c_str(), id);
  }
  flag.set = false;
  emulator::core().pipes.learn(pipe_t(static_cast<int>(event) % emulator::kPipes), flag.clock);
}

template <pipe_t pipe>
void PipeBarrier() {
  emulator::Core& me = emulator::core();
  if (pipe == PIPE_S) emulator::fail("PipeBarrier<PIPE_S>: the scalar pipe takes no barrier");
  if (pipe != PIPE_ALL && !emulator::has_pipe(me, pipe)) {
    emulator::fail("PipeBarrier: this core has no pipe %s", emulator::pipe_name(pipe));
  }
  me.pipes.barrier(pipe);
}

// Writes dirty lines back and forgets the others. What the scalar unit wrote to them is then in GM
// before anything it issues next.
template <class T, CacheLine line, DcciDst destination = DcciDst::CACHELINE_ALL>
void DataCacheCleanAndInvalid(const GlobalTensor<T>& view) {
  emulator::Core& me = emulator::core();
  emulator::GmTensor* tensor = view.tensor();
  if (!tensor) emulator::fail("DataCacheCleanAndInvalid: a GlobalTensor without SetGlobalBuffer");
  if (destination == DcciDst::CACHELINE_UB)
    emulator::fail("DataCacheCleanAndInvalid: GM is not CACHELINE_UB");
  me.pipes.learn(PIPE_S, me.pipes.after(PIPE_S));
  const emulator::Clock& now = me.pipes.known(PIPE_S);
  if (line == CacheLine::SINGLE_CACHE_LINE) {
    const int64_t number = view.byte_offset() / emulator::kCacheLine;
    me.line_invalidated[{tensor, number}] = now;
    const auto dirty = tensor->dirty_lines.find(number);
    if (dirty != tensor->dirty_lines.end() && dirty->second == me.number)
      tensor->dirty_lines.erase(dirty);
    return;
  }
  me.line_invalidated.clear();
  me.cache_invalidated = now;
  for (auto& each : emulator::machine->tensors) {
    for (auto dirty = each->dirty_lines.begin(); dirty != each->dirty_lines.end();) {
      dirty = dirty->second == me.number ? each->dirty_lines.erase(dirty) : std::next(dirty);
    }
  }
}

template <class T>
void SetAtomicAdd() {
  emulator::core().atomic_type = &emulator::kTypeMark<T>;
}
inline void InitSocState() { emulator::core().atomic_type = nullptr; }
inline void SetAtomicNone() { emulator::core().atomic_type = nullptr; }

}  // namespace AscendC
