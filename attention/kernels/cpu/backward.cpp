// Attention, backward: dQ, dK, dV from the logsumexp, without the score matrix (Dao et al., 2022; Dao, 2023).
//
//   for each tile of 64 keys j, and each tile of 64 queries i that sees it (S' one line a key, one lane a query):
//     S' = K Q'                     P' = 2^(S' - logsumexp_i)
//     dP' = V dO'                   dS' = P' (dP' - delta_i)        delta_i = dO_i . O_i - dlogsumexp_i
//     dV += P' dO                   dK += dS' Q                     dQ' += K' dS'
//
// Fused, one item is a K/V head: dK and dV stay in the tile, dQ' in scratch, five products. When the heads are fewer
// than the threads, or dQ' would not fit, two passes do seven: dK and dV by key tile, then dQ by query tile. Each
// number is summed in the same order either way, so that the bits do not depend on the threads.
#include "backward.hpp"

namespace fatui {
namespace {

template <class T>
class Gradients {
 public:
  explicit Gradients(const BackwardCall& call, const std::vector<float>& delta, int64_t slots, int64_t sums)
      : call_(call), p_(call.problem), delta_(delta), room_(call.problem, slots, sums) {}

  // All three gradients of one K/V head.
  void head(int64_t batch, int64_t kv_head) {
    const int64_t group = p_.heads / p_.kv_heads, tiles = ceil_div(p_.queries, query_tile);
    std::fill_n(room_.query_sums, group * tiles * query_tile * p_.head_dim, 0.0f);
    for (int64_t key = 0; key < p_.keys; key += key_tile) {
      open_keys(batch, kv_head, key, true);
      for (int64_t t = 0; t < group * tiles; t++) {
        const Item item = query_item(batch, kv_head * group + t / tiles, t % tiles);
        if (prepare(item, t)) step(item, query_sums(t), true);
      }
      close_keys(batch, kv_head, key);
    }
    for (int64_t t = 0; t < group * tiles; t++)
      write_queries(query_item(batch, kv_head * group + t / tiles, t % tiles), query_sums(t));
  }

  // dK and dV of one tile of keys.
  void keys(int64_t batch, int64_t kv_head, int64_t tile) {
    const int64_t group = p_.heads / p_.kv_heads, tiles = ceil_div(p_.queries, query_tile);
    open_keys(batch, kv_head, tile * key_tile, true);
    for (int64_t t = 0; t < group * tiles; t++) {
      const Item item = query_item(batch, kv_head * group + t / tiles, t % tiles);
      if (prepare(item, t)) step(item, nullptr, true);
    }
    close_keys(batch, kv_head, tile * key_tile);
  }

