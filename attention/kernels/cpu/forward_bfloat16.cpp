// Forward pass in bfloat16 with the CPU's dot-product instructions: the loops of forward_walk.hpp, on pairs.
//
//   for each tile of 128 keys:   VT = V transposed, once for up to four panels of 64 queries; then for each panel, at a mask's
//                                edge for each part of it, with the keys that it sees
//     S = K QP          bfloat16 pairs, float32 sums
//     finish_raw_scores scale, softcap, mask, bounds
//     softmax_pairs     PP, maximum, sum
//     O' += VT PP       rescaled before, in the few steps where a maximum exceeds its reference
//
// If a maximum is in the range of Coarse, beside a mask or a slope that float32 sums lose scores to, the item is computed anew
// by forward_widened.cpp.
#if defined(__AVX512BF16__)
#include "forward_walk.hpp"
#include "pair_product.hpp"

namespace fatui {

namespace {

// Transposing V is amortised over more rows than in float32.
constexpr int64_t items_wanted = 8;

// Scratch of one thread, in 32-bit words.
struct PairBuffers {
  int64_t d, dv;  // padded: whole tiles of 32 pairs' elements, of 16 rows
  float *scores, *pairs, *values, *panels;
  bfloat16_t* keys;

  static size_t floats(const Problem& p) {
    const int64_t d = round_up(p.head_dim, 32), dv = round_up(p.value_dim, 16);
    return query_tile * (pair_keys + pair_keys / 2) + dv * pair_keys / 2 + pair_keys * d / 2 +
           max_panels * query_tile * (d / 2 + dv);
  }
  explicit PairBuffers(const Problem& p) : d(round_up(p.head_dim, 32)), dv(round_up(p.value_dim, 16)) {
    scores = scratch(floats(p) * sizeof(float));
    pairs = scores + query_tile * pair_keys;
    values = pairs + query_tile * pair_keys / 2;
    float* key_words = values + dv * pair_keys / 2;
    keys = reinterpret_cast<bfloat16_t*>(key_words);
    panels = key_words + pair_keys * d / 2;
  }
  float* query(int64_t panel) const { return panels + panel * query_tile * (d / 2 + dv); }
  float* output(int64_t panel) const { return query(panel) + query_tile * d / 2; }
};

struct PairPanel {
  Item item;
  Bounds bounds;
  Softmax state;
  float *query, *output;
  int64_t width, begin, end;

  void open(const Problem& p, const Item& whole, int64_t index, const PairBuffers& buffer) {
    item = Schedule::panel(whole, index);
    bounds = bounds_of(p, item);
    state.reset();
    query = buffer.query(index), output = buffer.output(index);
    width = round_up(item.rows(), lanes);
    begin = std::max(item.key_begin, bounds.whole.any_first / pair_keys * pair_keys);
    end = std::min(item.key_end, bounds.whole.any_last + 1);
    std::fill_n(output, buffer.dv * query_tile, 0.0f);
    if (begin < end)
      turn_pairs(rows_of<bfloat16_t>(p.query, item), p.head_dim, buffer.d, width, query, buffer.keys);
  }

  // Parts of the panel that see the same keys of a tile together; each skips the others.
  void step(const Problem& p, const Floats& k, int64_t key, const uint64_t* bits, const PairBuffers& buffer,
            NextTile& next_tile) {
    if (key < begin || key >= end) return;
    const int64_t keys = std::min(pair_keys, end - key);
    for (int64_t i = 0, next; i * part_rows < width; i = next) {
      const KeyRange seen = keys_of_part(bounds, i, key, keys, bits);
      for (next = i + 1; next * part_rows < width; next++) {
        const KeyRange other = keys_of_part(bounds, next, key, keys, bits);
        if (other.first != seen.first || other.last != seen.last) break;
      }
      if (seen.first > seen.last) continue;
      const int64_t first = seen.first / pair_step * pair_step;
      attend(p, k, {buffer.scores + i * part_rows, key + first, seen.last + 1 - first, i * part_rows,
                    std::min(width, next * part_rows), next == i + 1 ? bounds.part[i] : bounds.whole,
                    bits == nullptr ? nullptr : bits + first},
             first, buffer, next_tile);
    }
  }

