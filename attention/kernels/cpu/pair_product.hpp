// Product of bfloat16 pairs, on the matrix unit (AMX) or with vector dot products.
#pragma once
#include "matrix_tiles.hpp"
#include "pairs.hpp"
#include "product.hpp"

#if defined(__AVX512BF16__)
namespace fatui {

#if !defined(FATUI_MATRIX_TILES)
struct MatrixUnit {
  MatrixUnit() {}
};
#endif

// C (rows x columns) = or += A (rows x depth) B, depth and strides in words; requires a live MatrixUnit. Reads and writes
// whole tiles: A and C are padded to a multiple of 16 rows, and depth is a multiple of 16 words.
inline void product(const Operands& o, int64_t rows, int64_t columns, bool add) {
#if defined(FATUI_MATRIX_TILES)
  if (matrix_tiles_granted())
    return multiply_tiles({o.a, o.a_stride, o.b, o.b_stride, o.depth, o.c, o.c_stride}, round_up(rows, 16), columns,
                          add);
#endif
  if (add) multiply<Layout::depth_contiguous, Update::add, Numbers::pairs>(o, rows, columns);
  else multiply<Layout::depth_contiguous, Update::overwrite, Numbers::pairs>(o, rows, columns);
}

}  // namespace fatui
#endif
