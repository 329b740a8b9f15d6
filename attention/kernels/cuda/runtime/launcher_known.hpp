// Table of repeated calls and their plans, looked up by the shapes, dtypes and keywords of a call. The same lookup in Python
// takes longer than the rest of the call.
#pragma once
#include <array>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <unordered_map>

#include "launcher_maps.hpp"

namespace fatui {

// Keywords of a call without a mask, as passed from Python.
struct Keywords {
  double scale;
  bool causal;
  std::optional<int64_t> window;
  std::optional<double> softcap;
};

// Everything that a plan depends on. The formats of quantized keys and values follow from the shapes of their parts, and from
// which of these there are, if values are as wide as the queries; others are not looked up here.
constexpr size_t MAX_INPUTS = 7;
using CallKey = std::array<int64_t, 4 * MAX_INPUTS + 5>;

struct CallHash {
  size_t operator()(const CallKey& key) const {
    uint64_t hash = 0xcbf29ce484222325;
    for (const int64_t word : key) hash = (hash ^ uint64_t(word)) * 0x9E3779B97F4A7C15, hash ^= hash >> 29;
    return hash;
  }
};

inline int64_t bits_of(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The key of a call; an array that the call lacks is null.
inline std::optional<CallKey> key_of(std::initializer_list<const mx::array*> arrays, const Keywords& keywords) {
  CallKey key{};
  size_t n = 0;
  int64_t types = 1;  // a digit for each array
  for (const mx::array* a : arrays) {
    types = types * 64 + (a != nullptr ? int64_t(a->dtype().val()) + 1 : 0);
    if (a == nullptr) continue;
    if (a->ndim() != 4) return std::nullopt;
    for (const int size : a->shape()) key[n++] = size;
  }
  key[n++] = types;
  key[n++] = bits_of(keywords.scale);
  key[n++] = keywords.causal + 2 * keywords.softcap.has_value() + 4 * keywords.window.has_value();
  key[n++] = keywords.window.value_or(0);
  key[n++] = bits_of(keywords.softcap.value_or(0));
  return key;
}

template <typename Value>
class Known {
 public:
  const Value* find(const CallKey& key) const {
    const auto found = known_.find(key);
    return found == known_.end() ? nullptr : &found->second;
  }
  void keep(const CallKey& key, Value value) {
    constexpr size_t MOST = 256;
    if (known_.size() >= MOST) known_.clear();
    known_.insert_or_assign(key, std::move(value));
  }
  void clear() { known_.clear(); }

 private:
  std::unordered_map<CallKey, Value, CallHash> known_;  // accessed only with the GIL held
};

}  // namespace fatui
