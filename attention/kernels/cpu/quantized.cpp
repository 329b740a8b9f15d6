// Dequantization of tiles of keys and values, 16 values at a time: the group size of every format is a multiple of that, and 16
// numbers of any size take whole bytes.
//
//   numbers of up to 4 bits   looked up in a table of the group's values, scale and bias included, where a register holds it
//   other integers            bytes, shifts and a mask; scale * number + bias
//   e2m1                      looked up, too
//   e4m3                      the bits of a float16 that is 2^-8 of it; times 2^8, times the scale
#include "quantized.hpp"

#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define FATUI_SHUFFLES 1
#endif

namespace fatui {
namespace {

constexpr int chunk = 16, vectors = chunk / lanes;
constexpr int64_t rows_at_once = 16, most_groups = 512 / chunk;

enum class Number { integer, e2m1, e4m3 };

struct e4m3_t { uint8_t bits; };
struct e8m0_t { uint8_t bits; };  // a power of two

FATUI_INLINE Vector widen(const e4m3_t* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const Halves number = __builtin_convertvector(bytes, Halves);
  const Halves half = ((number & 0x7f) << 7) | ((number & 0x80) << 8);
  const Halves bits = (number & 0x7f) == 0x7f ? Halves{} + uint16_t(0x7e00) : half;  // NaN
  return fatui::widen(reinterpret_cast<const float16_t*>(&bits)) * 0x1p8f;
}
FATUI_INLINE Vector widen(const e8m0_t* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const Words exponent = __builtin_convertvector(bytes, Words);
  return as<Vector>(exponent == 0u ? Words{} + 0x00400000u : exponent << 23);
}
using fatui::widen;

// Scales or biases of some rows, one row after another. Writes whole vectors.
template <class T>
void read_groups(const Tensor& t, int64_t at, int64_t rows, int64_t groups, float* out) {
  const T* from = static_cast<const T*>(t.data) + at;
  if (t.stride[2] == groups && t.stride[3] == 1) groups *= rows, rows = 1;
  for (int64_t r = 0; r < rows; r++, from += t.stride[2], out += groups)
    for (int64_t g = 0; g < groups; g += lanes) {
      alignas(64) T some[lanes] = {};
      const bool whole = g + lanes <= groups && t.stride[3] == 1;
      for (int64_t i = 0; i < lanes && g + i < groups && !whole; i++) some[i] = from[(g + i) * t.stride[3]];
      store(out + g, widen(whole ? from + g : some));
    }
}

void read_groups(const Tensor& t, Mode mode, int64_t at, int64_t rows, int64_t groups, float* out) {
  if (mode == Mode::nvfp4) return read_groups<e4m3_t>(t, at, rows, groups, out);
  if (mode != Mode::affine) return read_groups<e8m0_t>(t, at, rows, groups, out);
  switch (t.element) {
    case Element::float16: return read_groups<float16_t>(t, at, rows, groups, out);
    case Element::bfloat16: return read_groups<bfloat16_t>(t, at, rows, groups, out);
    default: return read_groups<float>(t, at, rows, groups, out);
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
// The 2 * bits bytes of 16 numbers.
template <int bits>
FATUI_INLINE __m128i packed(const uint8_t* p) {
  if constexpr (bits == 8) return _mm_loadu_si128((const __m128i*)p);
  uint64_t low = 0, high = 0;
  std::memcpy(&low, p, std::min(8, 2 * bits));
  if constexpr (bits <= 4) return _mm_cvtsi64_si128(int64_t(low));
  std::memcpy(&high, p + 8, std::max(0, 2 * bits - 8));
  return _mm_set_epi64x(int64_t(high), int64_t(low));
}

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
    uint64_t numbers = 0;
    std::memcpy(&numbers, p, 2 * bits);
    static constexpr Places from = [] {
      Places all{};
      for (int i = 0; i < lanes; i++) all.bytes[4 * i] = uint8_t(bits * i);
      return all;
    }();
    return (Words)_mm512_multishift_epi64_epi8(_mm512_load_si512(from.bytes), _mm512_set1_epi64(int64_t(numbers)));
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
  return shifted<bits, first>(p) & ((1u << bits) - 1);
}
#else
constexpr int looked_up = 0;

template <int bits, int first>
FATUI_INLINE Words integers(const uint8_t* p) {
  Words x;
  FATUI_UNROLL for (int i = 0; i < lanes; i++) {
    const int half = (first + i) / 8;  // eight numbers take `bits` bytes
    uint64_t all = 0;
    std::memcpy(&all, p + half * bits, bits);
    x[i] = uint32_t(all >> (bits * (first + i - 8 * half))) & ((1u << bits) - 1);
  }
  return x;
}
#endif

// The values of numbers [first, first + lanes) of 16, `values` being the table of the group.
template <int bits, Number number, int first>
FATUI_INLINE Vector values_of(const uint8_t* p, Vector scale, Vector bias, [[maybe_unused]] Vector values) {
  if constexpr (number == Number::e4m3) return widen(reinterpret_cast<const e4m3_t*>(p) + first) * scale;
#if defined(FATUI_SHUFFLES)
  else if constexpr (bits <= looked_up) return look_up(values, shifted<bits, first>(p));
  else if constexpr (number == Number::e2m1) {
    const Words x = shifted<bits, first>(p);
    return as<Vector>(as<Words>(look_up(values, x)) ^ ((x << 28) & 0x80000000u));
  }
#endif
  else if constexpr (number == Number::e2m1) {
    const Words x = integers<bits, first>(p);
    Vector y;
    for (int i = 0; i < lanes; i++) y[i] = e2m1_values[x[i]];
    return y * scale;
  } else {
    return fused(bias, __builtin_convertvector(integers<bits, first>(p), Vector), scale);
  }
}

template <int bits, Number number, int first = 0>
FATUI_INLINE void store_chunk(const uint8_t* p, Vector scale, Vector bias, Vector values, float* out) {
  store(out + first, values_of<bits, number, first>(p, scale, bias, values));
  if constexpr (first + lanes < chunk) store_chunk<bits, number, first + lanes>(p, scale, bias, values, out);
}

template <int bits, Number number>
void expand(const uint8_t* p, int64_t groups, int64_t group, const float* scales, const float* biases, float* out) {
  for (int64_t g = 0; g < groups; g++) {
    const Vector scale = broadcast(scales[g]), bias = number == Number::integer ? broadcast(biases[g]) : Vector{};
    const Vector values = fused(bias, table<bits, number>(std::make_integer_sequence<int, lanes>{}), scale);
    for (int64_t i = 0; i < group; i += chunk, p += 2 * bits, out += chunk)
      store_chunk<bits, number>(p, scale, bias, values, out);
  }
}

using Expand = void(const uint8_t*, int64_t, int64_t, const float*, const float*, float*);

Expand* expansion(const Packing& packing) {
  if (packing.mode == Mode::mxfp8) return expand<8, Number::e4m3>;
  if (packing.mode != Mode::affine) return expand<4, Number::e2m1>;
  switch (packing.bits) {
    case 2: return expand<2, Number::integer>;
    case 3: return expand<3, Number::integer>;
    case 4: return expand<4, Number::integer>;
    case 5: return expand<5, Number::integer>;
    case 6: return expand<6, Number::integer>;
    default: return expand<8, Number::integer>;
  }
}
}  // namespace

void dequantize(const Tensor& numbers, const Packing& packing, int64_t batch, int64_t head, int64_t row, int64_t rows,
                int64_t columns, float* out, int64_t line) {
  const auto at = [&](const Tensor& t, int64_t r) { return batch * t.stride[0] + head * t.stride[1] + r * t.stride[2]; };
  const int64_t groups = columns / packing.group, row_bytes = columns * packing.bits / 8, stride = 4 * numbers.stride[2];
  const uint8_t* p = static_cast<const uint8_t*>(numbers.data) + 4 * at(numbers, row);
  Expand* const expand_row = expansion(packing);
  uint32_t words[512 / 4];  // a row whose words are not side by side
  alignas(64) float scales[rows_at_once * most_groups + lanes], biases[rows_at_once * most_groups + lanes];
  for (int64_t first = 0; first < rows; first += rows_at_once) {
    const int64_t some = std::min(rows_at_once, rows - first);
    read_groups(packing.scales, packing.mode, at(packing.scales, row + first), some, groups, scales);
    if (packing.mode == Mode::affine)
      read_groups(packing.biases, packing.mode, at(packing.biases, row + first), some, groups, biases);
    for (int64_t r = 0; r < some; r++, p += stride, out += line) {
      for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(p + rows * stride + b);  // the next tile
      if (numbers.stride[3] != 1)
        for (int64_t w = 0; w < row_bytes / 4; w++) std::memcpy(words + w, p + 4 * w * numbers.stride[3], 4);
      const uint8_t* bytes = numbers.stride[3] == 1 ? p : reinterpret_cast<const uint8_t*>(words);
      expand_row(bytes, groups, packing.group, scales + r * groups, biases + r * groups, out);
    }
  }
}

}  // namespace fatui
