// Flags, barriers, flags between cores, and who am I: everything a kernel says about order.
#pragma once

#include "instr.h"

namespace AscendC {

namespace emulator {
constexpr int event_number(pipe_t from, pipe_t to) { return from * kPipes + to; }
}  // namespace emulator

#define SPCOMP_EVENT(from, to) from##_##to = emulator::event_number(PIPE_##from, PIPE_##to)
enum class HardEvent {
  SPCOMP_EVENT(S, V), SPCOMP_EVENT(S, MTE2), SPCOMP_EVENT(S, MTE3),
  SPCOMP_EVENT(V, S), SPCOMP_EVENT(V, MTE2), SPCOMP_EVENT(V, MTE3),
  SPCOMP_EVENT(MTE2, S), SPCOMP_EVENT(MTE2, V), SPCOMP_EVENT(MTE2, MTE3),
  SPCOMP_EVENT(MTE3, S), SPCOMP_EVENT(MTE3, V), SPCOMP_EVENT(MTE3, MTE2),
  SPCOMP_EVENT(MTE2, MTE1), SPCOMP_EVENT(MTE1, MTE2), SPCOMP_EVENT(MTE1, M), SPCOMP_EVENT(M, MTE1),
  SPCOMP_EVENT(M, FIX), SPCOMP_EVENT(FIX, M), SPCOMP_EVENT(MTE1, FIX), SPCOMP_EVENT(FIX, MTE1),
  SPCOMP_EVENT(MTE2, M), SPCOMP_EVENT(M, MTE2), SPCOMP_EVENT(MTE2, FIX), SPCOMP_EVENT(FIX, MTE2),
  SPCOMP_EVENT(MTE3, MTE1), SPCOMP_EVENT(MTE1, MTE3),
};
#undef SPCOMP_EVENT

enum class CacheLine { SINGLE_CACHE_LINE, ENTIRE_DATA_CACHE };
enum class DcciDst { CACHELINE_ALL, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };

enum KernelType {
  KERNEL_TYPE_AIV_ONLY, KERNEL_TYPE_AIC_ONLY, KERNEL_TYPE_MIX_AIV_1_0, KERNEL_TYPE_MIX_AIC_1_0,
  KERNEL_TYPE_MIX_AIC_1_1, KERNEL_TYPE_MIX_AIC_1_2,
};

namespace emulator {

constexpr int kLastFreeEventId = 5;   // 6 and 7 belong to the system
constexpr int kLastFreeCrossId = 10;  // SyncAll uses 11 to 14
constexpr int kMostCrossSets = 15;

inline std::string event_name(HardEvent event) {
  const int number = static_cast<int>(event);
  return text("%s_%s", pipe_name(number / kPipes), pipe_name(number % kPipes));
}

inline EventFlag& event_flag(const char* call, HardEvent event, int id) {
  Core& me = core();
  const std::string name = event_name(event);
  if (id < 0 || id >= kEventIds) fail("%s<%s>: the id %d is not from 0 to 7", call, name.c_str(), id);
  const pipe_t from = pipe_t(static_cast<int>(event) / kPipes);
  const pipe_t to = pipe_t(static_cast<int>(event) % kPipes);
  const bool scalar = from == PIPE_S || to == PIPE_S;
  const auto known = [&](pipe_t pipe) { return has_pipe(me, pipe) || (me.cube && pipe == PIPE_MTE3); };
  if (!known(from) || !known(to) || (me.cube && scalar)) {
    fail("%s<%s>: this core has no such event", call, name.c_str());
  }
  if (id > kLastFreeEventId) {
    machine->warn(text("%s<%s>(%d): the ids 6 and 7 are reserved", call, name.c_str(), id));
  }
  return me.flags[static_cast<int>(event)][id];
}

// On the device a queue takes ids of the events between its two pipes, so a fixed id may be its own.
inline void warn_of_queues(HardEvent event, int id) {
  for (const Queue& queue : core().queues) {
    const bool forth = static_cast<int>(event) == event_number(queue.producer, queue.consumer);
    const bool back = static_cast<int>(event) == event_number(queue.consumer, queue.producer);
    if (!forth && !back) continue;
    machine->warn(text("SetFlag<%s>(%d): a %s queue takes ids of this event too; use AllocEventID",
                       event_name(event).c_str(), id, queue.position));
  }
}

inline void need_flags_between_cores(const char* call) {
  if (machine->flags_between_cores) return;
  fail("%s: a kernel of one kind of core has no flags between cores; declare a MIX kind", call);
}

inline void check_cross_id(const char* call, int id) {
  if (id < 0 || id >= kCrossIds) fail("%s: the id %d is not from 0 to 15", call, id);
  if (id > kLastFreeCrossId) {
    machine->warn(text("%s(%d): use the ids 0 to 10; SyncAll and matmul objects take the others", call, id));
  }
}

// The cores whose sets make one signal together, and the cores that receive it.
struct CrossGroup {
  std::vector<Core*> senders;
  std::vector<Core*> receivers;
};

inline CrossGroup cross_group(const Core& me, int mode) {
  CrossGroup group;
  for (auto& each : machine->cores) {
    const bool near = each->ai_core == me.ai_core;
    if (mode == 2) {
      if (near && each->cube != me.cube) group.receivers.push_back(each.get());
      if (near && each->cube == me.cube) group.senders.push_back(each.get());
    } else if (each->cube == me.cube && (mode == 0 || near)) {
      group.senders.push_back(each.get());
      group.receivers.push_back(each.get());
    }
  }
  return group;
}

inline std::vector<CrossSignal>::iterator first_of_mode(std::vector<CrossSignal>& signals, int mode) {
  auto found = signals.begin();
  while (found != signals.end() && found->mode != mode) ++found;
  return found;
}

inline void deliver(const Core& me, int mode, int id) {
  CrossGroup group = cross_group(me, mode);
  for (Core* sender : group.senders) {
    if (first_of_mode(sender->sent[id], mode) == sender->sent[id].end()) return;
  }
  CrossSignal joined{mode, Clock()};
  for (Core* sender : group.senders) {
    const auto signal = first_of_mode(sender->sent[id], mode);
    joined.clock.learn(signal->clock);
    sender->sent[id].erase(signal);
  }
  for (Core* receiver : group.receivers) {
    receiver->arrived[id].push_back(joined);
    if (receiver->arrived[id].size() > kMostCrossSets) {
      fail("CrossCoreSetFlag(%d): %s has more than 15 sets of this id outstanding", id,
           receiver->name.c_str());
    }
  }
}

inline bool has_arrived(Core& me) { return !me.arrived[me.waits_for].empty(); }

inline bool sync_all_passed(Core& me) { return me.at_sync_all == SyncAllKind::none; }

inline void sync_all(bool vector_cores_only) {
  Core& me = core();
  need_flags_between_cores("SyncAll");
  if (vector_cores_only && me.cube) fail("SyncAll<true>: only vector cores take part, and this is a cube core");
  const Options& options = machine->options;
  const int physical = options.physical_ai_cores * (options.kind == Kind::vector ? 2 : 1);
  if (options.blocks > physical) {
    fail("SyncAll: %d blocks are launched on %d cores, so some never start", options.blocks, physical);
  }
  const SyncAllKind kind = vector_cores_only ? SyncAllKind::vector_cores : SyncAllKind::every_core;
  me.at_sync_all = kind;
  std::vector<Core*> members;
  bool complete = true;
  for (auto& each : machine->cores) {
    if (vector_cores_only && each->cube) continue;
    members.push_back(each.get());
    complete = complete && each->at_sync_all == kind;
  }
  if (!complete) {
    wait_until(sync_all_passed, 0, vector_cores_only ? "SyncAll<true>" : "SyncAll<false>");
    return;
  }
  Clock everything;
  for (Core* each : members) everything.learn(each->pipes.after_all());
  for (Core* each : members) {
    each->pipes.learn_all(everything);
    each->at_sync_all = SyncAllKind::none;
  }
}

inline void declare_kind(KernelType type) {
  const Options& options = machine->options;
  const bool pure_vector = type == KERNEL_TYPE_AIV_ONLY || type == KERNEL_TYPE_MIX_AIV_1_0;
  const bool pure_cube = type == KERNEL_TYPE_AIC_ONLY || type == KERNEL_TYPE_MIX_AIC_1_0;
  const Kind kind = pure_vector ? Kind::vector : pure_cube ? Kind::cube : Kind::mix;
  const int ratio = type == KERNEL_TYPE_MIX_AIC_1_2 ? 2 : 1;
  if (options.kind != kind || (kind == Kind::mix && options.ratio != ratio)) {
    static const char* const names[] = {"vector", "cube", "mix"};
    fail("the kernel declares another kind of cores than the launch, which is %s%s",
         names[static_cast<int>(options.kind)],
         options.kind == Kind::mix ? text(" 1:%d", options.ratio).c_str() : "");
  }
  if (type != KERNEL_TYPE_AIV_ONLY && type != KERNEL_TYPE_AIC_ONLY) machine->flags_between_cores = true;
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
      fail("end of kernel: line %lld (64 B) of '%s' is written with SetValue and not cleaned: "
           "DataCacheCleanAndInvalid is missing",
           static_cast<long long>(line), tensor->name.c_str());
    }
  }
}

