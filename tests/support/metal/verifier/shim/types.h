// The types of MSL on the CPU. Address spaces mean nothing here; spaces.py checks them with another compiler.
#pragma once
#include <limits>
#include <type_traits>
#include "bfloat.h"
#include "gpu.h"

#define __METAL__ 1
#define __METAL_VERSION__ 320
#define device
#define constant
#define threadgroup
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

#pragma GCC diagnostic ignored "-Wliteral-suffix"  // MSL's own suffix has no underscore
constexpr half operator""h(long double x) { return half(x); }

constexpr float M_LOG2E_F = 1.44269504088896340736f;
constexpr float M_LN2_F = 0.693147180559945309417f;
constexpr float M_PI_F = 3.14159265358979323846f;

#include "vectors.h"

namespace metal {

using ::bfloat;
using ::half;
using ::uint;
using ::ushort;
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
using std::remove_reference_t;
using std::true_type;
using std::void_t;
template <class T>
using remove_addrspace_t = T;

#define NAMED(T)          \
  using T##2 = vec<T, 2>; \
  using T##3 = vec<T, 3>; \
  using T##4 = vec<T, 4>;
NAMED(float)
NAMED(half)
NAMED(bfloat)
NAMED(int)
NAMED(uint)
NAMED(short)
NAMED(ushort)
NAMED(long)
NAMED(ulong)
NAMED(uchar)
NAMED(bool)
#undef NAMED

template <class T>
struct numeric_limits : std::numeric_limits<T> {};
template <>
struct numeric_limits<half> {
  static constexpr half infinity() { return half(__builtin_inff()); }
  static constexpr half max() { return half(65504.0f); }
  static constexpr half min() { return half(6.103515625e-5f); }
  static constexpr half lowest() { return half(-65504.0f); }
};
template <>
struct numeric_limits<bfloat> {
  static constexpr bfloat infinity() { return bfloat(__builtin_inff()); }
  static constexpr bfloat max() { return bfloat(3.3895313892515355e38f); }
  static constexpr bfloat min() { return bfloat(1.17549435e-38f); }
  static constexpr bfloat lowest() { return bfloat(-3.3895313892515355e38f); }
};

template <class To, class From>
To as_type(From x) {
  return __builtin_bit_cast(To, x);
}
template <class T>
T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}

}  // namespace metal
