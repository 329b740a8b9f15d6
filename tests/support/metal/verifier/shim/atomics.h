// Atomic operations of relaxed order: they order nothing, and are no race with each other.
#pragma once
#include "types.h"

namespace metal {

enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  T value;
};
template <class T>
using _atomic = atomic<T>;
typedef atomic<float> atomic_float;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;

#define ATOMIC __attribute__((no_sanitize("thread")))
template <class T>
ATOMIC T atomic_load_explicit(const atomic<T>* from, memory_order) {
  gpu::atomic_access(from, sizeof(T), false);
  return from->value;
}
template <class T>
ATOMIC void atomic_store_explicit(atomic<T>* to, std::common_type_t<T> value, memory_order) {
  gpu::atomic_access(to, sizeof(T), true);
  to->value = value;
}
template <class T>
ATOMIC T atomic_fetch_add_explicit(atomic<T>* to, std::common_type_t<T> value, memory_order order) {
  const T before = atomic_load_explicit(to, order);
  atomic_store_explicit(to, before + value, order);
  return before;
}
#undef ATOMIC

}  // namespace metal
