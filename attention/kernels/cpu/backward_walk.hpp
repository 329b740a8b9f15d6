// Backward pass: the loops over key blocks and query tiles, generic in the class that multiplies the tiles.
//
// Fused, one item is a K/V head: dK and dV stay in the block, dQ' in scratch, five products. When the heads are fewer
// than the threads, or dQ' would not fit, two passes compute seven: dK and dV by key block, then dQ by query tile. The order
// of summation is the same either way, so that results do not depend on the number of threads.
#pragma once
#include "backward.hpp"

namespace fatui {

template <class T, class Tiles>
class Walk {
 public:
  Walk(const BackwardCall& call, int64_t slots, int64_t query_tiles)
      : call_(call), p_(call.problem), d_(padded(p_.head_dim)), dv_(padded(p_.value_dim)),
        key_sums_(scratch(BackwardPlan<Tiles>::floats(p_, slots, query_tiles) * sizeof(float))),
        value_sums_(key_sums_ + key_block * d_), query_sums_(value_sums_ + key_block * dv_),
        tiles_(call, slots, query_sums_ + query_tiles * query_tile * d_) {}

  // All three gradients of one K/V head.
  void head(int64_t batch, int64_t kv_head) {
    const int64_t group = p_.heads / p_.kv_heads, tiles = ceil_div(p_.queries, query_tile);
    std::fill_n(query_sums_, group * tiles * query_tile * d_, 0.0f);
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
    std::fill_n(query_sums_, query_tile * d_, 0.0f);
    for (int64_t key = 0; key < p_.keys; key += key_block)
      if (seen(item, key, key_block)) {
        open_keys(batch, item.kv_head, key, false);
        steps(item, 0, query_sums_, false);
      }
    write_queries(item, query_sums_);
  }

 private:
  float* query_sums(int64_t tile) const { return query_sums_ + tile * query_tile * d_; }

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
    tiles_.open_keys(batch, kv_head, block_, block_keys_);
    if (sums) std::fill_n(key_sums_, key_block * (d_ + dv_), 0.0f);
  }

  void close_keys(int64_t batch, int64_t kv_head) const {
    const int64_t row = (batch * p_.kv_heads + kv_head) * p_.keys + block_;
    write(static_cast<T*>(call_.key_gradient) + row * p_.head_dim, key_sums_, d_, p_.head_dim, p_.scale);
    write(static_cast<T*>(call_.value_gradient) + row * p_.value_dim, value_sums_, dv_, p_.value_dim, 1.0f);
  }

  [[gnu::noinline]] void steps(const Item& item, int64_t tile, float* query_sums, bool sums) {
    if (!seen(item, block_, block_keys_)) return;
    tiles_.take_queries(item, tile);
    const Bounds bounds = bounds_of(p_, item);
    for (int64_t row = 0; row < block_keys_; row += step_keys) {
      const int64_t key = block_ + row, keys = std::min(step_keys, block_keys_ - row);
      if (seen(item, key, keys))
        tiles_.step({item, bounds, key, row, keys, query_sums, sums ? key_sums_ + row * d_ : nullptr,
                     sums ? value_sums_ + row * dv_ : nullptr});
    }
  }

  void write(T* out, const float* sums, int64_t line, int64_t columns, float factor) const {
    for (int64_t j = 0; j < block_keys_; j++)
      for (int64_t d = 0; d < columns; d += lanes)
        narrow_some(out + j * columns + d, load(sums + j * line + d) * factor, columns - d);
  }

  void write_queries(const Item& item, const float* sums) const {
    T* out = static_cast<T*>(call_.query_gradient) +
             ((item.batch * p_.heads + item.head) * p_.queries + item.query) * p_.head_dim;
    write_turned(out, sums, item.queries, p_.head_dim, p_.scale);
  }

  const BackwardCall& call_;
  const Problem& p_;
  int64_t d_, dv_;
  float *key_sums_, *value_sums_, *query_sums_;
  Tiles tiles_;
  int64_t block_ = 0, block_keys_ = 0;
};

template <class T, class Tiles>
void walk(const BackwardCall& call) {
  const Problem& p = call.problem;
  const BackwardPlan<Tiles> plan(p);
  const int threads = threads_for(p);
  if (plan.fused(threads))
    return parallel_for(p.batch * p.kv_heads, threads, [&](int64_t i) {
      Walk<T, Tiles>(call, plan.slots, plan.query_tiles).head(i / p.kv_heads, i % p.kv_heads);
    });
  const int64_t key_blocks = ceil_div(p.keys, key_block), query_tiles = ceil_div(p.queries, query_tile);
  parallel_for(p.batch * p.kv_heads * key_blocks, threads, [&](int64_t i) {
    const int64_t head = i / key_blocks;
    Walk<T, Tiles>(call, 1, 1).keys(head / p.kv_heads, head % p.kv_heads, i % key_blocks);
  });
  parallel_for(p.batch * p.heads * query_tiles, threads, [&](int64_t i) {
    const int64_t head = i / query_tiles;
    Walk<T, Tiles>(call, 1, 1).queries(head / p.heads, head % p.heads, i % query_tiles);
  });
}

}  // namespace fatui
