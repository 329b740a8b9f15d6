#include "scores.hpp"

namespace fatui {
namespace {

void cap_scores(const Scores& t, float inside, float softcap) {
  for (int64_t j = 0; j < t.keys; j++)
    for (int64_t i = t.begin; i < t.end; i += lanes) store(t.at(j, i), tanh(load(t.at(j, i)) * inside) * softcap);
}

void scale_scores(const Scores& t, float factor) {
  for (int64_t j = 0; j < t.keys; j++)
    for (int64_t i = t.begin; i < t.end; i += lanes) store(t.at(j, i), load(t.at(j, i)) * factor);
}

void bound_scores(const Scores& t, const Bounds& b) {
  for (int64_t i = t.begin; i < t.end; i += lanes) {
    const Integers first = as<Integers>(load(reinterpret_cast<const float*>(b.first + i)));
    const Integers last = as<Integers>(load(reinterpret_cast<const float*>(b.last + i)));
    for (int64_t j = 0; j < t.keys; j++) {
      if (j == t.all_begin()) j = t.all_end();
      if (j == t.keys) break;
      const Integers here = Integers{} + int32_t(t.key + j);
      store(t.at(j, i), ((here >= first) & (here <= last)) ? load(t.at(j, i)) : broadcast(-infinity));
    }
  }
}

// Nothing is added for a boolean mask: a key that it hides may hold anything, NaN too.
template <class T>
FATUI_INLINE Vector masked(Vector score, Vector mask) {
  if constexpr (std::is_same_v<T, boolean_t>) return as<Integers>(mask) != 0 ? score : broadcast(-infinity);
  else return score + mask;
}

template <class T>
void add_mask(const Scores& t, const Tensor& mask, const Item& item) {
  Rows<T> rows = rows_of<T>(mask, item);
  for (int64_t r = 0; r < rows.count; r++) rows.row[r] += t.key * rows.stride;
  for (int64_t i = t.begin; i < t.end; i += lanes)
    for (int64_t j = 0; j < t.keys; j += lanes) {
      Vector x[lanes];
      load_turned(rows, i, j, t.keys, x);
      const int64_t some = std::min<int64_t>(lanes, t.keys - j);
      for (int64_t c = 0; c < some; c++)
        store(t.at(j + c, i), masked<T>(load(t.at(j + c, i)), x[c]));
    }
}

void add_any_mask(const Scores& t, const Tensor& mask, const Item& item) {
  switch (mask.element) {
    case Element::boolean: return add_mask<boolean_t>(t, mask, item);
    case Element::float32: return add_mask<float>(t, mask, item);
    case Element::float16: return add_mask<float16_t>(t, mask, item);
    case Element::bfloat16: return add_mask<bfloat16_t>(t, mask, item);
  }
}
}  // namespace

void finish_scores(const Scores& t, const Problem& p, const Item& item, const Bounds& b) {
  if (p.softcap > 0) cap_scores(t, inside_cap(p), p.softcap);
  if (p.mask.data != nullptr) add_any_mask(t, p.mask, item);
  if (!t.all_seen()) bound_scores(t, b);
}

float finish_raw_scores(const Scores& t, const Problem& p, const Item& item, const Bounds& b) {
  if (!(p.softcap > 0) && p.mask.data == nullptr && p.scale > 0) {
    if (!t.all_seen()) bound_scores(t, b);
    return p.scale;
  }
  scale_scores(t, p.scale);
  finish_scores(t, p, item, b);
  return 1.0f;
}

}  // namespace fatui
