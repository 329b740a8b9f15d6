// The online softmax, one lane a query: no sum or maximum ever crosses lanes.
//
// Milakov and Gimelshein, 2018. After each tile of keys, with m the largest score so far:
//   p = e^(s - m)     l = l * correction + sum of p     o = o * correction + p v     correction = e^(m before - m)
//
// e^(s - m) is made as 2^((s - m) log2(e)): the largest score's is exactly 1, whatever its size, and an output that one
// key alone decides is that key's value.
#pragma once
#include "scores.hpp"

namespace fatui {

constexpr float no_matter = 40.0f;      // what lies so far below the maximum adds less than a rounding, however coarse
constexpr float most_rounded = 0x1p-14f;  // of a score by its size, were it a long sum
constexpr float most_outgrown = 5.5f;  // where m is not moved at once: e^5.5 is about 2^8

struct Softmax {
  alignas(64) float maximum[query_tile], sum[query_tile];
  alignas(64) float fine[query_tile];  // what the maximum lacks where scores are in double, so that e^0 is 1 there too
  alignas(64) float correction[query_tile];  // of the step before: what O is multiplied by

  void reset() {
    std::fill_n(maximum, query_tile, -infinity);
    std::fill_n(sum, query_tile, 0.0f);
    std::fill_n(fine, query_tile, 0.0f);
  }
};

// m, or any number where nothing has been seen.
FATUI_INLINE Vector or_zero(Vector m) { return m > broadcast(-infinity) ? m : Vector{}; }

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

// One panel of N vectors of queries: scores become probabilities (not yet divided by their sum), in place. Where a
// maximum is coarse and not far below an earlier one, `again` makes finer
// scores of these columns, less their maximum, and sets the state up to it.
template <int N, class Again>
FATUI_INLINE void softmax_panel(const Scores& t, Softmax& state, int64_t column, const Coarse& coarse, const Again& again) {
  Vector top[N], subtracted[N], sum[N], coarsest{};
  float* s = t.s + column;
  largest_scores(s, t.keys, top);
  FATUI_UNROLL for (int v = 0; v < N; v++) {
    const Vector before = load(state.maximum + column + v * lanes), size = magnitude(top[v]);
    const Vector far = larger(broadcast(no_matter), size * most_rounded);
    coarsest = larger((top[v] > before - far) & (size < coarse.to) ? size : Vector{}, coarsest);
    top[v] = larger(top[v], before), subtracted[v] = or_zero(top[v]), sum[v] = Vector{};
  }
  if (max_of(coarsest) > coarse.from) [[unlikely]] {
    again(column, N * lanes);
    FATUI_UNROLL for (int v = 0; v < N; v++) subtracted[v] = Vector{};
  } else {
    FATUI_UNROLL for (int v = 0; v < N; v++) {
      const int64_t at = column + v * lanes;
      const Vector before = load(state.maximum + at);
      store(state.correction + at, exp2((before - subtracted[v]) * log2_e));
      store(state.fine + at, top[v] > before ? Vector{} : load(state.fine + at));
      store(state.maximum + at, top[v]);
    }
  }
  for (int64_t j = 0; j < t.keys; j++)
    FATUI_UNROLL for (int v = 0; v < N; v++) {
      float* p = s + j * query_tile + v * lanes;
      const Vector probability = exp2((load(p) - subtracted[v]) * log2_e);
      store(p, probability);
      sum[v] += probability;
    }
  FATUI_UNROLL for (int v = 0; v < N; v++) {
    const int64_t at = column + v * lanes;
    store(state.sum + at, load(state.sum + at) * load(state.correction + at) + sum[v]);
  }
}

template <class Again>
inline void softmax_step(const Scores& t, Softmax& state, const Coarse& coarse, const Again& again) {
  int64_t i = t.begin;
  if constexpr (registers == 32)
    for (; i + 4 * lanes <= t.end; i += 4 * lanes) softmax_panel<4>(t, state, i, coarse, again);
  for (; i + 2 * lanes <= t.end; i += 2 * lanes) softmax_panel<2>(t, state, i, coarse, again);
  if (i < t.end) softmax_panel<1>(t, state, i, coarse, again);
}

}  // namespace fatui
