// Backward pass in bfloat16 with the CPU's dot-product instructions: the loops of the float32 kernel, on pairs.
//
//   Pairs run along the depth, so the operands of each product are (QP etc.: pairs along d; Q2, dO2: pairs of rows):
//     S' = K QP     dP' = V dOP                                       K and V in place
//     P2 = P' in rows of bfloat16        dV += P2 dO2                 [key][query / 2]
//     dS2 = dS' in rows of bfloat16      dK += dS2 Q2
//     dSP = dS' in pairs of keys         dQ' += KT dSP                KT[d][key / 2], dSP[key / 2][query]
#if defined(__AVX512BF16__)
#include "backward_walk.hpp"
#include "pair_product.hpp"

namespace fatui {

namespace {

constexpr int64_t key_block = largest_block;

// Subtracts the reference first if it is large, as in the forward pass; returns whether it did.
inline bool subtract_first(float* s, int64_t keys, int64_t width, float factor, const RowNumbers& rows) {
  const bool first = std::any_of(rows.reference, rows.reference + query_tile, beyond_offset);
  for (int64_t i = 0; i < width && first; i += lanes) subtract<1>(s + i, keys, factor, {load(rows.reference + i)});
  return first;
}

// dO . O of each row minus the gradient of the logsumexp.
void read_deltas(const BackwardCall& call, const Item& item, RowNumbers& rows) {
  const Tensor &o = call.output, &g = call.output_gradient;
  const int64_t columns = call.problem.value_dim;
  for (int64_t i = 0; i < item.queries; i++) {
    const auto* a = static_cast<const bfloat16_t*>(o.data) + row_offset(o, item, i);
    const auto* b = static_cast<const bfloat16_t*>(g.data) + row_offset(g, item, i);
    Vector sum{};
    for (int64_t d = 0; d < columns; d += lanes)
      sum += widen_strided(a + d * o.stride[3], o.stride[3], columns - d) *
             widen_strided(b + d * g.stride[3], g.stride[3], columns - d);
    rows.delta[i] = sum_of(sum) - logsumexp_gradient(call, item, i);
  }
  std::fill(rows.delta + item.queries, rows.delta + query_tile, 0.0f);
}

// Writes rows from a transposed tile, scaled by a factor.
template <class T>
void write_transposed(T* out, const float* transposed, int64_t rows, int64_t columns, float factor) {
  for (int64_t row = 0; row < rows; row += lanes)
    for (int64_t d = 0; d < columns; d += lanes) {
      Vector x[lanes];
      for (int c = 0; c < lanes; c++)
        x[c] = d + c < columns ? load(transposed + (d + c) * query_tile + row) * factor : Vector{};
      transpose(x);
      for (int64_t r = 0; r < std::min<int64_t>(lanes, rows - row); r++)
        narrow_some(out + (row + r) * columns + d, x[r], columns - d);
    }
}

class PairTiles {
 public:
  static int64_t block(const Problem&) { return key_block; }
  // In words: three tiles of float32 and three of bfloat16, K, V and KT of the block, and scratch to transpose a tile.
  static int64_t fixed(const Problem& p) {
    const int64_t d = words_of(p.head_dim), dv = words_of(p.value_dim);
    return query_tile * step_keys * 9 / 2 + key_block * (2 * d + dv) + query_tile * std::max(d, dv);
  }
  static int64_t a_slot(const Problem& p) {
    return query_tile * 2 * (words_of(p.head_dim) + words_of(p.value_dim)) + row_numbers;
  }

  PairTiles(const BackwardCall& call, int64_t slots, float* buffer)
      : call_(call), p_(call.problem), d_(words_of(p_.head_dim)), dv_(words_of(p_.value_dim)), holds_(slots, -1) {
    scores_ = buffer;
    score_gradients_ = scores_ + query_tile * step_keys;
    slopes_ = score_gradients_ + query_tile * step_keys;
    probability_rows_ = reinterpret_cast<bfloat16_t*>(slopes_ + query_tile * step_keys);
    gradient_rows_ = probability_rows_ + query_tile * step_keys;
    gradient_pairs_ = words(gradient_rows_ + query_tile * step_keys);
    key_ = gradient_pairs_ + query_tile * step_keys / 2;
    value_ = key_ + key_block * d_;
    key_turned_ = value_ + key_block * dv_;
    copy_ = key_turned_ + key_block * d_;
    slots_ = copy_ + query_tile * std::max(d_, dv_);
  }

  [[gnu::noinline]] void open_keys(int64_t batch, int64_t kv_head, int64_t key, int64_t keys) {
    k_ = key_pairs(p_.key, batch, kv_head, key, keys, p_.head_dim, 2 * d_, halves(key_));
    v_ = key_pairs(p_.value, batch, kv_head, key, keys, p_.value_dim, 2 * dv_, halves(value_));
    turn_rows(p_.key, batch, kv_head, key, keys, p_.head_dim, round_up(keys, 32), key_turned_, key_block / 2);
  }

