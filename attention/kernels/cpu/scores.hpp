// Conversion of dot products to softmax inputs: scale, softcap, slopes, mask array, bits of block lists, causal and window
// bounds.
//
// A tile of scores is S[key][query]: one row per key, one lane per query. Masked scores are -inf.
#pragma once
#include "lists.hpp"
#include "tile.hpp"

namespace fatui {

// A CPU with one multiply-add of 64 bytes a cycle (AMD's Zen 4): register tiles of one vector, which load a number for each
// multiply-add, are as fast there as others.
#if defined(__AVX512F__) && defined(__SSE4A__) && !defined(__AVXVNNI__)
constexpr bool one_wide_multiply = true;
#else
constexpr bool one_wide_multiply = false;
#endif

// Queries of a tile that skip keys together at a mask's edge: whole register tiles.
constexpr int64_t part_rows = lanes > 8 && !one_wide_multiply ? 32 : 16, parts = query_tile / part_rows;

// Keys that any of a set of queries attends to, [any_first, any_last], and that all of them attend to.
struct Extent {
  int64_t any_first = std::numeric_limits<int64_t>::max(), any_last = -1;
  int64_t all_first = 0, all_last = std::numeric_limits<int64_t>::max();

  void take(const Visible& v) {
    any_first = std::min(any_first, v.first), any_last = std::max(any_last, v.last);
    all_first = std::max(all_first, v.first), all_last = std::min(all_last, v.last);
  }
};

struct Bounds {  // keys attended to by each query of the tile, by its parts, and by the whole tile
  alignas(64) int32_t first[query_tile], last[query_tile];
  Extent whole, part[parts];
};

inline Bounds bounds_of(const Problem& p, const Item& item) {
  Bounds b;
  if (!p.causal && p.window == 0) {  // then per-query bounds are not used
    b.whole.take(visible(p, item.query));
    std::fill_n(b.part, parts, b.whole);
    return b;
  }
  for (int64_t r = 0, i = 0; r < query_tile; r++) {  // rows after the last are as the last
    const Visible v = visible(p, item.query + i);
    b.first[r] = int32_t(v.first), b.last[r] = int32_t(v.last);
    b.whole.take(v), b.part[r / part_rows].take(v);
    if (r + 1 < item.rows()) i = i + 1 < item.queries ? i + 1 : 0;
  }
  return b;
}

// The keys of a tile, from its first one, that any query of a part of a panel sees.
inline KeyRange keys_of_part(const Bounds& b, int64_t part, int64_t key, int64_t keys, const uint64_t* bits) {
  if (bits != nullptr) return keys_seen(bits, keys, row_bits(part_rows) << part * part_rows);
  return {std::max<int64_t>(0, b.part[part].any_first - key), std::min(keys - 1, b.part[part].any_last - key)};
}

// A tile of scores, or some of its columns: keys [key, key + keys), queries [begin, end), in whole vectors.
struct Scores {
  float* s;  // of the first key and query
  int64_t key, keys, begin, end;
  const Extent& seen;  // by its queries
  const uint64_t* bits = nullptr;  // bit i of word j: query i sees key + j; null if the lists hide nothing

  int64_t width() const { return end - begin; }
  float* at(int64_t j, int64_t i) const { return s + j * tile_line + i - begin; }
  // The rows that all of its queries attend to: [all_begin, all_end).
  int64_t all_begin() const { return std::clamp<int64_t>(seen.all_first - key, 0, keys); }
  int64_t all_end() const { return std::clamp<int64_t>(seen.all_last + 1 - key, all_begin(), keys); }
  bool all_seen() const { return all_begin() == 0 && all_end() == keys; }
};

// 1 / softcap, finite for any softcap.
inline float inside_cap(const Problem& p) { return std::min(1.0f / p.softcap, largest); }

// Whether scores of a tile only need the scale.
inline bool only_scaled(const Scores& t, const Problem& p) {
  return !(p.softcap > 0) && p.mask.data == nullptr && p.slopes.data == nullptr && t.bits == nullptr && t.all_seen();
}

// Finishes a tile of dot products of pre-scaled queries: softcap, slopes, mask array, bits, causal and window.
void finish_scores(const Scores& t, const Problem& p, const Item& item, const Bounds& b);

// Finishes a tile of dot products of unscaled queries (bfloat16 pairs); returns the remaining factor, 1 or the scale, which
// the softmax applies at no cost, in the FMA that subtracts the maximum.
float finish_raw_scores(const Scores& t, const Problem& p, const Item& item, const Bounds& b);

// Range of the row maximum in which scores are recomputed in double. The rounding error of a score grows with its size:
// float32 rounds a score near 100 by up to 4e-6, which is the relative error of its weight. The limit is 2^30, where a
// float32 maximum is within 64 of a score, and e^64 is finite. In half precision the rounding of the inputs is larger, but
// adding a mask of -1e9 in float32 would lose the score; with float32 inputs, unfused attention loses it too.
struct Coarse {
  float from, to;

  explicit Coarse(const Problem& p) {
    const bool added = p.mask.data != nullptr && p.mask.element != Element::boolean;
    const bool float32 = p.query.element == Element::float32;
    from = float32 ? 0x1p6f : added || p.slopes.data != nullptr ? 0x1p12f : infinity;
    to = float32 && added ? 0x1p20f : 0x1p30f;
  }
  bool has(float maximum) const { return std::abs(maximum) > from && std::abs(maximum) < to; }
};

// Value subtracted from the scores of each query: maximum + fine.
struct Maxima {
  float *maximum, *fine;
};

// Recomputes the scores of the tile's columns in double, from dot product to masking, and subtracts the maxima. Scores of a
// query whose maximum is beyond the range are not recomputed.
void finish_in_double(const Scores& t, const Problem& p, const Item& item, const Floats& key, const Maxima& known);

// Recomputes scores in double and updates the maxima with them; `correction` returns e^(old maximum - new maximum).
void finish_in_double(const Scores& t, const Problem& p, const Item& item, const Floats& key, const Maxima& maxima,
                      float* correction);

}  // namespace fatui
