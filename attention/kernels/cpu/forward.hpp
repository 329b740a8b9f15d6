// What the forward kernels share: how many threads, writing finished rows, and joining spans of keys.
#pragma once
#include <vector>

#include "pool.hpp"
#include "softmax.hpp"

namespace fatui {

// Bfloat16 with the processor's own dot products (AMX, or AVX-512 BF16); false where it has none.
bool forward_bfloat16(const ForwardCall& call);
int64_t bfloat16_workspace(const Problem& p);

// A call too small to be worth waking a thread stays on its own.
inline int threads_for(const Problem& p) {
  const double work = double(p.batch * p.heads * p.queries) * double(p.keys) * double(p.head_dim + p.value_dim);
  return work < 2e5 ? 1 : thread_count();
}

// O = O' / sum, turned back to rows; logsumexp = (maximum + log2 sum) * ln 2. Nothing to attend to: 0 and -inf.
template <class T>
void write_rows(const ForwardCall& call, const Item& item, const float* turned, const Softmax& state) {
  const Problem& p = call.problem;
  const int64_t dv = p.value_dim, first = (item.batch * p.heads + item.head) * p.queries + item.query;
  const auto place = [&](int64_t row) { return first + row / item.queries * p.queries + row % item.queries; };
  for (int64_t row = 0; row < item.rows(); row += lanes) {
    const Vector sum = load(state.sum + row);
    const Vector inverse = sum > Vector{} ? 1.0f / sum : sum;
    const int64_t some = std::min<int64_t>(lanes, item.rows() - row);
    for (int64_t d = 0; d < dv; d += lanes) {
      Vector x[lanes];
      if (d + lanes <= dv)
        FATUI_UNROLL for (int c = 0; c < lanes; c++) x[c] = load(turned + (d + c) * query_tile + row) * inverse;
      else
        for (int c = 0; c < lanes; c++)
          x[c] = d + c < dv ? load(turned + (d + c) * query_tile + row) * inverse : Vector{};
      transpose(x);
      for (int64_t r = 0; r < some; r++)
        narrow_some(static_cast<T*>(call.output) + place(row + r) * dv + d, x[r], dv - d);
    }
    for (int64_t r = row; r < row + some && call.logsumexp != nullptr; r++)
      call.logsumexp[place(r)] = state.sum[r] == 0 ? -infinity : (state.maximum[r] + std::log2(state.sum[r])) * ln_2;
  }
}

// Spans of keys, each with its own maximum and sum, joined in the order of the keys.
class Partials {
 public:
  Partials(const Problem& p, const Schedule& s) : dv_(p.value_dim), spans_(s.spans) {
    if (spans_ > 1) data_.resize(size_t(bytes(p, s) / sizeof(float)));
  }

  static int64_t width(const Problem& p, const Schedule& s) {
    return round_up(std::min(s.rows_per_tile, s.heads_per_tile * std::min(p.queries, s.rows_per_tile)), lanes);
  }
  static int64_t bytes(const Problem& p, const Schedule& s) {
    return s.spans == 1 ? 0 : s.items() * (p.value_dim + 2) * query_tile * int64_t(sizeof(float));
  }

  void keep(const Item& item, const float* turned, const Softmax& state) {
    float* to = at(item.tile, item.span);
    std::copy_n(turned, dv_ * query_tile, to);
    std::copy_n(state.maximum, query_tile, to + dv_ * query_tile);
    std::copy_n(state.sum, query_tile, to + (dv_ + 1) * query_tile);
  }

  template <class T>
  void combine(const ForwardCall& call, const Schedule& s) {
    parallel_for(s.tiles, thread_count(), [&](int64_t tile) {
      const Item item = s.item(call.problem, tile * s.spans);
      Softmax state;
      join(tile, round_up(item.rows(), lanes), state);
      write_rows<T>(call, item, at(tile, 0), state);
    });
  }

 private:
  float* at(int64_t tile, int64_t span) { return data_.data() + (tile * spans_ + span) * (dv_ + 2) * query_tile; }

  void join(int64_t tile, int64_t width, Softmax& state) {
    for (int64_t i = 0; i < width; i += lanes) {
      Vector top = broadcast(-largest), sum = Vector{};
      for (int64_t span = 0; span < spans_; span++) top = larger(load(at(tile, span) + dv_ * query_tile + i), top);
      for (int64_t span = 0; span < spans_; span++) {
        const float* from = at(tile, span) + i;
        const Vector weight = exp2(load(from + dv_ * query_tile) - top);
        sum += load(from + (dv_ + 1) * query_tile) * weight;
        for (int64_t d = 0; d < dv_; d++) {
          float* total = at(tile, 0) + d * query_tile + i;
          store(total, load(from + d * query_tile) * weight + (span == 0 ? Vector{} : load(total)));
        }
      }
      store(state.maximum + i, top);
      store(state.sum + i, sum);
    }
  }

  int64_t dv_, spans_;
  std::vector<float> data_;
};

}  // namespace fatui
