// Barriers, and what the lanes of a simdgroup tell each other; each call knows its line.
#pragma once
#include "functions.h"

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((int)a | (int)b);
}
inline void threadgroup_barrier(mem_flags f, int L = __builtin_LINE()) {
  rt_tg_barrier((unsigned)f, L);
}
inline void simdgroup_barrier(mem_flags f, int L = __builtin_LINE()) {
  rt_sg_barrier((unsigned)f, L);
}

template <class T>
T simd_pick(T x, int src, int op, int L) {
  T all[32];
  rt_exchange(&x, sizeof(T), op, L, all);
  return all[src & 31];
}
template <class T>
T simd_shuffle(T x, ushort lane, int L = __builtin_LINE()) {
  return simd_pick(x, lane, 1, L);
}
template <class T>
T simd_shuffle_xor(T x, ushort m, int L = __builtin_LINE()) {
  return simd_pick(x, rt_lane() ^ m, 2, L);
}
template <class T>
T simd_shuffle_down(T x, ushort d, int L = __builtin_LINE()) {
  int s = rt_lane() + d;
  return simd_pick(x, s < 32 ? s : rt_lane(), 3, L);
}  // out of range: unspecified
template <class T>
T simd_shuffle_up(T x, ushort d, int L = __builtin_LINE()) {
  int s = rt_lane() - d;
  return simd_pick(x, s >= 0 ? s : rt_lane(), 4, L);
}
template <class T>
T simd_shuffle_and_fill_up(T x, T f, ushort d, int L = __builtin_LINE()) {
  T a[32];
  rt_exchange(&x, sizeof(T), 13, L, a);
  int s = rt_lane() - d;
  return s >= 0 ? a[s] : f;
}
template <class T>
T simd_broadcast(T x, ushort lane, int L = __builtin_LINE()) {
  return simd_pick(x, lane, 5, L);
}
template <class T>
T simd_broadcast_first(T x, int L = __builtin_LINE()) {
  return simd_pick(x, 0, 6, L);
}
template <class T>
T simd_sum(T x, int L = __builtin_LINE()) {
  T a[32];
  rt_exchange(&x, sizeof(T), 7, L, a);
  int n = rt_lanes();
  for (int w = 16; w; w /= 2)
    for (int i = 0; i < w; i++)
      if (i + w < n) a[i] = a[i] + a[i + w];
  return a[0];
}
template <class T>
T simd_max(T x, int L = __builtin_LINE()) {
  T a[32];
  rt_exchange(&x, sizeof(T), 8, L, a);
  for (int i = 1; i < rt_lanes(); i++) a[0] = max(a[0], a[i]);
  return a[0];
}
template <class T>
T simd_min(T x, int L = __builtin_LINE()) {
  T a[32];
  rt_exchange(&x, sizeof(T), 9, L, a);
  for (int i = 1; i < rt_lanes(); i++) a[0] = min(a[0], a[i]);
  return a[0];
}
template <class T>
T simd_prefix_inclusive_sum(T x, int L = __builtin_LINE()) {
  T a[32];
  rt_exchange(&x, sizeof(T), 14, L, a);
  for (int i = 1; i <= rt_lane(); i++) a[i] = a[i] + a[i - 1];
  return a[rt_lane()];
}
template <class T>
T simd_prefix_exclusive_sum(T x, int L = __builtin_LINE()) {
  T a[32];
  rt_exchange(&x, sizeof(T), 15, L, a);
  T s = T(0);
  for (int i = 0; i < rt_lane(); i++) s = s + a[i];
  return s;
}
inline bool simd_any(bool x, int L = __builtin_LINE()) {
  bool a[32], r = false;
  rt_exchange(&x, 1, 10, L, a);
  for (int i = 0; i < rt_lanes(); i++) r |= a[i];
  return r;
}
inline bool simd_all(bool x, int L = __builtin_LINE()) {
  bool a[32], r = true;
  rt_exchange(&x, 1, 11, L, a);
  for (int i = 0; i < rt_lanes(); i++) r &= a[i];
  return r;
}
}  // namespace metal
