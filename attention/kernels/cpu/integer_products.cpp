// Products of few query rows with packed numbers in integers; with those in e4m3 in pairs of bfloat16.
//
//   scores   With VNNI a lane is a key, whose words are transposed; a word of a row's query, once of high and once of low bytes, is
//            broadcast:
//
//              n   4 dims of key 0       | 4 dims of key 1 | ... key 15     S += scale (256 q_high n + q_low n) + bias sum(q)
//              q   the same 4 of a row   | the same        | ...
//
//            On AVX-512 without VNNI and on AVX2, scores are sums of 16-bit numbers: 8 words of a key, for 4 rows or for 2.
//
//   output   Parts of 16 bits of two keys' words in turns, of which a field is taken; the second key is half a tile after the first.
//            The weights p * scale of a tile's keys are integers of 16 bits, too, in a unit of their own for each row and group:
//
//              n   a dim of keys j and j + half | of the next part | ...    O[row] += unit (w n) + sum of p * bias
//              w   keys j and j + half          | the same         | ...
//
//   pairs    A number in e4m3 is looked up as the two bytes of a bfloat16, which holds it exactly; its scale, a power of two, is
//            that of the sums, or of the weights. Queries and weights are one bfloat16 or, where that is too coarse, two.
//
// Numbers of other widths than 4 and 8 bits are spread to bytes first, a tile at a time, in the L1; without VNNI so are keys in
// mxfp4. With AVX-512 numbers in e2m1 are looked up as integers, of which they are halves.
#include "decode_products.hpp"
#include "packed.hpp"

namespace fatui {

#if defined(FATUI_SHUFFLES)
namespace {

typedef uint16_t Shorts __attribute__((vector_size(lanes * 4)));
typedef float Four __attribute__((vector_size(16)));  // of the rows

constexpr int row_vectors = 16 / lanes, rows_of_vector = lanes / 4;  // of four query rows
constexpr float largest_integer = 127 * 256;                         // its high and low byte are between -128 and 127

// c + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1] in lane i, modulo 2^32.
FATUI_INLINE Integers dot_pairs(Integers c, Words a, Words b) {
#if defined(__AVX512VNNI__)
  return (Integers)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return c + (Integers)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (Integers)_mm256_dpwssd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b);
#else
  return (Integers)((Words)c + (Words)_mm256_madd_epi16((__m256i)a, (__m256i)b));
#endif
}

// For each of 16 numbers, in two halves: the two bytes that have it, and the factor that moves it to the top of 16 bits.
struct Spreading {
  alignas(32) uint8_t bytes[32];
  alignas(32) uint16_t factor[16];
};
template <int bits>
constexpr Spreading spreading() {
  Spreading all{};
  for (int i = 0; i < 16; i++) {
    const int bit = i * bits, last = (bit + bits - 1) / 8;
    all.bytes[2 * i] = uint8_t(bit / 8), all.bytes[2 * i + 1] = last > bit / 8 ? uint8_t(last) : 0x80;
    all.factor[i] = uint16_t(1 << (16 - bits - bit % 8));
  }
  return all;
}

// Sixteen numbers as 16-bit ones.
template <int bits>
FATUI_INLINE __m256i sixteen(const uint8_t* p) {
  static constexpr Spreading at = spreading<bits>();
  const __m256i bytes =
      _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(packed<bits>(p)), _mm256_load_si256((const __m256i*)at.bytes));
  return _mm256_srli_epi16(_mm256_mullo_epi16(bytes, _mm256_load_si256((const __m256i*)at.factor)), 16 - bits);
}

#if defined(__AVX512VBMI__)
// For each of 64 numbers: the byte that it gets, of eight with its own, and where it begins in these.
struct Gathering {
  alignas(64) uint8_t bytes[64], first_bit[64];
};
template <int bits>
constexpr Gathering gathering() {
  Gathering all{};
  for (int i = 0; i < 64; i++) all.bytes[i] = uint8_t(i / 8 * bits + std::min(i % 8, bits - 1)), all.first_bit[i] = uint8_t(i % 8 * bits);
  return all;
}

// Sixty-four numbers as bytes.
template <int bits>
FATUI_INLINE __m512i sixty_four(const uint8_t* p) {
  static constexpr Gathering at = gathering<bits>();
  const __m512i packed = _mm512_maskz_loadu_epi8((uint64_t(1) << 8 * bits) - 1, p);
  const __m512i eights = _mm512_permutexvar_epi8(_mm512_load_si512(at.bytes), packed);
  const __m512i shifted = _mm512_multishift_epi64_epi8(_mm512_load_si512(at.first_bit), eights);
  return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << bits) - 1));
}
#endif

// Rows of numbers as bytes: integers plus an offset; twice e2m1 plus an offset.
template <int bits, Number number>
void to_bytes(const Packed& from, int offset, uint8_t* out) {
  const __m256i plus = _mm256_set1_epi8(char(offset));
  const __m256i twice =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  int64_t rows = from.rows, dims = from.groups * from.group;
  if (from.stride * 8 == dims * bits) dims *= rows, rows = 1;  // contiguous: one long row
  for (int64_t r = 0; r < rows; r++) {
    const uint8_t* p = from.data + r * from.stride;
    int64_t d = 0;
#if defined(__AVX512VBMI__)
    if constexpr (number == Number::integer)
      for (; d + 64 <= dims; d += 64, p += 8 * bits, out += 64)
        _mm512_storeu_si512(out, _mm512_add_epi8(sixty_four<bits>(p), _mm512_set1_epi8(char(offset))));
#endif
    for (; d < dims; d += 32, p += 4 * bits, out += 32) {
      __m256i x = _mm256_packus_epi16(sixteen<bits>(p), sixteen<bits>(p + 2 * bits));
      x = _mm256_permute4x64_epi64(x, 0xd8);
      if constexpr (number == Number::e2m1) x = _mm256_shuffle_epi8(twice, x);
      _mm256_storeu_si256((__m256i*)out, _mm256_add_epi8(x, plus));
    }
  }
}

// Rows spread to bytes, with scales and biases that fit those.
struct Spread {
  alignas(64) uint8_t bytes[max_quantized_rows * 512];
  alignas(64) float scales[max_quantized_rows * max_groups + lanes], biases[max_quantized_rows * max_groups + lanes];

  // A byte is the number plus an offset if it is an integer, otherwise twice the number plus the offset, which the biases undo.
  Packed of(const Packed& from, const Packing& packing, int offset) {
    Packed made{bytes, from.groups * from.group, from.rows, from.groups, from.group, from.scales, from.biases};
    if (packing.mode == Mode::mxfp4) {
      to_bytes<4, Number::e2m1>(from, offset, bytes);
      for (int64_t i = 0; i < from.rows * from.groups; i += lanes) {
        const Vector scale = load(from.scales + i) * 0.5f;
        store(scales + i, scale), store(biases + i, scale * float(-offset));
      }
      made.scales = scales, made.biases = biases;
      return made;
    }
    switch (packing.bits) {
      case 2: to_bytes<2, Number::integer>(from, offset, bytes); break;
      case 3: to_bytes<3, Number::integer>(from, offset, bytes); break;
      case 5: to_bytes<5, Number::integer>(from, offset, bytes); break;
      default: to_bytes<6, Number::integer>(from, offset, bytes);
    }
    return made;
  }
};

