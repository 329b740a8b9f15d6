// Products of the decode kernel: few query rows times rows of keys and values, which are read once, in place.
//
//   scores   some keys times some rows of Q at once: `sums` vectors of products, folded into one of sums  S[row][key]
//   output   O[row][d] += P[row][key] V[key][d]
#pragma once
#include "pairs.hpp"
#include "product.hpp"

namespace fatui {

constexpr int sums = registers == 32 ? 16 : 8;  // accumulators
constexpr int64_t score_line = 64;              // floats per row of scores

// The steps of `fold`, four lanes being a group: lanes two apart within each group are added, which leaves sums of a
// and of b in turns; then again, which leaves those of a before those of b; then neighbouring groups, those of a first.
enum class Step { alternating, in_order, groups };

template <Step step, bool second>
constexpr int addend(int i) {  // index of the first or second lane summed into lane i, in the concatenation of a and b
  const int group = i / 4 * 4, k = i % 4, half = lanes / 2;
  if (step == Step::alternating) return group + k / 2 + (second ? 2 : 0) + k % 2 * lanes;
  if (step == Step::in_order) return group + k % 2 + (second ? 2 : 0) + k / 2 * lanes;
  return i % half / 4 * 8 + (second ? 4 : 0) + k + i / half * lanes;
}

struct Plus {
  FATUI_INLINE Vector operator()(Vector a, Vector b) const { return a + b; }
};
struct Larger {
  FATUI_INLINE Vector operator()(Vector a, Vector b) const { return larger(a, b); }
};

template <Step step, class Both, int... I>
FATUI_INLINE Vector join_lanes(Vector a, Vector b, Both both, std::integer_sequence<int, I...>) {
  return both(__builtin_shufflevector(a, b, addend<step, false>(I)...), __builtin_shufflevector(a, b, addend<step, true>(I)...));
}

// Lane i of the result is the sum of x[i]'s lanes, or their maximum; of four vectors, of a quarter of these: lanes 4 g + i together.
template <int N = lanes, class Both = Plus>
FATUI_INLINE Vector fold(const Vector* x, Both both = {}) {
  constexpr auto all = std::make_integer_sequence<int, lanes>{};
  if constexpr (N == 4) {
    const Vector a = join_lanes<Step::alternating>(x[0], x[1], both, all);
    const Vector b = join_lanes<Step::alternating>(x[2], x[3], both, all);
    return join_lanes<Step::in_order>(a, b, both, all);
  } else {
    return join_lanes<Step::groups>(fold<N / 2>(x, both), fold<N / 2>(x + N / 2, both), both, all);
  }
}

// Lane i of the first four is the sum, or the maximum, of x[i]'s lanes, for four vectors.
template <class Both = Plus>
FATUI_INLINE Vector fold_four(const Vector* x, Both both = {}) {
  constexpr auto all = std::make_integer_sequence<int, lanes>{};
  Vector y = fold<4>(x, both);
  if constexpr (lanes >= 16) y = both(y, rotated<8>(y, all));
  if constexpr (lanes >= 8) y = both(y, rotated<4>(y, all));
  return y;
}

// Cache lines of a number of vectors of a type.
template <class E>
constexpr int pieces(int vectors) { return std::max<int>(1, vectors * lanes * int(sizeof(E)) / 64); }

// Steps of a number of vectors in which a cache line is used. Asking for a line in each of them would keep all of the core's
// requests busy in the first half of a tile, and none in the second.
template <class E>
constexpr int steps_of_line(int vectors) { return std::max<int>(1, 64 / (vectors * lanes * int(sizeof(E)))); }

// Whether elements are read as words of an even and an odd dim, which a shift and a mask widen: two instructions for two vectors of
// bfloat16, where widening them in order takes four. Queries and outputs are then in blocks of 2 * lanes dims, even ones first.
template <class E>
constexpr bool even_and_odd = registers == 16 && std::is_same_v<E, bfloat16_t>;

// Whether the next rows of K and of V are prefetched together.
constexpr bool two_streams = registers == 16;

// Called in each step of a number of vectors: prefetches as many lines as are used, two at a time if there may be two streams. `level`
// is the cache they are prefetched into.
template <class E, int R, int vectors, int level>
FATUI_INLINE void ask_for_step(Ahead& next, int64_t step) {
  if constexpr (two_streams && R == 4) {
    if (step % (2 * steps_of_line<E>(vectors)) == 0) next.ask_two<level>();
  } else if (step % steps_of_line<E>(vectors) == 0) next.ask<pieces<E>(vectors), level>();
}

template <int odd>
FATUI_INLINE Vector widen_half(const bfloat16_t* p) {
  const Words words = as<Words>(load(reinterpret_cast<const float*>(p)));
  return as<Vector>(odd ? words & 0xffff0000u : words << 16);
}

// Vector i of the dims from `line` on.
template <class E>
FATUI_INLINE Vector dims_of(const E* line, int i) {
  if constexpr (even_and_odd<E>) return i % 2 == 0 ? widen_half<0>(line + i * lanes) : widen_half<1>(line + (i - 1) * lanes);
  else return widen(line + i * lanes);
}

// S[row][key] of R query rows; entries after the last key, up to a multiple of the accumulators, are undefined.
template <int R, Numbers numbers, int level, class E>
void score_lines(const float* query, int64_t query_line, const Lines<E>& keys, float* s, Ahead& ahead) {
  Ahead next = ahead;
  constexpr int together = sums / R;
  for (int64_t j = 0; j < keys.count; j += together) {
    Vector x[sums / lanes][lanes] = {};
    const E* line[together];
    FATUI_UNROLL for (int g = 0; g < together; g++) line[g] = keys.line(std::min(j + g, keys.count - 1));
    const auto add = [&](int64_t d, const auto& key_of) __attribute__((always_inline)) {
      Vector q[R];
      FATUI_UNROLL for (int r = 0; r < R; r++) q[r] = in_register(load(query + r * query_line + d));
      FATUI_UNROLL for (int g = 0; g < together; g++) {
        const Vector k = in_register(key_of(line[g]));
        FATUI_UNROLL for (int r = 0; r < R; r++) {
          Vector& sum = x[(r * together + g) / lanes][(r * together + g) % lanes];
          sum = multiply_add<numbers>(sum, k, q[r]);
        }
      }
    };
    constexpr int step = even_and_odd<E> ? 2 : 1;  // vectors
    const auto add_step = [&](int64_t d) __attribute__((always_inline)) {
      if constexpr (even_and_odd<E>) {
        add(d, [&](const E* key) { return widen_half<0>(key + d); });
        add(d + lanes, [&](const E* key) { return widen_half<1>(key + d); });
      } else add(d, [&](const E* key) { return widen(key + d); });
    };
    int64_t d = 0;
    if constexpr (even_and_odd<E> && R == 4) {  // a cache line of each of two keys together, for which two are prefetched
      constexpr int64_t line_dims = 64 / sizeof(E);
      for (; d + line_dims <= keys.length; d += line_dims) {
        next.ask_two<level>();
        FATUI_UNROLL for (int64_t i = 0; i < line_dims; i += step * lanes) add_step(d + i);
      }
    }
    for (; d < keys.length; d += step * lanes) {
      ask_for_step<E, R, step * together, level>(next, d / (step * lanes));
      add_step(d);
    }
    float sum[sums];
    FATUI_UNROLL for (int i = 0; i < sums / lanes; i++) store(sum + i * lanes, fold(x[i]));
    FATUI_UNROLL for (int r = 0; r < R; r++)
      std::memcpy(s + r * score_line + j, sum + r * together, together * sizeof(float));
  }
  ahead = next;
}

// O[row][d] of R rows and some vectors of dims.
template <int R, int Vectors, int level, class E>
void add_lines(const float* s, const Lines<E>& values, int64_t d, float* output, int64_t output_line, Ahead& ahead) {
  Ahead next = ahead;
  Vector c[R][Vectors];
  FATUI_UNROLL for (int r = 0; r < R; r++)
    FATUI_UNROLL for (int v = 0; v < Vectors; v++) c[r][v] = load(output + r * output_line + d + v * lanes);
  // A line that is used once is not kept: eight of them and as many sums are too many for 16 registers.
  constexpr bool used_once = R == 1 && registers == 16;
  constexpr bool in_pairs = two_streams && R == 4;
  const int64_t stride = values.stride, count = values.count;
  const E* line = values.data + d;
  const auto add = [&](int64_t j) __attribute__((always_inline)) {
    Vector x[Vectors];
    const Vector p_used_once = broadcast(s[j]);
    FATUI_UNROLL for (int v = 0; v < Vectors; v++) {
      x[v] = in_register(dims_of(line, v));
      if constexpr (used_once) c[0][v] += p_used_once * x[v];
      if constexpr (!in_pairs)
        if (v % (Vectors / std::min(Vectors, pieces<E>(Vectors))) == 0 && j % steps_of_line<E>(Vectors) == 0) next.ask<1, level>();
    }
    if constexpr (!used_once)
      FATUI_UNROLL for (int r = 0; r < R; r++) {
        const Vector p = broadcast(s[r * score_line + j]);
        FATUI_UNROLL for (int v = 0; v < Vectors; v++) c[r][v] += p * x[v];
      }
    line += stride;
  };
  int64_t j = 0;
  if constexpr (in_pairs && sizeof(E) == 2) {  // two cache lines together, for which two are prefetched
    constexpr int64_t keys = 2 * steps_of_line<E>(Vectors);
    for (; j + keys <= count; j += keys) {
      next.ask_two<level>();
      FATUI_UNROLL for (int64_t i = 0; i < keys; i++) add(j + i);
    }
  }
  for (; j < count; j++) {
    if constexpr (in_pairs) ask_for_step<E, R, Vectors, level>(next, j);
    add(j);
  }
  FATUI_UNROLL for (int r = 0; r < R; r++)
    FATUI_UNROLL for (int v = 0; v < Vectors; v++) store(output + r * output_line + d + v * lanes, c[r][v]);
  ahead = next;
}

// One row of queries: keys and values are read one after the other, as by a plain loop, for which the CPU's own
// prefetchers are enough. The fewer instructions there are beside the reading, the further ahead the CPU reads. Not with 32 short
// registers, where nobody has measured it.
constexpr bool by_key = registers == 16 || lanes == 16;

// S[key] of one row; entries after the last key, up to a multiple of lanes, are undefined. `width`: dims if they are known when this is
// compiled, so that the query stays in registers, or 0.
template <int width, class E>
void score_by_key(const float* query, const Lines<E>& keys, float* s) {
  constexpr int most = width > 0 ? width / lanes : 8, least = even_and_odd<E> ? 2 : 1;  // vectors at once
  Vector q[most];
  if constexpr (width > 0) FATUI_UNROLL for (int i = 0; i < most; i++) q[i] = load(query + i * lanes);
  const auto product = [&](const E* line) __attribute__((always_inline)) {
    Vector x{};
    if constexpr (width > 0) {
      x = dims_of(line, 0) * q[0];
      FATUI_UNROLL for (int i = 1; i < most; i++) x = fused(x, dims_of(line, i), q[i]);
      return x;
    }
    int64_t d = 0;
    for (; d + most * lanes <= keys.length; d += most * lanes)
      FATUI_UNROLL for (int i = 0; i < most; i++) x = fused(x, dims_of(line + d, i), load(query + d + i * lanes));
    for (; d < keys.length; d += least * lanes)
      FATUI_UNROLL for (int i = 0; i < least; i++) x = fused(x, dims_of(line + d, i), load(query + d + i * lanes));
    return x;
  };
  const E* line = keys.data;
  int64_t j = 0;
  for (; j + lanes <= keys.count; j += lanes) {
    Vector x[lanes];
    FATUI_UNROLL for (int g = 0; g < lanes; g++) {
      x[g] = product(line);
      line += keys.stride;
      in_order(x[g], line);
    }
    store(s + j, fold(x));
  }
  if (j == keys.count) return;
  Vector x[lanes];
  for (int g = 0; g < lanes; g++) x[g] = product(keys.line(std::min(j + g, keys.count - 1)));
  store(s + j, fold(x));
}

// O[d] += P[key] V[key][d] of one row and some vectors of dims.
template <int Vectors, class E>
void add_by_key(const float* weights, const Lines<E>& values, int64_t d, float* output) {
  Vector c[Vectors];
  FATUI_UNROLL for (int v = 0; v < Vectors; v++) c[v] = load(output + d + v * lanes);
  const E* line = values.data + d;
  for (int64_t j = 0; j < values.count; j++, line += values.stride) {
    const Vector weight = broadcast(weights[j]);
    FATUI_UNROLL for (int v = 0; v < Vectors; v++) c[v] = fused(c[v], weight, dims_of(line, v));
  }
  FATUI_UNROLL for (int v = 0; v < Vectors; v++) store(output + d + v * lanes, c[v]);
}

#if defined(__AVX512BF16__)
// O[row][d] with bfloat16 pairs: P and V as pairs of adjacent keys. A vector of words of V holds even and odd dims, and so
// does O here: in each block of 2 * lanes dims, the even ones come first.
template <int R, int Vectors, int level>
void add_pairs(const float* pairs, const Lines<float>& values, int64_t d, float* output, int64_t output_line,
               Ahead& ahead) {
  Ahead next = ahead;
  constexpr int dims = 2 * Vectors;
  Vector c[R][dims];
  float* out = output + 2 * d;
  FATUI_UNROLL for (int r = 0; r < R; r++)
    FATUI_UNROLL for (int v = 0; v < dims; v++) c[r][v] = load(out + r * output_line + v * lanes);
  for (int64_t j = 0; j < values.count; j += 2) {
    Vector x[dims];
    next.ask<dims, level>();
    FATUI_UNROLL for (int v = 0; v < Vectors; v++) {
      const int64_t at = d + v * lanes;
      const Words a = as<Words>(load(values.line(j) + at));
      const Words b = j + 1 < values.count ? as<Words>(load(values.line(j + 1) + at)) : Words{};
      x[2 * v] = as<Vector>((a & 0xffffu) | (b << 16)), x[2 * v + 1] = as<Vector>((a >> 16) | (b & 0xffff0000u));
    }
    FATUI_UNROLL for (int r = 0; r < R; r++) {
      const Vector p = spread<Numbers::pairs>(pairs + r * (score_line / 2) + j / 2);
      FATUI_UNROLL for (int v = 0; v < dims; v++) c[r][v] = multiply_add<Numbers::pairs>(c[r][v], p, x[v]);
    }
  }
  FATUI_UNROLL for (int r = 0; r < R; r++)
    FATUI_UNROLL for (int v = 0; v < dims; v++) store(out + r * output_line + v * lanes, c[r][v]);
  ahead = next;
}
#endif

}  // namespace fatui
