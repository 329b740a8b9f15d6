// Backward pass: dQ, dK, dV from each row's reference and sum, without the score matrix (Dao et al., 2022; Dao, 2023).
//
//   for each block of 256 keys, each tile of 64 queries i that attends to it, and each tile of 64 keys j of that block
//   (S': one row per key, one lane per query):
//     S' = K Q'                     P' = e^(S' - reference_i)       dO_i already divided by the row's sum
//     dP' = V dO'                   dS' = P' (dP' - delta_i)        delta_i = dO_i . O_i - dlogsumexp_i / sum_i
//     dV += P' dO                   dK += dS' Q                     dQ' += K' dS'
#include "backward_walk.hpp"
#include "product.hpp"

namespace fatui {
namespace {

// Tiles in float32, for every dtype.
template <class T>
class FloatTiles {
 public:
  static int64_t fixed(const Problem& p) {
    return tile_line * 3 * step_keys + key_block * (padded(p.head_dim) + padded(p.value_dim)) +
           query_tile * (row_line(p.head_dim) + row_line(p.value_dim));
  }
  static int64_t a_slot(const Problem& p) {
    return tile_line * (padded(p.head_dim) + padded(p.value_dim)) + row_numbers;
  }

  FloatTiles(const BackwardCall& call, int64_t slots, float* buffer)
      : call_(call), p_(call.problem), d_(padded(p_.head_dim)), dv_(padded(p_.value_dim)), holds_(slots, -1) {
    scores_ = buffer;
    score_gradients_ = scores_ + tile_line * step_keys;
    slopes_ = score_gradients_ + tile_line * step_keys;
    key_ = slopes_ + tile_line * step_keys;
    value_ = key_ + key_block * d_;
    query_ = value_ + key_block * dv_;
    gradient_ = query_ + query_tile * row_line(p_.head_dim);
    slots_ = gradient_ + query_tile * row_line(p_.value_dim);
  }

  [[gnu::noinline]] void open_keys(int64_t batch, int64_t kv_head, int64_t key, int64_t keys) {
    if (std::exchange(head_, batch * p_.kv_heads + kv_head) != batch * p_.kv_heads + kv_head)
      one_value_ = is_one_value(batch, kv_head);
    k_ = floats_of<T>(p_.key, batch, kv_head, key, keys, p_.head_dim, key_, d_);
    v_ = floats_of<T>(p_.value, batch, kv_head, key, keys, p_.value_dim, value_, dv_);
  }

  // Forms of a query tile: Q and dO, transposed (packed unless still in the slot) and not.
  [[gnu::noinline]] void take_queries(const Item& item, int64_t tile) {
    const int64_t slot = std::min(tile, int64_t(holds_.size()) - 1), width = round_up(item.queries, lanes);
    query_transposed_ = slots_ + slot * a_slot(p_), gradient_transposed_ = query_transposed_ + tile_line * d_;
    rows_ = reinterpret_cast<RowNumbers*>(gradient_transposed_ + tile_line * dv_);
    if (holds_[slot] != tile) {
      holds_[slot] = tile;
      read_statistics(call_, item, *rows_);
      transpose_rows(rows_of<T>(p_.query, item), p_.head_dim, width, query_transposed_, p_.scale);
      transpose_rows(rows_of<T>(call_.output_gradient, item), p_.value_dim, width, gradient_transposed_);
      for (int64_t d = 0; d < p_.value_dim; d++) divide(gradient_transposed_ + d * tile_line, width);
      make_deltas(item, width);
    }
    // Q in place only if whole vectors of columns can be read, and a column of rows does not share sets of a small L1.
    const int64_t line = row_line(p_.value_dim);
    q_ = floats_of<T>(p_.query, item.batch, item.head, item.query, item.queries, p_.head_dim, query_,
                      row_line(p_.head_dim), registers == 32 && d_ == p_.head_dim);
    floats_of<T>(call_.output_gradient, item.batch, item.head, item.query, item.queries, p_.value_dim, gradient_, line,
                 false);
    for (int64_t i = 0; i < item.queries; i++)
      for (float* x = gradient_ + i * line; x < gradient_ + i * line + dv_; x += lanes)
        store(x, load(x) * rows_->inverse[i]);
  }