// Field i of each 16-bit number, from 0 on.
template <int bits>
FATUI_INLINE Words field_of(Words x, int i) {
  const auto moved = as<Shorts>(x) >> (bits * i);
  return as<Words>(bits * (i + 1) == 16 ? moved : moved & uint16_t((1 << bits) - 1));
}

template <int first, int... I>
FATUI_INLINE Vector every_second(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + first)...);
}
constexpr auto all_lanes = std::make_integer_sequence<int, lanes>{};

// Scales and biases of a tile by groups, in whole vectors of keys; zeros after the last key.
struct Columns {
  struct Group {
    alignas(64) float scale[max_quantized_rows], bias[max_quantized_rows];
  };
  static constexpr int64_t line = sizeof(Group) / sizeof(float);
  Group of[max_groups];

  void read(const QuantizedRows& from) { read_scales(from), read(from, from.packing.biases, of[0].bias); }
  void read_scales(const QuantizedRows& from) { read(from, from.packing.scales, of[0].scale); }
  // Of numbers that are twice the values of e2m1, plus an offset.
  void read_doubled(const QuantizedRows& from, float offset) {
    read_scales(from);
    for (int64_t g = 0; g < from.groups(); g++)
      for (int64_t j = 0; j < from.rows; j += lanes) {
        const Vector half = load(of[g].scale + j) * 0.5f;
        store(of[g].scale + j, half), store(of[g].bias + j, half * -offset);
      }
  }

 private:
  [[gnu::noinline]] static void read(const QuantizedRows& from, const Tensor& t, float* out) {
    const int64_t groups = from.groups(), at = from.at(t);
    // Those of 16 bits are widened on their way here, if there are whole vectors of them.
    if (from.packing.mode == Mode::affine && t.stride[2] == groups && t.stride[3] == 1 && from.rows % lanes == 0) {
      if (t.element == Element::float16 && whole(static_cast<const float16_t*>(t.data) + at, from.rows, groups, out) > 0) return;
      if (t.element == Element::bfloat16 && whole(static_cast<const bfloat16_t*>(t.data) + at, from.rows, groups, out) > 0) return;
    }
    alignas(64) float x[max_quantized_rows * max_groups + lanes];
    read_groups(t, from.packing.mode, at, from.rows, groups, x);
    const int64_t done = whole(x, from.rows, groups, out);
    for (int64_t g = 0; g < groups && done < from.rows; g++) {
      float* to = out + g * line;
      std::fill(to + done, to + round_up(from.rows, lanes), 0.0f);
      for (int64_t j = done; j < from.rows; j++) to[j] = x[j * groups + g];
    }
  }

  // Those of whole vectors of keys, of usual numbers of groups; returns of how many keys.
  template <class T>
  static int64_t whole(const T* x, int64_t rows, int64_t groups, float* out) {
    switch (groups) {
      case 1: return whole<1>(x, rows, out);
      case 2: return whole<2>(x, rows, out);
      case 4: return whole<4>(x, rows, out);
      case 8: return whole<8>(x, rows, out);
      default: return 0;
    }
  }
  template <int groups, class T>
  static int64_t whole(const T* x, int64_t rows, float* out) {
    int64_t j = 0;
    for (; j + lanes <= rows; j += lanes) {
      Vector all[groups];
      FATUI_UNROLL for (int i = 0; i < groups; i++) all[i] = widen(x + j * groups + i * lanes);
      FATUI_UNROLL for (int step = 1; step < groups; step *= 2) {
        Vector half[groups];
        FATUI_UNROLL for (int i = 0; i < groups / 2; i++) {
          half[i] = every_second<0>(all[2 * i], all[2 * i + 1], all_lanes);
          half[i + groups / 2] = every_second<1>(all[2 * i], all[2 * i + 1], all_lanes);
        }
        FATUI_UNROLL for (int i = 0; i < groups; i++) all[i] = half[i];
      }
      FATUI_UNROLL for (int i = 0; i < groups; i++) store(out + i * line + j, all[i]);
    }
    return j;
  }
};

#if defined(__AVX512VNNI__)
constexpr int64_t keys_together = 32;  // two vectors

// Where rows are from the first of eight on; all of these take one instruction's address.
struct Strides {
  int64_t one, three, five, seven;

  explicit Strides(int64_t stride) : one(stride), three(3 * stride), five(5 * stride), seven(7 * stride) {
    asm("" : "+r"(one), "+r"(three), "+r"(five), "+r"(seven));  // not computed anew for each row
  }
  FATUI_INLINE int64_t operator()(int row) const {
    return row == 3 ? three : row == 5 ? five : row == 6 ? 2 * three : row == 7 ? seven : row * one;
  }
};

// Rows [j, j + keys_together), in place, or copies of them with the last key repeated.
struct KeysTogether {
  alignas(64) uint8_t copies[keys_together * 512];
  const uint8_t* data;
  int64_t stride;

  KeysTogether(const Packed& keys, int64_t j, int64_t row_bytes) : data(keys.data + j * keys.stride), stride(keys.stride) {
    if (j + keys_together <= keys.rows) return;
    for (int64_t k = 0; k < keys_together; k++)
      std::memcpy(copies + k * row_bytes, keys.data + std::min(j + k, keys.rows - 1) * keys.stride, size_t(row_bytes));
    data = copies, stride = row_bytes;
  }
};

// Words of 16 keys, from `first` and `ninth` on: x[i] has word i of each.
FATUI_INLINE void transposed(const uint8_t* first, const uint8_t* ninth, const Strides& by, __m512i (&x)[4]) {
  // Halves of vectors are put together by two instructions of 32 bytes: masked loads of whole ones use the ports of the products.
  const auto half = [&](const uint8_t* p, int row) __attribute__((always_inline)) {
    const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(p + by(row))));
    return _mm256_inserti128_si256(low, _mm_loadu_si128((const __m128i*)(p + by(row + 4))), 1);
  };
  __m512i y[4];
  FATUI_UNROLL for (int i = 0; i < 4; i++) y[i] = _mm512_inserti64x4(_mm512_castsi256_si512(half(first, i)), half(ninth, i), 1);
  const __m512i low[2] = {_mm512_unpacklo_epi32(y[0], y[1]), _mm512_unpacklo_epi32(y[2], y[3])};
  const __m512i high[2] = {_mm512_unpackhi_epi32(y[0], y[1]), _mm512_unpackhi_epi32(y[2], y[3])};
  x[0] = _mm512_unpacklo_epi64(low[0], low[1]), x[1] = _mm512_unpackhi_epi64(low[0], low[1]);
  x[2] = _mm512_unpacklo_epi64(high[0], high[1]), x[3] = _mm512_unpackhi_epi64(high[0], high[1]);
}

FATUI_INLINE __m512i word_of(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}

