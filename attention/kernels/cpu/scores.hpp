// From raw scores to what the softmax sees: scale, softcap, mask array, causal and window bounds.
//
// A tile of scores is S[key][query]: one line a key, one lane a query. Masked scores are -inf.
#pragma once
#include "tile.hpp"

namespace fatui {

struct Bounds {  // for each query of the tile, the keys it may see; and for the tile as a whole
  alignas(64) int32_t first[query_tile], last[query_tile];
  int64_t any_first, any_last, all_first, all_last;
};

inline Bounds bounds_of(const Problem& p, const Item& item) {
  Bounds b;
  b.any_first = p.keys, b.any_last = -1, b.all_first = 0, b.all_last = p.keys;
  for (int64_t r = 0; r < query_tile; r++) {
    const Visible v = visible(p, item.query + std::min(r, item.rows() - 1) % item.queries);
    b.first[r] = int32_t(v.first), b.last[r] = int32_t(v.last);
    b.any_first = std::min(b.any_first, v.first), b.any_last = std::max(b.any_last, v.last);
    b.all_first = std::max(b.all_first, v.first), b.all_last = std::min(b.all_last, v.last);
  }
  return b;
}

inline void cap_scores(float* s, int64_t keys, int64_t width, float scale, float softcap) {
  const float inside = scale / softcap, outside = softcap * log2_e;
  for (int64_t j = 0; j < keys; j++)
    for (int64_t i = 0; i < width; i += lanes) {
      float* p = s + j * query_tile + i;
      store(p, tanh(load(p) * inside) * outside);
    }
}

inline void scale_scores(float* s, int64_t keys, int64_t width, float factor) {
  for (int64_t j = 0; j < keys; j++)
    for (int64_t i = 0; i < width; i += lanes) store(s + j * query_tile + i, load(s + j * query_tile + i) * factor);
}

inline void bound_scores(float* s, int64_t key, int64_t keys, int64_t width, const Bounds& b) {
  for (int64_t i = 0; i < width; i += lanes) {
    const Integers first = as<Integers>(load(reinterpret_cast<const float*>(b.first + i)));
    const Integers last = as<Integers>(load(reinterpret_cast<const float*>(b.last + i)));
    for (int64_t j = 0; j < keys; j++) {
      const Integers here = Integers{} + int32_t(key + j);
      float* p = s + j * query_tile + i;
      store(p, (here >= first) & (here <= last) ? load(p) : broadcast(-infinity));
    }
  }
}

template <class T>
void add_mask(float* s, const Tensor& mask, const Item& item, int64_t key, int64_t keys, int64_t width) {
  Rows<T> rows = rows_of<T>(mask, item);
  for (int64_t r = 0; r < rows.count; r++) rows.row[r] += key * rows.stride;
  for (int64_t i = 0; i < width; i += lanes)
    for (int64_t j = 0; j < keys; j += lanes) {
      Vector x[lanes];
      load_turned(rows, i, j, keys, x);
      const int64_t some = std::min<int64_t>(lanes, keys - j);
      for (int64_t c = 0; c < some; c++) {
        float* p = s + (j + c) * query_tile + i;
        store(p, load(p) + (std::is_same_v<T, boolean_t> ? x[c] : to_base_2(x[c])));
      }
    }
}

inline void add_any_mask(float* s, const Tensor& m, const Item& item, int64_t key, int64_t keys, int64_t width) {
  switch (m.element) {
    case Element::boolean: return add_mask<boolean_t>(s, m, item, key, keys, width);
    case Element::float32: return add_mask<float>(s, m, item, key, keys, width);
    case Element::float16: return add_mask<float16_t>(s, m, item, key, keys, width);
    case Element::bfloat16: return add_mask<bfloat16_t>(s, m, item, key, keys, width);
  }
}

// Finishes a tile of raw dot products; returns the factor that still separates it from base-2 exponents, which the
// softmax applies for nothing (in the multiply-add that subtracts the maximum).
inline float finish_scores(float* s, const Problem& p, const Item& item, const Bounds& b, int64_t key, int64_t keys,
                           int64_t width) {
  float factor = p.scale * log2_e;
  if (p.softcap > 0) {
    cap_scores(s, keys, width, p.scale, p.softcap);
    factor = 1.0f;
  } else if (p.mask.data != nullptr || !(factor > 0)) {
    scale_scores(s, keys, width, factor);
    factor = 1.0f;
  }
  if (p.mask.data != nullptr) add_any_mask(s, p.mask, item, key, keys, width);
  if (key < b.all_first || key + keys - 1 > b.all_last) bound_scores(s, key, keys, width, b);
  return factor;
}

}  // namespace fatui
