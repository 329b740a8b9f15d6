// Backward pass: dQ, dK, dV from each row's reference and sum, without the score matrix (Dao et al., 2022; Dao, 2023).
//
//   for each block of 128 or 256 keys, each tile of 64 queries i that attends to it, and each tile of 64 keys j of that block
//   (S: one row per query, one lane per key):
//     S = Q K'                      P = e^(S - reference_i)         Q scaled, dO_i already divided by the row's sum
//     dP = dO V'                    dS = P (dP - delta_i)           delta_i = dO_i . O_i - dlogsumexp_i / sum_i
//     dV += P' dO                   dK += dS' Q                     dQ += dS K
//
// So Q and dO are only copied, and K and V transposed, once for all queries of the K/V head.
#include "backward_walk.hpp"
#include "product.hpp"

namespace fatui {
namespace {

// A step of the backward pass in float32, the same for every dtype.
class FloatSteps {
 public:
  // With the L2 of 16 registers' CPUs, the forms of a block and its gradients leave room for the tiles of queries.
  static int64_t block(const Problem& p) {
    return registers == 32 || p.head_dim + p.value_dim <= 128 ? largest_block : largest_block / 2;
  }
  static int64_t fixed(const Problem& p) {
    return 4 * step_keys * tile_line + block_line(p) * (padded(p.head_dim) + padded(p.value_dim)) +
           block(p) * row_line(p.head_dim) + query_tile * (row_line(p.head_dim) + row_line(p.value_dim));
  }
  static int64_t a_slot(const Problem&) { return row_numbers; }

  FloatSteps(const BackwardCall& call, int64_t slots, float* buffer)
      : call_(call), p_(call.problem), d_(padded(p_.head_dim)), dv_(padded(p_.value_dim)),
        query_line_(row_line(p_.head_dim)), gradient_line_(row_line(p_.value_dim)), key_line_(block_line(p_)), holds_(slots, -1) {
    scores_ = buffer;
    score_gradients_ = scores_ + step_keys * tile_line;
    slopes_ = score_gradients_ + step_keys * tile_line;
    turned_ = slopes_ + step_keys * tile_line;
    key_turned_ = turned_ + step_keys * tile_line;
    value_turned_ = key_turned_ + key_line_ * d_;
    key_ = value_turned_ + key_line_ * dv_;
    query_ = key_ + block(p_) * query_line_;
    gradient_ = query_ + query_tile * query_line_;
    slots_ = gradient_ + query_tile * gradient_line_;
  }

  [[gnu::noinline]] void step(const TileStep& t) {
    const int64_t rows = t.item.queries, width = round_up(t.keys, lanes);
    multiply_scores({query_, query_line_, key_turned_ + t.row, key_line_, p_.head_dim, scores_, tile_line, nullptr, ahead_,
                     ahead_lines_},
                    rows, width);
    multiply<Layout::depth_contiguous, Update::overwrite>({gradient_, gradient_line_, value_turned_ + t.row, key_line_,
                                                           p_.value_dim, score_gradients_, tile_line, nullptr, ahead_,
                                                           ahead_lines_},
                                                          rows, width);
    finish(t, width);
    const Extent& seen = t.bounds.whole;
    if (seen.any_first >= t.key && std::min(seen.any_last, p_.keys - 1) < t.key + t.keys) {
      make_probabilities<false>(rows, width);
      take_sums_of_tile(t.item, width);
      make_score_gradients(rows, width);
    } else {
      make_probabilities<true>(rows, width);
    }
    if (t.key_sums != nullptr) add_to_keys(t);
    if (t.query_sums != nullptr)
      multiply<Layout::depth_contiguous, Update::add>(
          {score_gradients_, tile_line, k_.data + t.row * k_.stride, k_.stride, t.keys, t.query_sums, d_, nullptr, ahead_,
           ahead_lines_},
          rows, d_);
  }

  static float key_factor(const Problem&) { return 1.0f; }  // Q is scaled
  static constexpr int64_t first_key = 1;  // some keys of a block may begin at a multiple of this

