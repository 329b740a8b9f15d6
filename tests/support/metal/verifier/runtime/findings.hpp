// What is found: a kind, a sentence, the place in the kernel's library, and the thread. Python adds the kernel's line.
#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <set>
#include <string>
#include <utility>

enum class Kind { race, out_of_bounds, uninitialised_read, misaligned, divergence, limit, wild, arithmetic };

inline const char* name_of(Kind kind) {
  static const char* const names[] = {"race",       "out-of-bounds", "uninitialised read", "misaligned",
                                      "divergence", "limit",         "wild",               "arithmetic"};
  return names[int(kind)];
}

class Findings {
 public:
  static constexpr size_t MOST = 40;

  // Forgets everything; places are told relative to where the kernel's library lies.
  void begin(uintptr_t library) {
    *this = Findings{};
    library_ = library;
  }

  // Adds a line "kind|offset|sentence|thread", once for each kind and place.
  void add(Kind kind, const void* place, const std::string& sentence, const std::string& thread) {
    // A place is where a call returns to; one byte before lies the call, and with it its line.
    const uintptr_t offset = place ? uintptr_t(place) - library_ - 1 : 0;
    if (!known_.insert({int(kind), place ? std::to_string(offset) : sentence}).second) return;
    if (known_.size() > MOST) return;
    char at[32];
    snprintf(at, sizeof at, "%lx", (unsigned long)offset);
    text_ += std::string(name_of(kind)) + "|" + at + "|" + sentence + "|" + thread + "\n";
  }

  const std::string& text() const { return text_; }

 private:
  uintptr_t library_ = 0;
  std::string text_;
  std::set<std::pair<int, std::string>> known_;
};

inline std::string formatted(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline std::string formatted(const char* format, ...) {
  char sentence[600];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(sentence, sizeof sentence, format, arguments);
  va_end(arguments);
  return sentence;
}
