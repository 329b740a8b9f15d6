// Barriers, and what the lanes of a simdgroup tell each other. Each call knows the line that it stands in.
#pragma once
#include "functions.h"

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  gpu::threadgroup_barrier(unsigned(flags), line);
}
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  gpu::simdgroup_barrier(unsigned(flags), line);
}

// The values of all lanes.
template <class T>
struct Told {
  T of[gpu::SIMD];
  Told(T mine, gpu::Together what, int line) { gpu::exchange(&mine, sizeof(T), what, line, of); }
};

// Shuffles: the value of another lane. From a lane that does not exist it is unspecified, and here the lane's own.
template <class T>
T from_lane(T x, int lane, int line) {
  const Told<T> told(x, gpu::Together::shuffle, line);
  return told.of[lane >= 0 && lane < gpu::SIMD ? lane : gpu::lane()];
}
template <class T>
T simd_shuffle(T x, ushort lane, int line = __builtin_LINE()) {
  return from_lane(x, lane, line);
}
template <class T>
T simd_shuffle_xor(T x, ushort mask, int line = __builtin_LINE()) {
  return from_lane(x, gpu::lane() ^ mask, line);
}
template <class T>
T simd_shuffle_down(T x, ushort delta, int line = __builtin_LINE()) {
  return from_lane(x, gpu::lane() + delta, line);
}
template <class T>
T simd_shuffle_up(T x, ushort delta, int line = __builtin_LINE()) {
  return from_lane(x, gpu::lane() - delta, line);
}
template <class T>
T simd_shuffle_and_fill_up(T x, T filling, ushort delta, int line = __builtin_LINE()) {
  const T found = from_lane(x, gpu::lane() - delta, line);
  return gpu::lane() >= delta ? found : filling;
}
template <class T>
T simd_broadcast(T x, ushort lane, int line = __builtin_LINE()) {
  return from_lane(x, lane, line);
}
template <class T>
T simd_broadcast_first(T x, int line = __builtin_LINE()) {
  return from_lane(x, 0, line);
}

// Reductions: of all lanes, and of those up to one's own.
template <class T>
T simd_sum(T x, int line = __builtin_LINE()) {
  Told<T> told(x, gpu::Together::reduce, line);
  for (int width = gpu::SIMD / 2; width; width /= 2)
    for (int i = 0; i < width; i++) told.of[i] = told.of[i] + told.of[i + width];
  return told.of[0];
}
template <class T>
T simd_max(T x, int line = __builtin_LINE()) {
  Told<T> told(x, gpu::Together::reduce, line);
  for (int i = 1; i < gpu::lanes(); i++) told.of[0] = max(told.of[0], told.of[i]);
  return told.of[0];
}
template <class T>
T simd_min(T x, int line = __builtin_LINE()) {
  Told<T> told(x, gpu::Together::reduce, line);
  for (int i = 1; i < gpu::lanes(); i++) told.of[0] = min(told.of[0], told.of[i]);
  return told.of[0];
}
template <class T>
T simd_and(T x, int line = __builtin_LINE()) {
  Told<T> told(x, gpu::Together::reduce, line);
  for (int i = 1; i < gpu::lanes(); i++) told.of[0] &= told.of[i];
  return told.of[0];
}
template <class T>
T simd_or(T x, int line = __builtin_LINE()) {
  Told<T> told(x, gpu::Together::reduce, line);
  for (int i = 1; i < gpu::lanes(); i++) told.of[0] |= told.of[i];
  return told.of[0];
}
template <class T>
T simd_prefix_exclusive_sum(T x, int line = __builtin_LINE()) {
  const Told<T> told(x, gpu::Together::reduce, line);
  T sum = T(0);
  for (int i = 0; i < gpu::lane(); i++) sum = sum + told.of[i];
  return sum;
}
template <class T>
T simd_prefix_inclusive_sum(T x, int line = __builtin_LINE()) {
  return simd_prefix_exclusive_sum(x, line) + x;
}
inline bool simd_any(bool x, int line = __builtin_LINE()) { return simd_sum(int(x), line) != 0; }
inline bool simd_all(bool x, int line = __builtin_LINE()) { return simd_sum(int(x), line) == gpu::lanes(); }

}  // namespace metal
