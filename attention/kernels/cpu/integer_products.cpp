// Products of few query rows with packed numbers in integers.
//
//   scores   A vector has the bytes of 16 dims for each of 4 rows, so that a key's bytes, repeated for each row, give the sums
//            of all rows at once:
//
//              q   row 0, dims 0..15 | row 1, dims 0..15 | row 2 | row 3    S += scale (256 q_high n + q_low n) + bias sum(q)
//              n   dims 0..15        | dims 0..15        | ...   | ...
//
//   output   Words of two adjacent keys, as 16-bit numbers: lane i of vector v is dim v of word i, on AVX2 a dim of a 16-bit part.
//            The weights p * scale of a tile's keys are integers of 16 bits, too, in a unit of their own for each row and group:
//
//              n   dim v of word 0, keys j and j + 1 | of word 1 | ...      O[row] += unit (w n) + sum of p * bias
//              w   keys j and j + 1                  | the same  | ...
//
// On AVX-512 without VNNI and on AVX2, scores are sums of 16-bit numbers as well: 8 words of a key, for 4 rows or for 2.
//
// Numbers of other widths than 4 and 8 bits are spread to bytes first, a tile at a time, in the L1; without VNNI so are keys in
// mxfp4.
#include "decode_products.hpp"
#include "packed.hpp"

namespace fatui {

#if defined(FATUI_SHUFFLES)
namespace {

typedef uint16_t Shorts __attribute__((vector_size(lanes * 4)));
typedef int16_t SignedShorts __attribute__((vector_size(lanes * 4)));
typedef int16_t HalfShorts __attribute__((vector_size(lanes * 2)));

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

// Rows of numbers as bytes: integers plus an offset; twice e2m1 plus an offset.
template <int bits, Number number>
void to_bytes(const Packed& from, int offset, uint8_t* out) {
  const __m256i plus = _mm256_set1_epi8(char(offset));
  const __m256i twice =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  for (int64_t r = 0; r < from.rows; r++) {
    const uint8_t* p = from.data + r * from.stride;
    for (int64_t d = 0; d < from.groups * from.group; d += 32, p += 4 * bits, out += 32) {
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

// Field i of each 16-bit number, from 0 on; and as a signed number.
template <int bits>
FATUI_INLINE Words field_of(Words x, int i) {
  const auto moved = as<Shorts>(x) >> (bits * i);
  return as<Words>(bits * (i + 1) == 16 ? moved : moved & uint16_t((1 << bits) - 1));
}
template <int bits>
FATUI_INLINE Words signed_field_of(Words x, int i) {
  return as<Words>(as<SignedShorts>(as<Shorts>(x) << (16 - bits * (i + 1))) >> (16 - bits));
}

#if defined(__AVX512VNNI__)
constexpr int64_t unit = 32;  // dims of two vectors

// The two vectors of 32 numbers, each with the 16 bytes of its dims four times: once for each row.
template <int bits, Number number>
FATUI_INLINE void unit_of(const uint8_t* p, __m512i (&x)[2]) {
  const __m512i first = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
  if constexpr (bits == 8) {
    x[0] = first, x[1] = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(p + 16)));
  } else {
    const __m512i low = _mm512_set1_epi8(15);
    x[0] = _mm512_and_si512(first, low), x[1] = _mm512_and_si512(_mm512_srli_epi16(first, 4), low);
    if constexpr (number == Number::e2m1) {  // twice the number, plus 12
      const __m128i shifted = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
      const __m512i values = _mm512_broadcast_i32x4(shifted);
      x[0] = _mm512_shuffle_epi8(values, x[0]), x[1] = _mm512_shuffle_epi8(values, x[1]);
    }
  }
}

// Four rows against all keys, four at a time.
template <int bits, Number number>
struct Scores4 {
  static constexpr int together = 4;

  static void run(const Packed& keys, const uint8_t* query, const float* sums, const float* units, float* s, int64_t line,
                  Ahead& ahead) {
    Ahead next = ahead;
    for (int64_t j = 0; j < keys.rows; j += together) {
      Vector total[together] = {};
      const uint8_t* p[together];
      int64_t at[together];
      FATUI_UNROLL for (int n = 0; n < together; n++) {
        const int64_t key = std::min(j + n, keys.rows - 1);
        p[n] = keys.data + key * keys.stride, at[n] = key * keys.groups;
      }
      const uint8_t* q = query;
      for (int64_t g = 0; g < keys.groups; g++) {
        __m512i high[together] = {}, low[together] = {};
        for (int64_t d = 0; d < keys.group; d += unit, q += 4 * 64) {
          __m512i y[4];
          FATUI_UNROLL for (int i = 0; i < 4; i++) y[i] = _mm512_load_si512(q + 64 * i);
          next.ask<bits * together * unit / 8 / 64>();
          FATUI_UNROLL for (int n = 0; n < together; n++) {
            __m512i x[2];
            unit_of<bits, number>(p[n], x);
            high[n] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(high[n], x[0], y[0]), x[1], y[2]);
            low[n] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(low[n], x[0], y[1]), x[1], y[3]);
            p[n] += unit * bits / 8;
          }
        }
        const Vector sum = load(sums + g * lanes);
        FATUI_UNROLL for (int n = 0; n < together; n++) {
          const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(high[n], 8), low[n]);
          const Vector product = (Vector)_mm512_cvtepi32_ps(both);
          const float scale = keys.scales[at[n] + g];
          total[n] = fused(total[n], product, broadcast(number == Number::e2m1 ? 0.5f * scale : scale));
          total[n] = fused(total[n], sum, broadcast(number == Number::e2m1 ? -6 * scale : keys.biases[at[n] + g]));
        }
      }
      const Vector all = fold<together>(total) * load(units);
      FATUI_UNROLL for (int r = 0; r < rows_together; r++)
        std::memcpy(s + r * line + j, reinterpret_cast<const float*>(&all) + r * together, together * sizeof(float));
    }
    ahead = next;
  }
};

