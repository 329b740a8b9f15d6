// Few rows (decoding): lanes of queries would stand empty, so the lanes are dims. K and V are read once, as they lie,
// and each is asked for while the other is worked on: what counts is that the memory is never idle.
//
//   scores   some keys times some rows of Q at once: `sums` vectors of products, folded into one of sums  S[key][row]
//   softmax  as everywhere, one lane a row
//   output   O[row][d] += P[key][row] V[key][d]
#pragma once
#include "pairs.hpp"
#include "product.hpp"

namespace fatui {

constexpr int64_t few_rows = 8;                 // up to so many query rows an item go this way
constexpr int sums = registers == 32 ? 16 : 8;  // accumulators

// Keys of a tile: 8 KiB of K, so that two tiles of K and V lie in the L1.
inline int64_t decode_keys(int64_t row_bytes) { return std::clamp<int64_t>(8192 / row_bytes / 16 * 16, 16, 64); }

// Lane i of x[0] becomes the sum of x[i]'s lanes: interleaving x[r] with x[r + N / 2] and adding, log2(lanes) times.
template <int N = lanes>
FATUI_INLINE void fold(Vector (&x)[lanes]) {
  FATUI_UNROLL for (int r = 0; r < N / 2; r++) {
    Vector low, high;
    interleave(x[r], x[r + N / 2], low, high, std::make_integer_sequence<int, lanes>{});
    x[r] = low + high;
  }
  if constexpr (N > 2) fold<N / 2>(x);
}

// Keeps the compiler from loading what it has once more for each use: a line that is not there yet would be waited for
// by all of them.
FATUI_INLINE Vector in_register(Vector x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// Rows of keys or values, one after the other: where they lie, or copied.
template <class E>
struct Lines {
  const E* data;
  int64_t stride, length, count;

  const E* line(int64_t j) const { return data + j * stride; }
};

// Asks the memory for lines that will be wanted soon, 64 bytes at a time, strictly in the order in which they lie: then
// the processor's own prefetchers see it as one stream and run ahead of it.
class Ahead {
 public:
  template <class E>
  explicit Ahead(const Lines<E>& lines)
      : at_(reinterpret_cast<const char*>(lines.data)), pieces_(ceil_div(lines.length * sizeof(E), 64)), here_(pieces_),
        left_(pieces_ * lines.count), gap_(lines.stride * int64_t(sizeof(E)) - 64 * pieces_) {}

  FATUI_INLINE void ask() {
    if (left_ == 0) return;
    __builtin_prefetch(at_);
    at_ += 64, left_--;
    if (--here_ == 0) at_ += gap_, here_ = pieces_;
  }

 private:
  const char* at_;
  int64_t pieces_, here_, left_, gap_;
};

// S[key][row] of R rows of queries.
template <int R, Numbers numbers, class E>
void score_lines(const float* query, int64_t query_line, const Lines<E>& keys, float* s, Ahead& ahead) {
  Ahead next = ahead;
  constexpr int together = sums / R;
  for (int64_t j = 0; j < keys.count; j += together) {
    Vector x[sums / lanes][lanes] = {};
    const E* line[together];
    FATUI_UNROLL for (int g = 0; g < together; g++) line[g] = keys.line(std::min(j + g, keys.count - 1));
    for (int64_t d = 0; d < keys.length; d += lanes) {
      Vector q[R];
      FATUI_UNROLL for (int r = 0; r < R; r++) q[r] = in_register(load(query + r * query_line + d));
      FATUI_UNROLL for (int g = 0; g < together; g++) {
        const Vector k = in_register(widen(line[g] + d));
        if (lanes * sizeof(E) >= 64 || d * sizeof(E) % 64 == 0) next.ask();
        FATUI_UNROLL for (int r = 0; r < R; r++) {
          Vector& sum = x[(g * R + r) / lanes][(g * R + r) % lanes];
          sum = multiply_add<numbers>(sum, k, q[r]);
        }
      }
    }
    float sum[sums];
    FATUI_UNROLL for (int i = 0; i < sums / lanes; i++) fold(x[i]), store(sum + i * lanes, x[i][0]);
    for (int64_t g = 0; g < std::min<int64_t>(together, keys.count - j); g++)
      FATUI_UNROLL for (int r = 0; r < R; r++) s[(j + g) * query_tile + r] = sum[g * R + r];
  }
  ahead = next;
}

// O[row][d] of R rows and some vectors of dims.
template <int R, int Vectors, class E>
void add_lines(const float* s, const Lines<E>& values, int64_t d, float* output, int64_t output_line,
               Ahead& ahead) {
  Ahead next = ahead;
  Vector c[R][Vectors];
  FATUI_UNROLL for (int r = 0; r < R; r++)
    FATUI_UNROLL for (int v = 0; v < Vectors; v++) c[r][v] = load(output + r * output_line + d + v * lanes);
  for (int64_t j = 0; j < values.count; j++) {
    Vector x[Vectors];
    FATUI_UNROLL for (int v = 0; v < Vectors; v++) {
      x[v] = in_register(widen(values.line(j) + d + v * lanes));
      if (lanes * sizeof(E) >= 64 || (d + v * lanes) * sizeof(E) % 64 == 0) next.ask();
    }
    FATUI_UNROLL for (int r = 0; r < R; r++) {
      const Vector p = broadcast(s[j * query_tile + r]);
      FATUI_UNROLL for (int v = 0; v < Vectors; v++) c[r][v] += p * x[v];
    }
  }
  FATUI_UNROLL for (int r = 0; r < R; r++)
    FATUI_UNROLL for (int v = 0; v < Vectors; v++) store(output + r * output_line + d + v * lanes, c[r][v]);
  ahead = next;
}

#if defined(__AVX512BF16__)
// The same with pairs: keys two by two, P and V as pairs of neighbouring keys. A vector of words of V holds even and
// odd dims, and so does O here: of each block of 2 * lanes dims the even ones come first.
template <int R, int Vectors>
void add_pairs(const float* pairs, const Lines<float>& values, int64_t d, float* output, int64_t output_line,
               Ahead& ahead) {
  Ahead next = ahead;
  constexpr int dims = 2 * Vectors;
  Vector c[R][dims];
  float* out = output + 2 * d;
  FATUI_UNROLL for (int r = 0; r < R; r++)
    FATUI_UNROLL for (int v = 0; v < dims; v++) c[r][v] = load(out + r * output_line + v * lanes);
  for (int64_t j = 0; j < values.count; j += 2) {
    Vector x[dims];
    FATUI_UNROLL for (int v = 0; v < Vectors; v++) {
      const int64_t at = d + v * lanes;
      const Words a = as<Words>(load(values.line(j) + at));
      const Words b = j + 1 < values.count ? as<Words>(load(values.line(j + 1) + at)) : Words{};
      x[2 * v] = as<Vector>((a & 0xffffu) | (b << 16)), x[2 * v + 1] = as<Vector>((a >> 16) | (b & 0xffff0000u));
      next.ask(), next.ask();
    }
    FATUI_UNROLL for (int r = 0; r < R; r++) {
      const Vector p = spread<Numbers::pairs>(pairs + j / 2 * query_tile + r);
      FATUI_UNROLL for (int v = 0; v < dims; v++) c[r][v] = multiply_add<Numbers::pairs>(c[r][v], p, x[v]);
    }
  }
  FATUI_UNROLL for (int r = 0; r < R; r++)
    FATUI_UNROLL for (int v = 0; v < dims; v++) store(out + r * output_line + v * lanes, c[r][v]);
  ahead = next;
}
#endif

// Calls f(row, R) for groups of 4, 2 and 1 rows.
template <class F>
FATUI_INLINE void in_groups(int64_t rows, const F& f) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) f(row, std::integral_constant<int, 4>{});
  for (; row + 2 <= rows; row += 2) f(row, std::integral_constant<int, 2>{});
  if (row < rows) f(row, std::integral_constant<int, 1>{});
}

