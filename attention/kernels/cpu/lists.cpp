#include "lists.hpp"

#include <numeric>
#include <utility>

namespace fatui {
namespace {

constexpr int64_t line = key_tile / 32;  // words of a query's bits

template <int width>
void swap_blocks(uint64_t* x, uint64_t low) {
  for (int base = 0; base < 64; base += 2 * width)
    for (int r = base; r < base + width; r++) {
      const uint64_t changed = ((x[r] >> width) ^ x[r + width]) & low;
      x[r] ^= changed << width, x[r + width] ^= changed;
    }
}

// Transposes a square of bits: bit c of row r and bit r of row c are exchanged.
void transpose_bits(uint64_t* x) {
  swap_blocks<32>(x, 0x00000000ffffffff), swap_blocks<16>(x, 0x0000ffff0000ffff);
  swap_blocks<8>(x, 0x00ff00ff00ff00ff), swap_blocks<4>(x, 0x0f0f0f0f0f0f0f0f);
  swap_blocks<2>(x, 0x3333333333333333), swap_blocks<1>(x, 0x5555555555555555);
}

int64_t planes(const Problem& p) { return p.lists.batches * p.lists.heads; }
}  // namespace

double listed_share(const Problem& p) {
  const double tiles = double(ceil_div(p.queries, query_tile)) * double(ceil_div(p.keys, key_tile));
  const int64_t all = planes(p) * ceil_div(p.queries, query_tile);
  return tiles == 0 ? 0 : p.lists.offsets[all] / (tiles * double(planes(p)));
}

void read_bits(const Problem& p, int32_t index, int64_t rows, uint64_t* seen) {
  static_assert(query_tile == 64 && key_tile % 64 == 0);
  const uint32_t* tile = p.lists.bits + int64_t(index) * query_tile * line;
  for (int64_t k = 0; k < key_tile / 64; k++) {
    uint64_t* square = seen + 64 * k;
    for (int64_t r = 0; r < rows; r++) {
      const uint32_t* words = tile + r * line + 2 * k;
      square[r] = words[0] | uint64_t(words[1]) << 32;
    }
    std::fill(square + rows, square + 64, 0);
    transpose_bits(square);
  }
}

ListWalk::ListWalk(const Problem& p, const Item& item)
    : p_(p), item_(item), lists_(item.heads > 1 ? item.heads : ceil_div(item.queries, query_tile)) {
  const auto before = [](const Listed& entry, int64_t tile) { return entry.tile < tile; };
  for (int64_t i = 0; i < lists_; i++) {
    const int64_t head = item.head + (item.heads > 1 ? i : 0), tile = item.query / query_tile + (item.heads > 1 ? 0 : i);
    List& list = rest_[i] = list_of(p, item.batch, head, tile);
    list.begin = std::lower_bound(list.begin, list.end, item.key_begin / key_tile, before);
    list.end = std::lower_bound(list.begin, list.end, ceil_div(item.key_end, key_tile), before);
  }
}

int64_t ListWalk::upcoming() const {
  int32_t tile = std::numeric_limits<int32_t>::max();
  for (int64_t i = 0; i < lists_; i++)
    if (rest_[i].begin < rest_[i].end) tile = std::min(tile, rest_[i].begin->tile);
  return tile == std::numeric_limits<int32_t>::max() ? -1 : tile;
}

int64_t ListWalk::next() {
  const int64_t tile = upcoming();
  for (int64_t i = 0; i < lists_; i++) {
    const bool there = rest_[i].begin < rest_[i].end && rest_[i].begin->tile == tile;
    bits_[i] = there ? rest_[i].begin++->bits : not_listed;
  }
  return tile;
}

int64_t ListWalk::rows() const {
  if (item_.heads > 1) return item_.rows();
  return query_tile * std::count_if(bits_, bits_ + lists_, [](int32_t bits) { return bits != not_listed; });
}

Sight ListWalk::sight(int64_t panel, uint64_t* seen) {
  if (item_.heads == 1) {
    if (bits_[panel] == not_listed) return Sight::none;
    if (bits_[panel] == all_visible) return Sight::all;
    read_bits(p_, bits_[panel], std::min(query_tile, item_.queries - panel * query_tile), seen);
    return Sight::some;
  }
  const auto is = [&](int32_t what) { return std::all_of(bits_, bits_ + lists_, [=](int32_t b) { return b == what; }); };
  if (is(not_listed)) return Sight::none;
  if (is(all_visible)) return Sight::all;
  const uint64_t rows = row_bits(item_.queries);
  std::fill_n(seen, key_tile, 0);
  for (int64_t h = 0; h < lists_; h++) {
    if (bits_[h] == not_listed) continue;
    if (bits_[h] >= 0 && std::exchange(held_, bits_[h]) != bits_[h]) read_bits(p_, bits_[h], item_.queries, turned_);
    for (int64_t j = 0; j < key_tile; j++)
      seen[j] |= (bits_[h] == all_visible ? rows : turned_[j]) << (h * item_.queries);
  }
  return Sight::some;
}

std::vector<int64_t> longest_first(const std::vector<int64_t>& weights) {
  std::vector<int64_t> order(weights.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return weights[a] > weights[b]; });
  return order;
}

