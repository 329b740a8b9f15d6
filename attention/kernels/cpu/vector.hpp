// Portable SIMD types by the compiler's vector extensions, as wide as the machine's registers.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "intrinsics.hpp"

#define FATUI_INLINE [[gnu::always_inline]] inline
#if defined(__clang__)
#define FATUI_UNROLL _Pragma("clang loop unroll(full)")
#define FATUI_UNROLL_BY_4 _Pragma("clang loop unroll_count(4)")
#define FATUI_ROLLED _Pragma("clang loop unroll(disable)")
#else
#define FATUI_UNROLL _Pragma("GCC unroll 16")
#define FATUI_UNROLL_BY_4 _Pragma("GCC unroll 4")
#define FATUI_ROLLED _Pragma("GCC unroll 1")
#endif

namespace fatui {

#if defined(__AVX512F__)
constexpr int lanes = 16, registers = 32;
#elif defined(__AVX2__)
constexpr int lanes = 8, registers = 16;
#elif defined(__aarch64__)
constexpr int lanes = 4, registers = 32;
#else
constexpr int lanes = 4, registers = 16;
#endif

typedef float Vector __attribute__((vector_size(lanes * 4)));
typedef float VectorAnywhere __attribute__((vector_size(lanes * 4), aligned(2), may_alias));  // or pairs of bfloat16
typedef int32_t Integers __attribute__((vector_size(lanes * 4)));
typedef uint32_t Words __attribute__((vector_size(lanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(lanes * 2)));
typedef uint16_t HalvesAnywhere __attribute__((vector_size(lanes * 2), aligned(2), may_alias));

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float largest = std::numeric_limits<float>::max();
constexpr float log2_e = 1.4426950408889634f;

struct float16_t { uint16_t bits; };
struct bfloat16_t { uint16_t bits; };

FATUI_INLINE Vector load(const float* p) { return *reinterpret_cast<const VectorAnywhere*>(p); }
FATUI_INLINE void store(float* p, Vector x) { *reinterpret_cast<VectorAnywhere*>(p) = x; }
FATUI_INLINE Vector broadcast(float x) { return x - Vector{}; }
FATUI_INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }
FATUI_INLINE Vector smaller(Vector a, Vector b) { return a < b ? a : b; }

// Forces a value into a register: the compiler does not reload it for each use, which would stall every use on a cache miss,
// and does not contract a product into the following addition.
template <class V>
FATUI_INLINE V in_register(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// Has the compiler compute a value before it reads through an address.
template <class V, class T>
FATUI_INLINE void in_order(V& x, const T*& then) {
#if defined(__x86_64__)
  asm("" : "+v"(x), "+r"(then));
#elif defined(__aarch64__)
  asm("" : "+w"(x), "+r"(then));
#endif
}

template <class To, class From>
FATUI_INLINE To as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// c + a b with a single rounding if the CPU has FMA, independent of the compiler's contraction choices, so that equal terms
// summed in the same order give equal sums.
FATUI_INLINE Vector fused(Vector c, Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return c + a * b;
#endif
}

// 2^x for x <= 127 to about 1e-7, and exactly 0 below -126 (so 2^-inf = 0). NaN stays NaN.
// x = n + f with n an integer; a polynomial (minimax on [-1/2, 1/2], exact at 0) gives 2^f; n goes to its exponent.
FATUI_INLINE Vector exp2(Vector x) {
  const Vector shifter = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const Vector shifted = x + shifter;
  const Vector f = x - (shifted - shifter);
  Vector p = f * 1.326472964e-3f + 9.671517648e-3f;
  p = p * f + 5.550733954e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  p = p * f + 1.0f;
  const Words exponent = as<Words>(shifted) << 23;  // unsigned: overflow wraps, and the result is not used
  const Vector result = as<Vector>(as<Words>(p) + exponent);
  return x < broadcast(-126.0f) ? Vector{} : result;
}

// x, but at least `least`; NaN stays NaN.
FATUI_INLINE Vector at_least(float least, Vector x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Vector)_mm256_max_ps((__m256)broadcast(least), (__m256)x);  // of a comparison the compiler makes two instructions
#else
  return x < broadcast(least) ? broadcast(least) : x;
#endif
}

// 2^x of several vectors, in place, each step for all of them: a step waits four cycles for the one before, and the scheduler
// of a CPU with 16 registers is too small to find the next vector by itself. x is bounded at -127, whose 2^x is 0 in this
// arithmetic, which takes one instruction less; between -127 and -126 results are below 2^-126, but not exact.
template <int N>
FATUI_INLINE void exp2_together(Vector (&x)[N]) {
  const Vector shifter = broadcast(12582912.0f);
  Vector shifted[N], f[N], p[N];
  FATUI_UNROLL for (int i = 0; i < N; i++) x[i] = at_least(-127.0f, x[i]);
  FATUI_UNROLL for (int i = 0; i < N; i++) shifted[i] = x[i] + shifter;
  FATUI_UNROLL for (int i = 0; i < N; i++) f[i] = shifted[i] - shifter;
  FATUI_UNROLL for (int i = 0; i < N; i++) f[i] = x[i] - f[i];
  FATUI_UNROLL for (int i = 0; i < N; i++) p[i] = f[i] * 1.326472964e-3f + 9.671517648e-3f;
  for (const float c : {5.550733954e-2f, 2.402224243e-1f, 6.931470037e-1f, 1.0f})
    FATUI_UNROLL for (int i = 0; i < N; i++) p[i] = p[i] * f[i] + c;
  FATUI_UNROLL for (int i = 0; i < N; i++) x[i] = as<Vector>(as<Words>(p[i]) + (as<Words>(shifted[i]) << 23));
}

// tanh to about 1e-7, near zero too: by a polynomial there (Cephes), elsewhere by 2^x.
FATUI_INLINE Vector tanh(Vector x) {
  const Vector z = x * x;
  Vector p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vector small = p * z * x + x;
  const Vector bounded = larger(smaller(x, broadcast(9.1f)), broadcast(-9.1f));
  const Vector large = 1.0f - 2.0f / (1.0f + exp2(bounded * (2.0f * log2_e)));
  return z > broadcast(0.625f * 0.625f) ? large : small;
}

FATUI_INLINE Vector magnitude(Vector x) { return as<Vector>(as<Words>(x) & 0x7fffffffu); }

template <int... I>
FATUI_INLINE Integers lane_numbers(std::integer_sequence<int, I...>) { return Integers{I...}; }
FATUI_INLINE Integers lane_numbers() { return lane_numbers(std::make_integer_sequence<int, lanes>{}); }

// Rotates the lanes.
template <int places, int... I>
FATUI_INLINE Vector rotated(Vector x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, ((I + places) % lanes)...);
}