// Whether rows can be read as they lie, whole vectors at a time.
inline bool whole_vectors(const Tensor& t, int64_t columns) { return t.stride[3] == 1 && columns % lanes == 0; }

// How an item of few rows reads K and V: as they lie, so but in pairs of bfloat16, or from float32 copies.
enum class Reading { in_place, pairs, copied };

// One item: its rows against the keys, tile by tile.
template <class T, Reading reading>
struct FewRows {
  static constexpr bool in_pairs = reading == Reading::pairs;
  static constexpr Numbers numbers = in_pairs ? Numbers::pairs : Numbers::floats;
  using Element = std::conditional_t<reading == Reading::in_place, T, float>;  // pairs are words

  const Problem& p;
  const Item& item;
  const Bounds& bounds;
  Softmax& state;
  float *query, *scores, *pairs, *output, *key_copy, *value_copy;  // [row][d], [key][row], [row][dv]; tiles of K and V
  int64_t rows = item.rows(), width = round_up(rows, lanes), dv = round_up(p.value_dim, lanes);
  int64_t key_length = round_up(p.head_dim, lanes) / (in_pairs ? 2 : 1), value_length = dv / (in_pairs ? 2 : 1);

  void attend(int64_t begin, int64_t end) {
    const int64_t tile = decode_keys(p.head_dim * sizeof(T));
    read_queries();
    std::fill_n(output, rows * dv, 0.0f);
    std::fill_n(scores, tile * query_tile, 0.0f);
    for (int64_t key = begin; key < end; key += tile) {
      const int64_t count = std::min(tile, end - key);
      const Lines<Element> k = lines(p.key, key, count, p.head_dim, key_length, key_copy);
      const Lines<Element> v = lines(p.value, key, count, p.value_dim, value_length, value_copy);
      Lines<Element> next = k;  // tiles follow each other
      next.data += tile * k.stride, next.count = reading == Reading::copied ? 0 : std::min(tile, end - key - count);
      step(k, v, next, key);
    }
    if constexpr (in_pairs) order_dims();
  }