  // Forms of a query tile: Q and dO, transposed and as pairs of rows, unless still in the slot.
  [[gnu::noinline]] void take_queries(const Item& item, int64_t tile) {
    const int64_t slot = std::min(tile, int64_t(holds_.size()) - 1), width = round_up(item.queries, 32);
    query_transposed_ = slots_ + slot * a_slot(p_), gradient_transposed_ = query_transposed_ + query_tile * d_;
    query_rows_ = gradient_transposed_ + query_tile * dv_, gradient_row_pairs_ = query_rows_ + query_tile * d_;
    rows_ = reinterpret_cast<RowNumbers*>(gradient_row_pairs_ + query_tile * dv_);
    if (holds_[slot] == tile) return;
    holds_[slot] = tile;
    const auto q = rows_of<bfloat16_t>(p_.query, item), g = rows_of<bfloat16_t>(call_.output_gradient, item);
    turn_pairs(q, p_.head_dim, 2 * d_, width, query_transposed_, halves(copy_));
    turn_pairs(g, p_.value_dim, 2 * dv_, width, gradient_transposed_, halves(copy_));
    pair_rows(q, p_.head_dim, query_rows_, 2 * d_);
    pair_rows(g, p_.value_dim, gradient_row_pairs_, 2 * dv_);
    read_statistics(call_, item, *rows_);
    read_deltas(call_, item, *rows_);
  }

  // dQ' is [d][query]; queries and keys are not scaled before.
  static void write_queries(bfloat16_t* out, const float* sums, int64_t rows, const Problem& p) {
    write_transposed(out, sums, rows, p.head_dim, p.scale);
  }
  static float key_factor(const Problem& p) { return p.scale; }
  static constexpr int64_t first_key = pair_step;

  void step(const TileStep& t) {
    const int64_t width = round_up(t.item.queries, 32), keys = round_up(t.keys, pair_step);
    product({k_.data + t.row * k_.stride, k_.stride, query_transposed_, query_tile, d_, scores_, query_tile, nullptr},
            t.keys, width, false);
    product({v_.data + t.row * v_.stride, v_.stride, gradient_transposed_, query_tile, dv_, score_gradients_, query_tile,
             nullptr},
            t.keys, width, false);
    if (p_.softcap > 0) cap_slopes(scores_, slopes_, t.keys, width, p_.scale * inside_cap(p_));
    const float factor = finish_raw_scores({scores_, t.key, t.keys, 0, width, t.bounds.whole, t.bits}, p_, t.item, t.bounds);
    const bool subtracted = subtract_first(scores_, t.keys, width, factor, *rows_);
    for (int64_t j = 0; j < keys; j += 2)
      score_gradients(j, t.keys, width, subtracted ? 1.0f : factor * log2_e, subtracted);
    if (t.key_sums != nullptr) {
      product({words(probability_rows_), query_tile / 2, gradient_row_pairs_, 2 * dv_, width / 2, t.value_sums,
               padded(p_.value_dim), nullptr},
              t.keys, padded(p_.value_dim), true);
      product({words(gradient_rows_), query_tile / 2, query_rows_, 2 * d_, width / 2, t.key_sums, padded(p_.head_dim),
               nullptr},
              t.keys, padded(p_.head_dim), true);
    }
    if (t.query_sums != nullptr)
      product({key_turned_ + t.row / 2, key_block / 2, gradient_pairs_, query_tile, keys / 2, t.query_sums, query_tile,
               nullptr},
              p_.head_dim, width, true);
  }

 private:
  static int64_t words_of(int64_t dim) { return round_up(dim, 32) / 2; }
  static bfloat16_t* halves(float* p) { return reinterpret_cast<bfloat16_t*>(p); }
  static float* words(bfloat16_t* p) { return reinterpret_cast<float*>(p); }

  // P' from S' and dS' from dP' for keys j and j + 1, in the operand layouts of the products; zeros for missing keys.
  void score_gradients(int64_t j, int64_t keys, int64_t width, float factor, bool subtracted) const {
    for (int64_t i = 0; i < width; i += lanes) {
      const Vector offset = subtracted ? Vector{} : in_register(load(rows_->reference + i) * log2_e);
      Vector gradient[2];
      FATUI_UNROLL for (int64_t n = 0; n < 2; n++) {
        const int64_t at = (j + n) * query_tile + i;
        const bool there = j + n < keys;
        const Vector p =
            there ? exp2_short(load(scores_ + at) * factor - offset) * load(rows_->inverse + i) : Vector{};
        gradient[n] = there ? p * (load(score_gradients_ + at) - load(rows_->delta + i)) : Vector{};
        if (p_.softcap > 0 && there) gradient[n] *= load(slopes_ + at);
        narrow_short(probability_rows_ + at, p);
        narrow_short(gradient_rows_ + at, gradient[n]);
      }
      store(gradient_pairs_ + j / 2 * query_tile + i, rounded_pair(gradient[0], gradient[1]));
    }
  }

  const MatrixUnit unit_;
  const BackwardCall& call_;
  const Problem& p_;
  int64_t d_, dv_;  // padded, in words
  std::vector<int64_t> holds_;
  float *scores_, *score_gradients_, *slopes_, *gradient_pairs_, *key_, *value_, *key_turned_, *copy_, *slots_;
  bfloat16_t *probability_rows_, *gradient_rows_;
  float *query_transposed_ = nullptr, *gradient_transposed_ = nullptr, *query_rows_ = nullptr, *gradient_row_pairs_ = nullptr;
  RowNumbers* rows_ = nullptr;
  Floats k_{}, v_{};
};
}  // namespace

void backward_bfloat16(const BackwardCall& call) { walk<bfloat16_t, PairTiles>(call); }

int64_t backward_bfloat16_workspace(const Problem& p) {
  return BackwardPlan<PairTiles>(p).workspace(p, threads_for(p));
}

}  // namespace fatui
#endif
