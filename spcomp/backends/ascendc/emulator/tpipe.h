// TPipe, TQue and TBuf.
//
// The objects of the kernel are handles; their state belongs to the core, where the check at the
// end of the kernel finds it.
#pragma once

#include "carve.h"
#include "sync.h"

namespace AscendC {

using TEventID = int8_t;

template <TPosition position, int32_t depth>
class TQue {
  static_assert(emulator::is_queue_position(position), "no queue has this position");

 public:
  template <class T>
  LocalTensor<T> AllocTensor() {
    emulator::Queue& queue = checked("AllocTensor");
    emulator::Core& me = emulator::core();
    for (size_t tried = 0; tried < queue.buffers.size(); ++tried) {
      const int index = queue.buffers[queue.next];
      queue.next = (queue.next + 1) % queue.buffers.size();
      emulator::Buffer& buffer = me.buffers[static_cast<size_t>(index)];
      if (buffer.state != State::free) continue;
      buffer.state = State::allocated;
      me.pipes.learn(queue.producer, buffer.clock);
      return emulator::tensor_of<T>(index, 0, buffer.bytes);
    }
    emulator::fail(
        "AllocTensor: the %s queue has no free buffer among its %d; FreeTensor is missing",
        queue.position, static_cast<int>(queue.buffers.size()));
  }

  template <class T>
  bool EnQue(const LocalTensor<T>& tensor) {
    emulator::Queue& queue = checked("EnQue");
    emulator::Core& me = emulator::core();
    emulator::Buffer& buffer = owned("EnQue", queue, tensor);
    if (buffer.state != State::allocated) {
      emulator::fail("EnQue: the tensor of the %s queue is %s", queue.position,
                     state_name(buffer.state));
    }
    const size_t most = depth > 0 ? depth : 1;
    if (queue.waiting.size() >= most) {
      emulator::fail("EnQue: the %s queue of depth %d holds %d tensors already; DeQue is missing",
                     queue.position, depth, static_cast<int>(queue.waiting.size()));
    }
    buffer.state = State::enqueued;
    buffer.clock = me.pipes.after(queue.producer);
    queue.waiting.push_back(tensor.buffer());
    return true;
  }

  template <class T>
  LocalTensor<T> DeQue() {
    emulator::Queue& queue = checked("DeQue");
    emulator::Core& me = emulator::core();
    if (queue.waiting.empty()) {
      emulator::fail("DeQue: the %s queue is empty; EnQue is missing", queue.position);
    }
    const int index = queue.waiting.front();
    queue.waiting.erase(queue.waiting.begin());
    emulator::Buffer& buffer = me.buffers[static_cast<size_t>(index)];
    buffer.state = State::dequeued;
    me.pipes.learn(queue.consumer, buffer.clock);
    return emulator::tensor_of<T>(index, 0, buffer.bytes);
  }

  template <class T>
  void FreeTensor(const LocalTensor<T>& tensor) {
    emulator::Queue& queue = checked("FreeTensor");
    emulator::Core& me = emulator::core();
    emulator::Buffer& buffer = owned("FreeTensor", queue, tensor);
    if (buffer.state != State::dequeued && buffer.state != State::allocated) {
      emulator::fail("FreeTensor: the tensor of the %s queue is %s", queue.position,
                     state_name(buffer.state));
    }
    const bool consumed = buffer.state == State::dequeued;
    buffer.clock = me.pipes.after(consumed ? queue.consumer : queue.producer);
    buffer.state = State::free;
    ++buffer.generation;
    me.chip(buffer.store).poison(buffer.first_byte, buffer.first_byte + buffer.bytes);
  }

  // The in-place forms of a queue of depth 0.
  template <class T>
  void AllocTensor(LocalTensor<T>& tensor) {
    tensor = AllocTensor<T>();
  }
  template <class T>
  void DeQue(LocalTensor<T>& tensor) {
    tensor = DeQue<T>();
  }

 private:
  friend class TPipe;
  using State = emulator::Buffer::State;

  static const char* state_name(State state) {
    static const char* const names[] = {"free", "allocated and not enqueued", "in the queue",
                                        "out of the queue and not freed"};
    return names[static_cast<int>(state)];
  }

  emulator::Queue& checked(const char* call) const {
    if (index_ < 0) {
      emulator::fail("%s: the %s queue has no buffers; InitBuffer is missing", call,
                     emulator::position_name(position));
    }
    return emulator::core().queues[static_cast<size_t>(index_)];
  }

  template <class T>
  emulator::Buffer& owned(const char* call, const emulator::Queue& queue,
                          const LocalTensor<T>& tensor) {
    for (const int index : queue.buffers) {
      if (index != tensor.buffer()) continue;
      emulator::Buffer& buffer = emulator::core().buffers[static_cast<size_t>(index)];
      if (buffer.generation != tensor.generation()) {
        emulator::fail("%s: the tensor of the %s queue is freed already", call, queue.position);
      }
      return buffer;
    }
    emulator::fail("%s: the tensor does not come from this %s queue", call, queue.position);
  }

  int index_ = -1;
};

template <TPosition position>
class TBuf {
  static_assert(emulator::is_on_chip(position), "a TBuf lies in a store of the core");

