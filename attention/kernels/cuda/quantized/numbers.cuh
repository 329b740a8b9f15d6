// Formats of quantized keys and values, as `mx.quantize` packs them, and their conversion in registers.
//
// A word of packed numbers, seen as two halves of 16 bits, has F = 16 / BITS fields in each; field f of both halves becomes one
// pair of float16:
//
//   4 bits    | h3 h2 h1 h0 | l3 l2 l1 l0 |        pair f = (l_f, h_f), f = 0 .. 3
//                  |             |   & 0x000f000f  pair 0: as float16 these are n * 2^-24, subnormal and exact
//                  |             |   & 0x00f000f0  pair 1: n * 2^-20
//                                    >> 8          pairs 2 and 3 likewise
//
// so that an integer costs half an instruction to unpack, and no offset has to be subtracted: tensor cores take subnormal
// numbers. The halves are those of one word (keys: two columns of a key), or the same halves of two words (values: a column of
// two keys). Small floats become float16 by moving their bits, times a power of two.

enum Kind { INTEGER, E2M1, E4M3 };               // of the numbers
enum Scale { FLOAT32, FLOAT16, BFLOAT, E8M0, SCALE_E4M3 };  // of the scales

// Bytes of two words, chosen by the digits of a selector: bytes 0 to 3 of `a`, and 4 to 7 of `b`.
DEVICE u32 join_halves(u32 a, u32 b, u32 selector) {
  u32 word;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(selector));
  return word;
}

// The bytes of a word with the signs of another one's; in one operation, which the compiler would merge with later masks.
DEVICE u32 with_signs(u32 word, u32 signs) {
  u32 made;
  asm("lop3.b32 %0, %1, %2, 0x80808080, 0xd8;" : "=r"(made) : "r"(word), "r"(signs));
  return made;
}

template <int BITS_, int KIND, int GROUP_, int SCALE>
struct Format {
  static constexpr int BITS = BITS_, GROUP = GROUP_, SCALE_TYPE = SCALE;
  static constexpr bool BIASED = KIND == INTEGER;
  static constexpr bool STREAM = BITS == 3 || BITS == 5 || BITS == 6;  // fields that straddle halves and words
  static constexpr int FIELDS = STREAM ? 8 : 16 / BITS;                // pairs of a word
  static constexpr int SHIFTS = STREAM || BITS == 8 ? 1 : 8 / BITS;    // fields of a byte, each with a scale of its own
  static constexpr int UNIT = KIND == INTEGER ? 24 : KIND == E2M1 ? 14 : 8;  // a number is converted times 2^-UNIT
  static constexpr int SCALE_BYTES = SCALE == FLOAT32 ? 4 : SCALE >= E8M0 ? 1 : 2;

  // Converts a scale or a bias.
  static DEVICE float scale(u32 raw) {
    if constexpr (SCALE == FLOAT32) return __uint_as_float(raw);
    if constexpr (SCALE == FLOAT16) return from_half(raw);
    if constexpr (SCALE == BFLOAT) return __uint_as_float(raw << 16);
    if constexpr (SCALE == E8M0) return __uint_as_float(raw << 23);
    return from_half((raw & 0x80) << 8 | (raw & 0x7f) << 7) * 256;
  }

  // Converts the i-th scale of a word.
  static DEVICE float scale_of(u32 word, int i) {
    if constexpr (SCALE == BFLOAT) return __uint_as_float(i == 0 ? word << 16 : word & 0xffff0000u);
    if constexpr (SCALE == E8M0) return __uint_as_float((i == 3 ? word >> 1 : word << (23 - 8 * i)) & 0x7f800000u);
    return scale(word >> i * 8 * SCALE_BYTES & (SCALE_BYTES == 1 ? 255u : 65535u));
  }

