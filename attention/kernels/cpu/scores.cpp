#include <vector>

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

// Keeps the scores of the pairs whose bit is set.
void select_scores(const Scores& t, int64_t rows) {
  const Words lane = (Words{} + 1u) << as<Words>(lane_numbers());
  const uint64_t all = row_bits(std::min(t.end, rows)) & ~row_bits(t.begin);
  for (int64_t j = 0; j < t.keys; j++) {
    if ((t.bits[j] & all) == all) continue;
    for (int64_t i = t.begin; i < t.end; i += lanes) {
      const Words set = (Words{} + uint32_t(t.bits[j] >> i)) & lane;
      store(t.at(j, i), set != 0u ? load(t.at(j, i)) : broadcast(-infinity));
    }
  }
}

float slope_of(const Problem& p, const Item& item, int64_t row) {
  return static_cast<const float*>(p.slopes.data)[item.batch * p.slopes.stride[0] +
                                                  (item.head + row / item.queries) * p.slopes.stride[1]];
}
int64_t position_of(const Problem& p, const Item& item, int64_t row) {
  return item.query + row % item.queries + p.keys - p.queries;
}

void add_slopes(const Scores& t, const Problem& p, const Item& item) {
  for (int64_t i = t.begin; i < t.end; i += lanes) {
    Vector slope{}, distance{};  // of the tile's first key
    for (int c = 0; c < lanes && i + c < item.rows(); c++) {
      slope[c] = slope_of(p, item, i + c);
      distance[c] = float(t.key - position_of(p, item, i + c));
    }
    for (int64_t j = 0; j < t.keys; j++) store(t.at(j, i), fused(load(t.at(j, i)), slope, distance + float(j)));
  }
}

// A boolean mask selects instead of adding: a masked key may contain any value, NaN included.
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
  if (p.slopes.data != nullptr) add_slopes(t, p, item);
  if (p.mask.data != nullptr) add_any_mask(t, p.mask, item);
  if (t.bits != nullptr) select_scores(t, item.rows());
  if (!t.all_seen()) bound_scores(t, b);
}

float finish_raw_scores(const Scores& t, const Problem& p, const Item& item, const Bounds& b) {
  if (!(p.softcap > 0) && p.mask.data == nullptr && p.slopes.data == nullptr && p.scale > 0) {
    if (t.bits != nullptr) select_scores(t, item.rows());
    if (!t.all_seen()) bound_scores(t, b);
    return p.scale;
  }
  scale_scores(t, p.scale);
  finish_scores(t, p, item, b);
  return 1.0f;
}

namespace {
constexpr int halves = 2, keys_at_once = 4;
typedef double Doubles __attribute__((vector_size(lanes * 4)));  // half as many lanes as floats
constexpr int per_half = lanes / halves;
constexpr double max_above = 80;  // e^80 is finite; a score exceeds the maximum only by a rounding difference

double number_of(const Tensor& t, int64_t at) {
  const auto halves_to_double = [](auto* data) { return double(widen_some(data, 1)[0]); };
  switch (t.element) {
    case Element::float16: return halves_to_double(static_cast<const float16_t*>(t.data) + at);
    case Element::bfloat16: return halves_to_double(static_cast<const bfloat16_t*>(t.data) + at);
    case Element::float32: return static_cast<const float*>(t.data)[at];
    case Element::boolean: return static_cast<const uint8_t*>(t.data)[at];
  }
  return 0;
}

// One vector of queries of a tile, column by column [column, column + lanes).
struct InDouble {
  const Scores& t;
  const Problem& p;
  const Item& item;
  const Floats& key;
  int64_t column;
  std::vector<Doubles> query, scores;  // [d][half], not scaled; [key][half]

  InDouble(const Scores& t, const Problem& p, const Item& item, const Floats& key, int64_t column)
      : t(t), p(p), item(item), key(key), column(column), query(p.head_dim * halves), scores(t.keys * halves) {
    for (int i = 0; i < lanes && column + i < item.rows(); i++)
      for (int64_t d = 0; d < p.head_dim; d++)
        query[d * halves + i / per_half][i % per_half] =
            number_of(p.query, at(p.query, column + i) + d * p.query.stride[3]);
    for (int64_t j = 0; j < t.keys; j += keys_at_once) products(j);
    for (int64_t j = 0; j < t.keys; j++)
      for (int i = 0; i < lanes && column + i < item.rows(); i++) score(j, i) = finished(j, column + i, score(j, i));
  }

