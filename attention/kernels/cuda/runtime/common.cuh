// Common definitions of all CUDA kernels: types, addresses, arithmetic. No CUDA headers are needed.
// Shared-memory addresses are 32-bit offsets (see shared_address).

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define DEVICE __device__ __forceinline__
#define MINUS_INFINITY __int_as_float(0xff800000)

// Exponent, in log2 units, above which the maximum is subtracted from the scores before scaling. Below it, one FMA does
// both: it subtracts the rounded product of the maximum from the exact product of a score. The rounding error is 2^-11 at
// this limit and grows with the product.
constexpr float LARGE_EXPONENT = 16384;

DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// ---- loads of another block's results: from L2, because L1 may be stale --------------------------------------------

DEVICE float2 load_fresh(const float2* place) {
  float2 x;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(place) : "memory");
  return x;
}
DEVICE float4 load_fresh(const float4* place) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(place)
               : "memory");
  return x;
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Softmax results of each query row, for the caller and for the backward pass. Both pointers may be null.
struct RowResults {
  float* logsumexp;  // natural logarithm; -inf for a fully masked row
  float2* stats;     // row maximum or a little less, before multiplication by `factor`, and log2 of the row sum; (0, -inf) if fully masked.
                     // Separate, because with a large maximum a float32 logsumexp would lose the sum

  DEVICE RowResults from(i64 row) const {
    return {logsumexp != nullptr ? logsumexp + row : nullptr, stats != nullptr ? stats + row : nullptr};
  }
  DEVICE void write(int row, float max, float sum, float factor) const {
    constexpr float LN_2 = 0.693147180559945f;
    const bool sees = sum != 0;  // a NaN, too: a row with an infinite score is no empty one
    const float log2_sum = sees ? log2f(sum) : MINUS_INFINITY;
    if (logsumexp != nullptr) logsumexp[row] = sees ? (max * factor + log2_sum) * LN_2 : MINUS_INFINITY;
    if (stats != nullptr) stats[row] = make_float2(sees ? max : 0, log2_sum);
  }
};

// Slopes of ALiBi (Press et al., 2022), by query head: slope * (key - position of the query) is added to a score after the
// softcap. `factor` converts them to the units of the scores, which the softmax multiplies by its own factor.
struct Slopes {
  const float* heads = nullptr;
  float factor = 0;

  // Bounded, so that the product with a distance is finite; NaN stays NaN.
  DEVICE float operator[](int head) const {
    constexpr float MAX_SLOPE = 1e28f;
    const float slope = heads[head] * factor;
    return fabsf(slope) > MAX_SLOPE ? copysignf(MAX_SLOPE, slope) : slope;
  }
};

// Exponents of a row in the backward pass: the softmax weight of a score is 2^((score - base) * factor - rest). The base is
// 0 unless the maximum is large, see LARGE_EXPONENT; `rest` is +inf for fully masked and padding rows.
struct Exponents {
  float base = 0, rest = -MINUS_INFINITY;

  Exponents() = default;
  DEVICE Exponents(float2 stats, float factor) {
    const float shift = stats.x * factor;
    if (stats.y == MINUS_INFINITY) return;
    if (fabsf(shift) > LARGE_EXPONENT) base = stats.x, rest = stats.y;
    else rest = shift + stats.y;
  }
  DEVICE bool sees() const { return rest != -MINUS_INFINITY; }
};

// Score minus the base of its row, clamped to the maximum, because a recomputed product may round above it.
DEVICE float rebased(float score, float base) { return base == 0 ? score : fminf(score - base, 0); }

// Converts a float16, given by its bits, to float.
DEVICE float from_half(unsigned short half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

// The two elements of a word as floats, and the dot product of two words.
DEVICE float low_of(u32 pair) {
#if BFLOAT16
  return __uint_as_float(pair << 16);
#else
  return from_half(pair);
#endif
}
DEVICE float high_of(u32 pair) {
#if BFLOAT16
  return __uint_as_float(pair & 0xffff0000u);
#else
  return from_half(pair >> 16);
#endif
}
DEVICE float product(u32 a, u32 b) { return low_of(a) * low_of(b) + high_of(a) * high_of(b); }

// PTX's name of two elements in a word.
#if BFLOAT16
#define PAIR_TYPE "bf16x2"
#else
#define PAIR_TYPE "f16x2"
#endif

// Packs two floats into the halves of a word, `low` first in memory.
DEVICE u32 pack(float low, float high) {
  u32 word;
  asm("cvt.rn." PAIR_TYPE ".f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Rounds four floats to fp8 (e4m3), saturating; `a` is first in memory. From sm_89 on.
DEVICE u32 pack_fp8(float a, float b, float c, float d) {
  u32 word;
  asm("{\n .reg .b16 low, high;\n cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      " mov.b32 %0, {low, high};\n}"
      : "=r"(word)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return word;
}

DEVICE float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Transposes 4 x 4 words among the four lanes of a quad: lane t passes row t and receives column t.
DEVICE void transpose_in_quad(u32 (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const u32 received = __shfl_xor_sync(~0u, upper ? words[i] : words[i | bit], bit);
      if (upper) words[i] = received;
      else words[i | bit] = received;
    }
  }
}
