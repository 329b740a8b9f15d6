// Dequantization of keys and values, 16 at a time: the group size of every format is a multiple of that, and 16 numbers of any
// size take whole bytes.
//
//   numbers of up to 4 bits   looked up in a table of the group's values, scale and bias included, where a register holds it
//   other integers            bytes, shifts and a mask; scale * number + bias
//   e2m1                      looked up, too
//   e4m3                      the bits of a float16 that is 2^-8 of it; times 2^8, times the scale. In a tile without NaN
//                             and with scales that may be multiplied by 2^8, they are, once for each group
#include "decode_products.hpp"
#include "packed.hpp"

namespace fatui {
namespace {

constexpr int vectors = chunk / lanes;

struct e4m3_t { uint8_t bits; };
struct e8m0_t { uint8_t bits; };  // a power of two

FATUI_INLINE Vector widen(const e4m3_t* p) {
#if defined(__AVX512BW__)
  const __m256i number = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  const __m256i half = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(number, 8), 1), _mm256_set1_epi16(short(0xbf80)));
  const __m256i seven = _mm256_set1_epi16(0x7f), nan = _mm256_cmpeq_epi16(_mm256_and_si256(number, seven), seven);
  return (Vector)_mm512_cvtph_ps(_mm256_or_si256(half, nan)) * 0x1p8f;
#else
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const Halves number = __builtin_convertvector(bytes, Halves);
  const Halves half = ((number & 0x7f) << 7) | ((number & 0x80) << 8);
  const Halves bits = (number & 0x7f) == 0x7f ? Halves{} + uint16_t(0x7e00) : half;  // NaN
  return fatui::widen(reinterpret_cast<const float16_t*>(&bits)) * 0x1p8f;
#endif
}
// 2^-8 of numbers that are not NaN.
FATUI_INLINE Vector widen_finite(const uint8_t* p) {
#if defined(__AVX512BW__)
  const __m256i number = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));  // the sign in the upper byte
  return (Vector)_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(number, 7), _mm256_set1_epi16(short(0xbf80))));
#elif defined(__AVX2__) && defined(__F16C__)
  const __m128i number = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
  return (Vector)_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(number, 7), _mm_set1_epi16(short(0xbf80))));
#else
  return widen(reinterpret_cast<const e4m3_t*>(p)) * 0x1p-8f;