// Four rows against all keys, 32 at a time.
template <int bits, Number number>
struct Scores4 {
  static constexpr int vectors = 2;  // of keys

  static void run(const Packed& keys, const Columns& columns, const uint8_t* query, const float* sums, const float* units, float* s,
                  Ahead& ahead) {
    const int64_t pieces = keys.groups * keys.group * bits / 128, words = keys.group * bits / 32;
    for (int64_t j = 0; j < keys.rows; j += keys_together) {
      const KeysTogether some(keys, j, 16 * pieces);
      const Strides by(some.stride);
      const uint8_t* p[2 * vectors];
      FATUI_UNROLL for (int i = 0; i < 2 * vectors; i++) p[i] = some.data + 8 * i * some.stride;
      const uint8_t* q = query;
      const char* ask = ahead.take(pieces * keys_together / 4, query);
      Integers high[vectors][rows_together] = {}, low[vectors][rows_together] = {};
      int64_t left = words;
      float* const to = s + j;
      const float* scale = columns.of[0].scale + j;
      begin(columns, j, keys.groups, sums, units, to);
      const auto finish_group = [&]() __attribute__((always_inline)) {
        FATUI_UNROLL for (int r = 0; r < rows_together; r++)
          FATUI_UNROLL for (int v = 0; v < vectors; v++) {
            float* at = to + r * max_quantized_rows + v * lanes;
            const Vector product = __builtin_convertvector((high[v][r] << 8) + low[v][r], Vector) * broadcast(units[4 * r]);
            store(at, fused(load(at), product, load(scale + v * lanes)));
            high[v][r] = low[v][r] = Integers{};
          }
        scale += Columns::line, left = words;
      };
      for (int64_t piece = 0; piece < pieces; piece++) {
        __m512i x[vectors][4];
        FATUI_UNROLL for (int v = 0; v < vectors; v++) transposed(p[2 * v], p[2 * v + 1], by, x[v]);
        FATUI_UNROLL for (int i = 0; i < 2 * vectors; i++) p[i] += 16;
        FATUI_UNROLL for (int word = 0; word < 4; word++) {
          FATUI_UNROLL for (int i = 0; i < vectors; i++) __builtin_prefetch(ask + 64 * i);
          ask += 64 * vectors;
          FATUI_UNROLL for (int i = 0; i < 8 / bits; i++, q += 32) {
            __m512i y[vectors];
            FATUI_UNROLL for (int v = 0; v < vectors; v++) y[v] = numbers_of(x[v][word], i);
            FATUI_UNROLL for (int r = 0; r < rows_together; r++) {
              const __m512i of_row[2] = {word_of(q + 8 * r), word_of(q + 8 * r + 4)};
              FATUI_UNROLL for (int v = 0; v < vectors; v++) {
                high[v][r] = in_register((Integers)_mm512_dpbusd_epi32((__m512i)high[v][r], y[v], of_row[0]));
                low[v][r] = in_register((Integers)_mm512_dpbusd_epi32((__m512i)low[v][r], y[v], of_row[1]));
              }
            }
          }
          in_order(high[vectors - 1][rows_together - 1], ask);  // lines are asked for between the products, not all before them
          constexpr int least_group = number == Number::e2m1 ? 2 : 4;  // words
          if (word % least_group == least_group - 1 && (left -= least_group) == 0) finish_group();
        }
      }
    }
  }

 private:
  // What biases add to the scores.
  FATUI_INLINE static void begin(const Columns& columns, int64_t j, int64_t groups, const float* sums, const float* units, float* to) {
    Vector total[vectors][rows_together] = {};
    for (int64_t g = 0; g < groups; g++)
      FATUI_UNROLL for (int r = 0; r < rows_together; r++)
        FATUI_UNROLL for (int v = 0; v < vectors; v++)
          total[v][r] = fused(total[v][r], broadcast(sums[g * 16 + 4 * r]), load(columns.of[g].bias + j + v * lanes));
    FATUI_UNROLL for (int r = 0; r < rows_together; r++)
      FATUI_UNROLL for (int v = 0; v < vectors; v++)
        store(to + r * max_quantized_rows + v * lanes, total[v][r] * broadcast(units[4 * r]));
  }

  // Number i of each byte; twice e2m1, plus 12.
  FATUI_INLINE static __m512i numbers_of(__m512i x, int i) {
    if constexpr (bits == 8) return x;
    x = _mm512_and_si512(i == 0 ? x : _mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
    if constexpr (number == Number::e2m1)
      x = _mm512_shuffle_epi8(
          _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)), x);
    return x;
  }
};

// Integers of a row as high and low bytes: 4 of each, the rows side by side.
void place(const int32_t* integers, int64_t row, int64_t columns, int bits, uint8_t* query) {
  uint8_t* to = query + row * 8;
  const __m128i in_fields = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);  // of two in a byte
  for (int64_t d = 0; d < columns; d += 16, to += 128) {
    const __m512i whole = _mm512_loadu_si512(integers + d);  // 256 high + low
    __m128i low = _mm512_cvtepi32_epi8(whole);
    __m128i high = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8));
    if (bits == 4) low = _mm_shuffle_epi8(low, in_fields), high = _mm_shuffle_epi8(high, in_fields);
    const __m128i words[2] = {_mm_unpacklo_epi32(high, low), _mm_unpackhi_epi32(high, low)};
    FATUI_UNROLL for (int i = 0; i < 2; i++) {
      _mm_storel_epi64((__m128i*)(to + 64 * i), words[i]);
      _mm_storel_epi64((__m128i*)(to + 64 * i + 32), _mm_unpackhi_epi64(words[i], words[i]));
    }
  }
}
constexpr bool takes_e2m1 = true;
constexpr int sum_lanes = 1;  // of a row's four, the sum of a group's integers is in the first: they are added up
#else
FATUI_INLINE Words repeated(const uint8_t* p) {
#if defined(__AVX512BW__)
  return (Words)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
#else
  return (Words)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
#endif
}
FATUI_INLINE Words load_words(const uint8_t* p) { return as<Words>(load(reinterpret_cast<const float*>(p))); }

// The biases of four keys, for each row of a vector.
FATUI_INLINE Vector of_keys(const float* biases, const int64_t (&at)[4]) {
  Vector all;
  FATUI_UNROLL for (int i = 0; i < lanes; i++) all[i] = biases[at[i % 4]];
  return all;
}

// Four rows against all keys, four at a time. 16 bytes of a key are 8 words for each row, and as many vectors as a word has
// numbers.
template <int bits, Number>
struct Scores4 {
  static constexpr int together = 4, fields = 16 / bits;

  static void run(const Packed& keys, const Columns&, const uint8_t* query, const float* sums, const float* units, float* s,
                  Ahead& ahead) {
    switch (keys.group) {
      case 32: return run<bits / 4>(keys, query, sums, units, s, ahead);
      case 64: return run<bits / 2>(keys, query, sums, units, s, ahead);
      default: return run<bits>(keys, query, sums, units, s, ahead);
    }
  }

