// The loops of the forward pass: a query tile against all its keys, tile by tile, without the score matrix.
//
//                 64 queries (lanes)                     for each tile of 128 keys:
//               +--------------------+                     S = K Q'            S[key][query]
//        Q'     | D x 64, transposed |                     finish_scores       softcap, masks, bounds
//               +--------------------+                     softmax_step        P, maximum, sum, correction
//   +-------+   +--------------------+                     O' = O' * correction + V' P
//   | K     | . |  S, then P         |                   and at the end O = (O' / sum), transposed
//   | 128xD |   |  128 keys x 64     |
//   +-------+   +--------------------+                   K and V are read in place; Q' S O' stay in the
//   +-------+   +--------------------+                   caches of the core: 64 (D + Dv + 128) floats
//   | V'    | . |  O'   Dv x 64      |
//   +-------+   +--------------------+
#pragma once
#include <array>

#include "decode_products.hpp"
#include "forward.hpp"
#include "product.hpp"
#include "quantized.hpp"

namespace fatui {
namespace {

// With 16 registers a part of a panel, 16 queries, is two vectors, one register tile: each is computed from scores to output by
// itself, all in the same columns of S, which so stay in the L1. Two parts that see all keys of a tile are computed together, in
// wide register tiles, unless the depth is so short that most of what these save is spent at their ends.
constexpr bool by_parts = registers == 16;

// The tile of K and V after the present one, in whatever type, prefetched in equal shares by the register tiles of the products
// with the present one: from beyond the L2 it would come too late.
struct NextTile {
  Ahead key, value;
  int64_t key_lines = 0, value_lines = 0;  // for each register tile
  std::array<Ahead*, 2> rows = {};  // prefetched after the keys, and after the values

  // Keys from `first` on of an item, at most `keys`, while panels of `columns` queries in all are computed.
  template <class T>
  static NextTile of(const Problem& p, const Item& item, int64_t first, int64_t keys, int64_t columns) {
    keys = is_quantized(p) ? 0 : std::min(keys, key_tile);
    const auto rows = [&](const Tensor& t, int64_t dims) {
      return Ahead(Lines<T>{row_of<const T>(t, item.batch, item.kv_head, first), t.stride[2], dims, keys});
    };
    NextTile next{rows(p.key, p.head_dim), rows(p.value, p.value_dim)};
    const int64_t wide = (by_parts ? 2 : 4) * lanes, across = ceil_div(columns, wide);
    next.key_lines = ceil_div(next.key.pieces(), across * (key_tile / 6) * ceil_div(p.head_dim, depth_at_once));
    next.value_lines = ceil_div(next.value.pieces(), across * ceil_div(p.value_dim, 6));
    return next;
  }
  // The tile that is listed next, for the item or else first for the one after it.
  template <class T>
  static NextTile listed(const Problem& p, const Item& item, const Item* after, const ListWalk& walk) {
    int64_t tile = walk.upcoming();
    const bool ends = tile < 0 && after != nullptr;
    if (ends) tile = ListWalk(p, *after).upcoming();
    const Item& owner = ends ? *after : item;
    return of<T>(p, owner, std::max<int64_t>(tile, 0) * key_tile, tile < 0 ? 0 : p.keys - tile * key_tile, walk.rows());
  }
  // The first tile of an item.
  template <class T>
  static NextTile first(const Problem& p, const Item& item, int64_t columns) {
    const int64_t key = std::max(item.key_begin, visible(p, item.query).first / key_tile * key_tile);
    return of<T>(p, item, key, item.key_end - key, columns);
  }
};

constexpr int64_t few_keys = 4 * key_tile;

// Whether an item finds its first keys and values in the L2: those of the whole head are a quarter of it at most, and the item before
// had them. Prefetching them again would take time from the products.
template <class T>
bool finds_keys(const Problem& p, const Item& before, const Item& item) {
  constexpr int64_t kept = registers == 16 ? 128 << 10 : 0;  // bytes
  return before.batch == item.batch && before.kv_head == item.kv_head &&
         p.keys * (p.head_dim + p.value_dim) * int64_t(sizeof(T)) <= kept;
}

// Rows of the next item's queries and of this item's output, of one head, prefetched between those of keys and values: an item with
// few keys would wait for them as long as for a tenth of its products.
template <class T>
struct NextRows {
  Ahead queries, output;

  static Lines<T> none() { return {nullptr, 0, 0, 0}; }
  NextRows(const ForwardCall& call, const Item& item, const Item* after)
      : queries(after == nullptr || after->heads > 1 || call.problem.query.stride[3] != 1
                    ? none()
                    : Lines<T>{row_of<const T>(call.problem.query, after->batch, after->head, after->query),
                               call.problem.query.stride[2], call.problem.head_dim, after->queries}),
        output(item.heads > 1 ? none()
                              : Lines<T>{static_cast<const T*>(call.output) +
                                             ((item.batch * call.problem.heads + item.head) * call.problem.queries + item.query) *
                                                 call.problem.value_dim,
                                         call.problem.value_dim, call.problem.value_dim, item.queries},
               true) {}

