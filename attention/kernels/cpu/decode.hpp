// Kernel for few rows (decoding): query lanes would be mostly empty, so lanes are dims in the products and keys in the
// softmax. K and V are read once, in place, and each is prefetched while the other is processed, because the kernel is
// bound by memory bandwidth.
#pragma once
#include <optional>

#include "decode_products.hpp"
#include "pool.hpp"
#include "quantized.hpp"
#include "softmax.hpp"

namespace fatui {

static_assert(score_line * (query_tile + tile_line) <= key_tile * tile_line);  // scores, transposed and not, fit in one tile

// Bytes of K and V of a call that come from the L3 if they were read before.
constexpr int64_t most_cached = 8 << 20;

// Bytes of K and V of all heads.
inline int64_t bytes_read(const Problem& p) {
  const int64_t element = p.query.element == Element::float32 ? 4 : 2;
  return p.batch * p.kv_heads * p.keys * (p.head_dim + p.value_dim) * element;
}

// Whether K and V come from memory, to a core with an L2 of 1 MiB: it then has more requests on their way to the L2 than to the L1.
// Not with NEON, where nobody has measured it.
inline bool to_l2(const Problem& p) { return lanes > 4 && bytes_read(p) > most_cached && l2_bytes() >= 1 << 20; }

// Whether one row is computed key by key. With 16 registers that is slower from memory if the L2 is smaller, and in bfloat16.
inline bool one_by_one(const Problem& p) {
  return lanes == 16 || bytes_read(p) <= most_cached || (l2_bytes() >= 1 << 20 && p.query.element != Element::bfloat16);
}

// Keys per tile: K, V and the prefetched next K fit in an L1 of 48 KiB, or 32 with 16 registers; as few in float32, where memory
// bandwidth leaves time for more tiles, but for K and V that are prefetched into the L2.
template <class T>
int64_t decode_keys(const Problem& p) {
  const int64_t numbers = sizeof(T) == 2 ? (registers == 16 ? 4096 : 8192) : to_l2(p) ? 4096 : 2048;
  return std::clamp<int64_t>(numbers / p.head_dim / 16 * 16, 16, score_line);
}
static_assert(score_line <= max_quantized_rows && few_rows * max_quantized_rows <= query_tile * score_line);

// Keys of a tile where one row is computed key by key: its scores take the place of the transposed ones. The weights of some keys at a
// time are computed before their values are read, so that reading goes on meanwhile; a tile's first values are prefetched. With 32
// registers, whose vectors are wider, all weights take less time than changing between the two.
constexpr int64_t row_keys = 2048, weighed_together = registers == 32 ? row_keys : 64, first_values = registers == 32 ? 32 : 8;
static_assert(row_keys <= score_line * query_tile);

// Calls f(row, R) for groups of 4, 2 and 1 rows.
template <class F>
FATUI_INLINE void in_groups(int64_t rows, const F& f) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) f(row, std::integral_constant<int, 4>{});
  for (; row + 2 <= rows; row += 2) f(row, std::integral_constant<int, 2>{});
  if (row < rows) f(row, std::integral_constant<int, 1>{});
}

// Largest number of a row over their mean with which the row is read as integers of 16 bits: their rounding is then at most
// 2^-12, or 2^-9, of the mean, which is that of the type.
template <class T>
constexpr float max_share = std::is_same_v<T, bfloat16_t> ? 128 : 16;

// Whether rows can be read in place in whole vectors, or pairs of them.
template <class T>
bool whole_vectors(const Tensor& t, int64_t columns) {
  return t.stride[3] == 1 && columns % (even_and_odd<T> ? 2 * lanes : lanes) == 0;
}

// How K and V are read: in place, in place as pairs of bfloat16, or from float32 copies.
enum class Reading { in_place, pairs, copied };

// Keys that an item reads, [begin, end), what its rows see of them (null: all), and how many rows after the item's own those
// are whose queries it takes for them.
struct KeyRun {
  int64_t begin = 0, end = 0;
  const uint64_t* bits = nullptr;
  int64_t query = 0;

  bool empty() const { return begin >= end; }
};

// The runs of an item's keys: a single one, or one for each span or each listed tile.
class KeyRuns {
 public:
  KeyRuns(const Problem& p, const Item& item, const Bounds& bounds) : p_(p), item_(item) {
    if (has_lists(p)) walk_.emplace(p, item);
    else if (p.spans != nullptr) spans_ = p.spans[item.batch].of;
    else
      only_ = {std::max(item.key_begin, bounds.whole.any_first), std::min(item.key_end, bounds.whole.any_last + 1)};
  }

