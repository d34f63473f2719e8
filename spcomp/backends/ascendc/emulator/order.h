// Which instructions have certainly finished when another one starts.
//
// An agent is one pipe of one core; its instructions have the places 1, 2, 3, ... A clock says for
// every agent up to which place it has finished. Each pipe keeps the clock of what has finished
// before its next instruction; flags, barriers, queues and cross-core flags carry clocks along.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace AscendC {

enum pipe_t { PIPE_S, PIPE_V, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_M, PIPE_FIX, PIPE_ALL };

namespace emulator {

constexpr int kPipes = PIPE_ALL;

inline const char* pipe_name(int pipe) {
  static const char* const names[] = {"S", "V", "MTE1", "MTE2", "MTE3", "M", "FIX", "ALL"};
  return names[pipe];
}

struct Place {
  int agent = -1;
  uint32_t count = 0;
};

class Clock {
 public:
  explicit Clock(size_t agents = 0) : finished_(agents, 0) {}
  uint32_t operator[](int agent) const { return finished_[static_cast<size_t>(agent)]; }
  void learn(int agent, uint32_t count) {
    uint32_t& known = finished_[static_cast<size_t>(agent)];
    if (known < count) known = count;
  }
  void learn(const Clock& other) {
    if (finished_.size() < other.finished_.size()) finished_.resize(other.finished_.size(), 0);
    for (size_t agent = 0; agent < other.finished_.size(); ++agent) {
      if (finished_[agent] < other.finished_[agent]) finished_[agent] = other.finished_[agent];
    }
  }

 private:
  std::vector<uint32_t> finished_;
};

// The clocks and the instruction counters of one core.
class Pipes {
 public:
  Pipes(int core, int cores) : first_agent_(core * kPipes) {
    const size_t agents = static_cast<size_t>(cores) * kPipes;
    for (Clock& clock : known_) clock = Clock(agents);
  }

  Place issue(pipe_t pipe, const char* api) {
    follow_scalar(pipe);
    apis_[pipe].push_back(api);
    return Place{agent(pipe), count(pipe)};
  }
  int agent(int pipe) const { return first_agent_ + pipe; }
  uint32_t count(int pipe) const { return static_cast<uint32_t>(apis_[pipe].size()); }
  const char* api(int pipe, uint32_t count) const { return apis_[pipe][count - 1]; }
  const Clock& known(pipe_t pipe) const { return known_[pipe]; }

  // What has finished once everything issued to this pipe so far has.
  Clock after(pipe_t pipe) {
    follow_scalar(pipe);
    Clock clock = known_[pipe];
    clock.learn(agent(pipe), count(pipe));
    return clock;
  }
  Clock after_all() {
    Clock clock = after(PIPE_S);
    for (int pipe = PIPE_S + 1; pipe < kPipes; ++pipe) clock.learn(after(pipe_t(pipe)));
    return clock;
  }
  void learn(pipe_t pipe, const Clock& clock) {
    known_[pipe].learn(clock);
    if (pipe == PIPE_S) ++scalar_version_;
  }
  void learn_all(const Clock& clock) {
    for (int pipe = 0; pipe < kPipes; ++pipe) learn(pipe_t(pipe), clock);
  }
  void barrier(pipe_t pipe) {
    if (pipe == PIPE_ALL) {
      learn_all(after_all());
    } else {
      learn(pipe, after(pipe));
    }
  }

 private:
  // The scalar unit feeds every pipe, so what it waited for precedes whatever it issues next.
  void follow_scalar(pipe_t pipe) {
    if (pipe == PIPE_S || seen_version_[pipe] == scalar_version_) return;
    known_[pipe].learn(known_[PIPE_S]);
    seen_version_[pipe] = scalar_version_;
  }

  int first_agent_;
  Clock known_[kPipes];
  std::vector<const char*> apis_[kPipes];
  uint64_t scalar_version_ = 0;
  uint64_t seen_version_[kPipes] = {};
};

// One instruction as the ordering analysis sees it.
struct Issued {
  const Pipes* pipes = nullptr;
  pipe_t pipe = PIPE_S;
  Place place;
  bool own_pipe_in_order = false;  // the pipe finishes its earlier instructions before this one
  bool atomic = false;             // its writes to GM accumulate, so they commute with each other
  uint64_t checks = 0;

  // Whether `earlier` has finished, as far as this instruction may have to wait for it.
  bool follows(Place earlier, bool one_of_them_only_read_first) const {
    if (earlier.count == 0) return true;
    if (earlier.agent == place.agent) {
      const bool starts_in_order = one_of_them_only_read_first || own_pipe_in_order;
      if (earlier.count == place.count || starts_in_order) return true;
    }
    return pipes->known(pipe)[earlier.agent] >= earlier.count;
  }
};

struct Conflict {
  Place earlier;
  bool earlier_wrote = false;
  int64_t first_byte = 0;
};

// Last writer and last readers of each 32 B cell of one on-chip store.
class Cells {
 public:
  static constexpr int64_t kBytes = 32;