// Integers of a row as high and low bytes.
void place(const int32_t* integers, int64_t row, int64_t columns, int bits, uint8_t* query) {
  uint8_t* to = query + row * 16;
  for (int64_t d = 0; d < columns; d += unit, to += 4 * 64)
    for (int vector = 0; vector < 2; vector++)
      for (int b = 0; b < 16; b++) {
        const int32_t number = integers[d + (bits == 8 ? 16 * vector + b : 2 * b + vector)], high = (number + 128) >> 8;
        to[128 * vector + b] = uint8_t(high), to[128 * vector + 64 + b] = uint8_t(number - 256 * high);
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

  static void run(const Packed& keys, const uint8_t* query, const float* sums, const float* units, float* s, int64_t line,
                  Ahead& ahead) {
    switch (keys.group) {
      case 32: return run<bits / 4>(keys, query, sums, units, s, line, ahead);
      case 64: return run<bits / 2>(keys, query, sums, units, s, line, ahead);
      default: return run<bits>(keys, query, sums, units, s, line, ahead);
    }
  }

 private:
  template <int pieces>  // of 16 bytes in a group
  static void run(const Packed& keys, const uint8_t* query, const float* sums, const float* units, float* s, int64_t line,
                  Ahead& ahead) {
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
            FATUI_UNROLL for (int v = 0; v < row_vectors; v++) sum[v] = as<Integers>(in_register(as<Vector>(sum[v])));
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
          std::memcpy(s + (v * rows_of_vector + r) * line + j, reinterpret_cast<const float*>(&all[v]) + r * together,
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

bool IntegerQueries::take(const Packing& packing, int64_t columns) {
  return (packing.mode == Mode::affine || packing.mode == Mode::mxfp4) && columns % 32 == 0;
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
    float largest = 0, mean = 0;  // of square roots, in which a few large numbers weigh less
    for (int64_t d = 0; d < columns; d++) largest = std::max(largest, std::abs(q[d])), mean += std::sqrt(std::abs(q[d]));
    mean /= float(columns);
    if (!(largest <= largest_share * mean * mean) || largest > 0x1p100f) return false;
    if (largest < 0x1p-110f) {
      if (largest > 0) return false;
      continue;
    }
    const int64_t four = r / rows_together, lane = r % rows_together * 4;  // of 16, in one vector or in two
    const float inverse = largest_integer / largest;
    std::fill_n(units + four * 16 + lane, 4, largest / largest_integer);
    alignas(64) int32_t integers[512];
    for (int64_t d = 0; d < columns; d++) integers[d] = int32_t(std::nearbyint(q[d] * inverse));
    for (int64_t g = 0; g < groups; g++) {
      float sum = 0;
      for (int64_t d = g * packing.group; d < (g + 1) * packing.group; d++) sum += float(integers[d]);
      std::fill_n(sums + (four * groups + g) * 16 + lane, sum_lanes, sum);
    }
    place(integers, r % rows_together, columns, score_bits(packing), bytes + four * rows_together * columns * 2);
  }
  return true;
}

void IntegerQueries::scores(const QuantizedRows& keys, float* s, int64_t line, Ahead& next) const {
  with_packed(keys, [&](const Packed& given) {
    const Packing& packing = keys.packing;
    Spread buffer;
    const bool spread = score_bits(packing) != packing.bits;
    const Packed packed = spread ? buffer.of(given, packing, packing.mode == Mode::mxfp4 ? 12 : 0) : given;
    for (int64_t four = 0; four < row_groups_; four++) {
      const auto* bytes = bytes_ + four * rows_together * keys.columns * 2;
      const float *sums = sums_ + four * packed.groups * 16, *units = units_ + four * 16;
      float* to = s + four * rows_together * line;
      if (score_bits(packing) == 4 && packing.mode != Mode::affine)
        Scores4<4, Number::e2m1>::run(packed, bytes, sums, units, to, line, next);
      else if (score_bits(packing) == 4) Scores4<4, Number::integer>::run(packed, bytes, sums, units, to, line, next);
      else Scores4<8, Number::integer>::run(packed, bytes, sums, units, to, line, next);
    }
  });
}
namespace {

template <int... I>
FATUI_INLINE Vector every_second(Vector a, Vector b, int64_t first, std::integer_sequence<int, I...>) {
  return first == 0 ? __builtin_shufflevector(a, b, (2 * I)...) : __builtin_shufflevector(a, b, (2 * I + 1)...);
}

constexpr auto all_lanes = std::make_integer_sequence<int, lanes>{};
constexpr int64_t max_value_groups = 512 / 32;
constexpr float largest_weight = 32767;
#if defined(__AVX512BW__)
constexpr bool signed_numbers = true;
#else
constexpr bool signed_numbers = false;
#endif

// Lanes [i lanes / groups, (i + 1) lanes / groups) are those of x[i * stride].
template <int groups>
FATUI_INLINE Words by_groups(const void* x, int64_t stride) {
  Words all{};
  FATUI_UNROLL for (int i = 0; i < groups; i++) {
    uint32_t word;
    std::memcpy(&word, static_cast<const char*>(x) + i * stride, sizeof word);
    const Words one = Words{} + word;
    all = i == 0 ? one : lane_numbers() >= i * (lanes / groups) ? one : all;
  }
  return all;
}

// The weights p * scale of a tile: 4 rows, groups, keys; their units; and the sums of p * bias. Numbers count from -centre on,
// which leaves less to the rounding of the weights; the biases are those of the number at the centre. Where numbers are not read
// as signed, the centre's part is subtracted from the sums.
struct Weights {
  alignas(64) int16_t number[rows_together][max_value_groups][max_quantized_rows];
  float unit[rows_together][max_value_groups], offset[rows_together][max_value_groups];
  int32_t sum_of_numbers[rows_together][max_value_groups];

  void read(const Packed& values, float centre, const float* p, int64_t p_line, int64_t rows) {
    for (int64_t g = 0; g < values.groups; g++) {
      alignas(64) float scale[max_quantized_rows], bias[max_quantized_rows];
      of_group(values.scales, g, values.groups, values.rows, scale);
      of_group(values.biases, g, values.groups, values.rows, bias);
      read(g, centre, scale, bias, p, p_line, rows, round_up(values.rows, lanes));
    }
  }

  // Those of two adjacent keys, of some groups from one on.
  template <int groups>
  FATUI_INLINE Words of_pair(int r, int64_t group, int64_t pair) const {
    return by_groups<groups>(number[r][group] + 2 * pair, sizeof number[r][group]);
  }

 private:
  static Vector of_two(const float* x, int64_t g) { return every_second(load(x), load(x + lanes), g, all_lanes); }

  // Every `groups`-th number, and zeros up to whole vectors.
  static void of_group(const float* x, int64_t g, int64_t groups, int64_t keys, float* out) {
    const int64_t end = round_up(keys, lanes);
    std::fill(out + keys, out + end, 0.0f);
    int64_t j = 0;
    for (; groups == 2 && j + lanes <= keys; j += lanes) store(out + j, of_two(x + 2 * j, g));
    for (; groups == 4 && j + lanes <= keys; j += lanes)
      store(out + j, every_second(of_two(x + 4 * j, g % 2), of_two(x + 4 * j + 2 * lanes, g % 2), g / 2, all_lanes));
    for (; j < keys; j++) out[j] = x[j * groups + g];
  }

  void read(int64_t g, float centre, const float* scale, const float* bias, const float* p, int64_t p_line, int64_t rows,
            int64_t keys) {
    Vector top[rows_together] = {}, sum[rows_together] = {};
    const float* row[rows_together];  // of rows that are not there, the first one is read
    FATUI_UNROLL for (int r = 0; r < rows_together; r++) row[r] = p + (r < rows ? r : 0) * p_line;
    for (int64_t j = 0; j < keys; j += lanes) {
      const Vector s = load(scale + j), at_centre = fused(load(bias + j), s, broadcast(centre));
      FATUI_UNROLL for (int r = 0; r < rows_together; r++) {
        const Vector weight = load(row[r] + j);
        top[r] = larger(magnitude(weight * s), top[r]), sum[r] = fused(sum[r], weight, at_centre);
      }
    }
    Vector inverse[rows_together];
    FATUI_UNROLL for (int r = 0; r < rows_together; r++) {
      const float largest = max_of(top[r]);
      inverse[r] = broadcast(largest > 0x1p-100f ? largest_weight / largest : 0.0f);
      unit[r][g] = largest / largest_weight, offset[r][g] = sum_of(sum[r]);
    }
    Vector total[rows_together] = {};  // of integers, exactly
    for (int64_t j = 0; j < keys; j += lanes) {
      const Vector s = load(scale + j), shifter = broadcast(12582912.0f);  // adding it rounds to an integer, in the low bits
      FATUI_UNROLL for (int r = 0; r < rows_together; r++) {
        const Vector shifted = fused(shifter, load(row[r] + j) * s, inverse[r]);
        if constexpr (!signed_numbers) total[r] += shifted - shifter;
        const HalfShorts numbers = __builtin_convertvector(as<Integers>(shifted), HalfShorts);
        std::memcpy(number[r][g] + j, &numbers, sizeof numbers);
      }
    }
    if constexpr (!signed_numbers)
      FATUI_UNROLL for (int r = 0; r < rows_together; r++) {
        const float all = sum_of(total[r]);
        sum_of_numbers[r][g] = all == all ? int32_t(all) : 0;  // NaN comes with the offset
      }
  }
};

#if defined(__AVX512BW__)
// Numbers of words of two adjacent keys, as signed ones of 16 bits with others in them: the lower or upper halves of the words.
template <int bits, bool upper>
FATUI_INLINE Words halves_of(const uint8_t* p, const Packed& values, int64_t j) {
  Words a, b;
  std::memcpy(&a, p + j * values.stride, sizeof a);
  std::memcpy(&b, p + std::min(j + 1, values.rows - 1) * values.stride, sizeof b);
  constexpr uint32_t tops = bits == 4 ? 0x88888888u : 0x80808080u;  // n - centre: the top bit becomes a sign
  return (upper ? (a >> 16) | (b & 0xffff0000u) : (a & 0xffffu) | (b << 16)) ^ tops;
}

constexpr int block_vectors = 4;  // that are summed at once

// Some vectors of a block of `lanes` words: 4 rows x 4 vectors.
template <int bits, int first, int groups>
struct Block {
  static constexpr int count = block_vectors, fields = 16 / bits;
  static constexpr bool low = first < fields, high = first + count > fields;

  static void run(const Packed& values, const Weights& weights, int64_t block, float* output, int64_t line, Ahead& ahead) {
    Ahead next = ahead;
    const uint8_t* p = values.data + block * lanes * 4;
    const int64_t group = block * lanes * (32 / bits) / values.group;
    Integers sum[rows_together][count] = {};
    for (int64_t pair = 0; 2 * pair < values.rows; pair++) {
      Words halves[2], weight[rows_together];
      if constexpr (first == 0) next.ask<lanes / 8>();
      if constexpr (low) halves[0] = halves_of<bits, false>(p, values, 2 * pair);
      if constexpr (high) halves[1] = halves_of<bits, true>(p, values, 2 * pair);
      FATUI_UNROLL for (int r = 0; r < rows_together; r++) weight[r] = weights.of_pair<groups>(r, group, pair);
      FATUI_UNROLL for (int v = 0; v < count; v++) {
        const Words x = signed_field_of<bits>(halves[(first + v) / fields], (first + v) % fields);
        FATUI_UNROLL for (int r = 0; r < rows_together; r++) sum[r][v] = dot_pairs(sum[r][v], x, weight[r]);
      }
    }
    float* out = output + block * lanes * (32 / bits) + first * lanes;
    FATUI_UNROLL for (int r = 0; r < rows_together; r++) {
      const Vector unit = as<Vector>(by_groups<groups>(weights.unit[r] + group, sizeof(float)));
      const Vector offset = as<Vector>(by_groups<groups>(weights.offset[r] + group, sizeof(float)));
      FATUI_UNROLL for (int v = 0; v < count; v++) {
        float* to = out + r * line + v * lanes;
        store(to, load(to) + fused(offset, __builtin_convertvector(sum[r][v], Vector), unit));
      }
    }
    ahead = next;
  }

  static void all(const Packed& values, const Weights& weights, int64_t block, float* output, int64_t line, Ahead& next) {
    run(values, weights, block, output, line, next);
    if constexpr (first + count < 32 / bits)
      Block<bits, first + count, groups>::all(values, weights, block, output, line, next);
  }
};

template <int bits>
void add_blocks(const Packed& values, const Weights& weights, float* output, int64_t line, Ahead& next) {
  constexpr int dims = lanes * 32 / bits;
  for (int64_t block = 0; block < values.groups * values.group / dims; block++)
    if (values.group >= dims) Block<bits, 0, 1>::all(values, weights, block, output, line, next);
    else if (values.group == dims / 2) Block<bits, 0, 2>::all(values, weights, block, output, line, next);
    else if constexpr (dims > 64) Block<bits, 0, 4>::all(values, weights, block, output, line, next);
}

// Which dim of a block lane i of its vector v holds.
int64_t dim_of(int64_t vectors, int64_t v, int64_t i) { return i * vectors + v; }
#else
// Two vectors of a block of 8 words, 4 rows: two fields of the 16-bit parts of the words, of the four lower parts of each half or
// of the upper ones:
//
//   part i of key j | of key j + 1 | part i + 1 of key j | of key j + 1 | ...
//
// A pair's weights are broadcast when they are used: kept as vectors, they would take 4 KiB of the L1, and as many instructions.
template <int bits, bool upper, int field, int groups>
struct Fields {
  [[gnu::noinline]] static void run(const Packed& values, const Weights& weights, int64_t block, float* output, int64_t line,
                                    Ahead& ahead) {
    Ahead next = ahead;
    const uint8_t* p = values.data + block * lanes * 4;
    const int64_t group = block * lanes * (32 / bits) / values.group, stride = values.stride;
    Integers sum[rows_together][2] = {};
    const auto add = [&](int64_t pair, const uint8_t* a, const uint8_t* b) __attribute__((always_inline)) {
      Words x[2];
      read(a, b, x);
      FATUI_UNROLL for (int r = 0; r < rows_together; r++) {
        const auto w = as<Words>(in_register(as<Vector>(weights.of_pair<groups>(r, group, pair))));
        sum[r][0] = dot_pairs(sum[r][0], x[0], w);
        sum[r][1] = dot_pairs(sum[r][1], x[1], w);
        // Otherwise the compiler multiplies all before it adds, and stores the products in between.
        FATUI_UNROLL for (int v = 0; v < 2; v++) sum[r][v] = as<Integers>(in_register(as<Vector>(sum[r][v])));
      }
    };
    constexpr int some = 4;  // pairs, whose numbers in a block are four cache lines
    const int64_t pairs = values.rows / 2;
    int64_t pair = 0;
    for (; pair + some <= pairs; pair += some) {
      if constexpr (field == 0) next.ask_two();  // in two of the block's sums
      FATUI_UNROLL for (int i = 0; i < some; i++, p += 2 * stride) add(pair + i, p, p + stride);
    }
    for (; pair < pairs; pair++, p += 2 * stride) add(pair, p, p + stride);
    if (values.rows % 2 != 0) add(pair, p, p);  // the weight of the key that is not there is zero
    float* out = output + block * lanes * (32 / bits) + (upper * (16 / bits) + field) * lanes;
    FATUI_UNROLL for (int r = 0; r < rows_together; r++) {
      const Vector unit = as<Vector>(by_groups<groups>(weights.unit[r] + group, sizeof(float)));
      const Vector offset = as<Vector>(by_groups<groups>(weights.offset[r] + group, sizeof(float)));
      const Words weight = by_groups<groups>(weights.sum_of_numbers[r] + group, sizeof(int32_t));
      const auto at_centre = as<Integers>(weight << (bits - 1));
      finish(sum[r]);
      FATUI_UNROLL for (int v = 0; v < 2; v++) {
        float* to = out + r * line + v * lanes;
        store(to, load(to) + fused(offset, __builtin_convertvector(sum[r][v] - at_centre, Vector), unit));
      }
    }
    ahead = next;
  }

 private:
  // Numbers of two keys, or what sums of them can be made of by `finish`, with an instruction for each.
  FATUI_INLINE static void read(const uint8_t* a, const uint8_t* b, Words (&x)[2]) {
    const __m256i of_a = _mm256_loadu_si256((const __m256i*)a), of_b = _mm256_loadu_si256((const __m256i*)b);
    const auto both = as<Shorts>(upper ? _mm256_unpackhi_epi16(of_a, of_b) : _mm256_unpacklo_epi16(of_a, of_b));
    if constexpr (bits == 8) x[0] = as<Words>(both & 255), x[1] = as<Words>(both >> 8);
    else if constexpr (field == 0) x[0] = as<Words>(both & 15), x[1] = as<Words>(both & 240);  // 16 times the number
    else x[0] = as<Words>(both >> 8), x[1] = as<Words>(both >> 12);  // the number and 16 times the next; the next
  }
  FATUI_INLINE static void finish(Integers (&sum)[2]) {
    if constexpr (bits == 4 && field == 0) sum[1] >>= 4;
    if constexpr (bits == 4 && field == 2) sum[0] = as<Integers>(as<Words>(sum[0]) - (as<Words>(sum[1]) << 4));  // modulo 2^32
  }
};

template <int bits, int groups>
void add_block(const Packed& values, const Weights& weights, int64_t block, float* output, int64_t line, Ahead& next) {
  Fields<bits, false, 0, groups>::run(values, weights, block, output, line, next);
  if constexpr (bits == 4) Fields<bits, false, 2, groups>::run(values, weights, block, output, line, next);
  Fields<bits, true, 0, groups>::run(values, weights, block, output, line, next);
  if constexpr (bits == 4) Fields<bits, true, 2, groups>::run(values, weights, block, output, line, next);
}

template <int bits>
void add_blocks(const Packed& values, const Weights& weights, float* output, int64_t line, Ahead& next) {
  constexpr int dims = lanes * 32 / bits;
  for (int64_t block = 0; block < values.groups * values.group / dims; block++)
    if (values.group >= dims) add_block<bits, 1>(values, weights, block, output, line, next);
    else if constexpr (dims > 32) add_block<bits, 2>(values, weights, block, output, line, next);
}

// Which dim of a block lane i of its vector v holds.
int64_t dim_of(int64_t vectors, int64_t v, int64_t i) {
  const int64_t fields = vectors / 2;
  return (i / 4 * 8 + v / fields * 4 + i % 4) * fields + v % fields;
}
#endif

// Bits of the numbers that the output is summed from.
int sum_bits(const Packing& packing) { return packing.bits == 4 ? 4 : 8; }
}  // namespace

bool IntegerSums::take(const Packing& packing, int64_t columns) {
  return packing.mode == Mode::affine && columns % (lanes * 32 / sum_bits(packing)) == 0;
}

void IntegerSums::add(const QuantizedRows& values, const float* p, int64_t p_line, int64_t count, float* output,
                      int64_t output_line, Ahead& next) {
  with_packed(values, [&](const Packed& given) {
    const Packing& packing = values.packing;
    const int centre = 1 << (packing.bits - 1);
    Weights weights;
    Spread buffer;
    const Packed packed = sum_bits(packing) == packing.bits ? given : buffer.of(given, packing, 128 - centre);
    for (int64_t row = 0; row < count; row += rows_together) {
      weights.read(packed, float(centre), p + row * p_line, p_line, count - row);
      float* to = output + row * output_line;
      if (sum_bits(packing) == 4) add_blocks<4>(packed, weights, to, output_line, next);
      else add_blocks<8>(packed, weights, to, output_line, next);
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
#else
bool IntegerQueries::take(const Packing&, int64_t) { return false; }
bool IntegerQueries::read(const float*, int64_t, int64_t, int64_t, const Packing&, float, float*) { return false; }
void IntegerQueries::scores(const QuantizedRows&, float*, int64_t, Ahead&) const {}
bool IntegerSums::take(const Packing&, int64_t) { return false; }
void IntegerSums::add(const QuantizedRows&, const float*, int64_t, int64_t, float*, int64_t, Ahead&) {}
void IntegerSums::order(const Packing&, int64_t, float*) {}
#endif

}  // namespace fatui
