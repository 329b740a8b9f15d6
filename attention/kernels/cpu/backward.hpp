// What the backward pass keeps: scratch for its tiles, and the few numbers a row needs.
#pragma once
#include <vector>

#include "forward.hpp"
#include "product.hpp"

namespace fatui {

constexpr int64_t step_keys = 64;             // keys of a tile, here
constexpr int64_t key_block = 4 * step_keys;  // keys whose gradients stay close while the queries go by
constexpr int64_t thread_budget = 3 << 20;  // bytes of scratch a thread, whatever the lengths

inline int64_t padded(int64_t dim) { return round_up(dim, lanes); }

// Scratch of one thread. A slot holds one tile of queries, packed.
struct BackwardRoom {
  struct Slot {
    float *query_turned, *gradient_turned, *query, *gradient;
    float *logsumexp, *delta;  // of each row; the logsumexp in base 2
  };

  int64_t d, dv, slots;
  float *scores, *score_gradients, *slopes, *key, *value, *key_sums, *value_sums, *query_sums, *copies, *turned;
  std::vector<int64_t> holds;

  static int64_t fixed(const Problem& p) {
    return query_tile * 3 * step_keys + (2 * key_block + query_tile) * (padded(p.head_dim) + padded(p.value_dim));
  }
  static int64_t a_slot(const Problem& p) { return query_tile * (padded(p.head_dim) + padded(p.value_dim) + 2); }
  static size_t floats(const Problem& p, int64_t slots, int64_t sums) {
    return size_t(fixed(p) + slots * a_slot(p) + sums * query_tile * padded(p.head_dim));
  }

  BackwardRoom(const Problem& p, int64_t slot_count, int64_t sums) : slots(slot_count), holds(slot_count, -1) {
    d = padded(p.head_dim), dv = padded(p.value_dim);
    scores = scratch(floats(p, slots, sums) * sizeof(float));
    score_gradients = scores + query_tile * step_keys;
    slopes = score_gradients + query_tile * step_keys;
    key = slopes + query_tile * step_keys;
    value = key + key_block * d;
    key_sums = value + key_block * dv;
    value_sums = key_sums + key_block * d;
    copies = value_sums + key_block * dv;
    turned = copies + query_tile * (d + dv);
    query_sums = turned + slots * a_slot(p);
  }
  Slot slot(int64_t i) const {
    float* t = turned + i * query_tile * (d + dv + 2);
    float* rows = t + query_tile * (d + dv);
    return {t, t + query_tile * d, copies, copies + query_tile * d, rows, rows + query_tile};
  }
};

// Whether one item can be a whole K/V head, and how many packed tiles of queries it can keep.
struct BackwardPlan {
  int64_t items, query_tiles, slots;
  bool fits;

  explicit BackwardPlan(const Problem& p) {
    items = p.batch * p.kv_heads;
    query_tiles = p.heads / p.kv_heads * ceil_div(p.queries, query_tile);
    const int64_t left = thread_budget / int64_t(sizeof(float)) - BackwardRoom::fixed(p) -
                         query_tiles * query_tile * padded(p.head_dim);
    const int64_t room_for = left / BackwardRoom::a_slot(p);
    fits = room_for >= 1;
    slots = std::max<int64_t>(1, std::min(room_for, query_tiles));
  }
  // With few items a thread, the last ones would leave the others idle.
  bool fused(int threads) const { return fits && (items % threads == 0 || items >= 3 * threads); }
};

// For each row of a tile: the logsumexp in base 2 (a row that attends to nothing gets a huge one: its P is 0), and
// delta = dO . O, less the logsumexp's own gradient.
template <class T>
void row_statistics(const BackwardCall& call, const Item& item, float* logsumexp, float* delta) {
  const auto offset = [&](const Tensor& t, int64_t i) {
    return item.batch * t.stride[0] + item.head * t.stride[1] + (item.query + i) * t.stride[2];
  };
  const Tensor &o = call.output, &g = call.output_gradient, &l = call.logsumexp, &dl = call.logsumexp_gradient;
  const int64_t columns = call.problem.value_dim;
  for (int64_t i = 0; i < item.queries; i++) {
    const T *a = static_cast<const T*>(o.data) + offset(o, i), *b = static_cast<const T*>(g.data) + offset(g, i);
    Vector sum{};
    for (int64_t d = 0; d < columns; d += lanes)
      sum += widen_strided(a + d * o.stride[3], o.stride[3], columns - d) *
             widen_strided(b + d * g.stride[3], g.stride[3], columns - d);
    delta[i] = sum_of(sum) - (dl.data == nullptr ? 0.0f : static_cast<const float*>(dl.data)[offset(dl, i)]);
    const float value = static_cast<const float*>(l.data)[offset(l, i)];
    logsumexp[i] = value == -infinity ? largest : value * log2_e;
  }
  std::fill(logsumexp + item.queries, logsumexp + query_tile, largest);
  std::fill(delta + item.queries, delta + query_tile, 0.0f);
}

// 1 - tanh^2: the slope of the softcap.
inline void cap_slopes(const float* s, float* slopes, int64_t keys, int64_t width, float inside) {
  for (int64_t j = 0; j < keys; j++)
    for (int64_t i = 0; i < width; i += lanes) {
      const Vector t = tanh(load(s + j * query_tile + i) * inside);
      store(slopes + j * query_tile + i, 1.0f - t * t);
    }
}

// Rows from a turned tile, each number times a factor.
template <class T>
void write_turned(T* out, const float* turned, int64_t rows, int64_t columns, float factor) {
  for (int64_t row = 0; row < rows; row += lanes)
    for (int64_t d = 0; d < columns; d += lanes) {
      Vector x[lanes];
      for (int c = 0; c < lanes; c++)
        x[c] = d + c < columns ? load(turned + (d + c) * query_tile + row) * factor : Vector{};
      transpose(x);
      for (int64_t r = 0; r < std::min<int64_t>(lanes, rows - row); r++)
        narrow_some(out + (row + r) * columns + d, x[r], columns - d);
    }
}

}  // namespace fatui
