// Backward pass: the loops over key blocks and query tiles, generic in the class that multiplies the tiles.
//
// Fused, one item is a K/V head: dK and dV stay in the block, dQ in scratch, five products. When the heads are fewer
// than the threads, or dQ would not fit, two passes compute seven: dK and dV by key block, then dQ by query tile. The order
// of summation is the same either way, so that results do not depend on the number of threads.
//
// With block lists the loops visit only listed pairs of a key block and a query tile: a block is one or two tiles of the lists.
#pragma once
#include "backward.hpp"

namespace fatui {

template <class T, class Tiles>
class Walk {
 public:
  Walk(const BackwardCall& call, const KeyLists& lists, int64_t slots, int64_t query_tiles)
      : call_(call), p_(call.problem), lists_(lists), d_(padded(p_.head_dim)), dv_(padded(p_.value_dim)),
        key_block_(Tiles::block(p_)), key_sums_(scratch(BackwardPlan<Tiles>::floats(p_, slots, query_tiles) * sizeof(float))),
        value_sums_(key_sums_ + key_block_ * d_), query_sums_(value_sums_ + key_block_ * dv_),
        tiles_(call, slots, query_sums_ + query_tiles * query_tile * d_) {}

  // All three gradients of one K/V head; `after`, of all batch rows, is probably this thread's next one, or -1.
  void head(int64_t batch, int64_t kv_head, int64_t after) {
    after_ = after;
    const int64_t group = p_.heads / p_.kv_heads, tiles = ceil_div(p_.queries, query_tile);
    std::fill_n(query_sums_, group * tiles * query_tile * d_, 0.0f);
    for (int64_t key = 0; key < p_.keys; key += key_block_)
      block(batch, kv_head, key, [&](int64_t t) { return query_sums(t); });
    for (int64_t t = 0; t < group * tiles; t++)
      write_queries(query_item(batch, kv_head * group + t / tiles, t % tiles), query_sums(t));
  }

  // dK and dV of one block of keys.
  void keys(int64_t batch, int64_t kv_head, int64_t block) {
    this->block(batch, kv_head, block * key_block_, [](int64_t) { return nullptr; });
  }

  // dQ of some tiles of queries, from `tile` on; of one with lists.
  void queries(int64_t batch, int64_t head, int64_t tile, int64_t tiles) {
    std::fill_n(query_sums_, tiles * query_tile * d_, 0.0f);
    const int64_t kv_head = head / (p_.heads / p_.kv_heads);
    if (has_lists(p_)) {
      const List list = list_of(p_, batch, head, tile);
      for (const Listed* entry = list.begin; entry < list.end;) {
        const int64_t block = entry->tile / tiles_of_block();
        BlockSight sight;
        for (; entry < list.end && entry->tile / tiles_of_block() == block; entry++)
          sight.bits[entry->tile % tiles_of_block()] = entry->bits;
        open_keys(batch, kv_head, block * key_block_, false);
        listed_steps(query_item(batch, head, tile), 0, query_sums_, false, sight);
      }
    } else for (int64_t key = 0; key < p_.keys; key += key_block_) {
      bool open = false;
      for (int64_t t = 0; t < tiles; t++) {
        const Item item = query_item(batch, head, tile + t);
        if (!seen(item, key, key_block_)) continue;
        if (!std::exchange(open, true)) open_keys(batch, kv_head, key, false);
        steps(item, t, query_sums(t), false);
      }
    }
    for (int64_t t = 0; t < tiles; t++) write_queries(query_item(batch, head, tile + t), query_sums(t));
  }

 private:
  static constexpr int64_t most_tiles = largest_block / key_tile;
  static_assert(key_tile % step_keys == 0);
  int64_t tiles_of_block() const { return key_block_ / key_tile; }

  struct BlockSight {  // what a query tile sees of each tile of a block
    int32_t bits[most_tiles] = {not_listed, not_listed};
  };

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

  // One block of keys against all query tiles of a K/V head; sums_of(tile) is where dQ of a query tile goes.
  template <class Sums>
  void block(int64_t batch, int64_t kv_head, int64_t key, const Sums& sums_of) {
    const int64_t group = p_.heads / p_.kv_heads, tiles = ceil_div(p_.queries, query_tile);
    open_keys(batch, kv_head, key, true);
    for (int64_t h = 0; h < group; h++) {
      const int64_t head = kv_head * group + h;
      if (!has_lists(p_)) {
        for (int64_t t = 0; t < tiles; t++) {
          plan_prefetch(batch, kv_head, key, h * tiles + t + 1, sums_of);
          steps(query_item(batch, head, t), h * tiles + t, sums_of(h * tiles + t), true);
        }
        continue;
      }
      List list[most_tiles] = {};
      for (int64_t i = 0; i < tiles_of_block() && key + i * key_tile < p_.keys; i++)
        list[i] = lists_.of(batch, head, key / key_tile + i);
      for (;;) {
        int64_t t = tiles;
        for (const List& l : list) if (l.begin < l.end) t = std::min<int64_t>(t, l.begin->tile);
        if (t == tiles) break;
        BlockSight sight;
        for (int64_t i = 0; i < tiles_of_block(); i++)
          if (list[i].begin < list[i].end && list[i].begin->tile == t) sight.bits[i] = list[i].begin++->bits;
        listed_steps(query_item(batch, head, t), h * tiles + t, sums_of(h * tiles + t), true, sight);
      }
    }
    close_keys(batch, kv_head);
  }

