// Order between cores: cross-core flags, SyncAll, the kind of the kernel, and which core this is.
#pragma once

#include "sync.h"

namespace AscendC {

enum KernelType {
  KERNEL_TYPE_AIV_ONLY,
  KERNEL_TYPE_AIC_ONLY,
  KERNEL_TYPE_MIX_AIV_1_0,
  KERNEL_TYPE_MIX_AIC_1_0,
  KERNEL_TYPE_MIX_AIC_1_1,
  KERNEL_TYPE_MIX_AIC_1_2,
};

namespace emulator {

constexpr int kLastFreeCrossId = 10;  // SyncAll uses 11 to 14
constexpr int kMostCrossSets = 15;

inline void need_flags_between_cores(const char* call) {
  if (machine->flags_between_cores) return;
  fail("%s: a kernel of one kind of core has no flags between cores; declare a MIX kind", call);
}

inline void check_cross_id(const char* call, int id) {
  if (id < 0 || id >= kCrossIds) fail("%s: the id %d is not from 0 to 15", call, id);
  if (id > kLastFreeCrossId) {
    machine->warn(
        text("%s(%d): use the ids 0 to 10; SyncAll and matmul objects take the others", call, id));
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

inline std::vector<CrossSignal>::iterator first_of_mode(std::vector<CrossSignal>& signals,
                                                        int mode) {
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
  if (vector_cores_only && me.cube)
    fail("SyncAll<true>: only vector cores take part, and this is a cube core");
  const Options& options = machine->options;
  const int physical = options.physical_ai_cores * (options.kind == Kind::vector ? 2 : 1);
  if (options.blocks > physical) {
    fail("SyncAll: %d blocks are launched on %d cores, so some never start", options.blocks,
         physical);
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
  if (type != KERNEL_TYPE_AIV_ONLY && type != KERNEL_TYPE_AIC_ONLY)
    machine->flags_between_cores = true;
}

// After every core has ended: signals nobody waited for.
inline void check_end_of_launch(const Machine& m) {
  for (auto& each : m.cores) {
    for (int id = 0; id < kCrossIds; ++id) {
      if (each->arrived[id].empty() && each->sent[id].empty()) continue;
      const bool arrived = !each->arrived[id].empty();
      fail("end of kernel: %s %s", each->name.c_str(),
           text(arrived ? "has a cross-core flag %d that no CrossCoreWaitFlag took"
                        : "set the cross-core flag %d, and not every partner did",
                id)
               .c_str());
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

template <uint8_t mode, pipe_t pipe>
void CrossCoreSetFlag(uint16_t id) {
  static_assert(mode <= 2, "the modes are 0, 1 and 2");
  static_assert(pipe != PIPE_S && pipe != PIPE_ALL,
                "PIPE_S and PIPE_ALL cannot set a cross-core flag");
  emulator::Core& me = emulator::core();
  emulator::need_flags_between_cores("CrossCoreSetFlag");
  emulator::check_cross_id("CrossCoreSetFlag", id);
  if (!emulator::has_pipe(me, pipe)) {
    emulator::fail("CrossCoreSetFlag(%d): this core has no pipe %s", id, emulator::pipe_name(pipe));
  }
  if (mode == 1 && me.cube)
    emulator::fail("CrossCoreSetFlag<1>(%d): mode 1 is for vector cores", id);
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
void SyncAll() {
  emulator::sync_all(vector_cores_only);
}

}  // namespace AscendC