  // Converts the fields of both halves of a word, in order, times 2^-UNIT and, for field f, times 2^(BITS * (f % SHIFTS)).
  static DEVICE void expand(u32 (&pairs)[FIELDS], u32 word) {
    if constexpr (KIND == E4M3) {
      pairs[0] = word << 8 & 0x80008000 | word << 7 & 0x3f803f80;
      pairs[1] = word & 0x80008000 | word >> 1 & 0x3f803f80;
    } else if constexpr (KIND == E2M1) {
      // Sign and number in their places of the upper byte of a float16, and other bits. Shifts to the left are multiplications,
      // for which there is room beside the bitwise operations.
      constexpr u32 PLACES = 0x8e008e00;
      const u32 even = with_signs(word << 1, word << 4), odd = with_signs(word >> 3, word);
      pairs[0] = even << 8 & PLACES, pairs[1] = odd << 8 & PLACES;
      pairs[2] = even & PLACES, pairs[3] = odd & PLACES;
    } else {
      constexpr u32 FIELD = (1u << BITS) - 1;
#pragma unroll
      for (int f = 0; f < FIELDS; ++f) {
        const u32 from = f < SHIFTS ? word : BITS == 8 ? join_halves(word, 0, 0x4341) : word >> 8;
        pairs[f] = from & (FIELD | FIELD << 16) << BITS * (f % SHIFTS);
      }
    }
  }
  static constexpr DEVICE int field_shift(int f) { return KIND == INTEGER ? BITS * (f % SHIFTS) : 0; }

  // Of COUNT numbers of a key, that of the first or second half of pair i, and the field that it was.
  template <int COUNT>
  static constexpr DEVICE int key_field(int i) {
    return i % (COUNT < 2 * FIELDS ? COUNT / 2 : FIELDS);
  }
  template <int COUNT>
  static constexpr DEVICE int key_column(int i, int half) {
    constexpr int N = COUNT < 2 * FIELDS ? COUNT / 2 : FIELDS;
    return i / N * 2 * N + i % N + half * N;
  }
};

// ---- packed numbers of a lane ------------------------------------------------------------------------------------

template <int BYTES>
DEVICE u32 load_scale(const char* place) {
  u32 x;
  if constexpr (BYTES == 4) asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(place));
  if constexpr (BYTES == 2) asm volatile("{.reg .u16 h; ld.global.nc.u16 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(x) : "l"(place));
  if constexpr (BYTES == 1) asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(x) : "l"(place));
  return x;
}

template <int BYTES>
DEVICE u32 load_shared_scale(u32 place) {
  u32 x;
  if constexpr (BYTES == 4) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(place));
  if constexpr (BYTES == 2) asm volatile("{.reg .u16 h; ld.shared.u16 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(x) : "r"(place));
  if constexpr (BYTES == 1) asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(place));
  return x;
}

// COUNT consecutive numbers of a row.
template <int BITS, int COUNT>
struct Packed {
  static constexpr int BYTES = BITS * COUNT / 8;
  static constexpr int WORDS = (BYTES + 3) / 4;
  u32 words[WORDS];

  // `place` is aligned to the largest power of two that divides BYTES, at most 16.
  DEVICE void load(const char* place) {
    if constexpr (BYTES % 16 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS; i += 4) {
        asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                     : "l"(place + 4 * i));
      }
    } else if constexpr (BYTES % 8 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS; i += 2) {
        asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                     : "=r"(words[i]), "=r"(words[i + 1])
                     : "l"(place + 4 * i));
      }
    } else if constexpr (BYTES % 4 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS; ++i) asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(words[i]) : "l"(place + 4 * i));
    } else {
      constexpr int STEP = BYTES % 2 == 0 ? 2 : 1;
#pragma unroll
      for (int i = 0; i < WORDS; ++i) words[i] = 0;
#pragma unroll
      for (int i = 0; i < BYTES; i += STEP) {
        const u32 x = STEP == 2 ? *reinterpret_cast<const unsigned short*>(place + i)
                                : *reinterpret_cast<const unsigned char*>(place + i);
        words[i / 4] |= x << i % 4 * 8;
      }
    }
  }
  // Loads from shared memory, with the same alignment.
  DEVICE void load_shared(u32 place) {
    if constexpr (BYTES % 16 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS; i += 4) {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                     : "r"(place + 4 * i));
      }
    } else if constexpr (BYTES % 8 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS; i += 2) {
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[i]), "=r"(words[i + 1]) : "r"(place + 4 * i));
      }
    } else if constexpr (BYTES % 4 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS; ++i) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[i]) : "r"(place + 4 * i));
    } else {
      constexpr int STEP = BYTES % 2 == 0 ? 2 : 1;
#pragma unroll
      for (int i = 0; i < WORDS; ++i) words[i] = 0;
#pragma unroll
      for (int i = 0; i < BYTES; i += STEP) words[i / 4] |= load_shared_scale<STEP>(place + i) << i % 4 * 8;
    }
  }
  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = 0;
  }
  // Number i of a bit stream.
  DEVICE u32 number(int i) const {
    const int bit = BITS * i, word = bit / 32, shift = bit % 32;
    u32 x = words[word] >> shift;
    if (shift + BITS > 32) x |= words[word + 1] << (32 - shift);
    return x & ((1u << BITS) - 1);
  }
};

