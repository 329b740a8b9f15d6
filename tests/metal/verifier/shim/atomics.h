// Atomic operations of relaxed order.
#pragma once
#include "matrices.h"

namespace metal {
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T v;
};
template <class T>
using _atomic = atomic<T>;
typedef atomic<float> atomic_float;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
#define NOTSAN __attribute__((no_sanitize_thread))
template <class T>
NOTSAN T atomic_fetch_add_explicit(atomic<T>* p, std::common_type_t<T> x, memory_order) {
  rt_atomic(p, sizeof(T), 0);
  rt_atomic(p, sizeof(T), 1);
  T o = p->v;
  p->v = o + x;
  return o;
}
template <class T>
NOTSAN T atomic_load_explicit(const atomic<T>* p, memory_order) {
  rt_atomic(p, sizeof(T), 0);
  return p->v;
}
template <class T>
NOTSAN void atomic_store_explicit(atomic<T>* p, std::common_type_t<T> x, memory_order) {
  rt_atomic(p, sizeof(T), 1);
  p->v = x;
}
}  // namespace metal