  void step(const TileStep& t) {
    const int64_t width = round_up(t.item.queries, lanes);
    const float *k = k_.data + t.row * k_.stride, *v = v_.data + t.row * v_.stride;
    multiply_scores({k, k_.stride, query_transposed_, tile_line, p_.head_dim, scores_, tile_line, nullptr}, t.keys, width);
    multiply<Layout::depth_contiguous, Update::overwrite>(
        {v, v_.stride, gradient_transposed_, tile_line, p_.value_dim, score_gradients_, tile_line, nullptr}, t.keys,
        width);
    if (p_.softcap > 0) cap_slopes(scores_, slopes_, t.keys, width, inside_cap(p_));
    const Scores scores{scores_, t.key, t.keys, 0, width, t.bounds.whole, t.bits};
    finish_scores(scores, p_, t.item, t.bounds);
    const bool fine = std::any_of(rows_->reference, rows_->reference + t.item.queries,
                                  [&](float m) { return Coarse(p_).has(m); });
    if (fine) finish_in_double(scores, p_, t.item, {k, k_.stride}, {rows_->reference, rows_->fine});
    make_probabilities(t.keys, width, fine);
    const Extent& seen = t.bounds.whole;
    if (seen.any_first >= t.key && std::min(seen.any_last, p_.keys - 1) < t.key + t.keys)
      take_sums_of_tile(t.item, t.keys, width);
    make_score_gradients(t.keys, width);
    if (t.key_sums != nullptr) add_to_keys(t);
    if (t.query_sums != nullptr)
      multiply<Layout::rows_contiguous, Update::add>(
          {k, k_.stride, score_gradients_, tile_line, t.keys, t.query_sums, query_tile, nullptr}, p_.head_dim, width);
  }

 private:
  // Floats from one row of Q or dO to the next, for the reason of tile_line.
  static int64_t row_line(int64_t dim) { return padded(dim) + (tile_line - query_tile); }

  // Divides the values of each query by its row sum.
  void divide(float* x, int64_t width) const {
    for (int64_t i = 0; i < width; i += lanes) store(x + i, load(x + i) * load(rows_->inverse + i));
  }

  // Whether all keys of a head have the same value row.
  bool is_one_value(int64_t batch, int64_t kv_head) const {
    const Tensor& v = p_.value;
    const T* data = static_cast<const T*>(v.data) + batch * v.stride[0] + kv_head * v.stride[1];
    for (int64_t j = 1; j < p_.keys; j++)
      for (int64_t d = 0; d < p_.value_dim; d++)
        if (std::memcmp(data + d * v.stride[3], data + j * v.stride[2] + d * v.stride[3], sizeof(T)) != 0) return false;
    return true;
  }

  // delta = dO . O, summed in the order of dP = dO . V, so that they are equal if O equals a value row: if one key has all
  // the weight, or if all value rows are equal (V is then used instead of O, which is a rounded sum).
  void make_deltas(const Item& item, int64_t width) const {
    Rows<T> rows = rows_of<T>(one_value_ ? p_.value : call_.output, item);
    if (one_value_) {
      const Tensor& v = p_.value;
      std::fill_n(rows.row, rows.count, static_cast<const T*>(v.data) + item.batch * v.stride[0] + item.kv_head * v.stride[1]);
    }
    std::fill_n(rows_->delta, query_tile, 0.0f);
    for (int64_t i = 0; i < width; i += lanes) {
      Vector sum{};
      for (int64_t d = 0; d < p_.value_dim; d += lanes) {
        Vector x[lanes];
        load_turned(rows, i, d, p_.value_dim, x);
        const int64_t some = std::min<int64_t>(lanes, p_.value_dim - d);
        for (int64_t c = 0; c < some; c++) sum = fused(sum, x[c], load(gradient_transposed_ + (d + c) * tile_line + i));
      }
      store(rows_->delta + i, sum);
    }
    for (int64_t i = 0; i < item.queries; i++)
      rows_->delta[i] -= logsumexp_gradient(call_, item, i) * rows_->inverse[i];
  }

  void add_to_keys(const TileStep& t) const {
    multiply<Layout::depth_contiguous, Update::add>(
        {scores_, tile_line, gradient_, row_line(p_.value_dim), t.item.queries, t.value_sums, dv_, nullptr}, t.keys, dv_);
    multiply<Layout::depth_contiguous, Update::add>(
        {score_gradients_, tile_line, q_.data, q_.stride, t.item.queries, t.key_sums, d_, nullptr}, t.keys, d_);
  }

  // P' from S', in place.
  void make_probabilities(int64_t keys, int64_t width, bool subtracted) const {
    for (int64_t i = 0; i < width; i += lanes) {
      const Vector reference = subtracted ? Vector{} : load(rows_->reference + i);
      int64_t j = 0;
      if constexpr (registers == 16)
        for (; j + 4 <= keys; j += 4) {
          float* s = scores_ + j * tile_line + i;
          Vector x[4];
          FATUI_UNROLL for (int n = 0; n < 4; n++) x[n] = (load(s + n * tile_line) - reference) * log2_e;
          exp2_together(x);
          FATUI_UNROLL for (int n = 0; n < 4; n++) store(s + n * tile_line, x[n]);
        }
      for (; j < keys; j++) {
        float* s = scores_ + j * tile_line + i;
        store(s, exp2((load(s) - reference) * log2_e));
      }
    }
  }