  void resize(int64_t bytes) { cells_.assign(static_cast<size_t>((bytes + 31) / kBytes), Cell{}); }

  bool touch(Issued& now, int64_t first, int64_t end, bool writes, Conflict& conflict) {
    for (int64_t index = first / kBytes; index * kBytes < end; ++index) {
      Cell& cell = cells_[static_cast<size_t>(index)];
      ++now.checks;
      if (!now.follows(Place{now.pipes->agent(cell.writer), cell.written}, false)) {
        conflict =
            Conflict{Place{now.pipes->agent(cell.writer), cell.written}, true, index * kBytes};
        return false;
      }
      if (!writes) {
        cell.read[now.pipe] = now.place.count;
        continue;
      }
      for (int pipe = 0; pipe < kPipes; ++pipe) {
        if (!now.follows(Place{now.pipes->agent(pipe), cell.read[pipe]}, true)) {
          conflict =
              Conflict{Place{now.pipes->agent(pipe), cell.read[pipe]}, false, index * kBytes};
          return false;
        }
        cell.read[pipe] = 0;
      }
      cell.writer = static_cast<uint8_t>(now.pipe);
      cell.written = now.place.count;
    }
    return true;
  }

 private:
  struct Cell {
    uint32_t written = 0;
    uint32_t read[kPipes] = {};
    uint8_t writer = 0;
  };
  std::vector<Cell> cells_;
};

// Last writers and readers of a tensor in GM, as a map of byte ranges with the same history.
class Ranges {
 public:
  void resize(int64_t bytes) {
    ranges_.clear();
    ranges_.emplace(0, History{});
    bytes_ = bytes;
  }

  bool touch(Issued& now, int64_t first, int64_t end, bool writes, Conflict& conflict) {
    const auto begin = split(first);
    const auto stop = split(end);
    for (auto range = begin; range != stop; ++range) {
      ++now.checks;
      conflict.first_byte = range->first;
      if (!range->second.admits(now, writes, conflict)) return false;
      if (!writes) History::note(range->second.readers, now.place);
      if (writes && now.atomic) History::note(range->second.adders, now.place);
    }
    if (writes && !now.atomic) replace(begin, stop, now.place);
    return true;
  }

  // The writers of any byte in the range.
  std::vector<Place> writers(int64_t first, int64_t end) const {
    std::vector<Place> found;
    auto range = ranges_.upper_bound(first);
    for (--range; range != ranges_.end() && range->first < end; ++range) {
      if (range->second.writer.count) found.push_back(range->second.writer);
      for (const Place& adder : range->second.adders) found.push_back(adder);
    }
    return found;
  }

 private:
  struct History {
    Place writer;
    std::vector<Place> adders;
    std::vector<Place> readers;

    bool admits(const Issued& now, bool writes, Conflict& conflict) const {
      if (!now.follows(writer, false)) return refuse(writer, true, conflict);
      if (!(writes && now.atomic)) {
        for (const Place& adder : adders) {
          if (!now.follows(adder, false)) return refuse(adder, true, conflict);
        }
      }
      if (!writes) return true;
      for (const Place& reader : readers) {
        if (!now.follows(reader, true)) return refuse(reader, false, conflict);
      }
      return true;
    }
    static bool refuse(Place earlier, bool wrote, Conflict& conflict) {
      conflict.earlier = earlier;
      conflict.earlier_wrote = wrote;
      return false;
    }
    static void note(std::vector<Place>& places, Place place) {
      for (Place& known : places) {
        if (known.agent == place.agent) {
          known.count = place.count;
          return;
        }
      }
      places.push_back(place);
    }
  };
  using Map = std::map<int64_t, History>;

  Map::iterator split(int64_t at) {
    if (at >= bytes_) return ranges_.end();
    auto after = ranges_.lower_bound(at);
    if (after != ranges_.end() && after->first == at) return after;
    auto before = after;
    --before;
    return ranges_.emplace_hint(after, at, before->second);
  }

  // An ordered write makes everything before it history; rows written by one instruction join.
  void replace(Map::iterator begin, Map::iterator stop, Place writer) {
    if (begin == stop) return;
    begin->second = History{writer, {}, {}};
    ranges_.erase(std::next(begin), stop);
    if (begin == ranges_.begin()) return;
    const History& before = std::prev(begin)->second;
    const bool same = before.writer.agent == writer.agent && before.writer.count == writer.count;
    if (same && before.adders.empty() && before.readers.empty()) ranges_.erase(begin);
  }

  Map ranges_;
  int64_t bytes_ = 0;
};

}  // namespace emulator
}  // namespace AscendC
