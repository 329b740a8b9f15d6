// bfloat: the upper half of a float, rounded to the nearest, ties to even.
#pragma once
#include <stdint.h>
#include <type_traits>

using half = _Float16;

// Widening is implicit and narrowing explicit, as in MSL.
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T> || std::is_same_v<T, half>>>
  explicit constexpr bfloat(T x) : bits(rounded(float(x))) {}

  constexpr operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }

  static constexpr uint16_t rounded(float x) {
    const uint32_t u = __builtin_bit_cast(uint32_t, x);
    if ((u & 0x7fffffff) > 0x7f800000) return (u >> 16) | 64;  // NaN stays one
    return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
};

constexpr bfloat operator-(bfloat x) { return bfloat(-float(x)); }
constexpr bfloat operator+(bfloat x, bfloat y) { return bfloat(float(x) + float(y)); }
constexpr bfloat operator-(bfloat x, bfloat y) { return bfloat(float(x) - float(y)); }
constexpr bfloat operator*(bfloat x, bfloat y) { return bfloat(float(x) * float(y)); }
constexpr bfloat operator/(bfloat x, bfloat y) { return bfloat(float(x) / float(y)); }
inline bfloat& operator+=(bfloat& x, bfloat y) { return x = x + y; }
inline bfloat& operator-=(bfloat& x, bfloat y) { return x = x - y; }
inline bfloat& operator*=(bfloat& x, bfloat y) { return x = x * y; }
inline bfloat& operator/=(bfloat& x, bfloat y) { return x = x / y; }
