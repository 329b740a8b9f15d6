// Shared by the forward kernels: number of threads, writing finished rows, and combining spans of keys.
#pragma once
#include <vector>

#include "pool.hpp"
#include "softmax.hpp"

namespace fatui {

// Estimated time of a call on one thread: the maximum of compute and reading K and V.
inline double microseconds_alone(const Problem& p) {
  const double share = has_lists(p) ? listed_share(p) : 1;
  const double width = double(p.head_dim + p.value_dim), pairs = double(p.batch * p.heads * p.queries) * double(p.keys);
  const double element = is_quantized(p) ? p.key_packing.bits / 8.0 : p.query.element == Element::float32 ? 4 : 2;
  const double bytes = double(p.batch * p.kv_heads * p.keys) * width * element;
  return share * std::max(2 * pairs * width / 2e5, bytes / 4e4);
}

// A call too small to parallelise runs on the calling thread.
inline int threads_for(const Problem& p) { return microseconds_alone(p) < 2 ? 1 : thread_count(); }
inline bool brief(const Problem& p) { return microseconds_alone(p) < 60; }

// logsumexp = maximum + ln sum, and what the backward pass needs of a row of the state.
inline void write_statistics(const ForwardCall& call, int64_t place, const Softmax& state, int64_t row) {
  if (call.statistics != nullptr)
    reinterpret_cast<RowStatistics*>(call.statistics)[place] = {state.maximum[row], state.sum[row], state.fine[row]};
  if (call.logsumexp != nullptr)
    call.logsumexp[place] = state.sum[row] == 0 ? -infinity : state.maximum[row] + (state.fine[row] + std::log(state.sum[row]));
}

// A square of outputs at an edge: dims from d on of `rows` rows.
template <class T>
[[gnu::noinline]] void write_square(T* const (&out)[lanes], const float* transposed, int64_t line, int64_t d, int64_t dv,
                                    int64_t rows, Vector inverse) {
  Vector x[lanes];
  FATUI_ROLLED for (int c = 0; c < lanes; c++) x[c] = d + c < dv ? load(transposed + c * line) * inverse : Vector{};
  transpose(x);
  FATUI_ROLLED for (int64_t r = 0; r < rows; r++) narrow_some(out[r] + d, x[r], dv - d);
}

// O = O' / sum, transposed back to rows. Fully masked rows: 0, with a logsumexp of -inf.
template <class T>
void write_rows(const ForwardCall& call, const Item& item, const float* transposed, int64_t line, const Softmax& state) {
  const Problem& p = call.problem;
  const int64_t dv = p.value_dim, first = (item.batch * p.heads + item.head) * p.queries + item.query;
  const auto place = [&](int64_t row) { return first + row / item.queries * p.queries + row % item.queries; };
  for (int64_t row = 0; row < item.rows(); row += lanes) {
    const Vector sum = load(state.sum + row);
    const Vector inverse = sum > Vector{} ? 1.0f / sum : sum;
    const int64_t some = std::min<int64_t>(lanes, item.rows() - row);
    T* out[lanes];
    for (int64_t r = 0; r < some; r++) {
      out[r] = static_cast<T*>(call.output) + place(row + r) * dv;
      for (int64_t d = 0; d < dv; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(out[r] + d, 1);
    }
    for (int64_t d = 0; d < dv; d += lanes) {
      if (some < lanes || d + lanes > dv) {
        write_square(out, transposed + d * line + row, line, d, dv, some, inverse);
        continue;
      }
      Vector x[lanes];
      FATUI_UNROLL for (int c = 0; c < lanes; c++) x[c] = load(transposed + (d + c) * line + row) * inverse;
      transpose(x);
      FATUI_UNROLL for (int r = 0; r < lanes; r++) narrow(out[r] + d, x[r]);
    }
    for (int64_t r = row; r < row + some; r++) write_statistics(call, place(r), state, r);
  }
}

// The same of rows that are not transposed, `line` floats apart.
template <class T>
void write_few_rows(const ForwardCall& call, const Item& item, const float* rows, int64_t line, const Softmax& state) {
  const Problem& p = call.problem;
  const int64_t dv = p.value_dim, first = (item.batch * p.heads + item.head) * p.queries + item.query;
  for (int64_t r = 0; r < item.rows(); r++) {
    const int64_t place = first + r / item.queries * p.queries + r % item.queries;
    const Vector inverse = broadcast(state.sum[r] > 0 ? 1.0f / state.sum[r] : state.sum[r]);
    T* out = static_cast<T*>(call.output) + place * dv;
    for (int64_t d = 0; d < dv; d += lanes) narrow_some(out + d, load(rows + r * line + d) * inverse, dv - d);
    write_statistics(call, place, state, r);
  }
}

// Partial results of spans of keys, each with its own maximum and sum, combined in key order. Rows of one span: O', one
// per dim, then the maxima, then the sums.
class Partials {
 public:
  Partials(const Problem& p, const Schedule& s) : dv_(p.value_dim), spans_(s.spans), width_(width(p, s)) {
    if (spans_ > 1) data_.resize(size_t(bytes(p, s) / sizeof(float)));
  }

  static int64_t bytes(const Problem& p, const Schedule& s) {
    return s.spans == 1 ? 0 : s.items() * (p.value_dim + 2) * width(p, s) * int64_t(sizeof(float));
  }
  bool wanted() const { return spans_ > 1; }

  void keep(const Item& item, const float* transposed, const Softmax& state) {
    float* to = at(item.tile, item.span);
    std::copy_n(state.maximum, width_, to + dv_ * width_);
    for (int64_t i = 0; i < width_; i += lanes) {  // the low part of the maximum is not stored per span
      const Vector fine = exp2(load(state.fine + i) * log2_e);
      for (int64_t d = 0; d < dv_; d++) store(to + d * width_ + i, load(transposed + d * tile_line + i) * fine);
      store(to + (dv_ + 1) * width_ + i, load(state.sum + i) * fine);
    }
  }

  template <class T>
  void combine(const ForwardCall& call, const Schedule& s) {
    const auto join_tile = [&](int64_t tile) {
      const Item item = s.item(call.problem, tile * s.spans);
      Softmax state;
      state.reset();
      for (int64_t i = 0; i < width_; i += lanes) join(tile, i, state);
      write_rows<T>(call, item, at(tile, 0), width_, state);
    };
    parallel_for(s.tiles, thread_count(), join_tile, true);
  }

 private:
  static int64_t width(const Problem& p, const Schedule& s) {
    return round_up(s.heads_per_tile * std::min(p.queries, query_tile), lanes);
  }
  float* at(int64_t tile, int64_t span) { return data_.data() + (tile * spans_ + span) * (dv_ + 2) * width_; }

  void join(int64_t tile, int64_t i, Softmax& state) {
    Vector top = broadcast(-infinity), sum = Vector{};
    for (int64_t span = 0; span < spans_; span++) top = larger(load(at(tile, span) + dv_ * width_ + i), top);
    for (int64_t span = 0; span < spans_; span++) {
      const float* from = at(tile, span) + i;
      const Vector seen = load(from + (dv_ + 1) * width_), below = load(from + dv_ * width_) - top;
      const Vector weight = seen > Vector{} ? exp2(below * log2_e) : seen;
      sum += seen * weight;
      for (int64_t d = 0; d < dv_; d++) {
        float* total = at(tile, 0) + d * width_ + i;
        store(total, load(from + d * width_) * weight + (span == 0 ? Vector{} : load(total)));
      }
    }
    store(state.maximum + i, top);
    store(state.sum + i, sum);
  }

  int64_t dv_, spans_, width_;
  std::vector<float> data_;
};

// Finishes an item: a span of keys is stored until the other spans are complete; a complete item is written.
template <class T>
void finish(const ForwardCall& call, const Item& item, const float* transposed, const Softmax& state, Partials& partials) {
  if (partials.wanted()) partials.keep(item, transposed, state);
  else write_rows<T>(call, item, transposed, tile_line, state);
}

// Scratch of one thread.
struct Buffers {
  float *query, *scores, *output, *key, *value;
  int64_t d, dv;  // padded; row lengths of the copies of K and V

  static size_t floats(const Problem& p) {
    const int64_t d = round_up(p.head_dim, lanes), dv = round_up(p.value_dim, lanes);
    return tile_line * (max_panels * (d + dv) + key_tile) + key_tile * (d + dv);
  }
  Buffers() = default;
  Buffers(const Problem& p, int64_t panel) : d(round_up(p.head_dim, lanes)), dv(round_up(p.value_dim, lanes)) {
    scores = scratch(floats(p) * sizeof(float));
    key = scores + tile_line * key_tile;
    value = key + key_tile * d;
    query = value + key_tile * dv + panel * tile_line * (d + dv);
    output = query + tile_line * d;
  }
};

// With 16 registers a CPU has an L2 of 512 KiB or less, perhaps shared by two threads: Q' and O' of 256 rows would leave no room there
// for two tiles of K and V.
inline Schedule schedule_of(const Problem& p) {
  return Schedule(p, 64, registers == 16 ? 2 : max_panels);
}

inline int64_t workspace(const Problem& p) {
  return int64_t(threads_for(p) * Buffers::floats(p) * sizeof(float)) + Partials::bytes(p, schedule_of(p));
}

}  // namespace fatui