  // The next run, valid together with the one before; an empty one after the last.
  KeyRun next() {
    while (spans_ != nullptr && turn_ < 3) {
      const Span& span = spans_[turn_++];
      int64_t end = span.end;
      for (; turn_ < 3 && spans_[turn_].begin == end && spans_[turn_].query == span.query; turn_++) end = spans_[turn_].end;
      const KeyRun run{std::max(span.begin, item_.key_begin), std::min(end, item_.key_end), nullptr, span.query};
      if (!run.empty()) return run;
    }
    if (!walk_) return std::exchange(only_, {});
    for (int64_t tile; (tile = walk_->next()) >= 0;) {
      const int64_t key = tile * key_tile, keys = std::min(key_tile, p_.keys - key);
      const uint64_t* bits = bits_[turn_];
      const Sight sight = walk_->sight(0, bits_[turn_]);
      if (sight == Sight::all) return {key, key + keys};
      const KeyRange seen = keys_seen(bits, keys, row_bits(item_.rows()));
      if (seen.first > seen.last) continue;
      turn_ ^= 1;
      return {key + seen.first, key + seen.last + 1, bits + seen.first};
    }
    return {};
  }

 private:
  const Problem& p_;
  const Item& item_;
  KeyRun only_;
  const Span* spans_ = nullptr;
  std::optional<ListWalk> walk_;
  uint64_t bits_[2][key_tile];
  int turn_ = 0;
};

// One item: its rows against the keys, tile by tile.
template <class T, Reading reading>
struct FewRows {
  using Element = std::conditional_t<reading == Reading::in_place, T, float>;  // pairs are words
  static constexpr bool in_pairs = reading == Reading::pairs;
  static constexpr bool halved = reading == Reading::in_place && even_and_odd<T>;
  // Whether K and V from memory are prefetched into the L2: with the products of other types, which take longer, nothing is gained.
  static constexpr bool may_wait = reading != Reading::copied && sizeof(Element) == 4;
  static constexpr Numbers numbers = in_pairs ? Numbers::pairs : Numbers::floats;

  const Problem& p;
  const Item& item;
  const Bounds& bounds;
  Softmax& state;
  float *query, *scores, *output, *key_copy, *value_copy;  // [row][d], score tiles, [row][dv]; tiles of K and V
  float* pairs = scores + few_rows * score_line;           // P in rows of bfloat16
  float* transposed = scores + query_tile * score_line;    // transposed scores for the masks: [key][row]
  int64_t rows = item.rows(), dv = round_up(p.value_dim, lanes);
  bool alone = by_key && reading == Reading::in_place && rows == 1 && one_by_one(p);
  int64_t key_length = round_up(p.head_dim, lanes) / (in_pairs ? 2 : 1), value_length = dv / (in_pairs ? 2 : 1);

  void attend(KeyRuns& runs) {
    const int64_t tile = decode_keys<T>(p);
    KeyRun run = runs.next();
    if (!run.empty() && reading != Reading::copied && !alone)
      Ahead(lines(p.key, run.begin, std::min(tile, run.end - run.begin), p.head_dim, key_length, key_copy)).ask_for_all();
    int64_t query_read = run.query;
    read_queries(query_read);
    if constexpr (reading == Reading::copied) {
      if (is_quantized(p)) return attend_quantized(runs, run);
    }
    std::fill_n(output, rows * dv, 0.0f);
    if constexpr (by_key && reading == Reading::in_place) {
      if (alone) return attend_by_key(runs, run);
    }
    if (may_wait && to_l2(p)) attend_tiles<may_wait ? 2 : 1>(runs, run, tile);
    else attend_tiles<1>(runs, run, tile);
    if constexpr (in_pairs || halved) order_dims();
  }

 private:
  // Floats per row of scores.
  FATUI_INLINE int64_t line() const {
    if constexpr (reading == Reading::copied) return is_quantized(p) ? max_quantized_rows : score_line;
    return score_line;
  }