 public:
  template <class T>
  LocalTensor<T> Get() {
    return window<T>("Get", 0, bytes_);
  }
  template <class T>
  LocalTensor<T> Get(uint32_t elements) {
    return window<T>("Get", 0, static_cast<int64_t>(elements) * static_cast<int64_t>(sizeof(T)));
  }
  template <class T>
  LocalTensor<T> GetWithOffset(uint32_t elements, uint32_t byte_offset) {
    return window<T>("GetWithOffset", byte_offset,
                     static_cast<int64_t>(elements) * static_cast<int64_t>(sizeof(T)));
  }

 private:
  friend class TPipe;

  template <class T>
  LocalTensor<T> window(const char* call, int64_t first, int64_t bytes) {
    if (index_ < 0) emulator::fail("%s: the TBuf has no bytes; InitBuffer is missing", call);
    if (first + bytes > bytes_) {
      emulator::fail("%s: the bytes %lld to %lld of a TBuf of %lld bytes", call,
                     static_cast<long long>(first), static_cast<long long>(first + bytes),
                     static_cast<long long>(bytes_));
    }
    return emulator::tensor_of<T>(index_, first, bytes);
  }

  int index_ = -1;
  int64_t bytes_ = 0;
};

class TPipe {
 public:
  TPipe() {
    emulator::Core& me = emulator::core();
    if (me.pipe_object) emulator::fail("TPipe: this core has one already");
    me.pipe_object = this;
  }
  TPipe(const TPipe&) = delete;
  TPipe& operator=(const TPipe&) = delete;

  template <TPosition position, int32_t depth>
  bool InitBuffer(TQue<position, depth>& queue, int64_t count, int64_t bytes) {
    emulator::Core& me = emulator::core();
    const char* name = emulator::position_name(position);
    if (queue.index_ >= 0) emulator::fail("InitBuffer: the %s queue has its buffers already", name);
    check_queue(static_cast<int>(position), name, emulator::producer_of(position), count);
    emulator::Queue made;
    made.position = name;
    made.position_number = static_cast<int>(position);
    made.producer = emulator::producer_of(position);
    made.consumer = emulator::consumer_of(position);
    made.depth = depth;
    for (int64_t index = 0; index < count; ++index) {
      made.buffers.push_back(emulator::add_buffer(emulator::store_of(position), name, bytes));
    }
    me.queues.push_back(made);
    queue.index_ = static_cast<int>(me.queues.size()) - 1;
    return true;
  }

  template <TPosition position>
  bool InitBuffer(TBuf<position>& buffer, int64_t bytes) {
    if (buffer.index_ >= 0) emulator::fail("InitBuffer: the TBuf has its bytes already");
    const char* name = emulator::position_name(position);
    buffer.index_ = emulator::add_buffer(emulator::store_of(position), name, bytes);
    buffer.bytes_ = emulator::round_up(bytes, 32);
    return true;
  }

  template <HardEvent event>
  TEventID AllocEventID() {
    const TEventID id = FetchEventID<event>();
    emulator::core().flags[static_cast<int>(event)][id].reserved = true;
    return id;
  }
  template <HardEvent event>
  TEventID FetchEventID() {
    for (int id = 0; id <= emulator::kLastFreeEventId; ++id) {
      if (!emulator::core().flags[static_cast<int>(event)][id].reserved)
        return static_cast<TEventID>(id);
    }
    emulator::fail("AllocEventID<%s>: every id from 0 to %d is taken",
                   emulator::event_name(event).c_str(), emulator::kLastFreeEventId);
  }
  TEventID FetchEventID(HardEvent event) {
    for (int id = 0; id <= emulator::kLastFreeEventId; ++id) {
      if (!emulator::core().flags[static_cast<int>(event)][id].reserved)
        return static_cast<TEventID>(id);
    }
    emulator::fail("FetchEventID(%s): every id from 0 to %d is taken",
                   emulator::event_name(event).c_str(), emulator::kLastFreeEventId);
  }
  template <HardEvent event>
  void ReleaseEventID(TEventID id) {
    emulator::EventFlag& flag = emulator::event_flag("ReleaseEventID", event, id);
    if (!flag.reserved) {
      emulator::fail("ReleaseEventID<%s>(%d): AllocEventID did not give this id",
                     emulator::event_name(event).c_str(), id);
    }
    flag.reserved = false;
  }

 private:
  // Each queue buffer takes one of the eight hardware events of its position.
  static void check_queue(int position, const char* name, pipe_t producer, int64_t count) {
    if (count <= 0)
      emulator::fail("InitBuffer: the %s queue is given %lld buffers", name,
                     static_cast<long long>(count));
    if (!emulator::has_pipe(emulator::core(), producer)) {
      emulator::fail("InitBuffer: this core has no pipe %s for a %s queue",
                     emulator::pipe_name(producer), name);
    }
    int64_t held = count;
    for (const emulator::Queue& queue : emulator::core().queues) {
      if (queue.position_number == position) held += static_cast<int64_t>(queue.buffers.size());
    }
    if (held > 8) {
      emulator::fail("InitBuffer: the %s queues hold %lld buffers together; the most is 8", name,
                     static_cast<long long>(held));
    }
  }
};

inline TPipe* GetTPipePtr() {
  auto* pipe = static_cast<TPipe*>(emulator::core().pipe_object);
  if (!pipe) emulator::fail("GetTPipePtr: this core has no TPipe");
  return pipe;
}

}  // namespace AscendC