 private:
  template <int pieces>  // of 16 bytes in a group
  static void run(const Packed& keys, const uint8_t* query, const float* sums, const float* units, float* s, Ahead& ahead) {
    Ahead next = ahead;
    for (int64_t j = 0; j < keys.rows; j += together) {
      const uint8_t* p[together];
      int64_t at[together];
      FATUI_UNROLL for (int n = 0; n < together; n++) {
        const int64_t key = std::min(j + n, keys.rows - 1);
        p[n] = keys.data + key * keys.stride, at[n] = key * keys.groups;
      }
      const uint8_t* q = query;
      Vector total[row_vectors][together] = {};
      for (int64_t g = 0; g < keys.groups; g++, q += pieces * fields * 64) {
        next.ask<pieces>();
        FATUI_UNROLL for (int n = 0; n < together; n++) {
          Integers sum[row_vectors] = {};
          FATUI_UNROLL for (int piece = 0; piece < pieces; piece++) {
            const Words x = repeated(p[n] + 16 * piece);
            FATUI_UNROLL for (int f = 0; f < fields; f++)
              FATUI_UNROLL for (int v = 0; v < row_vectors; v++) {
                const uint8_t* of_query = q + ((piece * fields + f) * row_vectors + v) * lanes * 4;
                sum[v] = dot_pairs(sum[v], field_of<bits>(x, f), load_words(of_query));
              }
            // Otherwise the compiler multiplies all before it adds, and stores the products in between.
            FATUI_UNROLL for (int v = 0; v < row_vectors; v++) sum[v] = in_register(sum[v]);
          }
          p[n] += 16 * pieces;
          const Vector scale = broadcast(keys.scales[at[n] + g]);
          FATUI_UNROLL for (int v = 0; v < row_vectors; v++)
            total[v][n] = fused(total[v][n], __builtin_convertvector(sum[v], Vector), scale);
        }
      }
      Vector all[row_vectors];
      FATUI_UNROLL for (int v = 0; v < row_vectors; v++) all[v] = fold<together>(total[v]);
      for (int64_t g = 0; g < keys.groups; g++) {
        const Vector bias = of_keys(keys.biases + g, at);
        FATUI_UNROLL for (int v = 0; v < row_vectors; v++)
          all[v] = fused(all[v], load(sums + (g * row_vectors + v) * lanes), bias);
      }
      FATUI_UNROLL for (int v = 0; v < row_vectors; v++) {
        all[v] *= load(units + v * lanes);
        FATUI_UNROLL for (int r = 0; r < rows_of_vector; r++)
          std::memcpy(s + (v * rows_of_vector + r) * max_quantized_rows + j, reinterpret_cast<const float*>(&all[v]) + r * together,
                      together * sizeof(float));
      }
    }
    ahead = next;
  }
};

// Integers of a row as 16-bit numbers.
void place(const int32_t* integers, int64_t row, int64_t columns, int bits, uint8_t* query) {
  const int64_t fields = 16 / bits;
  uint8_t* to = query + row * 16;  // eight words; the rows of a vector are side by side, and so are the vectors
  for (int64_t d = 0; d < columns; d += 8 * fields)
    for (int64_t f = 0; f < fields; f++, to += 64)
      for (int64_t w = 0; w < 8; w++) {
        const auto number = int16_t(integers[d + w * fields + f]);
        std::memcpy(to + 2 * w, &number, sizeof number);
      }
}
constexpr bool takes_e2m1 = false;
constexpr int sum_lanes = 4;  // of a row, one for each key
#endif

// Bits of the numbers that scores are computed from.
int score_bits(const Packing& packing) {
  return packing.bits == 4 && (takes_e2m1 || packing.mode == Mode::affine) ? 4 : 8;
}
}  // namespace

bool IntegerQueries::take(const Packing& packing, int64_t columns, int64_t rows) {
  const bool takes_nvfp4 = takes_e2m1 && rows > 1;
  const bool takes = packing.mode == Mode::affine || packing.mode == Mode::mxfp4 || (takes_nvfp4 && packing.mode == Mode::nvfp4);
  return takes && columns % 32 == 0;
}

bool IntegerQueries::read(const float* query, int64_t line, int64_t rows, int64_t columns, const Packing& packing,
                          float largest_share, float* buffer) {
  const int64_t groups = columns / packing.group;
  row_groups_ = ceil_div(rows, rows_together);
  float *units = buffer, *sums = units + row_groups_ * 16;
  auto* bytes = reinterpret_cast<uint8_t*>(sums + row_groups_ * groups * 16);
  units_ = units, sums_ = sums, bytes_ = bytes;
  std::fill_n(buffer, row_groups_ * 16 * (1 + groups), 0.0f);
  std::memset(bytes, 0, size_t(row_groups_ * rows_together * columns * 2));
  for (int64_t r = 0; r < rows; r++) {
    const float* q = query + r * line;
    alignas(64) float roots[512];
    for (int64_t d = 0; d < columns; d++) roots[d] = std::sqrt(std::abs(q[d]));
    Vector top{}, total{};
    for (int64_t d = 0; d < columns; d += lanes) top = larger(magnitude(load(q + d)), top), total += load(roots + d);
    const float largest = max_of(top), mean = sum_of(total) / float(columns);  // of square roots, in which a few large numbers weigh less
    if (!(largest <= largest_share * mean * mean) || largest > 0x1p100f) return false;
    if (largest < 0x1p-110f) {
      if (largest > 0) return false;
      continue;
    }
    const int64_t four = r / rows_together, lane = r % rows_together * 4;  // of 16, in one vector or in two
    const Vector inverse = broadcast(largest_integer / largest), shifter = broadcast(12582912.0f);  // rounds to an integer
    std::fill_n(units + four * 16 + lane, 4, largest / largest_integer);
    alignas(64) int32_t integers[512];
    for (int64_t g = 0; g < groups; g++) {
      Vector sum{};
      for (int64_t d = g * packing.group; d < (g + 1) * packing.group; d += lanes) {
        const Vector whole = (load(q + d) * inverse + shifter) - shifter;
        store(reinterpret_cast<float*>(integers + d), as<Vector>(__builtin_convertvector(whole, Integers)));
        sum += whole;
      }
      std::fill_n(sums + (four * groups + g) * 16 + lane, sum_lanes, sum_of(sum));
    }
    place(integers, r % rows_together, columns, score_bits(packing), bytes + four * rows_together * columns * 2);
  }
  return true;
}

