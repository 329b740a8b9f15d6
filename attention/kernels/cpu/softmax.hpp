// The online softmax, one lane a query: no sum or maximum ever crosses lanes.
//
// Milakov and Gimelshein, 2018. After each tile of keys, with m the largest score so far:
//   p = e^(s - m)     l = l * correction + sum of p     o = o * correction + p v     correction = e^(m before - m)
//
// e^(s - m) is made as 2^(s log2(e) - m log2(e)), in one multiply-add, in which m log2(e) is rounded and s log2(e) is not:
// near 1e10 they lie apart by up to 500. So where m is large it is subtracted first.
#pragma once
#include "scores.hpp"

namespace fatui {

constexpr float most_outgrown = 5.5f;  // where m is not moved at once: e^5.5 is about 2^8

struct Softmax {
  alignas(64) float maximum[query_tile], sum[query_tile];
  union {
    alignas(64) float correction[query_tile];  // of the step before: what O is multiplied by
    alignas(64) float offset[query_tile];      // where few rows correct O themselves: of the exponents; infinite: subtract
  };

  void reset() {
    std::fill_n(maximum, query_tile, -infinity);
    std::fill_n(sum, query_tile, 0.0f);
  }
};

constexpr float largest_offset = 0x1p10f;  // beyond this m is subtracted first; both ways agree to 1e-4 here
inline bool beyond_offset(float m) { return std::abs(m) > largest_offset && std::abs(m) < infinity; }

// What probabilities are made with: exp2(s * factor - offset).
template <int N>
struct Exponents {
  float factor;
  Vector offset[N];
};

// In place, m subtracted first: s becomes (s * factor - m) log2(e).
template <int N>
void subtract(float* s, int64_t keys, float factor, const Vector (&m)[N]) {
  for (int64_t j = 0; j < keys; j++, s += query_tile)
    for (int v = 0; v < N; v++)
      store(s + v * lanes, (in_register(load(s + v * lanes) * factor) - m[v]) * log2_e);
}

// The exponents of N vectors of queries, whose m may be -inf where nothing has been seen: any number will do for those.
// The correction follows from the m before.
template <int N>
FATUI_INLINE Exponents<N> exponents(float* s, int64_t keys, float factor, Vector (&m)[N], const Vector (&before)[N],
                                    float* correction) {
  Exponents<N> e;
  Vector size{};
  FATUI_UNROLL for (int v = 0; v < N; v++) {
    m[v] = m[v] > broadcast(-infinity) ? m[v] : Vector{};
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

template <int N>
FATUI_INLINE void largest_scores(const float* s, int64_t keys, Vector (&top)[N]) {
  Vector even[N], odd[N];
  FATUI_UNROLL for (int v = 0; v < N; v++) even[v] = odd[v] = load(s + v * lanes);
  int64_t j = 1;
  for (; j + 1 < keys; j += 2)
    FATUI_UNROLL for (int v = 0; v < N; v++) {
      even[v] = larger(load(s + j * query_tile + v * lanes), even[v]);
      odd[v] = larger(load(s + (j + 1) * query_tile + v * lanes), odd[v]);
    }
  if (j < keys)
    FATUI_UNROLL for (int v = 0; v < N; v++) even[v] = larger(load(s + j * query_tile + v * lanes), even[v]);
  FATUI_UNROLL for (int v = 0; v < N; v++) top[v] = larger(even[v], odd[v]);
}

// One panel of N vectors of queries: scores become probabilities (not yet divided by their sum), in place.
template <int N>
FATUI_INLINE void softmax_panel(float* s, int64_t keys, Softmax& state, int64_t column) {
  Vector top[N], before[N], sum[N];
  s += column;
  largest_scores(s, keys, top);
  FATUI_UNROLL for (int v = 0; v < N; v++) {
    float* maximum = state.maximum + column + v * lanes;
    before[v] = load(maximum), top[v] = larger(top[v], before[v]), sum[v] = Vector{};
    store(maximum, top[v]);
  }
  const Exponents<N> e = exponents(s, keys, 1.0f, top, before, state.correction + column);
  for (int64_t j = 0; j < keys; j++)
    FATUI_UNROLL for (int v = 0; v < N; v++) {
      float* p = s + j * query_tile + v * lanes;
      const Vector probability = exp2(load(p) * e.factor - e.offset[v]);
      store(p, probability);
      sum[v] += probability;
    }
  FATUI_UNROLL for (int v = 0; v < N; v++) {
    const int64_t at = column + v * lanes;
    store(state.sum + at, load(state.sum + at) * load(state.correction + at) + sum[v]);
  }
}

inline void softmax_step(const Scores& t, Softmax& state) {
  int64_t i = t.begin;
  if constexpr (registers == 32)
    for (; i + 4 * lanes <= t.end; i += 4 * lanes) softmax_panel<4>(t.s, t.keys, state, i);
  for (; i + 2 * lanes <= t.end; i += 2 * lanes) softmax_panel<2>(t.s, t.keys, state, i);
  if (i < t.end) softmax_panel<1>(t.s, t.keys, state, i);
}

}  // namespace fatui