template <int places = lanes / 2>
FATUI_INLINE float sum_of(Vector x) {
  x += rotated<places>(x, std::make_integer_sequence<int, lanes>{});
  if constexpr (places > 1) return sum_of<places / 2>(x);
  else return x[0];
}

template <int places = lanes / 2>
FATUI_INLINE float max_of(Vector x) {
  x = larger(x, rotated<places>(x, std::make_integer_sequence<int, lanes>{}));
  if constexpr (places > 1) return max_of<places / 2>(x);
  else return x[0];
}

// Conversions. Bfloat16 is the upper half of a float32; float16 has instructions nearly everywhere.
FATUI_INLINE Vector widen(const float* p) { return load(p); }
FATUI_INLINE Vector widen(const bfloat16_t* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // one instruction, for which some compilers make five
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  const Halves bits = *reinterpret_cast<const HalvesAnywhere*>(p);
  return as<Vector>(__builtin_convertvector(bits, Words) << 16);
#endif
}
// Software conversion: a product rebiases the exponent and normalises subnormal numbers.
FATUI_INLINE Vector widen_float16_bits(Words bits) {
  const Words magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const Vector finite = as<Vector>(magnitude) * 0x1p112f;
  const Words special = magnitude | 0x7f800000u;
  const Words result = magnitude >= 0x7c00u << 13 ? special : as<Words>(finite);
  return as<Vector>(result | sign);
}
FATUI_INLINE Vector widen(const float16_t* p) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX2__)
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (Vector)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  const Halves bits = *reinterpret_cast<const HalvesAnywhere*>(p);
  return widen_float16_bits(__builtin_convertvector(bits, Words));
#endif
}

