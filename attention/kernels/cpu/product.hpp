// The matrix product under everything: C (rows x columns) = A (rows x depth) * B (depth x columns).
//
//            B: Vectors registers, loaded from one row of B        The accumulators stay in registers over the
//            +--------+--------+--------+--------+                 whole depth: 6 x 4 of them with 32 registers
//   A: one   | b0     | b1     | b2     | b3     |                 (24, and 4 for B, and 1 for A), 6 x 2 with 16.
//   number,  +--------+--------+--------+--------+                 Each step of the depth does Rows * Vectors
//   spread   | Rows x Vectors accumulators:      |                 multiply-adds for Rows + Vectors loads.
//   over a   |   c[r][v] += a[r] * b[v]          |
//   register |                                   |                 A is read where it lies: a key or a value tile
//            +-----------------------------------+                 needs no packing, whatever its row stride.
#pragma once
#include "vector.hpp"

namespace fatui {

// How the numbers of A lie: next to each other along the depth (keys in scores, probabilities in the gradients), or
// next to each other along the rows (values in the output: row d, depth j).
enum class Layout { depth_contiguous, rows_contiguous };

// What happens to C: overwritten, added to, or scaled for each column (the online softmax's correction) and added to.
enum class Update { overwrite, add, rescale };

struct Operands {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  int64_t depth;
  float* c;
  int64_t c_stride;
  const float* column_scale;  // for rescale only
};

template <int Rows, int Vectors, Layout layout, Update update>
FATUI_INLINE void register_tile(const Operands& o, int64_t row, int64_t column) {
  constexpr bool along_depth = layout == Layout::depth_contiguous;
  Vector c[Rows][Vectors];
  float* out = o.c + row * o.c_stride + column;
  FATUI_UNROLL for (int r = 0; r < Rows; r++)
    FATUI_UNROLL for (int v = 0; v < Vectors; v++) {
      if constexpr (update == Update::overwrite) c[r][v] = Vector{};
      else c[r][v] = load(out + r * o.c_stride + v * lanes);
      if constexpr (update == Update::rescale) c[r][v] *= load(o.column_scale + column + v * lanes);
    }
  const float* a = o.a + row * (along_depth ? o.a_stride : 1);
  const float* b = o.b + column;
  _Pragma("GCC unroll 4") for (int64_t k = 0; k < o.depth; k++, a += along_depth ? 1 : o.a_stride, b += o.b_stride) {
    Vector x[Vectors];
    FATUI_UNROLL for (int v = 0; v < Vectors; v++) x[v] = load(b + v * lanes);
    FATUI_UNROLL for (int r = 0; r < Rows; r++) {
      const Vector y = broadcast(along_depth ? a[r * o.a_stride] : a[r]);
      FATUI_UNROLL for (int v = 0; v < Vectors; v++) c[r][v] += y * x[v];
    }
  }
  FATUI_UNROLL for (int r = 0; r < Rows; r++)
    FATUI_UNROLL for (int v = 0; v < Vectors; v++) store(out + r * o.c_stride + v * lanes, c[r][v]);
}

// All rows of one panel of columns: as many full register tiles as fit, then smaller ones.
template <int Rows, int Vectors, Layout layout, Update update>
[[gnu::noinline]] void panel(const Operands& o, int64_t row, int64_t rows, int64_t column) {
  for (; row + Rows <= rows; row += Rows) register_tile<Rows, Vectors, layout, update>(o, row, column);
  constexpr int fewer = Rows > 8 ? 8 : Rows > 4 ? 4 : Rows / 2;
  if constexpr (fewer > 0)
    if (row < rows) panel<fewer, Vectors, layout, update>(o, row, rows, column);
}

template <Layout layout, Update update>
void multiply(const Operands& o, int64_t rows, int64_t columns) {
  constexpr int narrow_rows = registers == 32 ? 12 : 6;
  int64_t column = 0;
  if constexpr (registers == 32)
    for (; column + 4 * lanes <= columns; column += 4 * lanes) panel<6, 4, layout, update>(o, 0, rows, column);
  for (; column + 2 * lanes <= columns; column += 2 * lanes) panel<narrow_rows, 2, layout, update>(o, 0, rows, column);
  if (column < columns) panel<12, 1, layout, update>(o, 0, rows, column);
}

}  // namespace fatui
