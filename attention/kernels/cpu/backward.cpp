// Attention, backward: dQ, dK, dV from the logsumexp, without the score matrix (Dao et al., 2022; Dao, 2023).
//
//   for each block of 256 keys, each tile of 64 queries i that sees it, and each tile of 64 keys j of that block
//   (S' one line a key, one lane a query):
//     S' = K Q'                     P' = 2^(S' - logsumexp_i)
//     dP' = V dO'                   dS' = P' (dP' - delta_i)        delta_i = dO_i . O_i - dlogsumexp_i
//     dV += P' dO                   dK += dS' Q                     dQ' += K' dS'
//
// Fused, one item is a K/V head: dK and dV stay in the block, dQ' in scratch, five products. When the heads are fewer
// than the threads, or dQ' would not fit, two passes do seven: dK and dV by key block, then dQ by query tile. Each
// number is summed in the same order either way, so that the bits do not depend on the threads.
#include "backward.hpp"

namespace fatui {
namespace {

template <class T>
class Gradients {
 public:
  Gradients(const BackwardCall& call, int64_t slots, int64_t sums)
      : call_(call), p_(call.problem), room_(call.problem, slots, sums) {}

  // All three gradients of one K/V head.
  void head(int64_t batch, int64_t kv_head) {
    const int64_t group = p_.heads / p_.kv_heads, tiles = ceil_div(p_.queries, query_tile);
    std::fill_n(room_.query_sums, group * tiles * query_tile * p_.head_dim, 0.0f);
    for (int64_t key = 0; key < p_.keys; key += key_block) {
      open_keys(batch, kv_head, key, true);
      for (int64_t t = 0; t < group * tiles; t++)
        steps(query_item(batch, kv_head * group + t / tiles, t % tiles), t, query_sums(t), true);
      close_keys(batch, kv_head);
    }
    for (int64_t t = 0; t < group * tiles; t++)
      write_queries(query_item(batch, kv_head * group + t / tiles, t % tiles), query_sums(t));
  }

  // dK and dV of one block of keys.
  void keys(int64_t batch, int64_t kv_head, int64_t block) {
    const int64_t group = p_.heads / p_.kv_heads, tiles = ceil_div(p_.queries, query_tile);
    open_keys(batch, kv_head, block * key_block, true);
    for (int64_t t = 0; t < group * tiles; t++)
      steps(query_item(batch, kv_head * group + t / tiles, t % tiles), t, nullptr, true);
    close_keys(batch, kv_head);
  }

  // dQ of one tile of queries.
  void queries(int64_t batch, int64_t head, int64_t tile) {
    const Item item = query_item(batch, head, tile);
    std::fill_n(room_.query_sums, query_tile * p_.head_dim, 0.0f);
    for (int64_t key = 0; key < p_.keys; key += key_block)
      if (seen(item, key, key_block)) {
        open_keys(batch, item.kv_head, key, false);
        steps(item, 0, room_.query_sums, false);
      }
    write_queries(item, room_.query_sums);
  }

 private:
  float* query_sums(int64_t tile) const { return room_.query_sums + tile * query_tile * p_.head_dim; }

  Item query_item(int64_t batch, int64_t head, int64_t tile) const {
    Item i{};
    i.batch = batch, i.head = head, i.heads = 1, i.kv_head = head / (p_.heads / p_.kv_heads);
    i.query = tile * query_tile, i.queries = std::min(query_tile, p_.queries - i.query);
    return i;
  }

  bool seen(const Item& item, int64_t key, int64_t keys) const {
    const Visible first = visible(p_, item.query), last = visible(p_, item.query + item.queries - 1);
    return key + keys > first.first && key <= last.last;
  }

  void open_keys(int64_t batch, int64_t kv_head, int64_t key, bool sums) {
    block_ = key, block_keys_ = std::min(key_block, p_.keys - key);
    k_ = floats_of<T>(p_.key, batch, kv_head, key, block_keys_, p_.head_dim, room_.key, room_.d);
    v_ = floats_of<T>(p_.value, batch, kv_head, key, block_keys_, p_.value_dim, room_.value, room_.dv);
    if (sums) std::fill_n(room_.key_sums, key_block * (room_.d + room_.dv), 0.0f);
  }

  void close_keys(int64_t batch, int64_t kv_head) {
    const int64_t row = (batch * p_.kv_heads + kv_head) * p_.keys + block_;
    write(static_cast<T*>(call_.key_gradient) + row * p_.head_dim, room_.key_sums, room_.d, p_.head_dim, p_.scale);
    write(static_cast<T*>(call_.value_gradient) + row * p_.value_dim, room_.value_sums, room_.dv, p_.value_dim, 1.0f);
  }

  void steps(const Item& item, int64_t tile, float* query_sums, bool key_sums) {
    if (!seen(item, block_, block_keys_)) return;
    prepare(item, tile);
    const Bounds bounds = bounds_of(p_, item);
    for (key_ = block_; key_ < block_ + block_keys_; key_ += step_keys) {
      keys_ = std::min(step_keys, block_ + block_keys_ - key_);
      if (seen(item, key_, keys_)) step(item, bounds, query_sums, key_sums);
    }
  }

  void write(T* out, const float* sums, int64_t padded, int64_t columns, float factor) const {
    for (int64_t j = 0; j < block_keys_; j++)
      for (int64_t d = 0; d < columns; d += lanes)
        narrow_some(out + j * columns + d, load(sums + j * padded + d) * factor, columns - d);
  }

  void write_queries(const Item& item, const float* sums) const {
    T* out = static_cast<T*>(call_.query_gradient) +
             ((item.batch * p_.heads + item.head) * p_.queries + item.query) * p_.head_dim;
    write_turned(out, sums, item.queries, p_.head_dim, p_.scale);
  }