void IntegerQueries::scores(const QuantizedRows& keys, float* s, Ahead& next) const {
  const auto score = [&](const Packed& given) {
    const Packing& packing = keys.packing;
    Spread buffer;
    const bool spread = score_bits(packing) != packing.bits;
    const Packed packed = spread ? buffer.of(given, packing, packing.mode == Mode::mxfp4 ? 12 : 0) : given;
    [[maybe_unused]] Columns columns;
    if constexpr (takes_e2m1) {
      if (packing.mode == Mode::affine) columns.read(keys);
      else columns.read_doubled(keys, 12);
    }
    for (int64_t four = 0; four < row_groups_; four++) {
      const auto* bytes = bytes_ + four * rows_together * keys.columns * 2;
      const float *sums = sums_ + four * packed.groups * 16, *units = units_ + four * 16;
      float* to = s + four * rows_together * max_quantized_rows;
      if (score_bits(packing) == 4 && packing.mode != Mode::affine)
        Scores4<4, Number::e2m1>::run(packed, columns, bytes, sums, units, to, next);
      else if (score_bits(packing) == 4) Scores4<4, Number::integer>::run(packed, columns, bytes, sums, units, to, next);
      else Scores4<8, Number::integer>::run(packed, columns, bytes, sums, units, to, next);
    }
  };
  if constexpr (takes_e2m1) with_numbers(keys, score);  // scales and biases are in columns
  else with_packed(keys, score);
}
namespace {

constexpr float largest_weight = 32767;

// Lanes [i lanes / groups, (i + 1) lanes / groups) are those of x[i * stride]. Of eight groups of 16 numbers of 4 bits, the parts of
// every other one are in a vector.
template <int groups>
FATUI_INLINE Words by_groups(const void* x, int64_t stride) {
  if constexpr (groups == 8) return by_groups<4>(x, 2 * stride);
  Words all{};
  FATUI_UNROLL for (int i = 0; i < groups; i++) {
    uint32_t word;
    std::memcpy(&word, static_cast<const char*>(x) + i * stride, sizeof word);
    const Words one = Words{} + word;
    all = i == 0 ? one : lane_numbers() >= i * (lanes / groups) ? one : all;
  }
  return all;
}

// The lower halves of the words of a, and those of b above them.
FATUI_INLINE Words lower_halves(Words a, Words b) {
#if defined(__AVX512BW__)
  return (Words)_mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff), (__m512i)a, (__m512i)(b << 16), 0xea);  // (a & b) | c
#else
  return (Words)_mm256_blend_epi16((__m256i)a, (__m256i)(b << 16), 0xaa);
#endif
}

// The weights p * scale of a tile: 4 rows, groups, keys; their units; and the sums of p * bias. Numbers count from -centre on,
// which leaves less to the rounding of the weights: the biases are those of the number at the centre, and the offset has the
// centre's part of the sums of products, whose numbers are not negative.
struct Weights {
  // A word has the weights of a key and of the one half a tile after it.
  // Groups outermost, so that those that there are lie together: rows 4 KiB apart would share sets of the L1, and displace keys.
  alignas(64) Words pairs[max_groups][rows_together][max_quantized_rows / (2 * lanes)];
  Four unit[max_groups], offset[max_groups];

  // Half of a tile's keys, in whole vectors.
  static int64_t half_of(int64_t rows) { return round_up(ceil_div(rows, 2), lanes); }

  // p of four rows, max_quantized_rows floats apart; what is in those that are not there does not matter.
  void read(const Packed& values, const Columns& columns, float centre, const float* p) {
    const int64_t keys = round_up(values.rows, lanes);
    // Each step for all groups: a step waits for the one before.
    for (int64_t g = 0; g < values.groups; g++) measure(g, columns.of[g].scale, p, keys);
    for (int64_t g = 0; g < values.groups; g++) to_integers(g, centre, columns.of[g], p, keys, half_of(values.rows));
  }

  // Words `pair` of a row and of some groups from one on.
  template <int groups>
  FATUI_INLINE Words of_pair(int r, int64_t group, int64_t pair) const {
    return by_groups<groups>(reinterpret_cast<const uint32_t*>(pairs[group][r]) + pair, sizeof pairs[0]);
  }

 private:
  Four inverse[max_groups];

  static Four first_four(Vector x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3); }

  void measure(int64_t g, const float* scale, const float* p, int64_t keys) {
    Vector top[rows_together] = {};
    for (int64_t j = 0; j < keys; j += lanes) {
      const Vector size = magnitude(load(scale + j));
      FATUI_UNROLL for (int r = 0; r < rows_together; r++)
        top[r] = larger(in_register(load(p + r * max_quantized_rows + j) * size), top[r]);
    }
    const Four most = first_four(fold_four(top, Larger{}));
    unit[g] = most * (1 / largest_weight), inverse[g] = most > 0x1p-100f ? largest_weight / most : Four{};
  }

  void to_integers(int64_t g, float centre, const Columns::Group& of, const float* p, int64_t keys, int64_t half) {
    const Vector shifter = broadcast(12582912.0f);  // adding it rounds to an integer, in the low bits
    const Words ones = Words{} + 0x00010001u;
    Integers total[rows_together] = {};
    Vector sum[rows_together] = {};
    const auto add = [&](int64_t j, auto vectors) __attribute__((always_inline)) {
      Vector s[2], at_centre[2];
      FATUI_UNROLL for (int i = 0; i < vectors; i++)
        s[i] = load(of.scale + j + i * half), at_centre[i] = fused(load(of.bias + j + i * half), s[i], broadcast(centre));
      FATUI_UNROLL for (int r = 0; r < rows_together; r++) {
        Words whole[2] = {};
        FATUI_UNROLL for (int i = 0; i < vectors; i++) {
          const Vector weight = load(p + r * max_quantized_rows + j + i * half);
          whole[i] = as<Words>(fused(shifter, weight * s[i], broadcast(inverse[g][r])));
          sum[r] = fused(sum[r], weight, at_centre[i]);
        }
        const Words pair = lower_halves(whole[0], whole[1]);
        total[r] = dot_pairs(total[r], pair, ones);
        pairs[g][r][j / lanes] = pair;
      }
    };
    int64_t j = 0;
    for (; j < keys - half; j += lanes) add(j, std::integral_constant<int, 2>{});
    if (j < half) add(j, std::integral_constant<int, 1>{});
    FATUI_UNROLL for (int r = 0; r < rows_together; r++)
      sum[r] -= __builtin_convertvector(total[r], Vector) * broadcast(unit[g][r] * centre);
    offset[g] = first_four(fold_four(sum));
  }
};

// Some vectors of a block of `lanes` words, 4 rows: fields of the 16-bit parts of the words, of the four lower parts of each 16
// bytes or of the upper ones:
//
//   part i of key j | of key j + half | part i + 1 of key j | of key j + half | ...
//
// A pair's weights are broadcast when they are used: kept as vectors, they would take 4 KiB of the L1, and as many instructions.
template <int bits, Number number, int first, int groups>
struct Fields {
  static constexpr int vectors = registers == 32 ? 4 : 2, fields = 16 / bits, runs = 32 / bits / vectors;  // of a block