  void clear_prefetches() { prefetches_ = 0, ahead_[0] = nothing; }
  // Divides the planned lines among the register tiles of the products with the present queries and block.
  void share_prefetches(int64_t block_keys) {
    int64_t lines = 0;
    for (int i = 0; i < prefetches_; i++) {
      ahead_[i].go_on_with(i + 1 < prefetches_ ? &ahead_[i + 1] : nullptr);
      lines += ahead_[i].pieces();
    }
    const int64_t wide = (by_two ? 2 : 4) * lanes, rows = std::min(p_.queries, query_tile);
    const int64_t of_keys = ceil_div(block_keys, wide) * ceil_div(rows, 6);  // register tiles of S, and as many of dP
    const int64_t of_dims = ceil_div(d_ + dv_, wide) * ceil_div(block_keys, 6);  // of dK and dV
    ahead_lines_ = ceil_div(lines, 2 * of_keys + of_dims);
  }

 protected:
  static constexpr bool by_two = registers == 16;  // vectors of a register tile: two, or four
  static inline const Ahead nothing{Lines<float>{nullptr, 0, 0, 0}};

  // Floats from one row of K, Q or dO to the next, and of a transposed block, for the reason of tile_line.
  static int64_t row_line(int64_t dim) { return padded(dim) + (tile_line - query_tile); }
  static int64_t block_line(const Problem& p) { return block(p) + 16; }

  void take_logsumexp_gradients(const Item& item) const {
    if (call_.logsumexp_gradient.data == nullptr) return;
    for (int64_t i = 0; i < item.queries; i++)
      rows_->delta[i] -= logsumexp_gradient(call_, item, i) * rows_->inverse[i];
  }

  void plan_prefetch(const Ahead& rows) {
    if (rows.pieces() > 0 && prefetches_ < max_prefetches) ahead_[prefetches_++] = rows;
  }

 private:
  // Scores from dot products: masked ones are -inf; if any row's reference is in the range of Coarse, it is subtracted. What is
  // rare is done in a transposed tile, as in the forward pass.
  void finish(const TileStep& t, int64_t width) {
    const int64_t rows = t.item.queries;
    const Scores scores{turned_, t.key, t.keys, 0, round_up(rows, lanes), t.bounds.whole, t.bits};
    if (p_.softcap > 0) cap_slopes(scores_, slopes_, rows, width, inside_cap(p_));
    const bool scaled = !(p_.softcap > 0) && p_.mask.data == nullptr && p_.slopes.data == nullptr && t.bits == nullptr;
    if (scaled && !fine_) {
      if (!scores.all_seen() || t.keys < width) bound_rows(t, width);
      return;
    }
    turn(scores_, turned_);
    finish_scores(scores, p_, t.item, t.bounds);
    if (fine_) finish_in_double(scores, p_, t.item, {k_.data + t.row * k_.stride, k_.stride}, {rows_->reference, rows_->fine});
    for (int64_t j = t.keys; j < width; j++) std::fill_n(turned_ + j * tile_line, query_tile, -infinity);
    turn(turned_, scores_);
  }

  [[gnu::noinline]] void bound_rows(const TileStep& t, int64_t width) const {
    const Extent& seen = t.bounds.whole;
    const bool bounded = p_.causal || p_.window > 0;
    for (int64_t i = 0; i < t.item.queries; i++) {
      const int64_t first = (bounded ? t.bounds.first[i] : seen.any_first) - t.key;
      const int64_t last = std::min((bounded ? t.bounds.last[i] : seen.any_last) - t.key, t.keys - 1);
      const Integers low = Integers{} + int32_t(first), high = Integers{} + int32_t(last);
      float* s = scores_ + i * tile_line;
      for (int64_t j = 0; j < width; j += lanes) {
        if (first <= j && j + lanes - 1 <= last) continue;
        const Integers here = lane_numbers() + int32_t(j);
        store(s + j, ((here >= low) & (here <= high)) ? load(s + j) : broadcast(-infinity));
      }
    }
  }

  // Transposes a tile of 64 x 64.
  [[gnu::noinline]] static void turn(const float* from, float* to) {
    for (int64_t i = 0; i < query_tile; i += lanes)
      for (int64_t j = 0; j < step_keys; j += lanes) {
        Vector x[lanes];
        FATUI_UNROLL for (int c = 0; c < lanes; c++) x[c] = load(from + (i + c) * tile_line + j);
        transpose(x);
        FATUI_UNROLL for (int c = 0; c < lanes; c++) store(to + (j + c) * tile_line + i, x[c]);
      }
  }

  void add_to_keys(const TileStep& t) {
    const int64_t rows = t.item.queries;
    multiply<Layout::rows_contiguous, Update::add>(
        {scores_, tile_line, gradient_, gradient_line_, rows, t.value_sums, dv_, nullptr, ahead_, ahead_lines_}, t.keys, dv_);
    multiply<Layout::rows_contiguous, Update::add>(
        {score_gradients_, tile_line, query_, query_line_, rows, t.key_sums, d_, nullptr, ahead_, ahead_lines_}, t.keys, d_);
  }