  // With all keys of the queries in one tile, its own sums replace those of the forward pass, whose scores and outputs
  // were rounded differently: P' is scaled to the row sum, and delta is rowsum(P dP), so that gradients that should
  // cancel do. A mean lies between the smallest and the largest dP: if all are equal, delta is exactly that.
  void take_sums_of_tile(const Item& item, int64_t keys, int64_t width) const {
    for (int64_t i = 0; i < width; i += lanes) {
      Vector sum{}, product{};
      for (int64_t j = 0; j < keys; j++) sum += load(scores_ + j * tile_line + i);
      const Vector inverse = load(rows_->inverse + i), scaled = sum * inverse;
      const Vector factor = scaled > 0.0f ? 1.0f / scaled : Vector{};
      Vector low = Vector{} + infinity, high = Vector{} - infinity;
      for (int64_t j = 0; j < keys; j++) {
        const int64_t at = j * tile_line + i;
        const Vector probability = load(scores_ + at) * factor;
        store(scores_ + at, probability);
        const Vector gradient = load(score_gradients_ + at);
        product = fused(product, probability, gradient);
        low = probability > 0.0f && gradient < low ? gradient : low;
        high = probability > 0.0f && gradient > high ? gradient : high;
      }
      const Vector mean = product * inverse, above = mean > low ? mean : low;
      const Vector within = above < high ? above : high;
      store(rows_->delta + i, scaled > 0.0f ? within : mean);  // rows that see nothing have no dP
    }
    for (int64_t i = 0; i < item.queries; i++)
      rows_->delta[i] -= logsumexp_gradient(call_, item, i) * rows_->inverse[i];
  }

  // dS' from P' and dP', in place.
  void make_score_gradients(int64_t keys, int64_t width) const {
    const bool capped = p_.softcap > 0;
    for (int64_t i = 0; i < width; i += lanes) {
      const Vector delta = load(rows_->delta + i);
      for (int64_t j = 0; j < keys; j++) {
        const int64_t at = j * tile_line + i;
        const Vector gradient = load(scores_ + at) * (load(score_gradients_ + at) - delta);
        store(score_gradients_ + at, capped ? gradient * load(slopes_ + at) : gradient);
      }
    }
  }

  const BackwardCall& call_;
  const Problem& p_;
  int64_t d_, dv_, head_ = -1;
  bool one_value_ = false;  // for the current head
  std::vector<int64_t> holds_;
  float *scores_, *score_gradients_, *slopes_, *key_, *value_, *query_, *gradient_, *slots_;
  float *query_transposed_ = nullptr, *gradient_transposed_ = nullptr;
  RowNumbers* rows_ = nullptr;
  Floats k_{}, v_{}, q_{};
};
}  // namespace

// As in the forward pass, lists are walked by the kernel for all dtypes.
static bool in_pairs(const Problem& p) {
  return bfloat16_pairs && p.query.element == Element::bfloat16 && !has_lists(p);
}

// Whether the scores of a row are recomputed in double, which the products of pairs do not do.
static bool any_coarse(const BackwardCall& call) {
  const Problem& p = call.problem;
  const Coarse coarse(p);
  if (coarse.from == infinity) return false;
  const auto* rows = static_cast<const RowStatistics*>(call.statistics.data);
  return std::any_of(rows, rows + p.batch * p.heads * p.queries,
                     [&](const RowStatistics& row) { return coarse.has(row.reference); });
}

void backward(const BackwardCall& call) {
  const Problem& p = call.problem;
  if (p.batch * p.heads == 0) return;
  switch (p.query.element) {
    case Element::float16: return walk<float16_t, FloatTiles<float16_t>>(call);
    case Element::bfloat16:
      if (in_pairs(p) && !any_coarse(call)) return backward_bfloat16(call);
      return walk<bfloat16_t, FloatTiles<bfloat16_t>>(call);
    default: return walk<float, FloatTiles<float>>(call);
  }
}

int64_t backward_workspace(const Problem& p) {
  if (in_pairs(p)) return backward_bfloat16_workspace(p);
  return BackwardPlan<FloatTiles<float>>(p).workspace(p, threads_for(p));
}

}  // namespace fatui