#endif
}
FATUI_INLINE Vector widen(const e8m0_t* p) {
#if defined(__AVX512F__)
  const auto exponent = (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  const auto exponent = (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const Words exponent = __builtin_convertvector(bytes, Words);
#endif
  return as<Vector>(exponent == 0u ? Words{} + 0x00400000u : exponent << 23);
}
using fatui::widen;

// Scales or biases of some rows, one row after another. Writes whole vectors.
template <class T>
void read_groups(const Tensor& t, int64_t at, int64_t rows, int64_t groups, float* out) {
  const T* from = static_cast<const T*>(t.data) + at;
  if (t.stride[2] == groups && t.stride[3] == 1) groups *= rows, rows = 1;
  for (int64_t r = 0; r < rows; r++, from += t.stride[2], out += groups) {
    int64_t g = 0;
    for (; g + lanes <= groups && t.stride[3] == 1; g += lanes) store(out + g, widen(from + g));
    for (; g < groups; g += lanes) {
      alignas(64) T some[lanes] = {};
      for (int64_t i = 0; i < lanes && g + i < groups; i++) some[i] = from[(g + i) * t.stride[3]];
      store(out + g, widen(some));
    }
  }
}

constexpr float e2m1_values[chunk] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

// A word's lowest bits are the number; what is above them is another's, and chooses among copies of the number's value.
template <int bits, Number number, int... I>
FATUI_INLINE Vector table(std::integer_sequence<int, I...>) {
  if constexpr (number == Number::e2m1) return Vector{e2m1_values[I % chunk]...};
  else return Vector{float(I & ((1 << bits) - 1))...};
}

#if defined(FATUI_SHUFFLES)
// For each of lanes numbers: the two bytes that have it, and how far it is from their lowest bit.
struct Places {
  alignas(64) uint8_t bytes[4 * lanes];
  alignas(64) uint32_t shift[lanes];
};
template <int bits>
constexpr Places places(int first) {
  Places all{};
  for (int i = 0; i < lanes; i++) {
    const int bit = (first + i) * bits, last = (bit + bits - 1) / 8;
    all.bytes[4 * i] = uint8_t(bit / 8), all.bytes[4 * i + 1] = last > bit / 8 ? uint8_t(last) : 0x80;
    all.bytes[4 * i + 2] = all.bytes[4 * i + 3] = 0x80;
    all.shift[i] = bit % 8;
  }
  return all;
}

// Numbers [first, first + lanes) of 16 in the lowest bits of words.
template <int bits, int first>
FATUI_INLINE Words shifted(const uint8_t* p) {
  static constexpr Places at = places<bits>(first);
#if defined(__AVX512BW__)
#if defined(__AVX512VBMI__)
  if constexpr (bits <= 4) {  // one byte of eight bits from any bit of a quadword; the other bytes are not used
    const auto numbers = int64_t(low_bytes<std::min(8, 2 * bits)>(p));
    static constexpr Places from = [] {
      Places all{};
      for (int i = 0; i < lanes; i++) all.bytes[4 * i] = uint8_t(bits * i);
      return all;
    }();
    return (Words)_mm512_multishift_epi64_epi8(_mm512_load_si512(from.bytes), _mm512_set1_epi64(numbers));
  }
#endif
  const __m512i spread = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(packed<bits>(p)), _mm512_load_si512(at.bytes));
  return (Words)(bits == 8 ? spread : _mm512_srlv_epi32(spread, _mm512_load_si512(at.shift)));
#else
  const __m256i spread =
      _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(packed<bits>(p)), _mm256_load_si256((const __m256i*)at.bytes));
  return (Words)(bits == 8 ? spread : _mm256_srlv_epi32(spread, _mm256_load_si256((const __m256i*)at.shift)));
#endif
}

FATUI_INLINE Vector look_up(Vector values, Words x) {
#if defined(__AVX512BW__)
  return (Vector)_mm512_permutexvar_ps((__m512i)x, (__m512)values);
#else
  return (Vector)_mm256_permutevar8x32_ps((__m256)values, (__m256i)x);
#endif
}
constexpr int looked_up = lanes == 16 ? 4 : 3;  // bits of an index of a register

template <int bits, int first>
FATUI_INLINE Words integers(const uint8_t* p) {
  const Words x = shifted<bits, first>(p);
  return bits == 8 ? x : x & ((1u << bits) - 1);
}
#else
constexpr int looked_up = 0;

template <int bits, int first>
FATUI_INLINE Words integers(const uint8_t* p) {
  if constexpr (lanes == 4) {  // of the eight numbers that take `bits` bytes
    const auto four = uint32_t(low_bytes<bits>(p + first / 8 * bits) >> (first % 8 * bits));
    return ((Words{} + four) >> (as<Words>(lane_numbers()) * uint32_t(bits))) & ((1u << bits) - 1);
  }
  Words x;
  FATUI_UNROLL for (int i = 0; i < lanes; i++) {
    const int half = (first + i) / 8;  // eight numbers take `bits` bytes
    x[i] = uint32_t(low_bytes<bits>(p + half * bits) >> (bits * (first + i - 8 * half))) & ((1u << bits) - 1);
  }
  return x;
}
#endif

