// The types of MSL on the CPU: address spaces as nothing, bfloat, vectors, limits.
#pragma once
#include <type_traits>
#include <limits>
#include "msl_rt.h"
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define device
#define constant
#define threadgroup
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
struct bfloat {  // round to nearest even; widening is implicit, narrowing is explicit (MSL 2.1)
  uint16_t b;
  bfloat() = default;
  static constexpr uint16_t cvt(float f) {
    uint32_t u = __builtin_bit_cast(uint32_t, f);
    if ((u & 0x7fffffff) > 0x7f800000) return (u >> 16) | 64;
    return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  template <class U, class = std::enable_if_t<std::is_arithmetic_v<U> || std::is_same_v<U, half>>>
  explicit constexpr bfloat(U x) : b(cvt((float)x)) {}
  constexpr operator float() const {
    uint32_t u = (uint32_t)b << 16;
    return __builtin_bit_cast(float, u);
  }
};
#define BFOP(o)                                          \
  constexpr bfloat operator o(bfloat x, bfloat y) {      \
    return bfloat((float)x o(float) y);                  \
  }                                                      \
  inline bfloat& operator o## = (bfloat & x, bfloat y) { \
    return x = x o y;                                    \
  }
BFOP(+) BFOP(-) BFOP(*) BFOP(/) constexpr bfloat operator-(bfloat x) {
  return bfloat(-(float)x);
}
constexpr half operator""h(long double x) {
  return (half)x;
}
constexpr float M_LOG2E_F = 1.44269504088896340736f, M_LN2_F = 0.693147180559945309417f,
                M_PI_F = 3.14159265358979323846f;
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()

namespace metal {
using std::bool_constant;
using std::conditional;
using std::conditional_t;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_const_v;
using std::is_convertible_v;
using std::is_integral;
using std::is_integral_v;
using std::is_same;
using std::is_same_v;
using std::remove_cv;
using std::remove_cv_t;
using std::true_type;
using std::void_t;
template <class T>
using remove_addrspace_t = T;
using ::bfloat;
using ::half;
using ::uint;
using ::ushort;
using std::remove_reference_t;
template <class T>
struct numeric_limits : std::numeric_limits<T> {};
template <>
struct numeric_limits<half> {
  static constexpr half infinity() { return (half)__builtin_inff(); }
  static constexpr half max() { return (half)65504.f; }
  static constexpr half min() { return (half)6.103515625e-5f; }
  static constexpr half lowest() { return (half)-65504.f; }
};
template <>
struct numeric_limits<bfloat> {
  static constexpr bfloat infinity() { return bfloat(__builtin_inff()); }
  static constexpr bfloat max() { return bfloat(3.3895313892515355e38f); }
  static constexpr bfloat lowest() { return bfloat(-3.3895313892515355e38f); }
  static constexpr bfloat min() { return bfloat(1.17549435e-38f); }
};
template <class U, class T>
U as_type(T x) {
  static_assert(sizeof(U) == sizeof(T));
  U u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}

template <class T, int N>
struct vec;
template <class T>
struct alignas(sizeof(T) * 2) vec<T, 2> {
  T x, y;
  vec() = default;
  constexpr vec(T a) : x(a), y(a) {}
  constexpr vec(T a, T b) : x(a), y(b) {}
  template <class U>
  constexpr explicit vec(vec<U, 2> o) : x(T(o.x)), y(T(o.y)) {}
  constexpr T& operator[](int i) { return i ? y : x; }
  constexpr const T& operator[](int i) const { return i ? y : x; }
};
template <class T>
struct alignas(sizeof(T) * 4) vec<T, 3> {
  T x, y, z;
  vec() = default;
  constexpr vec(T a) : x(a), y(a), z(a) {}
  constexpr vec(T a, T b, T c) : x(a), y(b), z(c) {}
  vec(msl_u3 u) : x(u.x), y(u.y), z(u.z) {}
  constexpr T& operator[](int i) { return (&x)[i]; }
  constexpr const T& operator[](int i) const { return (&x)[i]; }
};
template <class T>
struct alignas(sizeof(T) * 4) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  constexpr vec(T a) : x(a), y(a), z(a), w(a) {}
  constexpr vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  template <class U>
  constexpr explicit vec(vec<U, 4> o) : x(T(o.x)), y(T(o.y)), z(T(o.z)), w(T(o.w)) {}
  constexpr T& operator[](int i) { return (&x)[i]; }
  constexpr const T& operator[](int i) const { return (&x)[i]; }
};
#define VOP(o)                                                           \
  template <class T, int N>                                              \
  constexpr vec<T, N> operator o(vec<T, N> a, vec<T, N> b) {             \
    for (int i = 0; i < N; i++) a[i] = a[i] o b[i];                      \
    return a;                                                            \
  }                                                                      \
  template <class T, int N>                                              \
  constexpr vec<T, N> operator o(vec<T, N> a, std::common_type_t<T> b) { \
    for (int i = 0; i < N; i++) a[i] = a[i] o b;                         \
    return a;                                                            \
  }                                                                      \
  template <class T, int N>                                              \
  constexpr vec<T, N> operator o(std::common_type_t<T> b, vec<T, N> a) { \
    for (int i = 0; i < N; i++) a[i] = b o a[i];                         \
    return a;                                                            \
  }                                                                      \
  template <class T, int N, class U>                                     \
  constexpr vec<T, N>& operator o## = (vec<T, N> & a, U b) {             \
    return a = a o b;                                                    \
  }
VOP(+)
VOP(-) VOP(*) VOP(/) template <class T, int N>
T dot(vec<T, N> a, vec<T, N> b) {
  T s = a[0] * b[0];
  for (int i = 1; i < N; i++) s += a[i] * b[i];
  return s;
}
#define VT(T)             \
  typedef vec<T, 2> T##2; \
  typedef vec<T, 3> T##3; \
  typedef vec<T, 4> T##4;
VT(float)
VT(half) VT(bfloat) VT(int) VT(uint) VT(short) VT(ushort) VT(long) VT(ulong) VT(uchar) VT(bool)
}  // namespace metal
