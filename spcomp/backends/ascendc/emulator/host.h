// The host's side of a launch: named buffers and scalars in, results or the first fault out.
#pragma once

#include <cmath>
#include <tuple>

#include "cross.h"

namespace AscendC {
namespace emulator {

// These structs are written by emulate.py; both sides change together.
struct HostTensor {
  const char* name;
  void* data;
  int64_t bytes;
  int64_t read_only;
};

struct HostArgument {
  enum Kind : int64_t { tensor, integer, real, bytes };
  int64_t kind;
  int64_t whole;  // index of the tensor, the integer, or the length of `content`
  double fraction;
  const void* content;
};

struct HostLaunch {
  int64_t tensor_count;
  const HostTensor* tensors;
  int64_t argument_count;
  const HostArgument* arguments;
  int64_t kind;
  int64_t blocks;
  int64_t ratio;
  int64_t descending;
  int64_t vector_in_order;
  int64_t keep_reserved_ub;
  int64_t physical_ai_cores;
};

struct HostReport {
  int64_t instructions;
  int64_t checks;
  char fault[4096];
  char warnings[4096];
};

template <class T>
struct ArgumentReader {
  static T read(const Machine&, const HostArgument& argument, int position) {
    if constexpr (std::is_floating_point_v<T>) {
      if (argument.kind == HostArgument::real) return static_cast<T>(argument.fraction);
      if (argument.kind == HostArgument::integer) return static_cast<T>(argument.whole);
    } else if constexpr (std::is_integral_v<T> || std::is_enum_v<T>) {
      if (argument.kind == HostArgument::integer) {
        const T value = static_cast<T>(argument.whole);
        const bool below_zero = std::is_unsigned_v<T> && argument.whole < 0;
        if (!below_zero && static_cast<int64_t>(value) == argument.whole) return value;
        fail("argument %d: %lld does not fit its %d bytes", position,
             static_cast<long long>(argument.whole), static_cast<int>(sizeof(T)));
      }
    } else if constexpr (std::is_trivially_copyable_v<T>) {
      if (argument.kind == HostArgument::bytes &&
          argument.whole == static_cast<int64_t>(sizeof(T))) {
        T value;
        std::memcpy(&value, argument.content, sizeof(T));
        return value;
      }
    }
    fail("argument %d has another kind or size than the kernel's parameter of %d bytes", position,
         static_cast<int>(sizeof(T)));
  }
};

template <class T>
struct ArgumentReader<T*> {
  static T* read(const Machine& m, const HostArgument& argument, int position) {
    if (argument.kind != HostArgument::tensor) fail("argument %d has to be a tensor", position);
    return reinterpret_cast<T*>(m.tensors[static_cast<size_t>(argument.whole)]->base);
  }
};

template <class... P>
struct Call {
  void (*kernel)(P...);
  std::tuple<std::remove_cv_t<P>...> values;

  static void start(void* self) {
    Call& call = *static_cast<Call*>(self);
    std::apply(call.kernel, call.values);
  }
};

template <class... P, size_t... I>
void launch_with(Machine& m, void (*kernel)(P...), const HostLaunch& launch,
                 std::index_sequence<I...>) {
  if (launch.argument_count != static_cast<int64_t>(sizeof...(P))) {
    fail("the kernel takes %d arguments and was given %lld", static_cast<int>(sizeof...(P)),
         static_cast<long long>(launch.argument_count));
  }
  Call<P...> call{
      kernel,
      {ArgumentReader<std::remove_cv_t<P>>::read(m, launch.arguments[I], static_cast<int>(I))...}};
  m.kernel = &Call<P...>::start;
  m.argument = &call;
  run_cores(m);
}

inline Options options_of(const HostLaunch& launch) {
  Options options;
  options.kind = Kind(launch.kind);
  options.blocks = static_cast<int>(launch.blocks);
  options.ratio = static_cast<int>(launch.ratio);
  options.descending = launch.descending != 0;
  options.vector_in_order = launch.vector_in_order != 0;
  options.keep_reserved_ub = launch.keep_reserved_ub != 0;
  options.physical_ai_cores = static_cast<int>(launch.physical_ai_cores);
  return options;
}

// Runs the kernel on copies of the tensors and copies the written ones back when it succeeds.
// Gives 0, or 1 with the fault in the report. No exception leaves it.
template <class... P>
int run_on_host(void (*kernel)(P...), const HostLaunch& launch, HostReport& report) noexcept {
  Machine m;
  std::string fault;
  try {
    m.options = options_of(launch);
    m.flags_between_cores = m.options.kind == Kind::mix;
    for (int64_t index = 0; index < launch.tensor_count; ++index) {
      const HostTensor& tensor = launch.tensors[index];
      m.tensors.push_back(
          std::make_unique<GmTensor>(tensor.name, tensor.bytes, tensor.read_only != 0));
      if (tensor.bytes > 0)
        std::memcpy(m.tensors.back()->base, tensor.data, static_cast<size_t>(tensor.bytes));
    }
    make_cores(m);
    machine = &m;
    launch_with(m, kernel, launch, std::index_sequence_for<P...>());
    if (m.fault.empty()) check_end_of_launch(m);
    fault = m.fault;
  } catch (const Fault& found) {
    fault = found.text;
  } catch (const std::exception& error) {
    fault = std::string("the emulator ran into ") + error.what();
  }
  running = nullptr;
  machine = nullptr;
  report.instructions = static_cast<int64_t>(m.instructions);
  report.checks = static_cast<int64_t>(m.checks);
  std::string warnings;
  for (const std::string& warning : m.warnings) warnings += warning + "\n";
  std::snprintf(report.fault, sizeof report.fault, "%s", fault.c_str());
  std::snprintf(report.warnings, sizeof report.warnings, "%s", warnings.c_str());
  if (!fault.empty()) return 1;
  for (int64_t index = 0; index < launch.tensor_count; ++index) {
    const HostTensor& tensor = launch.tensors[index];
    if (tensor.read_only || tensor.bytes == 0) continue;
    std::memcpy(tensor.data, m.tensors[static_cast<size_t>(index)]->base,
                static_cast<size_t>(tensor.bytes));
  }
  return 0;
}

}  // namespace emulator
}  // namespace AscendC

// The one symbol of a compiled kernel library.
#define SPCOMP_EMULATED_ENTRY(kernel)                                                           \
  extern "C" __attribute__((visibility("default"))) int spcomp_emulate(                         \
      const ::AscendC::emulator::HostLaunch* launch, ::AscendC::emulator::HostReport* report) { \
    return ::AscendC::emulator::run_on_host(&kernel, *launch, *report);                         \
  }
