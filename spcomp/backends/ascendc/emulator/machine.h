// The cores of one launch, what each of them owns, and the schedule that runs them.
//
// A core is a coroutine. It gives way only where it waits for other cores; its instructions have
// their effect on the values at once, in program order.
#pragma once

#include <ucontext.h>

#include <exception>
#include <memory>

#include "fault.h"
#include "memory.h"
#include "order.h"

namespace AscendC {
namespace emulator {

enum class Kind { vector, cube, mix };

struct Options {
  Kind kind = Kind::vector;
  int blocks = 1;
  int ratio = 2;                 // vector cores per cube core in a mix kernel
  bool descending = false;       // the order in which cores get their turn
  bool vector_in_order = false;  // as if the compiler had put a barrier between vector instructions
  bool keep_reserved_ub = true;  // false: the kernel is built with the reserved 8 KiB given back
  int physical_ai_cores = 24;    // SyncAll needs every launched core to be there at once
};

constexpr int kEvents = kPipes * kPipes;
constexpr int kEventIds = 8;
constexpr int kCrossIds = 16;

struct EventFlag {
  bool set = false;
  bool reserved = false;  // by AllocEventID
  Clock clock;
};

struct CrossSignal {
  int mode;
  Clock clock;
};

enum class SyncAllKind { none, vector_cores, every_core };

// A buffer that InitBuffer carved; a tensor taken from it remembers the generation it belongs to.
struct Buffer {
  enum class State { free, allocated, enqueued, dequeued };
  Store store = Store::UB;
  int64_t first_byte = 0;
  int64_t bytes = 0;
  State state = State::free;
  uint32_t generation = 0;
  Clock clock;  // of the last EnQue or FreeTensor
};

struct Queue {
  const char* position = "";
  int position_number = 0;
  pipe_t producer = PIPE_S;
  pipe_t consumer = PIPE_S;
  int depth = 1;
  std::vector<int> buffers;
  std::vector<int> waiting;  // enqueued, oldest first
  size_t next = 0;           // buffers take turns
};

// How far a store has been given out, and to whom.
struct Plan {
  int64_t used = 0;
  std::string parts;
  const char* owner = nullptr;
};

struct Core {
  Core(bool cube, int index, int ai_core, int sub_block, int number, int cores)
      : cube(cube),
        index(index),
        ai_core(ai_core),
        sub_block(sub_block),
        number(number),
        name(text("%s %d", cube ? "AIC" : "AIV", index)),
        pipes(number, cores) {}

  Chip& chip(Store store) { return chips[static_cast<int>(store)]; }

  bool cube;
  int index;  // GetBlockIdx
  int ai_core;
  int sub_block;  // GetSubBlockIdx
  int number;     // among all cores of the launch
  std::string name;
  Pipes pipes;
  Chip chips[kStores];
  Plan plans[kStores];
  EventFlag flags[kEvents][kEventIds];
  std::vector<CrossSignal> sent[kCrossIds];     // waiting for the other participants
  std::vector<CrossSignal> arrived[kCrossIds];  // waiting for CrossCoreWaitFlag
  std::vector<Buffer> buffers;
  std::vector<Queue> queues;
  void* pipe_object = nullptr;        // the TPipe of the kernel
  const void* atomic_type = nullptr;  // element type of SetAtomicAdd, or none
  std::map<std::pair<const GmTensor*, int64_t>, Clock> line_invalidated;
  Clock cache_invalidated;  // what had finished at the last full invalidate

  bool (*may_go_on)(Core&) = nullptr;  // why the core waits; null while it can run
  int waits_for = 0;
  std::string waiting_in;
  SyncAllKind at_sync_all = SyncAllKind::none;
  bool started = false;
  bool finished = false;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

struct Machine {
  Options options;
  std::vector<std::unique_ptr<GmTensor>> tensors;
  std::vector<std::unique_ptr<Core>> cores;
  bool flags_between_cores = false;
  std::vector<std::string> warnings;
  uint64_t instructions = 0;
  uint64_t checks = 0;

  void (*kernel)(void*) = nullptr;
  void* argument = nullptr;
  std::string fault;
  bool stopping = false;  // waiting cores end instead of going on
  ucontext_t scheduler;