// The values of numbers [first, first + lanes) of 16, `values` being the table of the group.
template <int bits, Number number, int first>
FATUI_INLINE Vector values_of(const uint8_t* p, Vector scale, Vector bias, [[maybe_unused]] Vector values) {
  if constexpr (number == Number::e4m3_finite) return widen_finite(p + first) * scale;
  else if constexpr (number == Number::e4m3) return widen(reinterpret_cast<const e4m3_t*>(p) + first) * scale;
#if defined(FATUI_SHUFFLES)
  else if constexpr (bits <= looked_up) return look_up(values, shifted<bits, first>(p));
  else if constexpr (number == Number::e2m1) {
    const Words x = shifted<bits, first>(p);
    return as<Vector>(as<Words>(look_up(values, x)) ^ ((x << 28) & 0x80000000u));
  }
#endif
  else if constexpr (number == Number::e2m1) {
    const Words x = integers<bits, first>(p);
#if defined(__aarch64__)
    // As a float32, subnormal ones too, of 2^-126 of the number.
    return as<Vector>(((x & 7u) << 22) | ((x & 8u) << 28)) * 0x1p126f * scale;
#endif
    Vector y;
    for (int i = 0; i < lanes; i++) y[i] = e2m1_values[x[i]];
    return y * scale;
  } else {
    return fused(bias, __builtin_convertvector(integers<bits, first>(p), Vector), scale);
  }
}

// How the values of a group are made of numbers.
struct Group {
  Vector scale, bias, values;
};

template <int bits, Number number>
FATUI_INLINE Group group_of(const float* scale, const float* bias) {
  Group g{broadcast(*scale), number == Number::integer ? broadcast(*bias) : Vector{}, {}};
  g.values = fused(g.bias, table<bits, number>(std::make_integer_sequence<int, lanes>{}), g.scale);
  return g;
}

template <int bits, Number number, int... I>
FATUI_INLINE void chunk_of(const uint8_t* p, const Group& g, Vector (&x)[vectors], std::integer_sequence<int, I...>) {
  ((x[I] = values_of<bits, number, I * lanes>(p, g.scale, g.bias, g.values)), ...);
}
template <int bits, Number number>
FATUI_INLINE void chunk_of(const uint8_t* p, const Group& g, Vector (&x)[vectors]) {
  chunk_of<bits, number>(p, g, x, std::make_integer_sequence<int, vectors>{});
}

template <int bits, Number number>
struct Expand {
  static void run(const Packed& from, float* out, int64_t line) {
    for (int64_t r = 0; r < from.rows; r++) {
      const uint8_t* p = from.data + r * from.stride;
      float* to = out + r * line;
      for (int64_t b = 0; b < from.groups * from.group * bits / 8; b += 64) __builtin_prefetch(p + from.rows * from.stride + b);
      for (int64_t g = r * from.groups; g < (r + 1) * from.groups; g++) {
        const Group group = group_of<bits, number>(from.scales + g, from.biases + g);
        for (int64_t i = 0; i < from.group; i += chunk, p += 2 * bits, to += chunk) {
          Vector x[vectors];
          chunk_of<bits, number>(p, group, x);
          FATUI_UNROLL for (int v = 0; v < vectors; v++) store(to + v * lanes, x[v]);
        }
      }
    }
  }
};

// Scores of R rows with some keys at once, dequantized in registers.
template <int R, int bits, Number number>
struct Score {
  static constexpr int together = sums / R;

