// From dot products to what the softmax sees: scale, softcap, mask array, causal and window bounds.
//
// A tile of scores is S[key][query]: one line a key, one lane a query. Masked scores are -inf.
#pragma once
#include "tile.hpp"

namespace fatui {

constexpr int64_t half_tile = query_tile / 2;

// Keys that any of some queries may see, [any_first, any_last], and that all of them may see.
struct Extent {
  int64_t any_first = std::numeric_limits<int64_t>::max(), any_last = -1;
  int64_t all_first = 0, all_last = std::numeric_limits<int64_t>::max();

  void take(const Visible& v) {
    any_first = std::min(any_first, v.first), any_last = std::max(any_last, v.last);
    all_first = std::max(all_first, v.first), all_last = std::min(all_last, v.last);
  }
};

struct Bounds {  // for each query of the tile, the keys it may see; for its halves, and for the tile as a whole
  alignas(64) int32_t first[query_tile], last[query_tile];
  Extent whole, half[2];
};

inline Bounds bounds_of(const Problem& p, const Item& item) {
  Bounds b;
  if (!p.causal && p.window == 0) {  // then nobody looks at the single queries
    for (Extent* e : {&b.whole, &b.half[0], &b.half[1]}) e->take(visible(p, item.query));
    return b;
  }
  for (int64_t r = 0; r < query_tile; r++) {
    const Visible v = visible(p, item.query + std::min(r, item.rows() - 1) % item.queries);
    b.first[r] = int32_t(v.first), b.last[r] = int32_t(v.last);
    b.whole.take(v), b.half[r / half_tile].take(v);
  }
  return b;
}

// A tile of scores, or some columns of one: keys [key, key + keys), queries [begin, end), whole vectors of them.
struct Scores {
  float* s;
  int64_t key, keys, begin, end;
  const Extent& seen;  // by its queries

  int64_t width() const { return end - begin; }
  float* at(int64_t j, int64_t i) const { return s + j * query_tile + i; }
  // The lines that all of its queries see: [all_begin, all_end).
  int64_t all_begin() const { return std::clamp<int64_t>(seen.all_first - key, 0, keys); }
  int64_t all_end() const { return std::clamp<int64_t>(seen.all_last + 1 - key, all_begin(), keys); }
  bool all_seen() const { return all_begin() == 0 && all_end() == keys; }
};

// 1 / softcap, finite for any softcap.
inline float inside_cap(const Problem& p) { return std::min(1.0f / p.softcap, largest); }

// Finishes a tile of dot products of queries that were multiplied by the scale: softcap, mask array, causal and window.
void finish_scores(const Scores& t, const Problem& p, const Item& item, const Bounds& b);

// The same for queries as they are (pairs of bfloat16); returns the factor that is left, 1 or the scale, which the softmax
// applies for nothing (in the multiply-add that subtracts the maximum).
float finish_raw_scores(const Scores& t, const Problem& p, const Item& item, const Bounds& b);

// Scores are as coarse as their size: float32 rounds one near 100 by up to 4e-6, which is its weight's relative error. In
// this range of their maximum they are computed again, in double. To 2^30, as a float32 maximum is no nearer than 64 to a
// score there, and e^64 is finite. The inputs' own rounding is larger in half precision, but a mask of -1e9 leaves nothing
// of a score in float32; with float32 inputs that is what the sum says, in plain attention too.
struct Coarse {
  float from, to;

  explicit Coarse(const Problem& p) {
    const bool added = p.mask.data != nullptr && p.mask.element != Element::boolean;
    const bool float32 = p.query.element == Element::float32;
    from = float32 ? 0x1p6f : added ? 0x1p12f : infinity;
    to = float32 && added ? 0x1p20f : 0x1p30f;
  }
  bool has(float maximum) const { return std::abs(maximum) > from && std::abs(maximum) < to; }
};

// What is subtracted from the scores of each query: maximum + fine.
struct Maxima {
  float *maximum, *fine;
};

// Scores of the tile's columns anew, in double from the dot product to the last bound, less the maxima. Those of a query
// whose maximum is larger are taken as they are.
void finish_in_double(const Scores& t, const Problem& p, const Item& item, const Floats& key, const Maxima& known);

// The same where the maxima are not known yet: they take these scores in, and `correction` is e^(before - now).
void finish_in_double(const Scores& t, const Problem& p, const Item& item, const Floats& key, const Maxima& maxima,
                      float* correction);

}  // namespace fatui