  // P from S, in place, and then dS from P and dP.
  template <bool gradients>
  [[gnu::noinline]] void make_probabilities(int64_t rows, int64_t width) const {
    const bool capped = p_.softcap > 0;
    for (int64_t i = 0; i < rows; i++) {
      const Vector reference = broadcast(fine_ ? 0.0f : rows_->reference[i]), delta = broadcast(rows_->delta[i]);
      float *s = scores_ + i * tile_line, *g = score_gradients_ + i * tile_line;
      const auto some = [&]<int N>(int64_t j, Vector(&x)[N]) {
        FATUI_UNROLL for (int n = 0; n < N; n++) x[n] = (load(s + j + n * lanes) - reference) * log2_e;
        if constexpr (registers == 16 && N > 1) exp2_together(x);
        else FATUI_UNROLL for (int n = 0; n < N; n++) x[n] = exp2(x[n]);
        FATUI_UNROLL for (int n = 0; n < N; n++) {
          store(s + j + n * lanes, x[n]);
          if constexpr (gradients) store(g + j + n * lanes, x[n] * (load(g + j + n * lanes) - delta));
        }
      };
      int64_t j = 0;
      for (; j + 4 * lanes <= width; j += 4 * lanes) {
        Vector x[4];
        some(j, x);
      }
      for (; j < width; j += lanes) {
        Vector x[1];
        some(j, x);
      }
    }
    if (gradients && capped) take_slopes(rows, width);
  }

  [[gnu::noinline]] void take_slopes(int64_t rows, int64_t width) const {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t at = i * tile_line; at < i * tile_line + width; at += lanes)
        store(score_gradients_ + at, load(score_gradients_ + at) * load(slopes_ + at));
  }

  // With all keys of the queries in one tile, its own sums replace those of the forward pass, whose scores and outputs
  // were rounded differently: P is scaled to the row sum, and delta is rowsum(P dP), so that gradients that should
  // cancel do. A mean lies between the smallest and the largest dP: if all are equal, delta is exactly that.
  [[gnu::noinline]] void take_sums_of_tile(const Item& item, int64_t width) const {
    for (int64_t i = 0; i < item.queries; i += lanes) {  // the sums of as many rows as a vector has lanes
      float *s = scores_ + i * tile_line, *g = score_gradients_ + i * tile_line;
      Vector x[lanes];
      for (int c = 0; c < lanes; c++) {
        Vector sum{};
        for (int64_t j = 0; j < width; j += lanes) sum += load(s + c * tile_line + j);
        x[c] = sum;
      }
      const Vector inverse = load(rows_->inverse + i), scaled = folded(x, [](Vector a, Vector b) { return a + b; }) * inverse;
      const Vector factor = scaled > 0.0f ? 1.0f / scaled : Vector{};
      Vector least[lanes], most[lanes];
      for (int c = 0; c < lanes; c++, s += tile_line, g += tile_line) {
        const Vector own = broadcast(factor[c]);
        Vector product{}, low = Vector{} + infinity, high = Vector{} - infinity;
        for (int64_t j = 0; j < width; j += lanes) {
          const Vector probability = load(s + j) * own, gradient = load(g + j);
          store(s + j, probability);
          product = fused(product, probability, gradient);
          low = smaller(probability > 0.0f ? gradient : Vector{} + infinity, low);
          high = larger(probability > 0.0f ? gradient : Vector{} - infinity, high);
        }
        x[c] = product, least[c] = low, most[c] = high;
      }
      const Vector mean = folded(x, [](Vector a, Vector b) { return a + b; }) * inverse;
      const Vector low = folded(least, [](Vector a, Vector b) { return smaller(a, b); });
      const Vector high = folded(most, [](Vector a, Vector b) { return larger(a, b); });
      const Vector above = mean > low ? mean : low, within = above < high ? above : high;
      store(rows_->delta + i, scaled > 0.0f ? within : mean);  // rows that see nothing have no dP
    }
    take_logsumexp_gradients(item);
  }

  // Lane i of the result: what the lanes of vector i make.
  template <class Two>
  FATUI_INLINE static Vector folded(Vector (&x)[lanes], const Two& two) {
    transpose(x);
    FATUI_UNROLL for (int step = lanes / 2; step > 0; step /= 2)
      FATUI_UNROLL for (int c = 0; c < step; c++) x[c] = two(x[c], x[c + step]);
    return x[0];
  }