  [[gnu::noinline]] static void run(const Packed& values, const Weights& weights, int64_t block, float* output, int64_t line,
                                    Ahead& ahead) {
    const uint8_t* p = values.data + block * lanes * 4;
    const int64_t group = (block * lanes * (32 / bits) >> log2_of(values.group)) + (groups == 8 ? first / fields : 0);
    const int64_t stride = values.stride, half = Weights::half_of(values.rows), apart = half * stride;
    Integers sum[rows_together][vectors] = {};
    const auto add = [&](int64_t pair, const uint8_t* a, const uint8_t* b) __attribute__((always_inline)) {
      Words x[vectors];
      read(a, b, x);
      FATUI_UNROLL for (int r = 0; r < rows_together; r++) {
        const Words w = in_register(weights.of_pair<groups>(r, group, pair));
        FATUI_UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = dot_pairs(sum[r][v], x[v], w);
        // Otherwise the compiler multiplies all before it adds, and stores the products in between.
        FATUI_UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = in_register(sum[r][v]);
      }
    };
    int64_t pair = 0;
    if constexpr (registers == 32) {
      const char* ask = ahead.take(2 * half / runs, &weights);
      for (; pair < std::min(half, values.rows); pair++, p += stride, ask += 128 / runs) {
        FATUI_UNROLL for (int i = 0; i < 2 / runs; i++) __builtin_prefetch(ask + 64 * i);
        add(pair, p, pair + half < values.rows ? p + apart : p);  // the weight of a key that is not there is zero
      }
    } else {
      Ahead next = ahead;
      constexpr int some = 4;  // pairs, whose numbers in a block are four cache lines
      for (; pair + some <= values.rows - half; pair += some) {
        if constexpr (first % fields == 0) next.ask_two();  // in two of the block's sums
        FATUI_UNROLL for (int i = 0; i < some; i++, p += stride) add(pair + i, p, p + apart);
      }
      for (; pair < std::min(half, values.rows); pair++, p += stride) add(pair, p, pair + half < values.rows ? p + apart : p);
      ahead = next;
    }
    float* out = output + block * lanes * (32 / bits) + first * lanes;
    finish(sum);
    FATUI_UNROLL for (int r = 0; r < rows_together; r++) {
      const Vector unit = as<Vector>(by_groups<groups>(reinterpret_cast<const float*>(weights.unit + group) + r, sizeof weights.unit[0]));
      const Vector offset = as<Vector>(by_groups<groups>(reinterpret_cast<const float*>(weights.offset + group) + r, sizeof weights.offset[0]));
      FATUI_UNROLL for (int v = 0; v < vectors; v++) {
        float* to = out + r * line + v * lanes;
        store(to, load(to) + fused(offset, __builtin_convertvector(sum[r][v], Vector), unit));
      }
    }
  }

  static void all(const Packed& values, const Weights& weights, int64_t block, float* output, int64_t line, Ahead& next) {
    run(values, weights, block, output, line, next);
    if constexpr (first + vectors < 32 / bits)
      Fields<bits, number, first + vectors, groups>::all(values, weights, block, output, line, next);
  }

 private:
  // Numbers of two keys, or what sums of them can be made of by `finish`, with an instruction for each.
  FATUI_INLINE static void read(const uint8_t* a, const uint8_t* b, Words (&x)[vectors]) {
    FATUI_UNROLL for (int v = 0; v < vectors; v++) {
      const auto both = as<Shorts>(parts_of(a, b, (first + v) / fields));
      const int field = (first + v) % fields;
#if defined(__AVX512BW__)
      if constexpr (number == Number::e2m1) {
        x[v] = (Words)_mm512_permutexvar_epi16((__m512i)(both >> 4 * field), twice_e2m1());
        continue;
      }
#endif
      if (bits == 8) x[v] = as<Words>(field == 0 ? both & 255 : both >> 8);
      else if (field == 0) x[v] = as<Words>(both & 15);
      else if (field == 1) x[v] = as<Words>(both & 240);  // 16 times the number
      else x[v] = as<Words>(both >> 4 * field);           // the number and 16 times the next; the next
    }
  }
#if defined(__AVX512BW__)
  // Looked up by the lowest five bits, of which the highest is another number's.
  FATUI_INLINE static __m512i twice_e2m1() {
    alignas(64) static constexpr int16_t values[32] = {0, 1,  2,  3,  4,  6,  8,  12, 0, -1, -2, -3, -4, -6, -8, -12,
                                                       0, 1,  2,  3,  4,  6,  8,  12, 0, -1, -2, -3, -4, -6, -8, -12};
    return _mm512_load_si512(values);
  }
#endif
  FATUI_INLINE static Words parts_of(const uint8_t* a, const uint8_t* b, int upper) {
#if defined(__AVX512BW__)
    const __m512i of_a = _mm512_loadu_si512(a), of_b = _mm512_loadu_si512(b);
    return (Words)(upper ? _mm512_unpackhi_epi16(of_a, of_b) : _mm512_unpacklo_epi16(of_a, of_b));
#else
    const __m256i of_a = _mm256_loadu_si256((const __m256i*)a), of_b = _mm256_loadu_si256((const __m256i*)b);
    return (Words)(upper ? _mm256_unpackhi_epi16(of_a, of_b) : _mm256_unpacklo_epi16(of_a, of_b));
#endif
  }
  FATUI_INLINE static void finish(Integers (&sum)[rows_together][vectors]) {
    if constexpr (bits == 4 && number == Number::integer)
      FATUI_UNROLL for (int r = 0; r < rows_together; r++)
        FATUI_UNROLL for (int v = 0; v < vectors; v++) {
          const int field = (first + v) % fields;
          if (field == 1) sum[r][v] >>= 4;
          if (field == 2) sum[r][v] = as<Integers>(as<Words>(sum[r][v]) - (as<Words>(sum[r][v + 1]) << 4));  // modulo 2^32
        }
  }
};

template <int bits, Number number>
void add_blocks(const Packed& values, const Weights& weights, float* output, int64_t line, Ahead& next) {
  constexpr int64_t dims = lanes * 32 / bits, least_group = number == Number::e2m1 ? 16 : 32;
  for (int64_t block = 0; block * dims < values.groups * values.group; block++)
    switch (dims >> log2_of(values.group)) {
      case 8: if constexpr (dims >= 8 * least_group) Fields<bits, number, 0, 8>::all(values, weights, block, output, line, next); break;
      case 4: if constexpr (dims >= 4 * least_group) Fields<bits, number, 0, 4>::all(values, weights, block, output, line, next); break;
      case 2: if constexpr (dims >= 2 * least_group && number == Number::integer) Fields<bits, number, 0, 2>::all(values, weights, block, output, line, next); break;
      default: if constexpr (number != Number::e2m1) Fields<bits, number, 0, 1>::all(values, weights, block, output, line, next);
    }
}

// Which dim of a block lane i of its vector v holds.
int64_t dim_of(int64_t vectors, int64_t v, int64_t i) {
  const int64_t fields = vectors / 2;
  return (i / 4 * 8 + v / fields * 4 + i % 4) * fields + v % fields;
}

// Bits of the numbers that the output is summed from.
int sum_bits(const Packing& packing) { return packing.bits == 4 ? 4 : 8; }
}  // namespace

bool IntegerSums::take(const Packing& packing, int64_t columns, int64_t rows) {
  const bool of_four = lanes == 16 && (packing.mode == Mode::mxfp4 || (packing.mode == Mode::nvfp4 && rows > 1));
  return (packing.mode == Mode::affine || of_four) && columns % (lanes * 32 / sum_bits(packing)) == 0;
}

