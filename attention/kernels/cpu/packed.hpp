// Rows of packed numbers as the loops read them: bytes, with scales and biases in float32.
#pragma once
#include <algorithm>

#include "quantized.hpp"

#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define FATUI_SHUFFLES 1
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#define FATUI_PAIRS_OF_E4M3 1
#endif

namespace fatui {

constexpr int chunk = 16;  // values: every group has a multiple of them
constexpr int64_t max_groups = 512 / chunk;

// The logarithm of a power of two, as a group's size is.
FATUI_INLINE int log2_of(int64_t x) { return __builtin_ctzll(uint64_t(x)); }

enum class Number { integer, e2m1, e4m3, e4m3_finite };

// Rows of packed numbers, with their scales and biases in float32.
struct Packed {
  const uint8_t* data;
  int64_t stride, rows, groups, group;
  const float *scales, *biases;
  bool finite = false;  // no number of e4m3 is NaN; the scales are then 2^8 times as large
};

// Reads scales or biases from an index on, of some rows, one row after another. Writes whole vectors.
void read_groups(const Tensor& t, Mode mode, int64_t at, int64_t rows, int64_t groups, float* out);

// Whether no number of e4m3 is NaN and no scale overflows if it is multiplied by 2^8.
bool can_be_finite(const Packed& from);

// Rows without scales and biases. Those whose words are not side by side are copied to `words`.
inline Packed numbers_of(const QuantizedRows& q, uint32_t (&words)[max_quantized_rows * 512 / 4]) {
  Packed packed{q.data(), q.stride(), q.rows, q.groups(), q.packing.group, nullptr, nullptr};
  if (q.numbers.stride[3] == 1) return packed;
  const int64_t row_bytes = q.bytes();
  for (int64_t r = 0; r < q.rows; r++)
    for (int64_t w = 0; w < row_bytes / 4; w++)
      std::memcpy(words + r * row_bytes / 4 + w, packed.data + r * packed.stride + 4 * w * q.numbers.stride[3], 4);
  packed.data = reinterpret_cast<const uint8_t*>(words), packed.stride = row_bytes;
  return packed;
}

// Calls f(packed rows), of up to max_quantized_rows rows, without scales and biases.
template <class F>
void with_numbers(const QuantizedRows& q, const F& f) {
  uint32_t words[max_quantized_rows * 512 / 4];
  f(numbers_of(q, words));
}

// The same with scales and biases. Whether numbers of e4m3 are finite is found out.
template <class F>
void with_packed(const QuantizedRows& q, const F& f) {
  const Packing& packing = q.packing;
  uint32_t words[max_quantized_rows * 512 / 4];
  alignas(64) float scales[max_quantized_rows * max_groups + lanes], biases[max_quantized_rows * max_groups + lanes];
  Packed packed = numbers_of(q, words);
  packed.scales = scales, packed.biases = biases;
  read_groups(packing.scales, packing.mode, q.at(packing.scales), q.rows, packed.groups, scales);
  if (packing.mode == Mode::affine)
    read_groups(packing.biases, packing.mode, q.at(packing.biases), q.rows, packed.groups, biases);
  if (packing.mode == Mode::mxfp8 && can_be_finite(packed)) {
    packed.finite = true;
    for (int64_t i = 0; i < q.rows * packed.groups; i += lanes) store(scales + i, load(scales + i) * 0x1p8f);
  }
  f(packed);
}

// Some bytes, up to eight, as the lowest ones of a word; in pieces that are loads, as a copy through memory would stall.
template <int bytes>
FATUI_INLINE uint64_t low_bytes(const uint8_t* p) {
  uint64_t eight = 0;
  uint32_t four = 0;
  uint16_t two = 0;
  uint8_t one = 0;
  if constexpr (bytes == 8) std::memcpy(&eight, p, 8);
  if constexpr (bytes & 4) std::memcpy(&four, p, 4);
  if constexpr (bytes & 2) std::memcpy(&two, p + (bytes & 4), 2);
  if constexpr (bytes & 1) std::memcpy(&one, p + (bytes & 6), 1);
  return eight | four | uint64_t(two) << 8 * (bytes & 4) | uint64_t(one) << 8 * (bytes & 6);
}

#if defined(FATUI_SHUFFLES)
// The 2 * bits bytes of 16 numbers.
template <int bits>
FATUI_INLINE __m128i packed(const uint8_t* p) {
  if constexpr (bits == 8) return _mm_loadu_si128((const __m128i*)p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return _mm_maskz_loadu_epi8(__mmask16((1u << 2 * bits) - 1), p);
#else
  const auto low = int64_t(low_bytes<std::min(8, 2 * bits)>(p));
  if constexpr (bits <= 4) return _mm_cvtsi64_si128(low);
  return _mm_set_epi64x(int64_t(low_bytes<std::clamp(2 * bits - 8, 0, 8)>(p + 8)), low);
#endif
}
#endif

}  // namespace fatui