  // The query tile's four forms (Q and dO, turned and not), packed unless its slot still holds them.
  void prepare(const Item& item, int64_t tile) {
    const int64_t slot = std::min(tile, room_.slots - 1), width = round_up(item.queries, lanes);
    at_ = room_.slot(slot);
    if (room_.holds[slot] != tile) {
      room_.holds[slot] = tile;
      turn(rows_of<T>(p_.query, item), p_.head_dim, width, at_.query_turned);
      turn(rows_of<T>(call_.output_gradient, item), p_.value_dim, width, at_.gradient_turned);
      row_statistics<T>(call_, item, at_.logsumexp, at_.delta);
    }
    q_ = rows(p_.query, item, p_.head_dim, at_.query, room_.d);
    do_ = rows(call_.output_gradient, item, p_.value_dim, at_.gradient, room_.dv);
  }

  Floats rows(const Tensor& t, const Item& item, int64_t columns, float* room, int64_t padded) const {
    return floats_of<T>(t, item.batch, item.head, item.query, item.queries, columns, room, padded, padded == columns);
  }

  void step(const Item& item, const Bounds& bounds, float* query_sums, bool key_sums) {
    const int64_t width = round_up(item.queries, lanes), row = key_ - block_;
    const float *k = k_.data + row * k_.stride, *v = v_.data + row * v_.stride;
    float *p = room_.scores, *ds = room_.score_gradients;
    multiply<Layout::depth_contiguous, Update::overwrite>(
        {k, k_.stride, at_.query_turned, query_tile, p_.head_dim, p, query_tile, nullptr}, keys_, width);
    multiply<Layout::depth_contiguous, Update::overwrite>(
        {v, v_.stride, at_.gradient_turned, query_tile, p_.value_dim, ds, query_tile, nullptr}, keys_, width);
    if (p_.softcap > 0) cap_slopes(p, room_.slopes, keys_, width, p_.scale / p_.softcap);
    const float factor = finish_scores({p, key_, keys_, 0, width, bounds.whole}, p_, item, bounds);
    score_gradients(p, ds, p_.softcap > 0 ? room_.slopes : nullptr, width, factor);
    if (key_sums) add_to_keys(item, p, ds, row);
    if (query_sums != nullptr)
      multiply<Layout::rows_contiguous, Update::add>(
          {k, k_.stride, ds, query_tile, keys_, query_sums, query_tile, nullptr}, p_.head_dim, width);
  }

  void add_to_keys(const Item& item, const float* p, const float* ds, int64_t row) const {
    float *dv = room_.value_sums + row * room_.dv, *dk = room_.key_sums + row * room_.d;
    multiply<Layout::depth_contiguous, Update::add>(
        {p, query_tile, do_.data, do_.stride, item.queries, dv, room_.dv, nullptr}, keys_, room_.dv);
    multiply<Layout::depth_contiguous, Update::add>(
        {ds, query_tile, q_.data, q_.stride, item.queries, dk, room_.d, nullptr}, keys_, room_.d);
  }

  // P' from S', and dS' from dP', in place.
  void score_gradients(float* p, float* ds, const float* slopes, int64_t width, float factor) const {
    for (int64_t i = 0; i < width; i += lanes) {
      const Vector logsumexp = load(at_.logsumexp + i), delta = load(at_.delta + i);
      for (int64_t j = 0; j < keys_; j++) {
        const int64_t at = j * query_tile + i;
        const Vector probability = exp2(load(p + at) * factor - logsumexp);
        const Vector gradient = probability * (load(ds + at) - delta);
        store(p + at, probability);
        store(ds + at, slopes == nullptr ? gradient : gradient * load(slopes + at));
      }
    }
  }

  const BackwardCall& call_;
  const Problem& p_;
  BackwardRoom room_;
  BackwardRoom::Slot at_{};
  Floats k_{}, v_{}, q_{}, do_{};
  int64_t block_ = 0, block_keys_ = 0, key_ = 0, keys_ = 0;
};

template <class T>
void run(const BackwardCall& call) {
  const Problem& p = call.problem;
  const BackwardPlan plan(p);
  const int threads = threads_for(p);
  if (plan.fused(threads))
    return parallel_for(p.batch * p.kv_heads, threads, [&](int64_t i) {
      Gradients<T>(call, plan.slots, plan.query_tiles).head(i / p.kv_heads, i % p.kv_heads);
    });
  const int64_t key_blocks = ceil_div(p.keys, key_block), query_tiles = ceil_div(p.queries, query_tile);
  parallel_for(p.batch * p.kv_heads * key_blocks, threads, [&](int64_t i) {
    const int64_t head = i / key_blocks;
    Gradients<T>(call, 1, 1).keys(head / p.kv_heads, head % p.kv_heads, i % key_blocks);
  });
  parallel_for(p.batch * p.heads * query_tiles, threads, [&](int64_t i) {
    const int64_t head = i / query_tiles;
    Gradients<T>(call, 1, 1).queries(head / p.heads, head % p.heads, i % query_tiles);
  });
}
}  // namespace

void backward(const BackwardCall& call) {
  const Problem& p = call.problem;
  if (p.batch * p.heads == 0) return;
  switch (p.query.element) {
    case Element::float16: return run<float16_t>(call);
    case Element::bfloat16: return run<bfloat16_t>(call);
    default: return run<float>(call);
  }
}

int64_t backward_workspace(const Problem& p) {
  const BackwardPlan plan(p);
  const int threads = threads_for(p);
  const bool fused = plan.fused(threads);
  const size_t room = BackwardRoom::floats(p, fused ? plan.slots : 1, fused ? plan.query_tiles : 1);
  return int64_t(threads * room * sizeof(float));
}

}  // namespace fatui