// Scale and bias of numbers that share them, as loaded; zero for numbers that do not exist.
template <typename F>
struct RawScale {
  u32 scale, bias;

  DEVICE void load(const char* scales, const char* biases, i64 offset) {
    scale = load_scale<F::SCALE_BYTES>(scales + offset);
    if constexpr (F::BIASED) bias = load_scale<F::SCALE_BYTES>(biases + offset);
  }
  DEVICE void load_shared(u32 scales, u32 biases) {
    scale = load_shared_scale<F::SCALE_BYTES>(scales);
    if constexpr (F::BIASED) bias = load_shared_scale<F::SCALE_BYTES>(biases);
  }
  DEVICE void clear() { scale = bias = 0; }
};

// The N scales or biases of a row in shared memory, as loaded.
template <typename F, int N>
struct RowScales {
  static constexpr int BYTES = N * F::SCALE_BYTES;
  static constexpr bool AT_ONCE = BYTES <= 16 && (BYTES & BYTES - 1) == 0;  // one load
  static constexpr int WORDS = AT_ONCE ? (BYTES + 3) / 4 : N;
  u32 words[WORDS];

  DEVICE void load_shared(u32 place) {
    if constexpr (AT_ONCE && BYTES >= 4) {
      Packed<8, BYTES> row;
      row.load_shared(place);
#pragma unroll
      for (int i = 0; i < WORDS; ++i) words[i] = row.words[i];
    } else if constexpr (AT_ONCE) {
      words[0] = load_shared_scale<BYTES>(place);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) words[i] = load_shared_scale<F::SCALE_BYTES>(place + i * F::SCALE_BYTES);
    }
  }
  DEVICE float operator[](int i) const {
    if constexpr (!AT_ONCE || F::SCALE_BYTES == 4) return F::scale(words[i]);
    constexpr int EACH = 4 / F::SCALE_BYTES;
    return F::scale_of(words[i / EACH], i % EACH);
  }
};

// Numbers, scales and biases of a plane's keys or values; strides of rows in bytes.
struct Plane {
  const char *numbers, *scales, *biases;
  int number_row, scale_row, bias_row;
};

struct PlaneRow {
  const char *numbers, *scales, *biases;

  DEVICE PlaneRow(const Plane& plane, int row)
      : numbers(plane.numbers + static_cast<i64>(row) * plane.number_row),
        scales(plane.scales + static_cast<i64>(row) * plane.scale_row),
        biases(plane.biases + static_cast<i64>(row) * plane.bias_row) {}

  // Loads consecutive numbers from a column on, and their scale; zeros unless `valid`.
  template <typename F, int COUNT>
  DEVICE void load(Packed<F::BITS, COUNT>& packed, RawScale<F>& scale, int column, bool valid) const {
    if (valid) {
      packed.load(numbers + column * F::BITS / 8);
      scale.load(scales, biases, column / F::GROUP * F::SCALE_BYTES);
    } else {
      packed.clear(), scale.clear();
    }
  }
};

// ---- scaling -----------------------------------------------------------------------------------------------------

DEVICE u32 pack_half(float low, float high) {
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
DEVICE u32 multiply_half(u32 a, u32 b) {
  u32 word;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}
DEVICE u32 multiply_add_half(u32 a, u32 b, u32 c) {
  u32 word;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(c));
  return word;
}
constexpr u32 LOWER = 0x5410, UPPER = 0x7632;  // selectors: lower halves of both words, upper halves

DEVICE int exponent_of(float x) { return static_cast<int>(__float_as_uint(x) >> 23 & 255) - 127; }

// Power of two by which scales are multiplied, so that the largest so far is below 2^LIMIT.
template <int LIMIT>
struct Factor {
  static constexpr float NONE = 0x1p100f;
  float value = NONE;

