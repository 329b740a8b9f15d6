// Division of a call into work items. It depends on the shape only, not on the threads, so that results are reproducible.
//
//   rows of an item: 64, 128 or 256 queries of one head (more rows read K and V less often, but enough items must remain
//                    for all threads); or, if a head has fewer, several query heads that share a K/V head
//   keys of an item: all that the rows attend to; or, with few tiles (decoding), one of several spans
#pragma once
#include <algorithm>

#include "problem.hpp"

namespace fatui {

constexpr int64_t query_tile = 64, key_tile = 128;  // forward pass; spans begin at multiples of key_tile

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t few_rows = 8;                  // maximum query rows of an item of the kernel for few
constexpr int64_t max_panels = 4;               // maximum panels of query_tile rows per item
constexpr int64_t max_partial_bytes = 9 << 18;  // maximum size of the partial results of all spans

struct Item {
  int64_t batch, kv_head, head, heads;  // query heads [head, head + heads)
  int64_t query, queries;               // queries [query, query + queries) of each
  int64_t key_begin, key_end;           // the span, before restriction by the mask
  int64_t tile, span;
  int64_t rows() const { return heads * queries; }
};

struct Schedule {
  int64_t heads_per_tile, head_groups, tiles_per_head, tiles, spans, keys_per_span, rows_per_tile;
  bool alternate;  // items of many and of few keys, where the last queries of a head have the most

  // Uses the most rows per item, up to `panels` of them, that leave at least `items_wanted` items.
  explicit Schedule(const Problem& p, int64_t items_wanted = 64, int64_t panels = max_panels) {
    if (p.items > 0) items_wanted = p.items, panels = max_panels;
    int64_t rows_wanted = panels * query_tile;
    while (rows_wanted > query_tile && p.batch * p.heads * (p.queries / rows_wanted) < items_wanted) rows_wanted /= 2;
    const int64_t group = p.heads / p.kv_heads;
    rows_per_tile = rows_wanted;
    heads_per_tile = p.queries >= rows_wanted ? 1 : std::min(group, rows_wanted / p.queries);
    if (p.spans != nullptr) heads_per_tile = std::min(heads_per_tile, few_rows);  // which reads spans
    head_groups = ceil_div(group, heads_per_tile);
    tiles_per_head = ceil_div(p.queries, rows_wanted);
    tiles = p.batch * p.kv_heads * head_groups * tiles_per_head;
    alternate = p.window > 0 ? 4 * p.window > p.queries : p.causal;
    const bool enough = tiles >= 32 || rows_per_tile > query_tile;  // spans support one panel only
    // Rounded to the widest vector of any CPU, so that the division depends on the shape only.
    const int64_t rows = round_up(heads_per_tile * std::min(p.queries, query_tile), 16);
    const int64_t buffer = max_partial_bytes / (tiles * rows * (p.value_dim + 2) * int64_t(sizeof(float)));
    const int64_t least = p.spans == nullptr ? 512 : 2048;  // keys of a span; a stream's steps are many and short
    spans = enough ? 1 : std::max<int64_t>(1, std::min({ceil_div(32, tiles), p.keys / least, buffer}));
    keys_per_span = round_up(ceil_div(std::max<int64_t>(p.keys, 1), spans), key_tile);
    spans = ceil_div(std::max<int64_t>(p.keys, 1), keys_per_span);
  }

  int64_t items() const { return tiles * spans; }

  // Rows [64 panel, 64 (panel + 1)) of an item.
  static Item panel(Item i, int64_t panel) {
    if (i.queries <= query_tile) return i;
    i.query += panel * query_tile;
    i.queries = std::min(query_tile, i.queries - panel * query_tile);
    return i;
  }

  // Items of a head come together, as they read the same keys; the last queries come first. With a causal mask these have the most
  // keys, and each is followed by the one with as few, so that equal numbers of items are equal work.
  Item item(const Problem& p, int64_t index) const {
    Item i;
    i.tile = index / spans;
    i.span = index % spans;
    const int64_t rank = i.tile % tiles_per_head;
    const int64_t after = !alternate ? rank : rank % 2 == 0 ? rank / 2 : tiles_per_head - 1 - rank / 2;
    i.query = (tiles_per_head - 1 - after) * rows_per_tile;
    int64_t rest = i.tile / tiles_per_head;
    i.head = (rest % head_groups) * heads_per_tile;
    rest /= head_groups;
    i.kv_head = rest % p.kv_heads;
    i.batch = rest / p.kv_heads;
    const int64_t group = p.heads / p.kv_heads;
    i.heads = std::min(heads_per_tile, group - i.head);
    i.head += i.kv_head * group;
    i.queries = std::min(rows_per_tile, p.queries - i.query);
    i.key_begin = i.span * keys_per_span;
    i.key_end = std::min(p.keys, i.key_begin + keys_per_span);
    return i;
  }
};

// Keys that query i attends to: [first, last]. Lower-right aligned: the last query attends to the last key.
struct Visible {
  int64_t first, last;
};
inline Visible visible(const Problem& p, int64_t query) {
  const int64_t own = query + p.keys - p.queries;
  const bool bounded = p.causal || p.window > 0;
  return {p.window > 0 ? std::max<int64_t>(0, own - p.window + 1) : 0, bounded ? own : p.keys - 1};
}

// The forward pass of an item: of many rows, in tiles, and of few.
class Partials;

FATUI_PART void attend_float32(const ForwardCall& call, const Item& item, Partials& partials);
FATUI_PART void attend_float16(const ForwardCall& call, const Item& item, Partials& partials);
FATUI_PART void attend_widened(const ForwardCall& call, const Item& item, Partials& partials);   // in float32 and double
FATUI_PART void attend_bfloat16(const ForwardCall& call, const Item& item, Partials& partials);  // in pairs
FATUI_PART void attend_few_float32(const ForwardCall& call, const Item& item, Partials& partials);
FATUI_PART void attend_few_float16(const ForwardCall& call, const Item& item, Partials& partials);
FATUI_PART void attend_few_bfloat16(const ForwardCall& call, const Item& item, Partials& partials);

// Whether an item of a call may have few rows: all of its queries, or those after the last whole tile.
inline bool has_few_rows(int64_t queries) {
  const int64_t last = queries % query_tile;
  return last > 0 && last <= few_rows;
}

}  // namespace fatui