  // After the keys and values of a tile, of which each register tile asks for some times its share: with a window panels skip tiles
  // and parts of them. `more`: lines that it asks for besides; an item of one tile has no other to ask for its rows.
  NextTile after(NextTile tile, int64_t shares, int64_t more = 2) {
    tile.rows = {&queries, &output};
    tile.key_lines = shares * tile.key_lines + more, tile.value_lines = shares * tile.value_lines + more;
    return tile;
  }
};

// State of a panel of 64 queries across key tiles.
struct Panel {
  Item item;
  Bounds bounds;
  Softmax state;
  Buffers buffer;
  int64_t width, begin, end;
  bool started[parts] = {};  // whether the output of each part is initialised

  template <class T>
  void open(const Problem& p, const Item& whole, int64_t index) {
    item = Schedule::panel(whole, index);
    buffer = Buffers(p, index);
    bounds = bounds_of(p, item);
    state.reset();
    width = round_up(item.rows(), lanes);
    begin = std::max(item.key_begin, bounds.whole.any_first / key_tile * key_tile);
    end = std::min(item.key_end, bounds.whole.any_last + 1);
    if (begin < end) transpose_rows(rows_of<T>(p.query, item), p.head_dim, width, buffer.query, p.scale);
  }

  void step(const Problem& p, const Floats& k, const Floats& v, int64_t key, const uint64_t* bits, NextTile& next_tile) {
    if (key < begin || key >= end) return;
    const int64_t keys = std::min(key_tile, end - key);
    if constexpr (!by_parts) {
      const Scores whole{buffer.scores, key, keys, 0, width, bounds.whole};
      const bool alike = std::all_of(started, started + ceil_div(width, part_rows), [&](bool s) { return s == started[0]; });
      if (bits == nullptr && alike && whole.all_seen()) return attend(p, k, v, whole, next_tile);
    }
    // At the mask's edge each part skips the keys that none of its queries sees; parts that see the same keys stay together.
    for (int64_t i = 0, next; i * part_rows < width; i = next) {
      const KeyRange seen = keys_of_part(bounds, i, key, keys, bits);
      for (next = i + 1; !by_parts && bits != nullptr && next * part_rows < width && started[next] == started[i]; next++) {
        const KeyRange other = keys_of_part(bounds, next, key, keys, bits);
        if (other.first != seen.first || other.last != seen.last) break;
      }
      if (seen.first > seen.last) continue;
      if (wide_tiles && p.head_dim > 32 && bits == nullptr && i % 2 == 0 && next * part_rows + part_rows <= width &&
          started[next] == started[i] && sees_all(i, key, keys) && sees_all(next, key, keys))
        next++;
      attend(p, {k.data + seen.first * k.stride, k.stride}, {v.data + seen.first * v.stride, v.stride},
             {buffer.scores + (by_parts ? 0 : i * part_rows), key + seen.first, seen.last - seen.first + 1, i * part_rows, std::min(width, next * part_rows),
              bounds.part[i], bits == nullptr ? nullptr : bits + seen.first}, next_tile);
    }
  }

  // Outputs that no step reached are 0.
  void close(int64_t dims) {
    for (int64_t i = 0; i < parts; i++)
      for (int64_t d = 0; d < dims && !started[i]; d++)
        std::fill_n(buffer.output + d * tile_line + i * part_rows, part_rows, 0.0f);
  }

 private:
  // Whether all queries of a part see all keys of a tile.
  bool sees_all(int64_t i, int64_t key, int64_t keys) const {
    return bounds.part[i].all_first <= key && bounds.part[i].all_last >= key + keys - 1;
  }