  DEVICE bool fits(float largest) const { return !(largest * value > power_of_two(LIMIT)); }

  // Returns the ratio of the new factor to the old one; `largest` is the largest magnitude among the lanes that share it.
  DEVICE float fit(float largest) {
    if (fits(largest)) return 1;
    const float old = inverse();
    value = power_of_two(LIMIT - 3 - exponent_of(largest));  // with room for scales four times as large
    return value * old;
  }
  DEVICE float inverse() const { return __uint_as_float((254u << 23) - __float_as_uint(value)); }
};

// Scales and biases of two values in float16, and scales for each field of a byte. What float16 loses of float32 scales and
// biases is kept apart.
template <typename F>
struct HalfScales {
  static constexpr bool IN_TWO = F::SCALE_BYTES == 4;
  u32 scale[F::SHIFTS], bias;
  u32 scale_rest[IN_TWO ? F::SHIFTS : 1], bias_rest;

  DEVICE HalfScales(float s0, float s1, float b0, float b1) {
    fill(scale, pack_half(s0, s1));
    if constexpr (F::BIASED) bias = pack_half(b0, b1);
    if constexpr (IN_TWO) {
      fill(scale_rest, pack_half(s0 - from_half(scale[0]), s1 - from_half(scale[0] >> 16)));
      bias_rest = pack_half(b0 - from_half(bias), b1 - from_half(bias >> 16));
    }
  }
  static DEVICE void fill(u32 (&scales)[F::SHIFTS], u32 first) {
    scales[0] = first;
#pragma unroll
    for (int i = 1; i < F::SHIFTS; ++i) {
      scales[i] = multiply_half(first, (0x3c00u - (F::field_shift(i) << 10)) * 0x10001u);  // 2^-shift
    }
  }
  DEVICE u32 apply(u32 pair, int field) const {
    const int i = F::BIASED ? field % F::SHIFTS : 0;
    if constexpr (!F::BIASED) return multiply_half(pair, scale[i]);
    const u32 x = multiply_add_half(pair, scale[i], bias);
    if constexpr (!IN_TWO) return x;
    return multiply_add_half(x, 0x3c003c00, multiply_add_half(pair, scale_rest[i], bias_rest));
  }
};

// Unpacks COUNT numbers of a key: COUNT / 2 pairs, whose columns are F::key_column<COUNT>.
template <typename F, int COUNT>
DEVICE void unpack_key(u32 (&pairs)[COUNT / 2], const Packed<F::BITS, COUNT>& packed) {
  constexpr int HALF = COUNT / 2;
  u32 fields[F::FIELDS];
  if constexpr (F::STREAM) {
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      const int at = F::template key_column<COUNT>(i, 0);
      pairs[i] = packed.number(at) | packed.number(F::template key_column<COUNT>(i, 1)) << 16;
    }
  } else if constexpr (COUNT < 2 * F::FIELDS) {  // less than a word: the second half of it goes to the upper half
    constexpr int BITS = F::BITS * HALF;
    const u32 word = packed.words[0];
    F::expand(fields, word & (1u << BITS) - 1 | (word >> BITS) << 16);
#pragma unroll
    for (int i = 0; i < HALF; ++i) pairs[i] = fields[i];
  } else {
#pragma unroll
    for (int word = 0; word < HALF / F::FIELDS; ++word) {
      F::expand(fields, packed.words[word]);
#pragma unroll
      for (int f = 0; f < F::FIELDS; ++f) pairs[word * F::FIELDS + f] = fields[f];
    }
  }
}

// Unpacks COUNT numbers of two keys: pair i has column i of both.
template <typename F, int COUNT>
DEVICE void unpack_values(u32 (&pairs)[COUNT], const Packed<F::BITS, COUNT>& a, const Packed<F::BITS, COUNT>& b) {
  if constexpr (F::STREAM) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) pairs[i] = a.number(i) | b.number(i) << 16;
  } else {
#pragma unroll
    for (int half = 0; half < COUNT / F::FIELDS; ++half) {
      u32 fields[F::FIELDS];
      F::expand(fields, join_halves(a.words[half / 2], b.words[half / 2], half % 2 ? UPPER : LOWER));
#pragma unroll
      for (int f = 0; f < F::FIELDS; ++f) pairs[half * F::FIELDS + f] = fields[f];
    }
  }
}