  static void run(const Packed& from, const float* query, int64_t query_line, float* s, int64_t line, Ahead* ahead) {
    Ahead next = *ahead;
    for (int64_t j = 0; j < from.rows; j += together) {
      Vector x[sums / lanes][lanes] = {};
      for (int64_t group = 0; group < from.groups; group++) {
        for (int64_t b = 0; b < together * from.group * bits / 8; b += 64) next.ask<1>();
        const float* q = query + group * from.group;
        FATUI_UNROLL for (int g = 0; g < together; g++) {
          const int64_t key = std::min(j + g, from.rows - 1), at = key * from.groups + group;
          const uint8_t* p = from.data + key * from.stride + group * from.group * bits / 8;
          const Group of_key = group_of<bits, number>(from.scales + at, from.biases + at);
          for (int64_t i = 0; i < from.group; i += chunk, p += 2 * bits) {
            Vector k[vectors];
            chunk_of<bits, number>(p, of_key, k);
            FATUI_UNROLL for (int v = 0; v < vectors; v++) {
              k[v] = in_register(k[v]);
              FATUI_UNROLL for (int r = 0; r < R; r++) {
                Vector& sum = x[(r * together + g) / lanes][(r * together + g) % lanes];
                sum = fused(sum, k[v], load(q + r * query_line + i + v * lanes));
              }
            }
          }
        }
      }
      float sum[sums];
      FATUI_UNROLL for (int i = 0; i < sums / lanes; i++) store(sum + i * lanes, fold(x[i]));
      FATUI_UNROLL for (int r = 0; r < R; r++) std::memcpy(s + r * line + j, sum + r * together, together * sizeof(float));
    }
    *ahead = next;
  }
};
template <int bits, Number number>
using ScoreFour = Score<rows_together, bits, number>;
template <int bits, Number number>
using ScoreOne = Score<1, bits, number>;

// Some chunks of the output at once, of R rows; at the end of a row the last chunk fills up their number.
template <int R, int bits, Number number>
struct Add {
  static constexpr int chunks = registers == 32 ? 16 / vectors / 4 : 1;  // 16 accumulators of 32 registers, 8 of 16

  template <bool one_group>
  static void run(const Packed& from, const float* p, int64_t p_line, float* output, int64_t output_line, int64_t first,
                  Ahead& ahead) {
    Ahead next = ahead;
    Vector c[R][chunks][vectors];
    const uint8_t* data[chunks];
    float* out[chunks];
    int64_t group[chunks];
    FATUI_UNROLL for (int i = 0; i < chunks; i++) {
      const int64_t at = std::min(first + i, from.groups * from.group / chunk - 1);
      data[i] = from.data + 2 * bits * at, out[i] = output + chunk * at, group[i] = at * chunk / from.group;
      FATUI_UNROLL for (int r = 0; r < R; r++)
        FATUI_UNROLL for (int v = 0; v < vectors; v++) c[r][i][v] = load(out[i] + r * output_line + v * lanes);
    }
    for (int64_t j = 0; j < from.rows; j++) {
      if (j % std::max(1, 32 / bits / chunks) == 0) next.ask<1>();
      Vector weight[R];
      FATUI_UNROLL for (int r = 0; r < R; r++) weight[r] = in_register(broadcast(p[r * p_line + j]));
      Group g;
      FATUI_UNROLL for (int i = 0; i < chunks; i++) {
        const int64_t at = j * from.groups + group[i];
        if (i == 0 || !one_group) g = group_of<bits, number>(from.scales + at, from.biases + at);
        Vector x[vectors];
        chunk_of<bits, number>(data[i] + j * from.stride, g, x);
        FATUI_UNROLL for (int v = 0; v < vectors; v++) {
          x[v] = in_register(x[v]);
          FATUI_UNROLL for (int r = 0; r < R; r++) c[r][i][v] += weight[r] * x[v];
        }
      }
    }
    FATUI_UNROLL for (int i = 0; i < chunks; i++)
      FATUI_UNROLL for (int r = 0; r < R; r++)
        FATUI_UNROLL for (int v = 0; v < vectors; v++) store(out[i] + r * output_line + v * lanes, c[r][i][v]);
    ahead = next;
  }

  static void run(const Packed& from, const float* p, int64_t p_line, float* output, int64_t output_line, Ahead* next) {
    const bool one_group = from.group % (chunks * chunk) == 0;
    for (int64_t first = 0; first < from.groups * from.group / chunk; first += chunks)
      if (one_group) run<true>(from, p, p_line, output, output_line, first, *next);
      else run<false>(from, p, p_line, output, output_line, first, *next);
  }
};