ListedItems::ListedItems(const Problem& p, const Schedule& schedule) : p_(p), schedule_(schedule) {
  if (!has_lists(p)) return;
  std::vector<int64_t> weights(schedule.items());
  if (schedule.spans > 1) cuts_.resize(schedule.items());
  for (int64_t tile = 0; tile < schedule.tiles; tile++) {
    Item item = schedule.item(p, tile * schedule.spans);
    item.key_begin = 0, item.key_end = p.keys;
    if (schedule.spans == 1) {
      for (int64_t i = 0; i < ceil_div(item.queries, query_tile); i++)
        for (int64_t h = 0; h < item.heads; h++)
          weights[tile] += list_of(p, item.batch, item.head + h, item.query / query_tile + i).size();
      continue;
    }
    std::vector<int64_t> listed;
    ListWalk walk(p, item);
    for (int64_t key; (key = walk.next()) >= 0;) listed.push_back(key);
    const auto first = [&](int64_t span) { return int64_t(listed.size()) * span / schedule.spans; };
    for (int64_t span = 0; span < schedule.spans; span++) {
      const int64_t index = tile * schedule.spans + span;
      weights[index] = first(span + 1) - first(span);
      cuts_[index] = first(span) < int64_t(listed.size()) ? listed[first(span)] * key_tile : p.keys;
    }
  }
  order_ = longest_first(weights);
}

Item ListedItems::item(int64_t index) const {
  if (order_.empty()) return schedule_.item(p_, index);
  Item item = schedule_.item(p_, order_[index]);
  if (cuts_.empty()) return item;
  item.key_begin = cuts_[order_[index]];
  item.key_end = item.span + 1 < schedule_.spans ? cuts_[order_[index] + 1] : p_.keys;
  return item;
}

KeyLists::KeyLists(const Problem& p) : p_(p), key_tiles_(ceil_div(p.keys, key_tile)) {
  if (!has_lists(p)) return;
  const int64_t query_tiles = ceil_div(p.queries, query_tile);
  const auto* entries = reinterpret_cast<const Listed*>(p.lists.entries);
  offsets_.assign(planes(p) * key_tiles_ + 1, 0);
  entries_.resize(p.lists.offsets[planes(p) * query_tiles]);
  const auto for_each = [&](const auto& f) {
    for (int64_t plane = 0; plane < planes(p); plane++)
      for (int64_t t = 0; t < query_tiles; t++)
        for (int32_t i = p.lists.offsets[plane * query_tiles + t]; i < p.lists.offsets[plane * query_tiles + t + 1]; i++)
          f(plane * key_tiles_ + entries[i].tile, t, entries[i].bits);
  };
  for_each([&](int64_t to, int64_t, int32_t) { offsets_[to + 1]++; });
  std::partial_sum(offsets_.begin(), offsets_.end(), offsets_.begin());
  std::vector<int32_t> next(offsets_.begin(), offsets_.end() - 1);
  for_each([&](int64_t to, int64_t tile, int32_t bits) { entries_[next[to]++] = {int32_t(tile), bits}; });
}

BackwardItems::BackwardItems(const Problem& p, const KeyLists& lists, int64_t tiles_of_block) {
  if (!has_lists(p)) return;
  const int64_t key_tiles = ceil_div(p.keys, key_tile), blocks = ceil_div(key_tiles, tiles_of_block);
  const int64_t query_tiles = ceil_div(p.queries, fatui::query_tile), group = p.heads / p.kv_heads;
  std::vector<int64_t> heads(p.batch * p.kv_heads), key_blocks(heads.size() * blocks), queries;
  for (int64_t batch = 0; batch < p.batch; batch++)
    for (int64_t head = 0; head < p.heads; head++) {
      const int64_t kv = batch * p.kv_heads + head / group;
      for (int64_t t = 0; t < key_tiles; t++) key_blocks[kv * blocks + t / tiles_of_block] += lists.of(batch, head, t).size();
      for (int64_t t = 0; t < query_tiles; t++) {
        queries.push_back(list_of(p, batch, head, t).size());
        heads[kv] += queries.back(), total_ += queries.back();
      }
    }
  for (const int64_t weight : heads) longest_head_ = std::max(longest_head_, weight);
  heads_ = longest_first(heads), blocks_ = longest_first(key_blocks), queries_ = longest_first(queries);
}

}  // namespace fatui