void IntegerSums::add(const QuantizedRows& values, const float* p, int64_t count, float* output, int64_t output_line,
                      Ahead& next) {
  with_numbers(values, [&](const Packed& given) {
    const Packing& packing = values.packing;
    const bool doubled = packing.mode != Mode::affine;
    const float centre = doubled ? 0 : float(1 << (packing.bits - 1));
    Weights weights;
    Columns columns;
    Spread buffer;
    const Packed packed = sum_bits(packing) == packing.bits ? given : buffer.of(given, packing, 0);
    if (doubled) columns.read_doubled(values, 0);
    else columns.read(values);
    for (int64_t row = 0; row < count; row += rows_together) {
      weights.read(packed, columns, centre, p + row * max_quantized_rows);
      float* to = output + row * output_line;
      if (sum_bits(packing) == 8) add_blocks<8, Number::integer>(packed, weights, to, output_line, next);
      else if (lanes < 16 || !doubled) add_blocks<4, Number::integer>(packed, weights, to, output_line, next);
      else if constexpr (lanes == 16) add_blocks<4, Number::e2m1>(packed, weights, to, output_line, next);
    }
  });
}

void IntegerSums::order(const Packing& packing, int64_t columns, float* output) {
  const int64_t vectors = 32 / sum_bits(packing), dims = vectors * lanes;
  for (float* block = output; block < output + columns; block += dims) {
    float ordered[8 * lanes];
    for (int64_t v = 0; v < vectors; v++)
      for (int64_t i = 0; i < lanes; i++) ordered[dim_of(vectors, v, i)] = block[v * lanes + i];
    std::copy_n(ordered, dims, block);
  }
}

#if defined(FATUI_PAIRS_OF_E4M3)
namespace {

// The magnitudes of e4m3 in bfloat16, exactly.
struct Magnitudes {
  alignas(64) uint8_t low[128], high[128];
};
constexpr Magnitudes magnitudes() {
  Magnitudes all{};
  for (int i = 0; i < 128; i++) {
    int exponent = i >> 3, fraction = i & 7;
    if (exponent == 0 && fraction > 0)
      for (exponent = 1; fraction < 8; exponent--) fraction *= 2;
    const int number = i == 0 ? 0 : i == 127 ? 0x7fc0 : (exponent + 120) << 7 | (fraction & 7) << 4;
    all.low[i] = uint8_t(number), all.high[i] = uint8_t(number >> 8);
  }
  return all;
}

// Numbers in e4m3 as the two bytes of a bfloat16.
struct Lookup {
  __m512i low[2], high[2];

  Lookup() {
    static constexpr Magnitudes all = magnitudes();
    FATUI_UNROLL for (int i = 0; i < 2; i++)
      low[i] = _mm512_load_si512(all.low + 64 * i), high[i] = _mm512_load_si512(all.high + 64 * i);
  }
  FATUI_INLINE void bytes_of(__m512i x, __m512i& low_byte, __m512i& high_byte) const {
    low_byte = _mm512_permutex2var_epi8(low[0], x, low[1]);
    high_byte = _mm512_permutex2var_epi8(high[0], x, high[1]);
    high_byte = _mm512_ternarylogic_epi64(high_byte, x, _mm512_set1_epi8(char(0x80)), 0xf8);  // a | (b & c)
  }
};

// The bfloat16 nearest to numbers, and that nearest to what is left.
FATUI_INLINE Words two_terms(Vector x) {
  const Words high = rounded_to_bfloat16(x), low = rounded_to_bfloat16(x - as<Vector>(high << 16));
  return high | low << 16;
}

// Four rows against all keys, 32 at a time, with `terms` bfloat16 for a number of the query.
template <int terms>
void score_pairs(const Packed& keys, const Columns& columns, const uint8_t* query, float unit, float* s, Ahead& ahead) {
  constexpr int vectors = 2;
  const Lookup lookup;
  for (int64_t j = 0; j < keys.rows; j += keys_together) {
    const KeysTogether some(keys, j, 32 * keys.groups);
    const Strides by(some.stride);
    const uint8_t* p[2 * vectors];
    FATUI_UNROLL for (int i = 0; i < 2 * vectors; i++) p[i] = some.data + 8 * i * some.stride;
    const uint8_t* q = query;
    const char* ask = ahead.take(keys.groups * keys_together / 2, query);
    for (int64_t group = 0; group < keys.groups; group++) {
      Vector sum[vectors][rows_together] = {};
      for (int piece = 0; piece < 2; piece++) {
        __m512i x[vectors][4];
        FATUI_UNROLL for (int v = 0; v < vectors; v++) transposed(p[2 * v], p[2 * v + 1], by, x[v]);
        FATUI_UNROLL for (int i = 0; i < 2 * vectors; i++) p[i] += 16;
        FATUI_UNROLL for (int word = 0; word < 4; word++) {
          __builtin_prefetch(ask), __builtin_prefetch(ask + 64);
          ask += 128;
          __m512i pairs[2][vectors];
          FATUI_UNROLL for (int v = 0; v < vectors; v++) {
            const __m512i lower = _mm512_set1_epi16(0xff);
            __m512i low, high;
            lookup.bytes_of(x[v][word], low, high);
            pairs[0][v] = _mm512_ternarylogic_epi64(lower, low, _mm512_slli_epi16(high, 8), 0xea);   // (a & b) | c
            pairs[1][v] = _mm512_ternarylogic_epi64(lower, high, _mm512_srli_epi16(low, 8), 0xae);  // (b & ~a) | c
          }
          FATUI_UNROLL for (int i = 0; i < 2 * terms; i++, q += 16)
            FATUI_UNROLL for (int r = 0; r < rows_together; r++) {
              const __m512i of_row = word_of(q + 4 * r);
              FATUI_UNROLL for (int v = 0; v < vectors; v++)
                sum[v][r] = in_register(
                    (Vector)_mm512_dpbf16_ps((__m512)sum[v][r], (__m512bh)pairs[i / terms][v], (__m512bh)of_row));
            }
          in_order(sum[vectors - 1][rows_together - 1], ask);
        }
      }
      FATUI_UNROLL for (int r = 0; r < rows_together; r++)
        FATUI_UNROLL for (int v = 0; v < vectors; v++) {
          float* to = s + r * max_quantized_rows + j + v * lanes;
          const Vector product = sum[v][r] * (load(columns.of[group].scale + j + v * lanes) * unit);
          store(to, group == 0 ? product : load(to) + product);
        }
    }
  }
}

// Of two keys' 32 numbers in turns: four dims of the first 16, and four of the others, in each 16 bytes.
struct Turns {
  alignas(64) uint8_t bytes[64];
};
constexpr Turns turns() {
  Turns all{};
  for (int i = 0; i < 64; i++) all.bytes[i] = uint8_t(i % 2 * 64 + i % 16 / 8 * 16 + i / 16 * 4 + i % 8 / 2);
  return all;
}

// The weights p * scale of a tile: pairs of keys.
template <int terms>
struct PairWeights {
  alignas(64) uint16_t number[max_groups][terms][rows_together][max_quantized_rows];