  // Plans what tiles that can prefetch do prefetch meanwhile: what the next tile of queries reads; after the last one what this block
  // writes, and what the next block reads, of this head or of the next one.
  template <class Sums>
  void plan_prefetch(int64_t batch, int64_t kv_head, int64_t key, int64_t next, const Sums& sums_of) {
    if constexpr (requires { tiles_.plan_queries(query_item(0, 0, 0), 0, nullptr); }) {
      const int64_t group = p_.heads / p_.kv_heads, tiles = ceil_div(p_.queries, query_tile);
      tiles_.clear_prefetches();
      if (next < group * tiles) {
        tiles_.plan_queries(query_item(batch, kv_head * group + next / tiles, next % tiles), next, sums_of(next));
      } else {
        tiles_.plan_key_gradients(batch, kv_head, key, block_keys_);
        if (key + key_block_ < p_.keys) {
          tiles_.plan_keys(batch, kv_head, key + key_block_);
        } else if (sums_of(0) != nullptr) {
          for (int64_t h = 0; h < std::min(group, max_panels); h++) tiles_.plan_query_gradients(batch, kv_head * group + h);
          if (after_ >= 0) {
            tiles_.plan_keys(after_ / p_.kv_heads, after_ % p_.kv_heads, 0);
            tiles_.plan_queries(query_item(after_ / p_.kv_heads, after_ % p_.kv_heads * group, 0), -1, nullptr);
          }
        }
      }
      tiles_.share_prefetches(block_keys_);
    }
  }

  void open_keys(int64_t batch, int64_t kv_head, int64_t key, bool sums) {
    block_ = key, block_keys_ = std::min(key_block_, p_.keys - key);
    tiles_.open_keys(batch, kv_head, block_, block_keys_);
    if (!sums) return;
    std::fill_n(key_sums_, block_keys_ * d_, 0.0f);
    std::fill_n(value_sums_, block_keys_ * dv_, 0.0f);
  }

  void close_keys(int64_t batch, int64_t kv_head) const {
    const int64_t row = (batch * p_.kv_heads + kv_head) * p_.keys + block_;
    write_rows(static_cast<T*>(call_.key_gradient) + row * p_.head_dim, key_sums_, d_, block_keys_, p_.head_dim,
               Tiles::key_factor(p_));
    write_rows(static_cast<T*>(call_.value_gradient) + row * p_.value_dim, value_sums_, dv_, block_keys_, p_.value_dim, 1.0f);
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

  [[gnu::noinline]] void listed_steps(const Item& item, int64_t tile, float* query_sums, bool sums,
                                      const BlockSight& sight) {
    tiles_.take_queries(item, tile);
    const Bounds bounds = bounds_of(p_, item);
    uint64_t bits[key_tile];
    for (int64_t i = 0; i < tiles_of_block(); i++) {
      if (sight.bits[i] == not_listed) continue;
      if (sight.bits[i] != all_visible) read_bits(p_, sight.bits[i], item.queries, bits);
      const int64_t end = std::min(block_keys_, (i + 1) * key_tile);
      for (int64_t row = i * key_tile; row < end; row += step_keys) {
        KeyRange range{0, std::min(step_keys, end - row) - 1};
        const uint64_t* seen = sight.bits[i] == all_visible ? nullptr : bits + row - i * key_tile;
        if (seen != nullptr) range = keys_seen(seen, range.last + 1, row_bits(item.queries));
        range.first -= range.first % Tiles::first_key;
        const int64_t first = row + range.first;
        if (range.first <= range.last)
          tiles_.step({item, bounds, block_ + first, first, range.last - range.first + 1, query_sums,
                       sums ? key_sums_ + first * d_ : nullptr, sums ? value_sums_ + first * dv_ : nullptr,
                       seen == nullptr ? nullptr : seen + range.first});
      }
    }
  }

  void write_queries(const Item& item, const float* sums) const {
    T* out = static_cast<T*>(call_.query_gradient) +
             ((item.batch * p_.heads + item.head) * p_.queries + item.query) * p_.head_dim;
    Tiles::write_queries(out, sums, item.queries, p_);
  }

  const BackwardCall& call_;
  const Problem& p_;
  const KeyLists& lists_;
  int64_t d_, dv_, key_block_;
  float *key_sums_, *value_sums_, *query_sums_;
  Tiles tiles_;
  int64_t block_ = 0, block_keys_ = 0, after_ = -1;
};

template <class T, class Tiles>
void walk(const BackwardCall& call) {
  const Problem& p = call.problem;
  const BackwardPlan<Tiles> plan(p);
  const int threads = threads_for(p);
  const KeyLists lists(p);
  const int64_t key_block = Tiles::block(p), together = plan.together(p, threads);
  const BackwardItems items(p, lists, key_block / key_tile);
  if (plan.fused(threads) && items.heads_are_even(threads))
    return parallel_for(p.batch * p.kv_heads, threads, [&](int64_t index) {
      const int64_t i = items.head(index), after = index + 1 < p.batch * p.kv_heads ? items.head(index + 1) : -1;
      Walk<T, Tiles>(call, lists, plan.slots, plan.query_tiles).head(i / p.kv_heads, i % p.kv_heads, after);
    });
  const int64_t key_blocks = ceil_div(p.keys, key_block), query_tiles = ceil_div(p.queries, query_tile);
  parallel_for(p.batch * p.kv_heads * key_blocks, threads, [&](int64_t index) {
    const int64_t i = items.key_block(index), head = i / key_blocks;
    Walk<T, Tiles>(call, lists, 1, 1).keys(head / p.kv_heads, head % p.kv_heads, i % key_blocks);
  });
  const int64_t of_head = ceil_div(query_tiles, together);
  parallel_for(p.batch * p.heads * of_head, threads, [&](int64_t index) {
    const int64_t i = items.query_tile(index), head = i / of_head, tile = i % of_head * together;
    Walk<T, Tiles>(call, lists, together, together)
        .queries(head / p.heads, head % p.heads, tile, std::min(together, query_tiles - tile));
  });
}

}  // namespace fatui
