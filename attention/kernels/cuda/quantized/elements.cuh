// Conversion of packed numbers to elements (bfloat16 or float16), for the kernels that put dequantized tiles into shared memory.
//
// An integer n is put into the mantissa of a power of two M, where it counts 2^P units of the last place, and one FMA computes
// (M + n * 2^P) * (scale / 2^P) + (bias - M / 2^P * scale). M / 2^P is at most 2^15, so that rounding the constant loses less
// than 2^-8 of a scale. Small floats go through float16 (quantized/numbers.cuh). Elements are rounded once, from float32.
//
// Where scales have the type of the elements, an integer that this type holds beside a power of two is converted in pairs:
// 128 + n, or 1024 + n in float16, minus that, times the scale plus the bias, rounded once, too.

using Key = Format<KEY_BITS, KEY_KIND, KEY_GROUP, KEY_SCALE>;
using Value = Format<VALUE_BITS, VALUE_KIND, VALUE_GROUP, VALUE_SCALE>;

// Scale and bias of a group, as the conversion of its numbers takes them.
template <typename F>
struct GroupScale {
  static constexpr int PLACES = F::BIASED && F::BITS == 4 ? 2 : 1;  // where in a mantissa a number can be
  float factor[PLACES], rest[PLACES];

  // Bits below a number in the mantissa.
  static constexpr DEVICE int place(int i) { return F::BITS == 8 ? 8 : F::BITS == 4 ? 12 + 4 * i : 23 - F::BITS; }

  DEVICE GroupScale(float scale, float bias) {
    if constexpr (!F::BIASED) {
      factor[0] = scale * power_of_two(F::UNIT);
    } else {
#pragma unroll
      for (int i = 0; i < PLACES; ++i) {
        factor[i] = F::BITS == 8 ? scale : scale * power_of_two(-place(i));
        rest[i] = bias - scale * power_of_two(F::BITS == 8 ? 15 : 23 - place(i));
      }
    }
  }

  // Converts 8 consecutive numbers, which start `bit` bits after the first of `words`, to pairs of elements.
  DEVICE void convert(u32 (&pairs)[4], const u32* words, int bit) const {
    float x[8];
    words += bit / 32, bit %= 32;
    if constexpr (F::BIASED) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = integer(words, bit, i);
    } else {
      constexpr int HALVES = F::FIELDS * 2;  // numbers of a word
#pragma unroll
      for (int word = 0; word < 8 / HALVES; ++word) {
        u32 fields[F::FIELDS];
        F::expand(fields, words[word]);
#pragma unroll
        for (int f = 0; f < F::FIELDS; ++f) {
          x[word * HALVES + f] = from_half(fields[f]) * factor[0];
          x[word * HALVES + F::FIELDS + f] = from_half(fields[f] >> 16) * factor[0];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pack(x[2 * i], x[2 * i + 1]);
  }

 private:
  DEVICE float integer(const u32* words, int bit, int i) const {
    if constexpr (F::BITS == 8) {  // byte 1 of 2^15 counts ones
      return __uint_as_float(join_halves(words[i / 4], 0x4700, 0x5404 | i % 4 << 4)) * factor[0] + rest[0];
    } else {
      const int where = F::BITS == 4 && i != 0 && i != 3 && i != 5;  // chosen so that numbers share shifts
      const int from = bit + F::BITS * i, word = from / 32, right = from % 32 - place(where);
      u32 x = right >= 0 ? words[word] >> right : words[word] << -right;
      if (from % 32 + F::BITS > 32) x = __funnelshift_r(words[word], words[word + 1], right);
      constexpr u32 FIELD = (1u << F::BITS) - 1, POWER = 0x4b000000;  // 2^23
      return __uint_as_float(x & FIELD << place(where) | POWER) * factor[where] + rest[where];
    }
  }
};

// The same, with arithmetic on pairs of elements.
template <typename F>
struct PairScale {
  static constexpr bool TAKES = F::BIASED && F::SCALE_TYPE == (BFLOAT16 ? BFLOAT : FLOAT16) && (F::BITS == 2 || F::BITS == 4 || F::BITS == 8 && !BFLOAT16);
  static constexpr u32 POWER = BFLOAT16 ? 0x43004300 : 0x64006400;         // 128 or 1024, twice
  static constexpr u32 MINUS_POWER = POWER | 0x80008000, ONE = BFLOAT16 ? 0x3f803f80 : 0x3c003c00;
  u32 scale, bias;

  DEVICE PairScale(u32 scale, u32 bias) : scale(join_halves(scale, 0, 0x1010)), bias(join_halves(bias, 0, 0x1010)) {}

  DEVICE void convert(u32 (&pairs)[4], const u32* words, int bit) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = bit + 2 * i * F::BITS, byte = from / 8 % 4, shift = from % 8;
      const u32 word = words[from / 32];
      u32 x;
      if constexpr (F::BITS == 8) {
        x = join_halves(word, POWER, 0x5050 | byte | (byte + 1) << 8);
      } else {
        constexpr u32 FIELD = (1u << F::BITS) - 1;
        x = join_halves(word >> shift, word >> (shift + F::BITS), 0x4400 | byte * 0x1111) & FIELD * 0x10001 | POWER;
      }
      pairs[i] = multiply_add_pair(multiply_add_pair(x, ONE, MINUS_POWER), scale, bias);
    }
  }

  // a * b + c, each two elements.
  static DEVICE u32 multiply_add_pair(u32 a, u32 b, u32 c) {
    u32 word;
    asm("fma.rn." PAIR_TYPE " %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(c));
    return word;
  }
};

// Converts 8 consecutive numbers, which start `bit` bits after the first of `words`, by the scale and the bias as they are in
// memory.
template <typename F>
DEVICE void convert_unit(u32 (&pairs)[4], const u32* words, int bit, u32 scale, u32 bias) {
  if constexpr (PairScale<F>::TAKES) PairScale<F>(scale, bias).convert(pairs, words, bit);
  else GroupScale<F>(F::scale(scale), F::BIASED ? F::scale(bias) : 0).convert(pairs, words, bit);
}

// Stores 8 elements to shared memory.
DEVICE void store_unit(u32 address, const u32 (&words)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}