  void read(const Packed& values, const Columns& columns, const float* p, int64_t p_line, int64_t rows) {
    for (int64_t g = 0; g < values.groups; g++)
      for (int64_t j = 0; j < values.rows; j += lanes)
        for (int64_t r = 0; r < rows_together; r++) {
          const Vector weight = load(p + (r < rows ? r : 0) * p_line + j) * load(columns.of[g].scale + j);
          const auto high = (__m256i)_mm512_cvtneps_pbh((__m512)weight);
          _mm256_store_si256((__m256i*)(number[g][0][r] + j), high);
          if constexpr (terms == 2) {
            const auto left = (__m512)weight - (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
            _mm256_store_si256((__m256i*)(number[g][1][r] + j), (__m256i)_mm512_cvtneps_pbh(left));
          }
        }
  }

  // Adds the products of a group's 32 values.
  [[gnu::noinline]] void add(const Packed& values, int64_t group, float* output, int64_t line, Ahead& ahead) const {
    const Lookup lookup;
    static constexpr Turns in_turns = turns();
    const __m512i order = _mm512_load_si512(in_turns.bytes);
    const uint8_t* p = values.data + 32 * group;
    const char* ask = ahead.take(values.rows / 2, this);
    Vector sum[rows_together][2] = {};
    const auto add_pair = [&](int64_t pair, const uint8_t* a, const uint8_t* b) __attribute__((always_inline)) {
      const __m256i of_a = _mm256_loadu_si256((const __m256i*)a), of_b = _mm256_loadu_si256((const __m256i*)b);
      __m512i low, high;
      lookup.bytes_of(_mm512_permutex2var_epi8(_mm512_castsi256_si512(of_a), order, _mm512_castsi256_si512(of_b)), low, high);
      const __m512i x[2] = {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
      FATUI_UNROLL for (int t = 0; t < terms; t++)
        FATUI_UNROLL for (int r = 0; r < rows_together; r++) {
          const __m512i w = word_of(reinterpret_cast<const uint8_t*>(number[group][t][r] + 2 * pair));
          FATUI_UNROLL for (int v = 0; v < 2; v++)
            sum[r][v] = in_register((Vector)_mm512_dpbf16_ps((__m512)sum[r][v], (__m512bh)x[v], (__m512bh)w));
        }
    };
    for (int64_t pair = 0; 2 * pair < values.rows; pair++, p += 2 * values.stride) {
      __builtin_prefetch(ask + 64 * pair);
      add_pair(pair, p, 2 * pair + 1 < values.rows ? p + values.stride : p);  // the weight of a key that is not there is zero
    }
    FATUI_UNROLL for (int r = 0; r < rows_together; r++)
      FATUI_UNROLL for (int v = 0; v < 2; v++) {
        float* to = output + r * line + 32 * group + v * lanes;
        store(to, load(to) + sum[r][v]);
      }
  }
};

template <int terms>
void add_pairs_of(const Packed& packed, const Columns& columns, const float* p, int64_t p_line, int64_t count, float* output,
                  int64_t output_line, Ahead& next) {
  PairWeights<terms> weights;
  for (int64_t row = 0; row < count; row += rows_together) {
    weights.read(packed, columns, p + row * p_line, p_line, count - row);
    for (int64_t g = 0; g < packed.groups; g++) weights.add(packed, g, output + row * output_line, output_line, next);
  }
}

}  // namespace

bool PairQueries::take(const Packing& packing, int terms, int64_t rows) {
  return packing.mode == Mode::mxfp8 && (terms == 1 || rows > 1);
}

bool PairQueries::read(const float* query, int64_t line, int64_t rows, int64_t columns, float exact_unit, float* buffer) {
  row_groups_ = ceil_div(rows, rows_together), terms_ = exact_unit != 0 ? 1 : 2, unit_ = exact_unit != 0 ? exact_unit : 1;
  bytes_ = reinterpret_cast<const uint8_t*>(buffer);
  auto* out = reinterpret_cast<uint16_t*>(buffer);
  std::fill_n(buffer, row_groups_ * rows_together * columns, 0.0f);
  const int64_t of_four = rows_together * columns * terms_;
  for (int64_t r = 0; r < rows; r++) {
    Vector top{};
    for (int64_t d = 0; d < columns; d += lanes) top = larger(magnitude(load(query + r * line + d)), top);
    const float largest = max_of(top);
    if (largest > 0 && largest < 0x1p-80f) return false;
    for (int64_t d = 0; d < columns; d += lanes) {
      const Words both = two_terms(load(query + r * line + d) / unit_);
      for (int64_t i = 0; i < lanes; i++)
        for (int64_t term = 0; term < terms_; term++) {  // words of dims 4 n and 4 n + 2, and of those after them
          const int64_t word = ((d + i) / 4 * 2 + i % 2) * terms_ + term;
          out[r / rows_together * of_four + (word * rows_together + r % rows_together) * 2 + i / 2 % 2] = uint16_t(both[i] >> 16 * term);
        }
    }
  }
  return true;
}

void PairQueries::scores(const QuantizedRows& keys, float* s, Ahead& next) const {
  with_numbers(keys, [&](const Packed& packed) {
    Columns columns;
    columns.read_scales(keys);
    for (int64_t four = 0; four < row_groups_; four++) {
      const uint8_t* query = bytes_ + four * rows_together * keys.columns * 2 * terms_;
      float* to = s + four * rows_together * max_quantized_rows;
      if (terms_ == 1) score_pairs<1>(packed, columns, query, unit_, to, next);
      else score_pairs<2>(packed, columns, query, unit_, to, next);
    }
  });
}

void add_in_pairs(const QuantizedRows& values, int terms, const float* p, int64_t p_line, int64_t count, float* output,
                  int64_t output_line, Ahead& next) {
  with_numbers(values, [&](const Packed& packed) {
    Columns columns;
    columns.read_scales(values);
    if (terms == 1) add_pairs_of<1>(packed, columns, p, p_line, count, output, output_line, next);
    else add_pairs_of<2>(packed, columns, p, p_line, count, output, output_line, next);
  });
}
#endif
#else
bool IntegerQueries::take(const Packing&, int64_t, int64_t) { return false; }
bool IntegerQueries::read(const float*, int64_t, int64_t, int64_t, const Packing&, float, float*) { return false; }
void IntegerQueries::scores(const QuantizedRows&, float*, Ahead&) const {}
bool IntegerSums::take(const Packing&, int64_t, int64_t) { return false; }
void IntegerSums::add(const QuantizedRows&, const float*, int64_t, float*, int64_t, Ahead&) {}
void IntegerSums::order(const Packing&, int64_t, float*) {}
#endif
#if !defined(FATUI_PAIRS_OF_E4M3)
bool PairQueries::take(const Packing&, int, int64_t) { return false; }
bool PairQueries::read(const float*, int64_t, int64_t, int64_t, float, float*) { return false; }
void PairQueries::scores(const QuantizedRows&, float*, Ahead&) const {}
void add_in_pairs(const QuantizedRows&, int, const float*, int64_t, int64_t, float*, int64_t, Ahead&) {}
#endif

}  // namespace fatui
