// Vectors of two to four elements, aligned as on the GPU: a vector of three takes the room of four.
#pragma once
#include <stddef.h>
#include <type_traits>
#include "bfloat.h"
#include "gpu.h"

namespace metal {

template <class T, int N>
struct vec;

template <class T>
struct alignas(sizeof(T) * 2) vec<T, 2> {
  T x, y;
  vec() = default;
  constexpr vec(T all) : x(all), y(all) {}
  constexpr vec(T x, T y) : x(x), y(y) {}
  template <class U>
  constexpr explicit vec(vec<U, 2> other) : x(T(other.x)), y(T(other.y)) {}
  constexpr T& operator[](int i) { return i ? y : x; }
  constexpr const T& operator[](int i) const { return i ? y : x; }
};

template <class T>
struct alignas(sizeof(T) * 4) vec<T, 3> {
  T x, y, z;
  vec() = default;
  constexpr vec(T all) : x(all), y(all), z(all) {}
  constexpr vec(T x, T y, T z) : x(x), y(y), z(z) {}
  vec(gpu::Position at) : x(at.x), y(at.y), z(at.z) {}
  constexpr T& operator[](int i) { return (&x)[i]; }
  constexpr const T& operator[](int i) const { return (&x)[i]; }
};

template <class T>
struct alignas(sizeof(T) * 4) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  constexpr vec(T all) : x(all), y(all), z(all), w(all) {}
  constexpr vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  template <class U>
  constexpr explicit vec(vec<U, 4> other) : x(T(other.x)), y(T(other.y)), z(T(other.z)), w(T(other.w)) {}
  constexpr T& operator[](int i) { return (&x)[i]; }
  constexpr const T& operator[](int i) const { return (&x)[i]; }
};

#define ELEMENTWISE(op)                                                    \
  template <class T, int N>                                                \
  constexpr vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {              \
    for (int i = 0; i < N; i++) a[i] = a[i] op b[i];                       \
    return a;                                                              \
  }                                                                        \
  template <class T, int N>                                                \
  constexpr vec<T, N> operator op(vec<T, N> a, std::common_type_t<T> b) {  \
    for (int i = 0; i < N; i++) a[i] = a[i] op b;                          \
    return a;                                                              \
  }                                                                        \
  template <class T, int N>                                                \
  constexpr vec<T, N> operator op(std::common_type_t<T> a, vec<T, N> b) {  \
    for (int i = 0; i < N; i++) b[i] = a op b[i];                          \
    return b;                                                              \
  }                                                                        \
  template <class T, int N, class U>                                       \
  constexpr vec<T, N>& operator op##=(vec<T, N>& a, U b) {                 \
    return a = a op b;                                                     \
  }
ELEMENTWISE(+)
ELEMENTWISE(-)
ELEMENTWISE(*)
ELEMENTWISE(/)
#undef ELEMENTWISE

template <class T, int N>
T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum += a[i] * b[i];
  return sum;
}

}  // namespace metal
