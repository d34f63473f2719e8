// A fault is one sentence about what the kernel did wrong. It is thrown inside the coroutine of a
// core, caught at that coroutine's entry, and ends the run.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <string>
#include <utility>

#define SPCOMP_PRINTF(sentence, first) __attribute__((__format__(__printf__, sentence, first)))

namespace AscendC {
namespace emulator {

struct Fault {
  std::string text;
};

// The running core as it is called in a report ("AIV 3"); empty outside a run. In machine.h.
std::string running_core();

SPCOMP_PRINTF(1, 0) inline std::string vtext(const char* format, va_list arguments) {
  va_list again;
  va_copy(again, arguments);
  const int length = std::vsnprintf(nullptr, 0, format, again);
  va_end(again);
  std::string text(length > 0 ? static_cast<size_t>(length) : 0, '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, arguments);
  return text;
}

SPCOMP_PRINTF(1, 2) inline std::string text(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string result = vtext(format, arguments);
  va_end(arguments);
  return result;
}

[[noreturn]] inline void fail_with(const std::string& sentence) {
  const std::string core = running_core();
  throw Fault{core.empty() ? sentence : core + ": " + sentence};
}

[[noreturn]] SPCOMP_PRINTF(1, 2) inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string sentence = vtext(format, arguments);
  va_end(arguments);
  fail_with(sentence);
}

}  // namespace emulator
}  // namespace AscendC