FATUI_INLINE void narrow(float* p, Vector x) { store(p, x); }
FATUI_INLINE Words rounded_to_bfloat16(Vector x) {  // to nearest, ties to even; the result is in the low half
  const Words bits = as<Words>(x);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? rounded : (bits >> 16) | 0x40u;
}
FATUI_INLINE void narrow(bfloat16_t* p, Vector x) {
  *reinterpret_cast<HalvesAnywhere*>(p) = __builtin_convertvector(rounded_to_bfloat16(x), Halves);
}
// Rounds to nearest, ties to even. Subnormal results are rounded by adding a number with the same last place.
FATUI_INLINE Words rounded_to_float16(Vector x) {
  const Words bits = as<Words>(x), magnitude = bits & 0x7fffffffu;
  const Vector shifter = broadcast(0.5f);
  const Words small = as<Words>(as<Vector>(magnitude) + shifter) - as<Words>(shifter);
  const Words normal = (magnitude + (0xc8000fffu + ((magnitude >> 13) & 1u))) >> 13;
  const Words special = magnitude > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
  const Words finite = magnitude < 0x38800000u ? small : normal;
  return (magnitude >= 0x477ff000u ? special : finite) | ((bits >> 16) & 0x8000u);
}
FATUI_INLINE void narrow(float16_t* p, Vector x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
  *reinterpret_cast<HalvesAnywhere*>(p) = __builtin_convertvector(rounded_to_float16(x), Halves);
#endif
}

// Loads the first `count` elements, or all lanes; the rest are zero.
template <class T>
FATUI_INLINE Vector widen_some(const T* p, int64_t count) {
  if (count >= lanes) return widen(p);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (Vector)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#endif
  alignas(64) T whole[lanes] = {};
  for (int64_t i = 0; i < count; i++) whole[i] = p[i];
  return widen(whole);
}

template <class T>
FATUI_INLINE Vector widen_strided(const T* p, int64_t stride, int64_t count) {
  if (stride == 1) return widen_some(p, count);
  alignas(64) T whole[lanes] = {};
  for (int64_t i = 0; i < count && i < lanes; i++) whole[i] = p[i * stride];
  return widen(whole);
}

template <class T>
FATUI_INLINE void narrow_some(T* p, Vector x, int64_t count) {
  if (count >= lanes) return narrow(p, x);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)x);
#endif
  alignas(64) T whole[lanes];
  narrow(whole, x);
  for (int64_t i = 0; i < count; i++) p[i] = whole[i];
}

template <class T, int... I>
FATUI_INLINE void interleave(T a, T b, T& low, T& high, std::integer_sequence<int, I...>) {
  low = __builtin_shufflevector(a, b, (I / 2 + (I % 2) * int(sizeof...(I)))...);
  high = __builtin_shufflevector(a, b, (I / 2 + int(sizeof...(I)) / 2 + (I % 2) * int(sizeof...(I)))...);
}

// Transposes a square of lanes x lanes floats: interleaving row r with row r + lanes/2, log2(lanes) times. AVX2's shuffles stay
// within halves of a vector, so that there blocks of 4 x 4 are transposed, and then the two off the diagonal are exchanged.
FATUI_INLINE void transpose(Vector (&x)[lanes]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  Vector y[lanes];
  FATUI_UNROLL for (int r = 0; r < lanes; r += 4) {
    const __m256 a = (__m256)x[r], b = (__m256)x[r + 1], c = (__m256)x[r + 2], d = (__m256)x[r + 3];
    const __m256d ab = (__m256d)_mm256_unpacklo_ps(a, b), cd = (__m256d)_mm256_unpacklo_ps(c, d);
    const __m256d ab_high = (__m256d)_mm256_unpackhi_ps(a, b), cd_high = (__m256d)_mm256_unpackhi_ps(c, d);
    y[r] = (Vector)_mm256_unpacklo_pd(ab, cd), y[r + 1] = (Vector)_mm256_unpackhi_pd(ab, cd);
    y[r + 2] = (Vector)_mm256_unpacklo_pd(ab_high, cd_high), y[r + 3] = (Vector)_mm256_unpackhi_pd(ab_high, cd_high);
  }
  FATUI_UNROLL for (int r = 0; r < lanes / 2; r++) {
    x[r] = (Vector)_mm256_permute2f128_ps((__m256)y[r], (__m256)y[r + 4], 0x20);
    x[r + 4] = (Vector)_mm256_permute2f128_ps((__m256)y[r], (__m256)y[r + 4], 0x31);
  }
#else
  FATUI_UNROLL for (int step = 1; step < lanes; step *= 2) {
    Vector y[lanes];
    FATUI_UNROLL for (int r = 0; r < lanes / 2; r++)
      interleave(x[r], x[r + lanes / 2], y[2 * r], y[2 * r + 1], std::make_integer_sequence<int, lanes>{});
    FATUI_UNROLL for (int r = 0; r < lanes; r++) x[r] = y[r];
  }
#endif
}

}  // namespace fatui
