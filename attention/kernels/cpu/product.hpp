// Float32 matrix product of the kernels: C (rows x columns) = A (rows x depth) * B (depth x columns).
//
//            B: Vectors registers, loaded from one row of B        The accumulators stay in registers over the
//            +--------+--------+--------+--------+                 whole depth: 6 x 4 of them with 32 registers
//   A: one   | b0     | b1     | b2     | b3     |                 (24, and 4 for B, and 1 for A); AVX2 see below.
//   number,  +--------+--------+--------+--------+                 Each step of the depth does Rows * Vectors
//   spread   | Rows x Vectors accumulators:      |                 multiply-adds for Rows + Vectors loads.
//   over a   |   c[r][v] += a[r] * b[v]          |
//   register |                                   |                 A is read in place: a key or a value tile
//            +-----------------------------------+                 needs no packing, whatever its row stride.
#pragma once
#include <algorithm>
#include <utility>

#include "ahead.hpp"
#include "vector.hpp"

namespace fatui {

// Layout of A: contiguous along the depth (keys in scores, probabilities in the gradients), or along the rows (values in
// the output: row d, depth j).
enum class Layout { depth_contiguous, rows_contiguous };

// Update of C: overwrite, add, or scale each column (the correction of the online softmax) and add.
enum class Update { overwrite, add, rescale };

// Element of A and B: a float32, or two bfloat16 (adjacent along the depth), multiplied and added in one instruction. Depth
// and strides are in 32-bit words either way.
enum class Numbers { floats, pairs };

template <Numbers numbers>
FATUI_INLINE Vector spread(const float* p) {
  if constexpr (numbers == Numbers::floats) return broadcast(*p);
  else {
    int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return as<Vector>(Integers{} + bits);
  }
}

template <Numbers numbers>
FATUI_INLINE Vector multiply_add(Vector c, Vector a, Vector b) {
#if defined(__AVX512BF16__)
  if constexpr (numbers == Numbers::pairs) return (Vector)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
  return fused(c, a, b);
}

struct Operands {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  int64_t depth;
  float* c;
  int64_t c_stride;
  const float* column_scale;  // for rescale only
  Ahead* ahead = nullptr;     // rows prefetched into the L2 meanwhile, not in bursts, which the CPU would wait for; or null
  int64_t ahead_lines = 0;    // cache lines of them before each register tile
  float* largest = nullptr;   // the maximum of each column, raised by those of C; or null
};

// AVX2's 16 registers hold 3 x 4 accumulators, 3 numbers of A and a vector of B, or 6 x 2, 2 vectors of B and a number of A: the
// former loads 7 times in a step rather than 8, and reads A, from the L2, for twice as many columns.
constexpr bool wide_tiles = registers == 16 && lanes == 8;

template <int Rows, int Vectors, Layout layout, Update update, Numbers numbers>
FATUI_INLINE void register_tile(const Operands& o, int64_t row, int64_t column) {
  constexpr bool along_depth = layout == Layout::depth_contiguous;
  Vector c[Rows][Vectors] = {};
  // Six rows of A are read from a pointer: x86 has too few registers for the offsets of twelve.
  constexpr int from_each = along_depth ? 6 : Rows, pointers = (Rows + from_each - 1) / from_each;
  const int64_t a_stride = o.a_stride, step = along_depth ? 1 : a_stride;
  const float* a[pointers];
  FATUI_UNROLL for (int n = 0; n < pointers; n++) {
    a[n] = o.a + (row + n * from_each) * (along_depth ? a_stride : 1);
    if (pointers > 1) asm("" : "+r"(a[n]));  // or the compiler computes one from the other
  }
  const auto number = [&](int r) { return a[r / from_each] + (along_depth ? r % from_each * a_stride : r); };
  const float* b = o.b + column;
  const auto advance = [&] {
    FATUI_UNROLL for (int n = 0; n < pointers; n++) a[n] += step;
    b += o.b_stride;
  };
  FATUI_UNROLL_BY_4 for (int64_t k = 0; k < o.depth; k++, advance()) {
    if constexpr (wide_tiles && Vectors == 4) {
      Vector y[Rows];
      FATUI_UNROLL for (int r = 0; r < Rows; r++) y[r] = spread<numbers>(number(r));
      FATUI_UNROLL for (int v = 0; v < Vectors; v++) {
        const Vector x = in_register(load(b + v * lanes));
        FATUI_UNROLL for (int r = 0; r < Rows; r++) c[r][v] = multiply_add<numbers>(c[r][v], y[r], x);
      }
      continue;
    }
    Vector x[Vectors];
    FATUI_UNROLL for (int v = 0; v < Vectors; v++) x[v] = load(b + v * lanes);
    FATUI_UNROLL for (int r = 0; r < Rows; r++) {
      const Vector y = spread<numbers>(number(r));
      FATUI_UNROLL for (int v = 0; v < Vectors; v++) c[r][v] = multiply_add<numbers>(c[r][v], y, x[v]);
    }
  }
  const int64_t c_stride = o.c_stride;  // which the compiler would load again after each store
  float* const out = o.c + row * c_stride + column;
  float* const largest = o.largest;
  FATUI_UNROLL for (int v = 0; v < Vectors; v++) {
    const Vector scale = update == Update::rescale ? load(o.column_scale + column + v * lanes) : Vector{};
    FATUI_UNROLL for (int r = 0; r < Rows; r++) {  // the previous value is added last: blocked summation
      float* place = out + r * c_stride + v * lanes;
      if constexpr (update == Update::add) c[r][v] += load(place);
      if constexpr (update == Update::rescale) c[r][v] += load(place) * scale;
      store(place, c[r][v]);
    }
    if constexpr (layout == Layout::depth_contiguous)
      if (largest != nullptr) {
        float* top = largest + column + v * lanes;
        FATUI_UNROLL for (int r = 1; r < Rows; r++) c[0][v] = larger(c[r][v], c[0][v]);
        store(top, larger(c[0][v], load(top)));
      }
  }
}

// All rows of one panel of columns: full register tiles, then smaller ones for the remainder. With tiles of six rows, eight
// are left to two tiles of four rather than to six and two: two rows have too few multiply-adds to hide their latency. So
// are four or eight rows after tiles of three, in halves of the columns, whose smaller tiles need no compiling of their own.
template <int Rows, int Vectors, Layout layout, Update update, Numbers numbers>
[[gnu::noinline]] void panel(const Operands& o, int64_t row, int64_t rows, int64_t column) {
  const int64_t all = rows - row;
  int64_t left = registers == 16 && Rows == 6 && all % 6 == 2 && all >= 8 ? 8 : 0;
  if (Rows == 3 && all % 3 > 0) left = std::min<int64_t>(all, 4 * (all % 3));
  for (; row + Rows <= rows - left; row += Rows) {
    if (o.ahead != nullptr) o.ahead->ask_one_by_one<2>(o.ahead_lines);
    register_tile<Rows, Vectors, layout, update, numbers>(o, row, column);
  }
  // One vector is at the edge of a panel only: with 16 registers fewer sizes, each of which takes time to compile.
  constexpr int fewer = Vectors == 1 && registers == 16 ? (Rows > 4 ? 4 : Rows > 1) : Rows > 8 ? 8 : Rows > 4 ? 4 : Rows / 2;
  if constexpr (wide_tiles && Vectors == 4) {
    if (row < rows)
      for (const int64_t half : {column, column + 2 * lanes}) panel<4, 2, layout, update, numbers>(o, row, rows, half);
  } else if constexpr (fewer > 0) {
    if (row < rows) panel<fewer, Vectors, layout, update, numbers>(o, row, rows, column);
  }
}

template <Layout layout, Update update, Numbers numbers = Numbers::floats>
void multiply(const Operands& o, int64_t rows, int64_t columns) {
  constexpr int narrow_rows = registers == 32 ? 12 : 6;
  int64_t column = 0;
  if constexpr (registers == 32)
    for (; column + 4 * lanes <= columns; column += 4 * lanes)
      panel<6, 4, layout, update, numbers>(o, 0, rows, column);
  if constexpr (wide_tiles)
    for (; column + 4 * lanes <= columns; column += 4 * lanes)
      panel<3, 4, layout, update, numbers>(o, 0, rows, column);
  for (; column + 2 * lanes <= columns; column += 2 * lanes)
    panel<narrow_rows, 2, layout, update, numbers>(o, 0, rows, column);
  if (column < columns) panel<12, 1, layout, update, numbers>(o, 0, rows, column);
}

// Those of the forward pass are compiled once, in product.cpp.
#define FATUI_FORWARD_PRODUCTS(declare)                                                                     \
  declare template void multiply<Layout::depth_contiguous, Update::overwrite>(const Operands&, int64_t, int64_t); \
  declare template void multiply<Layout::depth_contiguous, Update::add>(const Operands&, int64_t, int64_t);       \
  declare template void multiply<Layout::rows_contiguous, Update::overwrite>(const Operands&, int64_t, int64_t);  \
  declare template void multiply<Layout::rows_contiguous, Update::rescale>(const Operands&, int64_t, int64_t);
FATUI_FORWARD_PRODUCTS(extern)

constexpr int64_t depth_at_once = 64;

// Dot products of queries and keys, in blocks of dims, which bounds the rounding error of long sums.
inline void multiply_scores(Operands o, int64_t rows, int64_t columns) {
  const int64_t depth = o.depth;
  float* const largest = std::exchange(o.largest, depth > depth_at_once ? nullptr : o.largest);
  o.depth = std::min(depth, depth_at_once);
  multiply<Layout::depth_contiguous, Update::overwrite>(o, rows, columns);
  for (int64_t d = depth_at_once; d < depth; d += depth_at_once) {
    o.a += depth_at_once, o.b += depth_at_once * o.b_stride, o.depth = std::min(depth - d, depth_at_once);
    if (d + depth_at_once >= depth) o.largest = largest;
    multiply<Layout::depth_contiguous, Update::add>(o, rows, columns);
  }
}

}  // namespace fatui