  void warn(const std::string& sentence) {
    for (const std::string& known : warnings) {
      if (known == sentence) return;
    }
    warnings.push_back(sentence);
  }
};

inline thread_local Machine* machine = nullptr;
inline thread_local Core* running = nullptr;

inline std::string running_core() { return running ? running->name : std::string(); }

inline Core& core() {
  if (!running) fail("AscendC calls work only inside a running kernel");
  return *running;
}

inline void make_cores(Machine& m) {
  const Options& options = m.options;
  const int per_ai_core = options.kind == Kind::mix ? 1 + options.ratio : 1;
  const int count = options.blocks * per_ai_core;
  for (int number = 0; number < count; ++number) {
    const int ai_core = number / per_ai_core;
    const int place = number % per_ai_core;
    const bool cube = options.kind == Kind::cube || (options.kind == Kind::mix && place == 0);
    const int sub_block = options.kind == Kind::mix && !cube ? place - 1 : 0;
    const int index =
        options.kind == Kind::mix && !cube ? ai_core * options.ratio + sub_block : ai_core;
    m.cores.push_back(std::make_unique<Core>(cube, index, ai_core, sub_block, number, count));
    Core& made = *m.cores.back();
    for (int store = 0; store < kStores; ++store) {
      made.chips[store].resize(store_bytes(Store(store), cube, options.keep_reserved_ub));
    }
    made.cache_invalidated = Clock(static_cast<size_t>(count) * kPipes);
  }
}

void check_end_of_kernel(Core& core);  // in sync.h

struct Stopped {};  // unwinds a waiting core when another one has ended the run

inline void enter_coroutine() {
  try {
    machine->kernel(machine->argument);
    check_end_of_kernel(*running);
  } catch (const Fault& fault) {
    machine->fault = fault.text;
  } catch (const Stopped&) {
  } catch (const std::exception& error) {
    machine->fault = running->name + ": the emulator ran into " + error.what();
  }
  running->finished = true;
  swapcontext(&running->context, &machine->scheduler);
}

// Gives way to the other cores until `may_go_on` holds.
inline void wait_until(bool (*may_go_on)(Core&), int argument, const std::string& where) {
  Core& me = core();
  me.waits_for = argument;
  if (may_go_on(me)) return;
  me.may_go_on = may_go_on;
  me.waiting_in = where;
  swapcontext(&me.context, &machine->scheduler);
  if (machine->stopping) throw Stopped{};
  me.may_go_on = nullptr;
}

inline void start_coroutine(Core& core) {
  constexpr size_t kStackBytes = size_t{1} << 20;
  core.stack.reset(new char[kStackBytes]);
  getcontext(&core.context);
  core.context.uc_stack.ss_sp = core.stack.get();
  core.context.uc_stack.ss_size = kStackBytes;
  core.context.uc_link = nullptr;
  makecontext(&core.context, enter_coroutine, 0);
}

inline void resume(Machine& m, Core& core) {
  core.started = true;
  running = &core;
  swapcontext(&m.scheduler, &core.context);
  running = nullptr;
}

inline void report_deadlock(Machine& m) {
  m.fault = "deadlock: no core can go on";
  for (auto& each : m.cores) {
    if (!each->finished) m.fault += "; " + each->name + " waits in " + each->waiting_in;
  }
}

// Gives every core that can run its turn, again and again, until all have ended or one is at fault.
inline void take_turns(Machine& m) {
  const int count = static_cast<int>(m.cores.size());
  for (int left = count; left > 0;) {
    bool progress = false;
    for (int turn = 0; turn < count; ++turn) {
      Core& next = *m.cores[static_cast<size_t>(m.options.descending ? count - 1 - turn : turn)];
      if (next.finished || (next.may_go_on && !next.may_go_on(next))) continue;
      progress = true;
      resume(m, next);
      if (!m.fault.empty()) return;
      if (next.finished) --left;
    }
    if (!progress) return report_deadlock(m);
  }
}

// Leaves a fault, a deadlock included, in `m.fault`. The other cores are then unwound where they
// wait, so that what lies on their stacks is released.
inline void run_cores(Machine& m) {
  for (auto& each : m.cores) start_coroutine(*each);
  take_turns(m);
  m.stopping = true;
  for (auto& each : m.cores) {
    if (each->started && !each->finished) resume(m, *each);
  }
}

}  // namespace emulator
}  // namespace AscendC