  // Tile by tile, the next one prefetched into the L1, or the L2: functions of their own, for the sake of their registers.
  template <int level>
  [[gnu::noinline]] void attend_tiles(KeyRuns& runs, KeyRun run, int64_t tile) {
    int64_t query_read = run.query;
    for (KeyRun after; !run.empty(); run = after) {
      if (run.query != query_read) read_queries(query_read = run.query);
      after = runs.next();
      for (int64_t key = run.begin; key < run.end; key += tile) {
        const int64_t count = std::min(tile, run.end - key);
        const Lines<Element> k = lines(p.key, key, count, p.head_dim, key_length, key_copy);
        const Lines<Element> v = lines(p.value, key, count, p.value_dim, value_length, value_copy);
        const bool last = key + count == run.end;
        const int64_t first = last ? after.begin : key + count, end = last ? after.end : run.end;
        Lines<Element> next = k;  // the tile after this one
        next.data += (first - key) * k.stride;
        next.count = reading == Reading::copied ? 0 : std::min(tile, end - first);
        Lines<Element> next_values = v;
        next_values.data += (first - key) * v.stride, next_values.count = next.count;
        const uint64_t* bits = run.bits == nullptr ? nullptr : run.bits + (key - run.begin);
        step<level>(k, v, next, next_values, key, bits);
      }
    }
  }

  void read_queries(int64_t further) {
    Item own = item;
    own.query += further;
    const Rows<T> q = rows_of<T>(p.query, own);
    for (int64_t r = 0; r < rows; r++)
      if constexpr (in_pairs)
        copy_row(q.row[r], q.stride, p.head_dim, reinterpret_cast<T*>(query + r * key_length), p.head_dim);
      else if constexpr (halved)
        for (int64_t c = 0; c < p.head_dim; c += 2 * lanes) {
          T block[2 * lanes];
          for (int64_t i = 0; i < 2 * lanes; i++) block[i] = q.row[r][(c + i) * q.stride];
          store(query + r * key_length + c, widen_half<0>(block) * float(p.scale));
          store(query + r * key_length + c + lanes, widen_half<1>(block) * float(p.scale));
        }
      else
        for (int64_t c = 0; c < p.head_dim; c += lanes)
          store(query + r * key_length + c,
                widen_strided(q.row[r] + c * q.stride, q.stride, p.head_dim - c) * float(p.scale));
  }

  Lines<Element> lines(const Tensor& t, int64_t key, int64_t count, int64_t dim, int64_t length, float* copy) const {
    if constexpr (reading == Reading::copied) {
      const Floats f = floats_of<T>(t, item.batch, item.kv_head, key, count, dim, copy, length, length == dim);
      return {f.data, f.stride, length, count};
    } else {
      const T* data = static_cast<const T*>(t.data) + item.batch * t.stride[0] + item.kv_head * t.stride[1];
      return {reinterpret_cast<const Element*>(data + key * t.stride[2]), t.stride[2] / (in_pairs ? 2 : 1), length,
              count};
    }
  }

  template <int level>
  void step(const Lines<Element>& k, const Lines<Element>& v, const Lines<Element>& next, const Lines<Element>& next_values,
            int64_t key, const uint64_t* bits) {
    const bool both = two_streams && level == 1 && rows % 4 == 0 && k.length == v.length && k.stride == v.stride;
    Ahead ahead = both ? Ahead(next, next_values) : Ahead(v), after_it(next);
    Ahead &values = ahead, &keys = both ? ahead : after_it;
    in_groups(rows, [&](int64_t row, auto group) {
      score_lines<group, numbers, level>(query + row * key_length, key_length, k, scores + row * score_line, values);
    });
    softmax(key, k.count, bits);
    in_groups(rows, [&](int64_t row, auto group) {
      // with 16 registers, 8 accumulators of all rows: as many as hide the latency of a sum
      constexpr int most = registers == 32 ? (in_pairs ? 2 : 4) : 8 / group, least = halved ? 2 : 1;
      int64_t c = 0;
      for (; c + most * lanes <= value_length; c += most * lanes) add<group, most, level>(row, v, c, keys);
      for (; c < value_length; c += least * lanes) add<group, least, level>(row, v, c, keys);
    });
  }