// After every core has ended: signals nobody waited for.
inline void check_end_of_launch(const Machine& m) {
  for (auto& each : m.cores) {
    for (int id = 0; id < kCrossIds; ++id) {
      if (each->arrived[id].empty() && each->sent[id].empty()) continue;
      const bool arrived = !each->arrived[id].empty();
      fail("end of kernel: %s %s", each->name.c_str(),
           text(arrived ? "has a cross-core flag %d that no CrossCoreWaitFlag took"
                        : "set the cross-core flag %d, and not every partner did", id).c_str());
    }
  }
}

}  // namespace emulator

inline int64_t GetBlockIdx() { return emulator::core().index; }
inline int64_t GetBlockNum() { return emulator::core(), emulator::machine->options.blocks; }
inline int64_t GetSubBlockIdx() { return emulator::core().sub_block; }
inline int64_t GetTaskRatio() {
  const bool mix = emulator::machine->options.kind == emulator::Kind::mix;
  return mix && !emulator::core().cube ? emulator::machine->options.ratio : 1;
}
inline void InitSocState() { emulator::core().atomic_type = nullptr; }

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

template <uint8_t mode, pipe_t pipe>
void CrossCoreSetFlag(uint16_t id) {
  static_assert(mode <= 2, "the modes are 0, 1 and 2");
  static_assert(pipe != PIPE_S && pipe != PIPE_ALL, "PIPE_S and PIPE_ALL cannot set a cross-core flag");
  emulator::Core& me = emulator::core();
  emulator::need_flags_between_cores("CrossCoreSetFlag");
  emulator::check_cross_id("CrossCoreSetFlag", id);
  if (!emulator::has_pipe(me, pipe)) {
    emulator::fail("CrossCoreSetFlag(%d): this core has no pipe %s", id, emulator::pipe_name(pipe));
  }
  if (mode == 1 && me.cube) emulator::fail("CrossCoreSetFlag<1>(%d): mode 1 is for vector cores", id);
  if (me.sent[id].size() >= emulator::kMostCrossSets) {
    emulator::fail("CrossCoreSetFlag(%d): more than 15 sets of this id are outstanding", id);
  }
  me.sent[id].push_back(emulator::CrossSignal{mode, me.pipes.after(pipe)});
  emulator::deliver(me, mode, id);
}