 private:
  void read_queries() {
    const Rows<T> q = rows_of<T>(p.query, item);
    for (int64_t r = 0; r < rows; r++)
      if constexpr (in_pairs)
        copy_row(q.row[r], q.stride, p.head_dim, reinterpret_cast<T*>(query + r * key_length), p.head_dim);
      else
        for (int64_t c = 0; c < p.head_dim; c += lanes)
          store(query + r * key_length + c, widen_strided(q.row[r] + c * q.stride, q.stride, p.head_dim - c));
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

  void step(const Lines<Element>& k, const Lines<Element>& v, const Lines<Element>& next, int64_t key) {
    Ahead values(v), keys(next);
    in_groups(rows, [&](int64_t row, auto group) {
      score_lines<group, numbers>(query + row * key_length, key_length, k, scores + row, values);
    });
    const Scores tile{scores, key, k.count, 0, width, bounds.whole};
    softmax(tile, finish_scores(tile, p, item, bounds));
    constexpr int most = registers == 32 && !in_pairs ? 4 : 2;
    in_groups(rows, [&](int64_t row, auto group) {
      int64_t c = 0;
      for (; c + most * lanes <= value_length; c += most * lanes) add<group, most>(row, v, c, keys);
      for (; c < value_length; c += lanes) add<group, 1>(row, v, c, keys);
    });
  }

  template <int R, int Vectors>
  void add(int64_t row, const Lines<Element>& v, int64_t column, Ahead& next) {
    float* out = output + row * dv;
    if constexpr (in_pairs) add_pairs<R, Vectors>(pairs + row, v, column, out, dv, next);
    else add_lines<R, Vectors>(scores + row, v, column, out, dv, next);
  }

  void softmax(const Scores& tile, float factor) {
    bool moved = true;
    if constexpr (in_pairs) moved = softmax_pairs<1>(scores, tile.keys, tile.keys, factor, state, 0, pairs);
    else softmax_step(tile, factor, state);
    for (int64_t r = 0; moved && r < rows; r++)
      for (int64_t c = 0; c < dv; c += lanes)
        store(output + r * dv + c, load(output + r * dv + c) * state.correction[r]);
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