  // One row, key by key.
  void attend_by_key(KeyRuns& runs, KeyRun run) {
    for (int64_t query_read = run.query; !run.empty(); run = runs.next()) {
      if (run.query != query_read) read_queries(query_read = run.query);
      const Scores all{nullptr, run.begin, run.end - run.begin, 0, lanes, bounds.whole, run.bits};
      const int64_t tile = only_scaled(all, p) ? row_keys : score_line;
      for (int64_t key = run.begin; key < run.end; key += tile) {
        const int64_t count = std::min(tile, run.end - key);
        const Lines<Element> k = lines(p.key, key, count, p.head_dim, key_length, key_copy);
        if (k.length == 8 * lanes) score_by_key<8 * lanes>(query, k, scores);
        else if (lanes == 16 && k.length == 4 * lanes) score_by_key<lanes == 16 ? 4 * lanes : 0>(query, k, scores);
        else score_by_key<0>(query, k, scores);
        const float factor = finished({transposed, key, count, 0, lanes, bounds.whole,
                                       run.bits == nullptr ? nullptr : run.bits + (key - run.begin)});
        const Lines<Element> v = lines(p.value, key, count, p.value_dim, value_length, value_copy);
        // Not by Ahead: used here too, its loop would become a function, whose calls make the kernel for more rows keep no registers.
        for (int64_t j = 0; j < std::min(first_values, count); j++)
          for (int64_t d = 0; d < value_length; d += 64 / int64_t(sizeof(Element))) __builtin_prefetch(v.line(j) + d);
        const float m = reference(0, count, factor);
        for (int64_t j = 0; j < count; j += weighed_together) {
          const int64_t some = std::min(weighed_together, count - j);
          weigh(0, j, j + some, factor, m);
          add_values({v.line(j), v.stride, v.length, some}, scores + j);
        }
      }
    }
    if constexpr (halved) order_dims();
  }

  void add_values(const Lines<Element>& v, const float* weights) {
    constexpr int most = 8, some = most / 2, least = halved ? 2 : 1;
    int64_t c = 0;
    for (; c + most * lanes <= value_length; c += most * lanes) add_by_key<most>(weights, v, c, output);
    for (; c + some * lanes <= value_length; c += some * lanes) add_by_key<some>(weights, v, c, output);
    for (; c < value_length; c += least * lanes) add_by_key<least>(weights, v, c, output);
  }

  // Keys and values in integers where that is exact enough, else dequantized in registers.
  void attend_quantized(KeyRuns& runs, KeyRun run) {
    IntegerQueries integers;
    const auto to_integers = [&] {
      return sizeof(T) == 2 && IntegerQueries::take(p.key_packing, p.head_dim, rows) &&
             integers.read(query, key_length, rows, p.head_dim, p.key_packing, max_share<T>, query + few_rows * key_length);
    };
    // bfloat16's rounding of weights is that of the type; queries are exact.
    PairQueries pairs;
    constexpr int terms = std::is_same_v<T, bfloat16_t> ? 1 : 2;
    const bool sums_in_pairs = sizeof(T) == 2 && PairQueries::take(p.value_packing, terms, rows);
    const auto to_pairs = [&] {
      const float unit = terms == 1 ? float(p.scale) : 0.0f;
      return sizeof(T) == 2 && PairQueries::take(p.key_packing, terms, rows) &&
             pairs.read(query, key_length, rows, p.head_dim, unit, query + few_rows * key_length);
    };
    int64_t query_read = run.query;
    bool in_integers = to_integers(), scores_in_pairs = to_pairs();
    const bool sums_in_integers = sizeof(T) == 2 && IntegerSums::take(p.value_packing, p.value_dim, rows);
    const int64_t whole = round_up(rows, rows_together), padded = rows == 1 && !sums_in_integers && !sums_in_pairs ? 1 : whole;
    std::fill_n(query + rows * key_length, (whole - rows) * key_length, 0.0f);
    std::fill_n(scores, few_rows * max_quantized_rows, 0.0f);
    std::fill_n(output, padded * dv, 0.0f);
    for (KeyRun after; !run.empty(); run = after) {
      if (run.query != query_read) {
        read_queries(query_read = run.query);
        in_integers = to_integers(), scores_in_pairs = to_pairs();
      }
      after = runs.next();
      const int64_t tile = quantized_tile({nullptr, run.begin, run.end - run.begin, 0, lanes, bounds.whole, run.bits});
      for (int64_t key = run.begin; key < run.end; key += tile) {
        const int64_t count = std::min(tile, run.end - key);
        const bool last = key + count == run.end;
        const int64_t first = last ? after.begin : key + count, end = last ? after.end : run.end;
        const QuantizedRows k = quantized(p.key, p.key_packing, key, count, p.head_dim);
        const QuantizedRows v = quantized(p.value, p.value_packing, key, count, p.value_dim);
        const QuantizedRows next = quantized(p.key, p.key_packing, first, std::min(tile, end - first), p.head_dim);
        Ahead values(packed_lines(v)), keys(packed_lines(next));
        if (in_integers) integers.scores(k, scores, values);
        else if (scores_in_pairs) pairs.scores(k, scores, values);
        if ((!in_integers && !scores_in_pairs) || !finite_scores(count))  // sums of integers may overflow before they get their unit
          score_quantized(k, query, key_length, rows == 1 ? 1 : whole, scores, line(), values);
        softmax(key, count, run.bits == nullptr ? nullptr : run.bits + (key - run.begin));
        if (sums_in_integers) IntegerSums::add(v, scores, rows, output, dv, keys);
        else if (sums_in_pairs) add_in_pairs(v, terms, scores, line(), rows, output, dv, keys);
        else add_quantized(v, scores, line(), padded, output, dv, keys);
      }
    }
    for (int64_t r = 0; r < rows && sums_in_integers; r++) IntegerSums::order(p.value_packing, p.value_dim, output + r * dv);
  }