  void attend(const Problem& p, const Floats& k, const Floats& v, const Scores& tile, NextTile& next) {
    const int64_t i = tile.begin;
    alignas(64) float largest[query_tile];
    float* const known = only_scaled(tile, p) ? std::fill_n(largest, tile.width(), -infinity) - tile.width() : nullptr;
    multiply_scores({k.data, k.stride, buffer.query + i, tile_line, p.head_dim, tile.s, tile_line, nullptr, &next.key,
                     next.key_lines, known},
                    tile.keys, tile.width());
    finish_scores(tile, p, item, bounds);
    softmax_step(tile, state, Coarse(p), known, [&](int64_t column, int64_t columns) {
      finish_in_double({tile.at(0, column), tile.key, tile.keys, column, column + columns, tile.seen, tile.bits}, p, item, k,
                       {state.maximum, state.fine}, state.correction);
    });
    const Operands to_output{v.data,    v.stride,  tile.s, tile_line, tile.keys, buffer.output + i, tile_line,
                             state.correction + i, &next.value, next.value_lines};
    if (started[i / part_rows])
      multiply<Layout::rows_contiguous, Update::rescale>(to_output, p.value_dim, tile.width());
    else
      multiply<Layout::rows_contiguous, Update::overwrite>(to_output, p.value_dim, tile.width());
    for (int64_t row = tile.begin; row < tile.end; row += part_rows) started[row / part_rows] = true;
  }
};

// Calls f(key, keys, next tile, walk) for each tile of an item whose panels see keys [begin, end); the tile is the walk's current
// one, or without lists the walk is null. `after` is the item that probably follows on this thread, or null.
template <class T, class F>
void for_each_tile(const ForwardCall& call, const Item& item, const Item* after, int64_t begin, int64_t end, const F& f) {
  const Problem& p = call.problem;
  NextRows<T> rows(call, item, after);
  const bool prefetch_first = after != nullptr && !finds_keys<T>(p, item, *after);
  const auto next_tile = [&](const NextTile& tile) {
    if (p.window > 0) return rows.after(tile, 2);
    return end - begin <= key_tile ? rows.after(tile, 1, 8) : end - begin <= few_keys ? rows.after(tile, 1) : tile;
  };
  const auto take = [&](int64_t key, int64_t keys, NextTile next, ListWalk* walk) {
    next.key.go_on_with(next.rows[0]), next.value.go_on_with(next.rows[1]);
    f(key, keys, next, walk);
  };
  if (has_lists(p)) {
    ListWalk walk(p, item);
    for (int64_t tile; (tile = walk.next()) >= 0;)
      take(tile * key_tile, std::min(key_tile, p.keys - tile * key_tile),
           rows.after(NextTile::listed<T>(p, item, after, walk), 1), &walk);
    return;
  }
  for (int64_t key = begin, next; key < end; key = next) {
    next = std::min(key + key_tile, end);
    take(key, next - key,
         next_tile(next == end && prefetch_first ? NextTile::first<T>(p, *after, item.rows())
                                                 : NextTile::of<T>(p, item, next, end - next, item.rows())),
         nullptr);
  }
}

// All panels of an item against one tile of keys.
template <class T>
void share_tile(const Problem& p, const Item& item, Panel* panel, int64_t panels, int64_t key, int64_t keys, NextTile& next,
                ListWalk* walk) {
  const Buffers& buffer = panel[0].buffer;
  const Floats k =
      floats_of<T>(p.key, p.key_packing, item.batch, item.kv_head, key, keys, p.head_dim, buffer.key, buffer.d);
  const Floats v =
      floats_of<T>(p.value, p.value_packing, item.batch, item.kv_head, key, keys, p.value_dim, buffer.value, buffer.dv);
  uint64_t bits[key_tile];
  for (int64_t i = 0; i < panels; i++) {
    const Sight sight = walk == nullptr ? Sight::all : walk->sight(i, bits);
    if (sight != Sight::none) panel[i].step(p, k, v, key, sight == Sight::some ? bits : nullptr, next);
  }
}

template <class T>
void attend_panels(const ForwardCall& call, const Item& item, Partials& partials, const Item* after = nullptr) {
  const Problem& p = call.problem;
  const int64_t panels = item.heads > 1 ? 1 : ceil_div(item.queries, query_tile);
  Panel panel[max_panels];
  int64_t begin = p.keys, end = 0;
  for (int64_t i = 0; i < panels; i++) {
    panel[i].open<T>(p, item, i);
    if (panel[i].begin < panel[i].end) begin = std::min(begin, panel[i].begin), end = std::max(end, panel[i].end);
  }
  for_each_tile<T>(call, item, after, begin, end, [&](int64_t key, int64_t keys, NextTile& next, ListWalk* walk) {
    share_tile<T>(p, item, panel, panels, key, keys, next, walk);
  });
  for (int64_t i = 0; i < panels; i++) {
    panel[i].close(p.value_dim);
    finish<T>(call, panel[i].item, panel[i].buffer.output, panel[i].state, partials);
  }
}

template <class T>
void attend(const ForwardCall& call, const Item& item, Partials& partials, const Item* after) {
  if (item.rows() > few_rows) return attend_panels<T>(call, item, partials, after);
  if constexpr (std::is_same_v<T, float>) attend_few_float32(call, item, partials);
  else if constexpr (std::is_same_v<T, float16_t>) attend_few_float16(call, item, partials);
  else attend_few_bfloat16(call, item, partials);
}

// All items, each by attend(call, item, partials, the item after it or null).
template <class T, class Attend>
void walk(const ForwardCall& call, const Schedule& schedule, const Attend& attend) {
  const Problem& p = call.problem;
  const ListedItems items(p, schedule);
  Partials partials(p, schedule);
  const auto attend_item = [&](int64_t index) {
    const bool last = index + 1 == schedule.items();
    const Item item = items.item(index), after = last ? item : items.item(index + 1);  // probably of the same thread
    attend(call, item, partials, last ? nullptr : &after);
  };
  parallel_for(schedule.items(), threads_for(p), attend_item, brief(p));
  if (partials.wanted()) partials.combine<T>(call, schedule);
}

template <class T>
void walk(const ForwardCall& call) { walk<T>(call, schedule_of(call.problem), attend<T>); }
}  // namespace

}  // namespace fatui