 private:
  void attend(const Problem& p, const Floats& k, const Scores& tile, int64_t first, const PairBuffers& buffer, NextTile& next) {
    const int64_t padded_keys = round_up(tile.keys, pair_step), i = tile.begin, columns = tile.width();
    product({k.data + first * k.stride, k.stride, query + i, query_tile, buffer.d / 2, tile.s, query_tile, nullptr, &next.key,
             next.key_lines},
            tile.keys, columns, false);
    const float factor = finish_raw_scores(tile, p, item, bounds);
    if (softmax(tile, padded_keys, factor, buffer)) correct(p.value_dim, tile);
    product({buffer.values + first / 2, pair_keys / 2, buffer.pairs + i, query_tile, padded_keys / 2, output + i, query_tile,
             nullptr, &next.value, next.value_lines},
            p.value_dim, columns, true);
  }

  bool softmax(const Scores& tile, int64_t padded_keys, float factor, const PairBuffers& buffer) {
    bool moved = false;
    int64_t i = tile.begin;
    for (; i + 4 * lanes <= tile.end; i += 4 * lanes)
      moved |= softmax_pairs<4>(buffer.scores, tile.keys, padded_keys, factor, state, i, buffer.pairs);
    for (; i < tile.end; i += lanes)
      moved |= softmax_pairs<1>(buffer.scores, tile.keys, padded_keys, factor, state, i, buffer.pairs);
    return moved;
  }

  void correct(int64_t dims, const Scores& tile) {
    for (int64_t d = 0; d < dims; d++)
      for (int64_t i = tile.begin; i < tile.end; i += lanes)
        store(output + d * query_tile + i, load(output + d * query_tile + i) * load(state.correction + i));
  }
};

void attend_pairs(const ForwardCall& call, const Item& item, Partials& partials, const Item* after) {
  const Problem& p = call.problem;
  const PairBuffers buffer(p);
  const MatrixUnit unit;
  const int64_t panels = item.heads > 1 ? 1 : ceil_div(item.queries, query_tile);
  PairPanel panel[max_panels];
  int64_t begin = p.keys, end = 0;
  for (int64_t i = 0; i < panels; i++) {
    panel[i].open(p, item, i, buffer);
    begin = std::min(begin, panel[i].begin), end = std::max(end, panel[i].end);
  }
  for_each_tile<bfloat16_t>(call, item, after, begin, end, [&](int64_t key, int64_t keys, NextTile& next, ListWalk* walk) {
    const Floats k = key_pairs(p.key, item.batch, item.kv_head, key, keys, p.head_dim, buffer.d, buffer.keys);
    turn_rows(p.value, item.batch, item.kv_head, key, keys, p.value_dim, round_up(keys, 32), buffer.values,
              pair_keys / 2);
    uint64_t bits[key_tile];
    for (int64_t i = 0; i < panels; i++) {
      const Sight sight = walk == nullptr ? Sight::all : walk->sight(i, bits);
      if (sight != Sight::none) panel[i].step(p, k, key, sight == Sight::some ? bits : nullptr, buffer, next);
    }
  });
  const Coarse coarse(p);
  for (int64_t i = 0; i < panels; i++) {
    const float* maximum = panel[i].state.maximum;
    if (std::any_of(maximum, maximum + panel[i].item.rows(), [&](float m) { return coarse.has(m); }))
      return attend_widened(call, item, partials);
  }
  for (int64_t i = 0; i < panels; i++)
    finish<bfloat16_t>(call, panel[i].item, panel[i].output, panel[i].state, partials);
}

}  // namespace

void attend_bfloat16(const ForwardCall& call, const Item& item, Partials& partials) {
  attend_pairs(call, item, partials, nullptr);
}

void forward_bfloat16(const ForwardCall& call) {
  walk<bfloat16_t>(call, Schedule(call.problem, items_wanted), attend_pairs);
}

int64_t bfloat16_workspace(const Problem& p) {
  return int64_t(threads_for(p) * PairBuffers::floats(p) * sizeof(float)) + Partials::bytes(p, Schedule(p, items_wanted));
}

}  // namespace fatui
#endif