template <int bits, Number number>
using AddFour = Add<rows_together, bits, number>;
template <int bits, Number number>
using AddOne = Add<1, bits, number>;

// Runs the loop for a format.
template <template <int, Number> class Loop, class... Arguments>
void run_for(const Packing& packing, const Packed& from, const Arguments&... more) {
  if (from.finite) return Loop<8, Number::e4m3_finite>::run(from, more...);
  if (packing.mode == Mode::mxfp8) return Loop<8, Number::e4m3>::run(from, more...);
  if (packing.mode != Mode::affine) return Loop<4, Number::e2m1>::run(from, more...);
  switch (packing.bits) {
    case 2: return Loop<2, Number::integer>::run(from, more...);
    case 3: return Loop<3, Number::integer>::run(from, more...);
    case 4: return Loop<4, Number::integer>::run(from, more...);
    case 5: return Loop<5, Number::integer>::run(from, more...);
    case 6: return Loop<6, Number::integer>::run(from, more...);
    default: return Loop<8, Number::integer>::run(from, more...);
  }
}

}  // namespace

void read_groups(const Tensor& t, Mode mode, int64_t at, int64_t rows, int64_t groups, float* out) {
  if (mode == Mode::nvfp4) return read_groups<e4m3_t>(t, at, rows, groups, out);
  if (mode != Mode::affine) return read_groups<e8m0_t>(t, at, rows, groups, out);
  switch (t.element) {
    case Element::float16: return read_groups<float16_t>(t, at, rows, groups, out);
    case Element::bfloat16: return read_groups<bfloat16_t>(t, at, rows, groups, out);
    default: return read_groups<float>(t, at, rows, groups, out);
  }
}

bool can_be_finite(const Packed& from) {
  typedef uint32_t Words32 __attribute__((vector_size(32), aligned(1), may_alias));  // the numbers of a group
  Words32 nan{};
  for (int64_t r = 0; r < from.rows; r++) {
    const uint8_t* p = from.data + r * from.stride;
    for (int64_t d = 0; d < from.groups * from.group; d += 32)
      nan |= ((*reinterpret_cast<const Words32*>(p + d) & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
  }
  Vector top{};
  for (int64_t i = 0; i < from.rows * from.groups; i += lanes) top = larger(load(from.scales + i), top);
  uint32_t any = 0;
  for (int i = 0; i < 8; i++) any |= nan[i];
  return any == 0 && max_of(top) < 0x1p119f;
}

void dequantize(const QuantizedRows& rows, float* out, int64_t line) {
  for (int64_t first = 0; first < rows.rows; first += max_quantized_rows) {
    QuantizedRows some = rows;
    some.row += first, some.rows = std::min(max_quantized_rows, rows.rows - first);
    with_packed(some, [&](const Packed& packed) { run_for<Expand>(rows.packing, packed, out + first * line, line); });
  }
}

void score_quantized(const QuantizedRows& keys, const float* query, int64_t query_line, int64_t count, float* s, int64_t line,
                     Ahead& next) {
  with_packed(keys, [&](const Packed& packed) {
    if (count == 1) return run_for<ScoreOne>(keys.packing, packed, query, query_line, s, line, &next);
    for (int64_t row = 0; row < count; row += rows_together)
      run_for<ScoreFour>(keys.packing, packed, query + row * query_line, query_line, s + row * line, line, &next);
  });
}

void add_quantized(const QuantizedRows& values, const float* p, int64_t p_line, int64_t count, float* output,
                   int64_t output_line, Ahead& next) {
  with_packed(values, [&](const Packed& packed) {
    if (count == 1) return run_for<AddOne>(values.packing, packed, p, p_line, output, output_line, &next);
    for (int64_t row = 0; row < count; row += rows_together)
      run_for<AddFour>(values.packing, packed, p + row * p_line, p_line, output + row * output_line, output_line, &next);
  });
}

}  // namespace fatui