  // dQ of one tile of queries.
  void queries(int64_t batch, int64_t head, int64_t tile) {
    const Item item = query_item(batch, head, tile);
    std::fill_n(room_.query_sums, query_tile * p_.head_dim, 0.0f);
    for (int64_t key = 0; key < p_.keys; key += key_tile) {
      key_ = key, keys_ = std::min(key_tile, p_.keys - key);
      if (!seen(item)) continue;
      open_keys(batch, item.kv_head, key, false);
      prepare(item, 0);
      step(item, room_.query_sums, false);
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

  bool seen(const Item& item) const {
    const Visible first = visible(p_, item.query), last = visible(p_, item.query + item.queries - 1);
    return key_ + keys_ > first.first && key_ <= last.last;
  }

  void open_keys(int64_t batch, int64_t kv_head, int64_t key, bool sums) {
    key_ = key, keys_ = std::min(key_tile, p_.keys - key);
    k_ = floats_of<T>(p_.key, batch, kv_head, key, keys_, p_.head_dim, room_.key, room_.d);
    v_ = floats_of<T>(p_.value, batch, kv_head, key, keys_, p_.value_dim, room_.value, room_.dv);
    if (sums) std::fill_n(room_.key_sums, key_tile * (room_.d + room_.dv), 0.0f);
  }

  void close_keys(int64_t batch, int64_t kv_head, int64_t key) {
    const int64_t row = (batch * p_.kv_heads + kv_head) * p_.keys + key;
    write(static_cast<T*>(call_.key_gradient) + row * p_.head_dim, room_.key_sums, room_.d, p_.head_dim, p_.scale);
    write(static_cast<T*>(call_.value_gradient) + row * p_.value_dim, room_.value_sums, room_.dv, p_.value_dim, 1.0f);
  }

  void write(T* out, const float* sums, int64_t padded, int64_t columns, float factor) const {
    for (int64_t j = 0; j < keys_; j++)
      for (int64_t d = 0; d < columns; d += lanes)
        narrow_some(out + j * columns + d, load(sums + j * padded + d) * factor, columns - d);
  }

  void write_queries(const Item& item, const float* sums) const {
    T* out = static_cast<T*>(call_.query_gradient) +
             ((item.batch * p_.heads + item.head) * p_.queries + item.query) * p_.head_dim;
    write_turned(out, sums, item.queries, p_.head_dim, p_.scale);
  }

  // The query tile's four forms (Q and dO, turned and not), packed unless its slot still holds them.
  bool prepare(const Item& item, int64_t tile) {
    if (!seen(item)) return false;
    const int64_t slot = std::min(tile, room_.slots - 1), width = round_up(item.queries, lanes);
    at_ = room_.slot(slot);
    if (room_.holds[slot] != tile) {
      room_.holds[slot] = tile;
      turn(rows_of<T>(p_.query, item), p_.head_dim, width, at_.query_turned);
      turn(rows_of<T>(call_.output_gradient, item), p_.value_dim, width, at_.gradient_turned);
    }
    q_ = rows(p_.query, item, p_.head_dim, at_.query, room_.d);
    do_ = rows(call_.output_gradient, item, p_.value_dim, at_.gradient, room_.dv);
    return true;
  }

  Floats rows(const Tensor& t, const Item& item, int64_t columns, float* room, int64_t padded) const {
    return floats_of<T>(t, item.batch, item.head, item.query, item.queries, columns, room, padded, padded == columns);
  }

  void step(const Item& item, float* query_sums, bool key_sums) {
    const int64_t width = round_up(item.queries, lanes);
    float *p = room_.scores, *ds = room_.score_gradients;
    multiply<Layout::depth_contiguous, Update::overwrite>(
        {k_.data, k_.stride, at_.query_turned, query_tile, p_.head_dim, p, query_tile, nullptr}, keys_, width);
    multiply<Layout::depth_contiguous, Update::overwrite>(
        {v_.data, v_.stride, at_.gradient_turned, query_tile, p_.value_dim, ds, query_tile, nullptr}, keys_, width);
    if (p_.softcap > 0) cap_slopes(p, room_.slopes, keys_, width, p_.scale / p_.softcap);
    const float factor = finish_scores(p, p_, item, bounds_of(p_, item), key_, keys_, width);
    score_gradients(p, ds, p_.softcap > 0 ? room_.slopes : nullptr, item, width, factor);
    if (key_sums) {
      multiply<Layout::depth_contiguous, Update::add>(
          {p, query_tile, do_.data, do_.stride, item.queries, room_.value_sums, room_.dv, nullptr}, keys_, room_.dv);
      multiply<Layout::depth_contiguous, Update::add>(
          {ds, query_tile, q_.data, q_.stride, item.queries, room_.key_sums, room_.d, nullptr}, keys_, room_.d);
    }
    if (query_sums != nullptr)
      multiply<Layout::rows_contiguous, Update::add>(
          {k_.data, k_.stride, ds, query_tile, keys_, query_sums, query_tile, nullptr}, p_.head_dim, width);
  }

  // P' from S', and dS' from dP', in place.
  void score_gradients(float* p, float* ds, const float* slopes, const Item& item, int64_t width, float factor) const {
    for (int64_t i = 0; i < width; i += lanes) {
      Vector logsumexp, delta;
      for (int64_t n = 0; n < lanes; n++) {
        const bool there = i + n < item.queries;
        const int64_t row = item.query + i + n;
        const float lse = there ? logsumexp_at(call_, item.batch, item.head, row) : 0;
        logsumexp[n] = lse == -infinity || !there ? largest : lse * log2_e;
        delta[n] = there ? delta_[(item.batch * p_.heads + item.head) * p_.queries + row] : 0;
      }
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
  const std::vector<float>& delta_;
  BackwardRoom room_;
  BackwardRoom::Slot at_{};
  Floats k_{}, v_{}, q_{}, do_{};
  int64_t key_ = 0, keys_ = 0;
};

template <class T>
void run(const BackwardCall& call) {
  const Problem& p = call.problem;
  const BackwardPlan plan(p);
  std::vector<float> delta(p.batch * p.heads * p.queries);
  const int threads = threads_for(p);
  parallel_for(p.batch * p.heads, threads, [&](int64_t i) { row_deltas<T>(call, i, delta.data() + i * p.queries); });
  if (plan.fused(threads))
    return parallel_for(p.batch * p.kv_heads, threads, [&](int64_t i) {
      Gradients<T>(call, delta, plan.slots, plan.query_tiles).head(i / p.kv_heads, i % p.kv_heads);
    });
  const int64_t key_tiles = ceil_div(p.keys, key_tile), query_tiles = ceil_div(p.queries, query_tile);
  parallel_for(p.batch * p.kv_heads * key_tiles, threads, [&](int64_t i) {
    const int64_t head = i / key_tiles;
    Gradients<T>(call, delta, 1, 1).keys(head / p.kv_heads, head % p.kv_heads, i % key_tiles);
  });
  parallel_for(p.batch * p.heads * query_tiles, threads, [&](int64_t i) {
    const int64_t head = i / query_tiles;
    Gradients<T>(call, delta, 1, 1).queries(head / p.heads, head % p.heads, i % query_tiles);
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
  return int64_t(threads * room + p.batch * p.heads * p.queries) * int64_t(sizeof(float));
}

}  // namespace fatui
