// Online softmax with one lane per query: no reduction across lanes.
//
// Milakov and Gimelshein, 2018. After each tile of keys, with m the largest score so far:
//   p = e^(s - m)     l = l * correction + sum of p     o = o * correction + p v     correction = e^(m before - m)
//
// e^(s - m) is computed as 2^((s - m) log2(e)): the weight of the largest score is exactly 1, and the output of a row
// dominated by one key is exactly that key's value.
#pragma once
#include "scores.hpp"

namespace fatui {

constexpr float no_matter = 40.0f;      // scores this far below the maximum contribute less than a rounding error
constexpr float max_rounded = 0x1p-14f;  // bound of the relative rounding error of a score that is a long sum
constexpr float max_outgrown = 5.5f;  // threshold of lazy updates of m: e^5.5 is about 2^8

struct Softmax {
  alignas(64) float maximum[query_tile], sum[query_tile];
  alignas(64) float fine[query_tile];  // low part of the maximum if scores are in double, so that e^0 is exact there too
  alignas(64) float correction[query_tile];  // factor of O from the last step

  void reset() {
    std::fill_n(maximum, query_tile, -infinity);
    std::fill_n(sum, query_tile, 0.0f);
    std::fill_n(fine, query_tile, 0.0f);
  }
};

// m, or a finite number if the row is fully masked so far.
FATUI_INLINE Vector or_zero(Vector m) { return m > broadcast(-infinity) ? m : Vector{}; }

template <int N>
FATUI_INLINE void largest_scores(const float* s, int64_t keys, Vector (&top)[N]) {
  Vector even[N], odd[N];
  FATUI_UNROLL for (int v = 0; v < N; v++) even[v] = odd[v] = load(s + v * lanes);
  int64_t j = 1;
  for (; j + 1 < keys; j += 2)
    FATUI_UNROLL for (int v = 0; v < N; v++) {
      even[v] = larger(load(s + j * tile_line + v * lanes), even[v]);
      odd[v] = larger(load(s + (j + 1) * tile_line + v * lanes), odd[v]);
    }
  if (j < keys)
    FATUI_UNROLL for (int v = 0; v < N; v++) even[v] = larger(load(s + j * tile_line + v * lanes), even[v]);
  FATUI_UNROLL for (int v = 0; v < N; v++) top[v] = larger(even[v], odd[v]);
}

// Probabilities of N vectors of queries, in place, and their sums; an even number of keys. A function of its own, so that what
// the loop needs fits into 16 registers.
template <int N>
[[gnu::noinline]] void exponentials(float* s, int64_t keys, const Vector (&subtracted)[N], Vector (&sums)[N]) {
  Vector m[N], sum[N];
  FATUI_UNROLL for (int v = 0; v < N; v++) m[v] = subtracted[v], sum[v] = sums[v];
  for (int64_t j = 0; j < keys; j += 2, s += 2 * tile_line) {
    Vector x[2 * N];
    FATUI_UNROLL for (int i = 0; i < 2 * N; i++)
      x[i] = (load(s + i / N * tile_line + i % N * lanes) - m[i % N]) * log2_e;
    exp2_together(x);
    FATUI_UNROLL for (int i = 0; i < 2 * N; i++) {
      store(s + i / N * tile_line + i % N * lanes, x[i]);
      sum[i % N] += x[i];
    }
  }
  FATUI_UNROLL for (int v = 0; v < N; v++) sums[v] = sum[v];
}

// Converts the scores of a panel of N vectors of queries to probabilities (not yet divided by their sum), in place. If a
// maximum is in the range of Coarse and not far below an earlier one, `again` recomputes these columns in double, subtracts
// their maximum and updates the state.
template <int N, class Again>
FATUI_INLINE void softmax_panel(const Scores& t, Softmax& state, int64_t column, const Coarse& coarse, const float* largest,
                                const Again& again) {
  Vector top[N], subtracted[N], sum[N], coarsest{};
  float* s = t.at(0, column);
  if (largest == nullptr) largest_scores(s, t.keys, top);
  else FATUI_UNROLL for (int v = 0; v < N; v++) top[v] = load(largest + column - t.begin + v * lanes);
  FATUI_UNROLL for (int v = 0; v < N; v++) {
    const Vector before = load(state.maximum + column + v * lanes), size = magnitude(top[v]);
    const Vector far = larger(broadcast(no_matter), size * max_rounded);
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
  int64_t j = 0;
  if constexpr (registers == 16) exponentials(s, j = t.keys / 2 * 2, subtracted, sum);
  for (; j < t.keys; j++)
    FATUI_UNROLL for (int v = 0; v < N; v++) {
      float* p = s + j * tile_line + v * lanes;
      const Vector probability = exp2((load(p) - subtracted[v]) * log2_e);
      store(p, probability);
      sum[v] += probability;
    }
  FATUI_UNROLL for (int v = 0; v < N; v++) {
    const int64_t at = column + v * lanes;
    store(state.sum + at, load(state.sum + at) * load(state.correction + at) + sum[v]);
  }
}

// `largest`: the maximum of each column of the tile if it is known, or null.
template <class Again>
inline void softmax_step(const Scores& t, Softmax& state, const Coarse& coarse, const float* largest, const Again& again) {
  int64_t i = t.begin;
  if constexpr (registers == 32)
    for (; i + 4 * lanes <= t.end; i += 4 * lanes) softmax_panel<4>(t, state, i, coarse, largest, again);
  for (; i + 2 * lanes <= t.end; i += 2 * lanes) softmax_panel<2>(t, state, i, coarse, largest, again);
  if (i < t.end) softmax_panel<1>(t, state, i, coarse, largest, again);
}

}  // namespace fatui