  double get(int64_t j, int i) const { return scores[j * halves + i / per_half][i % per_half]; }

  double highest(int i) const {
    double top = -infinity;
    for (int64_t j = 0; j < t.keys; j++) top = std::max(top, get(j, i));
    return top;
  }

  // Replaces the scores of a query by their difference to m, unchanged or recomputed in double.
  void write(int i, double m, bool in_double) const {
    for (int64_t j = 0; j < t.keys; j++) {
      float& s = *t.at(j, column + i);
      const double above = (in_double ? get(j, i) : s) - m;
      s = s == -infinity ? s : float(std::min(above, max_above));
    }
  }

 private:
  int64_t at(const Tensor& t, int64_t row) const {
    return item.batch * t.stride[0] + (item.head + row / item.queries) * t.stride[1] +
           (item.query + row % item.queries) * t.stride[2];
  }

  void products(int64_t j) {
    Doubles sum[keys_at_once][halves] = {};
    const float* k[keys_at_once];
    for (int n = 0; n < keys_at_once; n++) k[n] = key.data + std::min(j + n, t.keys - 1) * key.stride;
    for (int64_t d = 0; d < p.head_dim; d++)
      FATUI_UNROLL for (int n = 0; n < keys_at_once; n++)
        FATUI_UNROLL for (int h = 0; h < halves; h++) sum[n][h] += double(k[n][d]) * query[d * halves + h];
    for (int n = 0; n < keys_at_once && j + n < t.keys; n++)
      for (int h = 0; h < halves; h++) scores[(j + n) * halves + h] = sum[n][h] * p.scale;
  }

  // Softcap, slope, mask array, bits, causal and window of one score.
  double finished(int64_t j, int64_t row, double score) const {
    const Visible seen = visible(p, item.query + row % item.queries);
    if (t.key + j < seen.first || t.key + j > seen.last) return -infinity;
    if (t.bits != nullptr && (t.bits[j] >> row & 1) == 0) return -infinity;
    if (p.softcap > 0) score = std::tanh(score / p.softcap) * p.softcap;
    if (p.slopes.data != nullptr) score += double(slope_of(p, item, row)) * double(t.key + j - position_of(p, item, row));
    if (p.mask.data == nullptr) return score;
    const double number = number_of(p.mask, at(p.mask, row) + (t.key + j) * p.mask.stride[3]);
    if (p.mask.element == Element::boolean) return number == 0 ? -infinity : score;
    return score + number;
  }

  double& score(int64_t j, int i) {
    return reinterpret_cast<double*>(scores.data() + j * halves)[i];
  }
};
}  // namespace

[[gnu::cold]] void finish_in_double(const Scores& t, const Problem& p, const Item& item, const Floats& key,
                                    const Maxima& maxima, float* correction) {
  const Coarse coarse(p);
  for (int64_t column = t.begin; column < t.end; column += lanes) {
    const InDouble some(t, p, item, key, column);
    for (int i = 0; i < lanes; i++) {
      float &m = maxima.maximum[column + i], &fine = maxima.fine[column + i];
      const double before = double(m) + fine;
      double now = std::max(some.highest(i), before);
      const bool in_double = column + i < item.rows() && std::abs(now) < coarse.to;
      if (!in_double) {
        now = before;
        for (int64_t j = 0; j < t.keys; j++) now = std::max<double>(now, *t.at(j, column + i));
      }
      m = float(now), fine = in_double ? float(now - m) : 0.0f;
      correction[column + i] = now > before ? float(std::exp(before - now)) : 1.0f;
      some.write(i, std::max<double>(now, -largest), in_double);
    }
  }
}

[[gnu::cold]] void finish_in_double(const Scores& t, const Problem& p, const Item& item, const Floats& key,
                                    const Maxima& known) {
  const Coarse coarse(p);
  for (int64_t column = t.begin; column < t.end; column += lanes) {
    const InDouble some(t, p, item, key, column);
    for (int i = 0; i < lanes; i++) {
      const float m = known.maximum[column + i];
      some.write(i, double(m) + known.fine[column + i], column + i < item.rows() && std::abs(m) < coarse.to);
    }
  }
}

}  // namespace fatui
