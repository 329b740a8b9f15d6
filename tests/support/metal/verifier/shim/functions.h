// Functions of numbers, by the CPU's own: exp and tanh round otherwise than on a GPU.
#pragma once
#include "types.h"

// half and bfloat go by way of float.
#define OF_ONE(name, of_float)                               \
  inline float name(float x) { return of_float; }            \
  inline half name(half x) { return half(name(float(x))); }  \
  inline bfloat name(bfloat x) { return bfloat(name(float(x))); }

#define FUNCTIONS                                                            \
  OF_ONE(exp, __builtin_expf(x))                                             \
  OF_ONE(exp2, __builtin_exp2f(x))                                           \
  OF_ONE(log, __builtin_logf(x))                                             \
  OF_ONE(log2, __builtin_log2f(x))                                           \
  OF_ONE(sqrt, __builtin_sqrtf(x))                                           \
  OF_ONE(rsqrt, 1.0f / __builtin_sqrtf(x))                                   \
  OF_ONE(floor, __builtin_floorf(x))                                         \
  OF_ONE(ceil, __builtin_ceilf(x))                                           \
  OF_ONE(rint, __builtin_rintf(x))                                           \
  OF_ONE(tanh, __builtin_tanhf(x))                                           \
  OF_ONE(sin, __builtin_sinf(x))                                             \
  OF_ONE(cos, __builtin_cosf(x))                                             \
  OF_ONE(fabs, __builtin_fabsf(x))                                           \
  OF_ONE(abs, __builtin_fabsf(x))                                            \
  inline float atan2(float y, float x) { return __builtin_atan2f(y, x); }    \
  inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); } \
  inline float fmax(float a, float b) { return __builtin_fmaxf(a, b); }      \
  inline float fmin(float a, float b) { return __builtin_fminf(a, b); }      \
  inline bool isnan(float x) { return x != x; }                              \
  inline bool isinf(float x) { return __builtin_isinf(x); }

#define OF_INTEGERS(T)                                                    \
  inline constexpr T max(T a, T b) { return a < b ? b : a; }              \
  inline constexpr T min(T a, T b) { return b < a ? b : a; }              \
  inline T clamp(T x, T low, T high) { return x < low ? low : high < x ? high : x; }

#define OF_FLOATS(T)                                                      \
  inline T max(T a, T b) { return T(__builtin_fmaxf(float(a), float(b))); } \
  inline T min(T a, T b) { return T(__builtin_fminf(float(a), float(b))); } \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }

namespace metal {

FUNCTIONS
namespace fast {
FUNCTIONS
}
namespace precise {
FUNCTIONS
}

OF_INTEGERS(int)
OF_INTEGERS(uint)
OF_INTEGERS(short)
OF_INTEGERS(ushort)
OF_INTEGERS(long)
OF_INTEGERS(ulong)
OF_INTEGERS(char)
OF_INTEGERS(uchar)
OF_FLOATS(float)
OF_FLOATS(half)
OF_FLOATS(bfloat)
inline int abs(int x) { return x < 0 ? -x : x; }

}  // namespace metal
#undef OF_ONE
#undef FUNCTIONS
#undef OF_INTEGERS
#undef OF_FLOATS
