// The online softmax, one lane a query: no sum or maximum ever crosses lanes.
//
// Milakov and Gimelshein, 2018. After each tile of keys, with m the largest score so far (base 2):
//   p = 2^(s - m)     l = l * correction + sum of p     o = o * correction + p v     correction = 2^(m before - m)
#pragma once
#include "scores.hpp"

namespace fatui {

struct Softmax {
  alignas(64) float maximum[query_tile], sum[query_tile], correction[query_tile];

  void reset() {
    std::fill_n(maximum, query_tile, -infinity);
    std::fill_n(sum, query_tile, 0.0f);
  }
};

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
FATUI_INLINE void softmax_panel(float* s, int64_t keys, float factor, Softmax& state, int64_t column) {
  Vector top[N], sum[N];
  s += column;
  largest_scores(s, keys, top);
  FATUI_UNROLL for (int v = 0; v < N; v++) {
    float* maximum = state.maximum + column + v * lanes;
    const Vector before = load(maximum), now = larger(top[v] * factor, before);
    store(maximum, now);
    top[v] = larger(now, broadcast(-largest));  // a row that sees nothing yet: -inf less this is still -inf
    store(state.correction + column + v * lanes, exp2(before - top[v]));
    sum[v] = Vector{};
  }
  for (int64_t j = 0; j < keys; j++)
    FATUI_UNROLL for (int v = 0; v < N; v++) {
      float* p = s + j * query_tile + v * lanes;
      const Vector probability = exp2(load(p) * factor - top[v]);
      store(p, probability);
      sum[v] += probability;
    }
  FATUI_UNROLL for (int v = 0; v < N; v++) {
    const int64_t at = column + v * lanes;
    store(state.sum + at, load(state.sum + at) * load(state.correction + at) + sum[v]);
  }
}

inline void softmax_step(const Scores& t, float factor, Softmax& state) {
  int64_t i = t.begin;
  if constexpr (registers == 32)
    for (; i + 4 * lanes <= t.end; i += 4 * lanes) softmax_panel<4>(t.s, t.keys, factor, state, i);
  for (; i + 2 * lanes <= t.end; i += 2 * lanes) softmax_panel<2>(t.s, t.keys, factor, state, i);
  if (i < t.end) softmax_panel<1>(t.s, t.keys, factor, state, i);
}

}  // namespace fatui
