// Functions of numbers, in every type that MSL has them for.
#pragma once
#include "types.h"

namespace metal {
#define M1(n, b)                \
  inline float n(float x) {     \
    return b(x);                \
  }                             \
  inline half n(half x) {       \
    return (half)b((float)x);   \
  }                             \
  inline bfloat n(bfloat x) {   \
    return bfloat(b((float)x)); \
  }
#define MATH                                                                                                  \
  M1(exp, __builtin_expf)                                                                                     \
  M1(exp2, __builtin_exp2f) M1(log, __builtin_logf) M1(log2, __builtin_log2f) M1(sqrt, __builtin_sqrtf)       \
      M1(rsqrt, 1.0f / __builtin_sqrtf) M1(floor, __builtin_floorf) M1(ceil, __builtin_ceilf)                 \
          M1(rint, __builtin_rintf) M1(tanh, __builtin_tanhf) M1(sin, __builtin_sinf) M1(cos, __builtin_cosf) \
              M1(fabs, __builtin_fabsf) inline float                                                          \
              abs(float x) {                                                                                  \
    return __builtin_fabsf(x);                                                                                \
  }                                                                                                           \
  inline half abs(half x) {                                                                                   \
    return (half)__builtin_fabsf((float)x);                                                                   \
  }                                                                                                           \
  inline float atan2(float y, float x) {                                                                      \
    return __builtin_atan2f(y, x);                                                                            \
  }                                                                                                           \
  inline float fma(float a, float b, float c) {                                                               \
    return __builtin_fmaf(a, b, c);                                                                           \
  }                                                                                                           \
  inline bool isnan(float x) {                                                                                \
    return x != x;                                                                                            \
  }                                                                                                           \
  inline bool isinf(float x) {                                                                                \
    return __builtin_isinf(x);                                                                                \
  }                                                                                                           \
  inline float fmax(float a, float b) {                                                                       \
    return __builtin_fmaxf(a, b);                                                                             \
  }                                                                                                           \
  inline float fmin(float a, float b) {                                                                       \
    return __builtin_fminf(a, b);                                                                             \
  }
    MATH namespace fast {
  MATH
}
namespace precise {
MATH
}
#define MM(T)                         \
  inline constexpr T max(T a, T b) {  \
    return a < b ? b : a;             \
  }                                   \
  inline constexpr T min(T a, T b) {  \
    return b < a ? b : a;             \
  }                                   \
  inline T clamp(T x, T l, T h) {     \
    return x < l ? l : h < x ? h : x; \
  }
MM(int)
MM(uint) MM(short) MM(ushort) MM(long) MM(ulong) MM(char) MM(uchar)
#define MF(T)                                      \
  inline T max(T a, T b) {                         \
    return T(__builtin_fmaxf((float)a, (float)b)); \
  }                                                \
  inline T min(T a, T b) {                         \
    return T(__builtin_fminf((float)a, (float)b)); \
  }                                                \
  inline T clamp(T x, T l, T h) {                  \
    return min(max(x, l), h);                      \
  }
    MF(float) MF(half) MF(bfloat) inline int abs(int x) {
  return x < 0 ? -x : x;
}
template <class T>
T select(T a, T b, bool c) {
  return c ? b : a;
}
}  // namespace metal
