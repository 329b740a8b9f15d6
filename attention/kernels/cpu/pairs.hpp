// Bfloat16 tiles as pairs: two adjacent elements along the depth in one 32-bit word, the operand of dot-product instructions.
//
//   queries  QP[d / 2][query]  transposed as 32-bit words      values  VT[d][key / 2]      transposed once for all panels
//   keys     K[key][d / 2]     in place                        P       PP[key / 2][query]  written by the softmax
#pragma once
#include "matrix_tiles.hpp"
#include "softmax.hpp"

#if defined(__AVX512BF16__)
namespace fatui {

constexpr int64_t pair_keys = key_tile;  // keys per tile: enough to amortise loading and storing the output

// Some keys of a tile begin at a multiple of this, and those of a product along the keys are padded to one.
#if defined(FATUI_MATRIX_TILES)
constexpr int64_t pair_step = 32;
#else
constexpr int64_t pair_step = 2;
#endif

// Whether rows can be read in place as whole vectors of words.
inline bool whole_words(const Tensor& t, int64_t columns) {
  return t.stride[3] == 1 && t.stride[2] % 2 == 0 && columns % (2 * lanes) == 0;
}

FATUI_INLINE const float* words(const bfloat16_t* p) { return reinterpret_cast<const float*>(p); }

// Copies a row, zero-padded to `padded` (even) elements.
inline void copy_row(const bfloat16_t* from, int64_t stride, int64_t count, bfloat16_t* to, int64_t padded) {
  if (stride == 1) std::memcpy(to, from, size_t(count) * 2);
  else for (int64_t i = 0; i < count; i++) to[i] = from[i * stride];
  std::memset(to + count, 0, size_t(padded - count) * 2);
}

// Transposes query rows in words. `buffer` is scratch for one tile of padded rows.
inline void turn_pairs(const Rows<bfloat16_t>& rows, int64_t columns, int64_t padded, int64_t width, float* out,
                       bfloat16_t* buffer) {
  Rows<float> wide;
  wide.count = rows.count, wide.stride = 1;
  const bool in_place = rows.stride == 1 && columns == padded;
  for (int64_t r = 0; r < rows.count; r++) {
    if (!in_place) copy_row(rows.row[r], rows.stride, columns, buffer + r * padded, padded);
    wide.row[r] = words(in_place ? rows.row[r] : buffer + r * padded);
  }
  transpose_rows(wide, padded / 2, width, out);
}

// Rows of keys: in place if whole tiles can be read there, else a padded copy.
inline Floats key_pairs(const Tensor& t, int64_t batch, int64_t head, int64_t key, int64_t keys, int64_t columns,
                        int64_t padded, bfloat16_t* buffer) {
  const bfloat16_t* data = row_of<const bfloat16_t>(t, batch, head, key);
  if (whole_words(t, columns) && columns == padded && keys % 16 == 0)
    return {words(data), t.stride[2] / 2};
  const int64_t whole = round_up(keys, 16);
  for (int64_t j = 0; j < keys; j++) copy_row(data + j * t.stride[2], t.stride[3], columns, buffer + j * padded, padded);
  std::memset(buffer + keys * padded, 0, size_t((whole - keys) * padded) * 2);
  return {words(buffer), padded / 2};
}

FATUI_INLINE Vector interleaved(Vector even, Vector odd) {  // two vectors of 16-bit numbers, in the lower halves
  return as<Vector>(as<Words>(even) | (as<Words>(odd) << 16));
}

FATUI_INLINE Vector bits_of(const void* p) {
  return as<Vector>(__builtin_convertvector(*static_cast<const HalvesAnywhere*>(p), Words));
}

// The first `count` numbers, or as many as there are lanes; the rest are zero.
[[gnu::noinline]] inline Vector bits_of(const bfloat16_t* p, int64_t stride, int64_t count) {
  alignas(64) uint16_t whole[lanes] = {};
  for (int64_t i = 0; i < std::min<int64_t>(count, lanes); i++) whole[i] = p[i * stride].bits;
  return bits_of(whole);
}

// Transposes keys or values: VT[d][key / 2], with a row stride in words; zeros for missing keys and dims.
inline void turn_rows(const Tensor& t, int64_t batch, int64_t head, int64_t key, int64_t keys, int64_t dims,
                        int64_t padded_keys, float* out, int64_t line) {
  const bfloat16_t* data = row_of<const bfloat16_t>(t, batch, head, key);
  const int64_t line_of_data = t.stride[2];
  const auto row = [&](int64_t j, int64_t d) {
    return j < keys ? bits_of(data + j * line_of_data + d * t.stride[3], t.stride[3], dims - d) : Vector{};
  };
  for (int64_t j = 0; j < padded_keys; j += 2 * lanes)
    for (int64_t d = 0; d < dims; d += lanes) {
      Vector x[lanes];
      if (t.stride[3] == 1 && d + lanes <= dims && j + 2 * lanes <= keys) {
        const bfloat16_t* from = data + j * line_of_data + d;
        FATUI_UNROLL for (int i = 0; i < lanes; i++, from += 2 * line_of_data)
          x[i] = interleaved(bits_of(from), bits_of(from + line_of_data));
      } else {
        Vector some[lanes];
        FATUI_ROLLED for (int i = 0; i < lanes; i++) some[i] = interleaved(row(j + 2 * i, d), row(j + 2 * i + 1, d));
        FATUI_UNROLL for (int i = 0; i < lanes; i++) x[i] = some[i];
      }
      transpose(x);
      FATUI_UNROLL for (int i = 0; i < lanes; i++) store(out + (d + i) * line + j / 2, x[i]);
    }
}

// Packs rows in pairs: out[row / 2][column], with a row stride in words; zeros for a missing row and missing columns.
inline void pair_rows(const Rows<bfloat16_t>& rows, int64_t columns, float* out, int64_t line) {
  const auto row = [&](int64_t r, int64_t c) {
    if (r >= rows.count) return Vector{};
    if (rows.stride == 1 && c + lanes <= columns) return bits_of(rows.row[r] + c);
    return bits_of(rows.row[r] + c * rows.stride, rows.stride, columns - c);
  };
  for (int64_t r = 0; r < query_tile; r += 2)
    for (int64_t c = 0; c < columns; c += lanes) store(out + r / 2 * line + c, interleaved(row(r, c), row(r + 1, c)));
}

// 2^x with a relative error of 1e-4, a tenth of the rounding error of bfloat16: a polynomial of x - floor(x) (minimax on
// [0, 1), exact at 0), with the floor added to the exponent. 2^-inf = 0.
FATUI_INLINE Vector exp2_short(Vector x) {
  const Vector f = (Vector)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vector p = f * 7.706724107e-02f + 2.276449800e-01f;
  p = p * f + 6.951166391e-01f;
  p = p * f + 1.0f;
  return (Vector)_mm512_scalef_ps((__m512)p, (__m512)x);
}

FATUI_INLINE void narrow_short(bfloat16_t* p, Vector x) {  // as `narrow`, but numbers below 2^-126 become 0
  const __m256bh bits = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(p, &bits, sizeof bits);
}

FATUI_INLINE Vector rounded_pair(Vector even, Vector odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (Vector)_mm512_permutexvar_epi16(order, (__m512i)both);
}

// Updates the reference of the exponents only if some row's maximum exceeds it by a factor of 2^8: until then the output is
// not rescaled, and a probability of up to 256 has the same relative rounding error. Returns whether it was updated.
template <int N>
FATUI_INLINE bool move_reference(const Vector (&top)[N], Softmax& state, int64_t column) {
  bool moved = false;
  FATUI_UNROLL for (int v = 0; v < N; v++) {
    const Integers outgrown = top[v] > load(state.maximum + column + v * lanes) + max_outgrown;
    moved |= _mm512_test_epi32_mask((__m512i)outgrown, (__m512i)outgrown) != 0;
  }
  FATUI_UNROLL for (int v = 0; v < N; v++) {
    float* maximum = state.maximum + column + v * lanes;
    if (moved) store(maximum, larger(top[v], load(maximum)));
  }
  return moved;
}

// Exponents of probabilities, exp2(s * factor - offset), in one FMA, in which m log2(e) is rounded and s log2(e) is not:
// near 1e10 they differ by up to 500. If m is large, it is therefore subtracted first.
template <int N>
struct Exponents {
  float factor;
  Vector offset[N];
};

constexpr float largest_offset = 0x1p10f;  // both ways agree to 1e-4 here, below bfloat16's precision
inline bool beyond_offset(float m) { return std::abs(m) > largest_offset && std::abs(m) < infinity; }

// Subtracts m first, in place: s becomes (s * factor - m) log2(e).
template <int N>
void subtract(float* s, int64_t keys, float factor, const Vector (&m)[N]) {
  for (int64_t j = 0; j < keys; j++, s += query_tile)
    for (int v = 0; v < N; v++)
      store(s + v * lanes, (in_register(load(s + v * lanes) * factor) - m[v]) * log2_e);
}

// The exponents of N vectors of queries; the correction follows from the m before.
template <int N>
FATUI_INLINE Exponents<N> exponents(float* s, int64_t keys, float factor, Vector (&m)[N], const Vector (&before)[N],
                                    float* correction) {
  Exponents<N> e;
  Vector size{};
  FATUI_UNROLL for (int v = 0; v < N; v++) {
    m[v] = or_zero(m[v]);
    size = larger(magnitude(m[v]), size);
  }
  const bool first = max_of(size) > largest_offset;
  if (first) subtract(s, keys, factor, m);
  e.factor = first ? 1.0f : factor * log2_e;
  FATUI_UNROLL for (int v = 0; v < N; v++) {
    const Vector offset = in_register(m[v] * log2_e);
    e.offset[v] = first ? Vector{} : offset;
    store(correction + v * lanes,
          exp2(first ? (before[v] - m[v]) * log2_e : in_register(before[v] * log2_e) - offset));
  }
  return e;
}

// Converts scores S[key][query], times the factor, to pairs of probabilities PP[key / 2][query], zero up to padded_keys.
template <int N>
FATUI_INLINE bool softmax_pairs(float* s, int64_t keys, int64_t padded_keys, float factor, Softmax& state,
                                int64_t column, float* pairs) {
  Vector top[N], before[N], sum[N];
  s += column, pairs += column;
  largest_scores(s, keys, top);
  FATUI_UNROLL for (int v = 0; v < N; v++)
    top[v] = in_register(top[v] * factor), before[v] = load(state.maximum + column + v * lanes);
  const bool moved = move_reference(top, state, column);
  FATUI_UNROLL for (int v = 0; v < N; v++) top[v] = load(state.maximum + column + v * lanes);
  const Exponents<N> e = exponents(s, keys, factor, top, before, state.correction + column);
  FATUI_UNROLL for (int v = 0; v < N; v++)
    sum[v] = load(state.sum + column + v * lanes) * load(state.correction + column + v * lanes);
  int64_t j = 0;
  for (; j < keys; j += 2, pairs += query_tile)
    FATUI_UNROLL for (int v = 0; v < N; v++) {
      const float* p = s + j * query_tile + v * lanes;
      const Vector even = exp2_short(load(p) * e.factor - e.offset[v]);
      const Vector odd = j + 1 < keys ? exp2_short(load(p + query_tile) * e.factor - e.offset[v]) : Vector{};
      sum[v] += even + odd;
      store(pairs + v * lanes, rounded_pair(even, odd));
    }
  for (; j < padded_keys; j += 2, pairs += query_tile)
    FATUI_UNROLL for (int v = 0; v < N; v++) store(pairs + v * lanes, Vector{});
  FATUI_UNROLL for (int v = 0; v < N; v++) store(state.sum + column + v * lanes, sum[v]);
  return moved;
}

}  // namespace fatui
#endif
