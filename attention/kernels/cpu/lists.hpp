// Block lists of a structured mask: walking the key tiles that some queries see, in both directions.
//
//   forward, dQ   the tiles of 128 keys that a tile of 64 queries lists; panels and heads that share K and V walk the union
//   dK, dV        the tiles of 64 queries that list a tile of 128 keys
//
// Bits of a partial tile are transposed when they are read, because a lane is a query: bit i of word j is query i, key j.
#pragma once
#include <vector>

#include "schedule.hpp"

namespace fatui {

struct Listed {
  int32_t tile, bits;  // bits: index of the tile's bits; all_visible; or, in a pair of tiles, not_listed
};
constexpr int32_t all_visible = -1, not_listed = -2;

struct List {
  const Listed *begin, *end;
  int64_t size() const { return end - begin; }
};

inline bool has_lists(const Problem& p) { return p.lists.offsets != nullptr; }

inline int64_t plane_of(const BlockLists& l, int64_t batch, int64_t head) {
  return batch % l.batches * l.heads + head % l.heads;
}

// The key tiles that a tile of queries sees.
inline List list_of(const Problem& p, int64_t batch, int64_t head, int64_t query_tile_index) {
  const auto* entries = reinterpret_cast<const Listed*>(p.lists.entries);
  const int32_t* offsets = p.lists.offsets + plane_of(p.lists, batch, head) * ceil_div(p.queries, query_tile);
  return {entries + offsets[query_tile_index], entries + offsets[query_tile_index + 1]};
}

// Fraction of all pairs of tiles that is listed.
double listed_share(const Problem& p);

// Words of queries [0, rows): bit i is set for i < rows.
constexpr uint64_t row_bits(int64_t rows) { return rows >= query_tile ? ~uint64_t(0) : (uint64_t(1) << rows) - 1; }

// Reads the bits of a tile, transposed; bits of queries from `rows` on are 0.
void read_bits(const Problem& p, int32_t index, int64_t rows, uint64_t* seen);

// The keys of a tile, [first, last], that any of the queries in `rows` sees; first > last if there is none.
struct KeyRange {
  int64_t first, last;
};
inline KeyRange keys_seen(const uint64_t* seen, int64_t keys, uint64_t rows) {
  KeyRange range{0, keys - 1};
  while (range.first <= range.last && (seen[range.first] & rows) == 0) range.first++;
  while (range.first <= range.last && (seen[range.last] & rows) == 0) range.last--;
  return range;
}

// What a panel sees of a tile.
enum class Sight { none, some, all };

// The key tiles listed for an item, in ascending order: the union over its panels, or over the heads of its only panel.
class ListWalk {
 public:
  ListWalk(const Problem& p, const Item& item);

  // Moves to the next key tile and returns it; -1 after the last.
  int64_t next();

  // The key tile that `next` moves to; -1 if there is none.
  int64_t upcoming() const;

  // Rows of the panels that see any of the current tile.
  int64_t rows() const;

  // What a panel sees of the current tile; if that is a part, `seen` gets its bits.
  Sight sight(int64_t panel, uint64_t* seen);

 private:
  static constexpr int64_t max_lists = query_tile;

  const Problem& p_;
  const Item& item_;
  int64_t lists_;
  List rest_[max_lists];
  int32_t bits_[max_lists];  // of the current tile
  int32_t held_ = not_listed;  // tile of bits in turned_
  uint64_t turned_[key_tile];
};

// Items in an order that leaves little to wait for at the end, and spans of keys with equally many listed tiles.
class ListedItems {
 public:
  ListedItems(const Problem& p, const Schedule& schedule);
  Item item(int64_t index) const;

 private:
  const Problem& p_;
  const Schedule& schedule_;
  std::vector<int64_t> order_;  // empty without lists
  std::vector<int64_t> cuts_;   // first key of each span of each tile
};

// Indices in descending order of weight, equal ones in ascending order.
std::vector<int64_t> longest_first(const std::vector<int64_t>& weights);

// Lists by key tile: `tile` of an entry is a tile of queries.
class KeyLists {
 public:
  explicit KeyLists(const Problem& p);
  List of(int64_t batch, int64_t head, int64_t key_tile_index) const {
    const int32_t* offsets = offsets_.data() + plane_of(p_.lists, batch, head) * key_tiles_ + key_tile_index;
    return {entries_.data() + offsets[0], entries_.data() + offsets[1]};
  }

 private:
  const Problem& p_;
  int64_t key_tiles_;
  std::vector<int32_t> offsets_;
  std::vector<Listed> entries_;
};

// Orders of the backward pass's items, longest first: K/V heads, blocks of some key tiles, and query tiles.
class BackwardItems {
 public:
  BackwardItems(const Problem& p, const KeyLists& lists, int64_t tiles_of_block);

  int64_t head(int64_t index) const { return at(heads_, index); }
  int64_t key_block(int64_t index) const { return at(blocks_, index); }
  int64_t query_tile(int64_t index) const { return at(queries_, index); }

  // Whether no K/V head is much more than a thread's share of the work.
  bool heads_are_even(int threads) const { return double(longest_head_) * threads <= 1.25 * double(total_); }

 private:
  static int64_t at(const std::vector<int64_t>& order, int64_t index) { return order.empty() ? index : order[index]; }

  std::vector<int64_t> heads_, blocks_, queries_;  // empty without lists
  int64_t longest_head_ = 0, total_ = 0;
};

}  // namespace fatui