// The core issues nothing more to any pipe until the flag has come.
template <uint8_t mode = 0, pipe_t pipe = PIPE_S>
void CrossCoreWaitFlag(uint16_t id) {
  emulator::Core& me = emulator::core();
  emulator::need_flags_between_cores("CrossCoreWaitFlag");
  emulator::check_cross_id("CrossCoreWaitFlag", id);
  emulator::wait_until(emulator::has_arrived, id, emulator::text("CrossCoreWaitFlag(%d)", id));
  me.pipes.learn_all(me.arrived[id].front().clock);
  me.arrived[id].erase(me.arrived[id].begin());
}

template <bool vector_cores_only = true>
void SyncAll() { emulator::sync_all(vector_cores_only); }

// Writes dirty lines back and forgets the others. What the scalar unit wrote to them is then in GM
// before anything it issues next.
template <class T, CacheLine line, DcciDst destination = DcciDst::CACHELINE_ALL>
void DataCacheCleanAndInvalid(const GlobalTensor<T>& view) {
  emulator::Core& me = emulator::core();
  emulator::GmTensor* tensor = view.tensor();
  if (!tensor) emulator::fail("DataCacheCleanAndInvalid: a GlobalTensor without SetGlobalBuffer");
  if (destination == DcciDst::CACHELINE_UB) emulator::fail("DataCacheCleanAndInvalid: GM is not CACHELINE_UB");
  me.pipes.learn(PIPE_S, me.pipes.after(PIPE_S));
  const emulator::Clock& now = me.pipes.known(PIPE_S);
  if (line == CacheLine::SINGLE_CACHE_LINE) {
    const int64_t number = view.byte_offset() / emulator::kCacheLine;
    me.line_invalidated[{tensor, number}] = now;
    const auto dirty = tensor->dirty_lines.find(number);
    if (dirty != tensor->dirty_lines.end() && dirty->second == me.number) tensor->dirty_lines.erase(dirty);
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
void SetAtomicAdd() { emulator::core().atomic_type = &emulator::kTypeMark<T>; }
inline void SetAtomicNone() { emulator::core().atomic_type = nullptr; }

}  // namespace AscendC