  // dS from P and dP, in place.
  [[gnu::noinline]] void make_score_gradients(int64_t rows, int64_t width) const {
    for (int64_t i = 0; i < rows; i++) {
      const Vector delta = broadcast(rows_->delta[i]);
      for (int64_t at = i * tile_line; at < i * tile_line + width; at += lanes)
        store(score_gradients_ + at, load(scores_ + at) * (load(score_gradients_ + at) - delta));
    }
    if (p_.softcap > 0) take_slopes(rows, width);
  }

 protected:
  const BackwardCall& call_;
  const Problem& p_;
  int64_t d_, dv_, query_line_, gradient_line_, key_line_, head_ = -1;
  bool one_value_ = false;  // for the current head
  bool fine_ = false;       // whether scores of the current queries are recomputed in double
  std::vector<int64_t> holds_;
  float *scores_, *score_gradients_, *slopes_, *turned_, *key_turned_, *value_turned_, *key_, *query_, *gradient_, *slots_;
  RowNumbers* rows_ = nullptr;
  Floats k_{};
  static constexpr int max_prefetches = 8;
  Ahead ahead_[max_prefetches] = {nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing};
  int prefetches_ = 0;       // planned ones, of these
  int64_t ahead_lines_ = 0;  // cache lines to prefetch before each register tile
};

// Tiles in float32 of a dtype: what a step reads.
template <class T>
class FloatTiles : public FloatSteps {
 public:
  using FloatSteps::FloatSteps;

  // Forms of a block of keys: K, and K and V transposed. K is in place only if whole vectors of columns can be read, and a column
  // of rows does not share sets of a small L1.
  [[gnu::noinline]] void open_keys(int64_t batch, int64_t kv_head, int64_t key, int64_t keys) {
    if (std::exchange(head_, batch * p_.kv_heads + kv_head) != batch * p_.kv_heads + kv_head)
      one_value_ = is_one_value(batch, kv_head);
    Item item{};
    item.batch = batch, item.head = kv_head, item.heads = 1, item.query = key, item.queries = keys;
    const int64_t width = round_up(keys, lanes);
    transpose_rows(rows_of<T>(p_.key, item), p_.head_dim, width, key_turned_, 1.0f, key_line_);
    transpose_rows(rows_of<T>(p_.value, item), p_.value_dim, width, value_turned_, 1.0f, key_line_);
    k_ = floats_of<T>(p_.key, batch, kv_head, key, keys, p_.head_dim, key_, query_line_,
                      registers == 32 && d_ == p_.head_dim);
  }

  // A query tile: its numbers, unless still in the slot, scaled Q, and dO divided by the sums.
  [[gnu::noinline]] void take_queries(const Item& item, int64_t tile) {
    const int64_t slot = std::min(tile, int64_t(holds_.size()) - 1);
    rows_ = reinterpret_cast<RowNumbers*>(slots_ + slot * row_numbers);
    const bool fresh = std::exchange(holds_[slot], tile) != tile;
    if (fresh) read_statistics(call_, item, *rows_);
    alignas(64) float scale[query_tile];
    std::fill_n(scale, query_tile, float(p_.scale));
    copy_rows(p_.query, item, p_.head_dim, scale, query_, query_line_);
    copy_rows(call_.output_gradient, item, p_.value_dim, rows_->inverse, gradient_, gradient_line_);
    if (fresh && needs_deltas()) make_deltas(item);
    const Coarse coarse(p_);
    fine_ = std::any_of(rows_->reference, rows_->reference + item.queries, [&](float m) { return coarse.has(m); });
  }

