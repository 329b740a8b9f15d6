// Shared by the backward kernels: work plan, row statistics, writing gradients.
#pragma once
#include <vector>

#include "forward.hpp"

namespace fatui {

// Bfloat16 backward pass with the CPU's dot-product instructions, if available.
void backward_bfloat16(const BackwardCall& call);
int64_t backward_bfloat16_workspace(const Problem& p);

constexpr int64_t step_keys = 64;              // keys per tile of the backward pass
constexpr int64_t largest_block = 2 * key_tile;  // keys whose gradients stay in cache during the loop over queries
constexpr int64_t thread_budget = 3 << 20;     // maximum scratch bytes per thread, for any lengths

inline int64_t padded(int64_t dim) { return round_up(dim, lanes); }

// A query tile, a key tile of the current block, and the accumulators of their gradients.
struct TileStep {
  const Item& item;
  const Bounds& bounds;
  int64_t key, row, keys;  // first key; its row in the block; number of keys
  float *query_sums, *key_sums, *value_sums;  // dQ (as Tiles has it), dK [key][d], dV [key][dv]; null if not requested
  const uint64_t* bits = nullptr;             // as in Scores
};

// Decides whether one item can be a whole K/V head, and how many packed query tiles it can keep. Tiles is the class that
// loads and multiplies: `fixed` floats of scratch, and `a_slot` per packed query tile; `block` keys at a time.
template <class Tiles>
struct BackwardPlan {
  int64_t items, query_tiles, slots;
  bool fits;

  explicit BackwardPlan(const Problem& p) {
    items = p.batch * p.kv_heads;
    query_tiles = p.heads / p.kv_heads * ceil_div(p.queries, query_tile);
    const int64_t left = thread_budget / int64_t(sizeof(float)) - floats(p, 0, query_tiles);
    const int64_t room_for = left / Tiles::a_slot(p);
    fits = room_for >= 1;
    slots = std::max<int64_t>(1, std::min(room_for, query_tiles));
  }
  // With few items per thread, the last items would leave the other threads idle.
  bool fused(int threads) const { return fits && (items % threads == 0 || items >= 3 * threads); }

  static int64_t floats(const Problem& p, int64_t slots, int64_t query_tiles) {
    return Tiles::block(p) * (padded(p.head_dim) + padded(p.value_dim)) + query_tiles * query_tile * padded(p.head_dim) +
           Tiles::fixed(p) + slots * Tiles::a_slot(p);
  }
  int64_t workspace(const Problem& p, int threads) const {
    const bool whole = fused(threads);
    const int64_t tiles = whole ? query_tiles : together(p, threads);
    return threads * floats(p, whole ? slots : tiles, tiles) * int64_t(sizeof(float));
  }
  // Query tiles of a head that an item of the second pass takes together, so that keys and values are prepared once for them.
  static int64_t together(const Problem& p, int threads) {
    if (has_lists(p)) return 1;
    const int64_t tiles = ceil_div(p.queries, query_tile);
    return std::clamp<int64_t>(p.batch * p.heads * tiles / (4 * threads), 1, std::min<int64_t>(tiles, 4));
  }
};

// Row statistics for P and dS: P = e^(S - reference) inverse, dS = P (dP - delta).
struct RowNumbers {
  float reference[query_tile];  // infinite for fully masked and padding rows: then P is 0
  float fine[query_tile];       // low part of the reference if scores are in double
  float inverse[query_tile];    // 1 / sum
  float delta[query_tile];      // dO . O minus the gradient of the logsumexp
};
constexpr int64_t row_numbers = sizeof(RowNumbers) / sizeof(float);

inline int64_t row_offset(const Tensor& t, const Item& item, int64_t row) {
  return item.batch * t.stride[0] + item.head * t.stride[1] + (item.query + row) * t.stride[2];
}

// Gradient of a row's logsumexp, which is subtracted from delta.
inline float logsumexp_gradient(const BackwardCall& call, const Item& item, int64_t row) {
  const Tensor& t = call.logsumexp_gradient;
  return t.data == nullptr ? 0.0f : static_cast<const float*>(t.data)[row_offset(t, item, row)];
}

// Reference and inverse of each row.
inline void read_statistics(const BackwardCall& call, const Item& item, RowNumbers& rows) {
  const Tensor& l = call.statistics;
  for (int64_t i = 0; i < item.queries; i++) {
    const float* statistics = static_cast<const float*>(l.data) + row_offset(l, item, i);
    const bool some = statistics[1] != 0;
    rows.reference[i] = some ? statistics[0] : infinity;
    rows.inverse[i] = some ? 1.0f / statistics[1] : 0.0f;
    rows.fine[i] = statistics[2];
  }
  std::fill(rows.reference + item.queries, rows.reference + query_tile, infinity);
  std::fill(rows.fine + item.queries, rows.fine + query_tile, 0.0f);
  std::fill(rows.inverse + item.queries, rows.inverse + query_tile, 0.0f);
}

// 1 - tanh^2, the derivative of the softcap.
inline void cap_slopes(const float* s, float* slopes, int64_t rows, int64_t width, float inside) {
  for (int64_t j = 0; j < rows; j++)
    for (int64_t i = 0; i < width; i += lanes) {
      const Vector t = tanh(load(s + j * tile_line + i) * inside);
      store(slopes + j * tile_line + i, 1.0f - t * t);
    }
}

// Writes rows of sums, scaled by a factor.
template <class T>
void write_rows(T* out, const float* sums, int64_t line, int64_t rows, int64_t columns, float factor) {
  for (int64_t j = 0; j < rows; j++)
    for (int64_t d = 0; d < columns; d += lanes)
      narrow_some(out + j * columns + d, load(sums + j * line + d) * factor, columns - d);
}

}  // namespace fatui