  // Keys of a tile: as many as there may be, so that each step starts less often, if no scores are transposed for masks, and if K, V
  // and the prefetched next K leave room in an L1 of 32 KiB.
  int64_t quantized_tile(const Scores& all) const {
    const int64_t bytes = std::max(p.head_dim * p.key_packing.bits, p.value_dim * p.value_packing.bits) / 8;
    return bytes <= 64 && only_scaled(all, p) ? max_quantized_rows : score_line;
  }

  bool finite_scores(int64_t keys) const {
    Vector zero{};  // times infinity or NaN it is NaN
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < keys; j += lanes) zero = fused(zero, load(scores + r * line() + j), Vector{});
    return sum_of(zero) == 0;
  }

  QuantizedRows quantized(const Tensor& t, const Packing& packing, int64_t key, int64_t count, int64_t dims) const {
    return {t, packing, item.batch, item.kv_head, key, count, dims};
  }
  static Lines<uint8_t> packed_lines(const QuantizedRows& rows) {
    return {rows.data(), rows.stride(), rows.bytes(), rows.rows};
  }

  void softmax(int64_t key, int64_t keys, const uint64_t* bits) {
    const float factor = finished({transposed, key, keys, 0, round_up(rows, lanes), bounds.whole, bits});
    int64_t row = 0;
    if constexpr (reading == Reading::copied)
      for (; is_quantized(p) && row + 4 <= rows; row += 4) softmax_four<max_quantized_rows>(row, keys, factor);
    if constexpr (reading == Reading::in_place)
      for (; row + 4 <= rows; row += 4) softmax_four<score_line>(row, keys, factor);
    for (; row < rows; row++) softmax_row(row, keys, factor);
  }

  // Four rows of a tile at once, `width` floats apart: in a row alone most steps wait for the one before.
  template <int64_t width>
  void softmax_four(int64_t row, int64_t keys, float factor) {
    float* s = scores + row * width;
    const int64_t end = round_up(keys, lanes), last = end - lanes;
    Vector top[4], sum[4] = {};
    FATUI_UNROLL for (int r = 0; r < 4; r++) {
      float* edge = s + r * width + last;
      top[r] = lane_numbers() < int32_t(keys - last) ? load(edge) : broadcast(-infinity);
      store(edge, top[r]);
    }
    for (int64_t j = 0; j < last; j += lanes)
      FATUI_UNROLL for (int r = 0; r < 4; r++) top[r] = larger(load(s + r * width + j), top[r]);
    const Vector highest = fold_four(top, Larger{}) * factor;
    float m[4];
    FATUI_UNROLL for (int r = 0; r < 4; r++) {
      if (highest[r] > state.maximum[row + r] + max_outgrown) move_reference(row + r, highest[r]);
      m[r] = std::max(state.maximum[row + r], -largest);
    }
    for (int64_t j = 0; j < end; j += lanes) {
      Vector p[4];
      FATUI_UNROLL for (int r = 0; r < 4; r++) p[r] = (in_register(load(s + r * width + j) * factor) - m[r]) * log2_e;
      exp2_together(p);
      FATUI_UNROLL for (int r = 0; r < 4; r++) store(s + r * width + j, p[r]), sum[r] += p[r];
    }
    const Vector sums_of_rows = fold_four(sum);
    FATUI_UNROLL for (int r = 0; r < 4; r++) state.sum[row + r] += sums_of_rows[r];
  }

  // Applies softcap and masks to the transposed scores, if there are any; returns the remaining factor of the scores.
  float finished(const Scores& tile) {
    const bool plain = only_scaled(tile, p);
    if constexpr (!in_pairs) if (plain) return 1.0f;
    if (plain && p.scale > 0) return p.scale;
    Rows<float> lines;
    lines.stride = 1, lines.count = rows;
    for (int64_t r = 0; r < rows; r++) lines.row[r] = scores + r * line();
    transpose_rows(lines, tile.keys, tile.width(), transposed);
    float factor = 1.0f;
    if constexpr (in_pairs) factor = finish_raw_scores(tile, p, item, bounds);
    else finish_scores(tile, p, item, bounds);
    lines.count = tile.keys;
    for (int64_t j = 0; j < tile.keys; j++) lines.row[j] = transposed + j * tile_line;
    transpose_rows(lines, rows, round_up(tile.keys, lanes), scores, 1.0f, line());
    return factor;
  }

  // Converts a row's scores, times the factor, to probabilities, in place or as bfloat16; lanes are keys.
  void softmax_row(int64_t row, int64_t keys, float factor) { weigh(row, 0, keys, factor, reference(row, keys, factor)); }

  // The reference of a row's exponents, which is subtracted from its scores. It is raised, and the output rescaled, only if the maximum
  // exceeds it by more than a threshold. Scores after the last key are masked.
  float reference(int64_t row, int64_t keys, float factor) {
    float* s = scores + row * line();
    const int64_t last = round_up(keys, lanes) - lanes;
    store(s + last, lane_numbers() < int32_t(keys - last) ? load(s + last) : broadcast(-infinity));
    constexpr int chains = 4;
    Vector top[chains];
    FATUI_UNROLL for (int i = 0; i < chains; i++) top[i] = load(s + last);
    int64_t j = 0;
    for (; j + chains * lanes <= last; j += chains * lanes)
      FATUI_UNROLL for (int i = 0; i < chains; i++) top[i] = larger(load(s + j + i * lanes), top[i]);
    for (; j < last; j += lanes) top[0] = larger(load(s + j), top[0]);
    const float highest = max_of(larger(larger(top[0], top[1]), larger(top[2], top[3]))) * factor;
    if (highest > state.maximum[row] + max_outgrown) move_reference(row, highest);
    return std::max(state.maximum[row], -largest);
  }

  // Converts scores [begin, end) of a row to probabilities relative to `m`, and adds them to its sum.
  void weigh(int64_t row, int64_t begin, int64_t end, float factor, float m) {
    const float* s = scores + row * line();
    Vector sum{};
    // Rounds the product like that of the maximum: contracted into an FMA with the subtraction, it would differ.
    for (int64_t j = begin; j < end; j += lanes)
      sum += probabilities(row, j, (in_register(load(s + j) * factor) - m) * log2_e);
    state.sum[row] += sum_of(sum);
  }

  FATUI_INLINE Vector probabilities(int64_t row, int64_t j, Vector exponents) const {
#if defined(__AVX512BF16__)
    if constexpr (in_pairs) {
      const Vector p = exp2_short(exponents);
      narrow_short(reinterpret_cast<T*>(pairs) + row * score_line + j, p);
      return p;
    }
#endif
    const Vector p = exp2(exponents);
    store(scores + row * line() + j, p);
    return p;
  }

  template <int R, int Vectors, int level>
  void add(int64_t row, const Lines<Element>& v, int64_t column, Ahead& next) const {
    float* out = output + row * dv;
    if constexpr (in_pairs) add_pairs<R, Vectors, level>(pairs + row * (score_line / 2), v, column, out, dv, next);
    else add_lines<R, Vectors, level>(scores + row * score_line, v, column, out, dv, next);
  }

  [[gnu::noinline]] void move_reference(int64_t row, float now) {
    const float before = std::exchange(state.maximum[row], now);
    const float correction = exp2(broadcast((before - now) * log2_e))[0];
    for (float* o = output + row * dv; o < output + (row + 1) * dv; o += lanes) store(o, load(o) * correction);
    state.sum[row] *= correction;
  }

  void order_dims() {
    for (int64_t c = 0; c < rows * dv; c += 2 * lanes) {
      Vector low, high;
      interleave(load(output + c), load(output + c + lanes), low, high, std::make_integer_sequence<int, lanes>{});
      store(output + c, low), store(output + c + lanes, high);
    }
  }
};

}  // namespace fatui