  // Plan what the products prefetch before it is needed: a query tile, whose sums of dQ may be null (tile -1: its statistics are in no
  // slot yet), a block of keys, rows of gradients that will be written.
  void plan_queries(const Item& item, int64_t tile, float* sums) {
    const bool fresh = tile < 0 || holds_[std::min(tile, int64_t(holds_.size()) - 1)] != tile;
    plan_rows(p_.query, item.batch, item.head, item.query, item.queries, p_.head_dim);
    plan_rows(call_.output_gradient, item.batch, item.head, item.query, item.queries, p_.value_dim);
    if (fresh && needs_deltas()) plan_rows(call_.output, item.batch, item.head, item.query, item.queries, p_.value_dim);
    if (sums != nullptr) plan_prefetch(Ahead(Lines<float>{sums, d_, d_, item.queries}, true));
  }
  void plan_keys(int64_t batch, int64_t kv_head, int64_t key) {
    const int64_t keys = std::min(p_.keys - key, block(p_));
    plan_rows(p_.key, batch, kv_head, key, keys, p_.head_dim);
    plan_rows(p_.value, batch, kv_head, key, keys, p_.value_dim);
  }
  void plan_key_gradients(int64_t batch, int64_t kv_head, int64_t key, int64_t keys) {
    const int64_t row = (batch * p_.kv_heads + kv_head) * p_.keys + key;
    plan_written(call_.key_gradient, row, keys, p_.head_dim);
    plan_written(call_.value_gradient, row, keys, p_.value_dim);
  }
  void plan_query_gradients(int64_t batch, int64_t head) {
    const int64_t row = (batch * p_.heads + head) * p_.queries;
    plan_written(call_.query_gradient, row, std::min(p_.queries, max_panels * query_tile), p_.head_dim);
  }

  static void write_queries(T* out, const float* sums, int64_t rows, const Problem& p) {
    write_rows(out, sums, padded(p.head_dim), rows, p.head_dim, p.scale);
  }

 private:
  // With all keys in one tile these are made of its own sums.
  bool needs_deltas() const { return p_.keys > step_keys || has_lists(p_); }

  void plan_rows(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t columns) {
    if (t.stride[3] == 1) plan_prefetch(Ahead(Lines<T>{row_of<const T>(t, batch, head, row), t.stride[2], columns, rows}));
  }
  void plan_written(void* rows, int64_t row, int64_t count, int64_t columns) {
    plan_prefetch(Ahead(Lines<T>{static_cast<const T*>(rows) + row * columns, columns, columns, count}, true));
  }

  // Rows of a query tile as float32, each times a factor of its own.
  [[gnu::noinline]] static void copy_rows(const Tensor& t, const Item& item, int64_t columns, const float* factors, float* out,
                                          int64_t line) {
    const int64_t stride = t.stride[3], whole = stride == 1 ? columns / lanes * lanes : 0;
    const T* from = row_of<const T>(t, item.batch, item.head, item.query);
    for (int64_t i = 0; i < item.queries; i++, from += t.stride[2], out += line) {
      const Vector factor = broadcast(factors[i]);
      int64_t c = 0;
      for (; c < whole; c += lanes) store(out + c, widen(from + c) * factor);
      for (; c < columns; c += lanes) store(out + c, widen_strided(from + c * stride, stride, columns - c) * factor);
    }
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
  void make_deltas(const Item& item) const {
    Rows<T> rows = rows_of<T>(one_value_ ? p_.value : call_.output, item);
    if (one_value_) {
      const Tensor& v = p_.value;
      std::fill_n(rows.row, rows.count, static_cast<const T*>(v.data) + item.batch * v.stride[0] + item.kv_head * v.stride[1]);
    }
    Rows<float> gradients{{}, 1, item.queries};
    for (int64_t i = 0; i < item.queries; i++) gradients.row[i] = gradient_ + i * gradient_line_;
    std::fill_n(rows_->delta, query_tile, 0.0f);
    for (int64_t i = 0; i < item.queries; i += lanes) {
      Vector sum{};
      for (int64_t d = 0; d < p_.value_dim; d += lanes) {
        Vector x[lanes], y[lanes];
        load_turned(rows, i, d, p_.value_dim, x);
        load_turned(gradients, i, d, p_.value_dim, y);
        FATUI_UNROLL for (int c = 0; c < lanes; c++) sum = fused(sum, x[c], y[c]);
      }
      store(rows_->delta + i, sum);
    }
    take_logsumexp_gradients(item);
  }
};
}  // namespace

static bool in_pairs(const Problem& p) { return bfloat16_pairs && p.query.element == Element::bfloat16; }

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
      if constexpr (bfloat16_pairs)  // elsewhere its source is empty
        if (in_pairs(p) && !any_coarse(call)) return backward_bfloat16(call);
      return walk<bfloat16_t, FloatTiles<bfloat16_t>>(call);
    default: return walk<float, FloatTiles<float>>(call);
  }
}

int64_t backward_workspace(const Problem& p) {
  if constexpr (bfloat16_pairs)
    if (in_pairs(p)) return backward_bfloat16_workspace(p);
  return BackwardPlan<FloatTiles<float>>(p).workspace(p, threads_for(p));
}

}  // namespace fatui
