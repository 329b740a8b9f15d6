// Products of bfloat16 pairs on the CPU's matrix unit (AMX): C (rows x columns) += A (rows x depth) B.
//
//            B  16 pairs x 16 columns, twice     Eight tile registers: four of C, two of A, two of B. Four products
//           +----------+----------+              of 16 x 16 x 32 for four loads. A is read row by row, in place;
//   A       | C  0     | C  1     |              B holds pairs of depth neighbours: [pair][column].
//   16 rows +----------+----------+
//   twice   | C  2     | C  3     |
//           +----------+----------+
#pragma once
#include "vector.hpp"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define FATUI_MATRIX_TILES 1
#include <cstdlib>
#include <sys/syscall.h>
#include <unistd.h>

namespace fatui {

// Requests permission to use the AMX tile registers from Linux.
inline bool matrix_tiles_granted() {
  static const bool granted = [] {
    const char* wish = std::getenv("FATUI_AMX");
    constexpr long request_permission = 0x1023, tile_data = 18;
    return (wish == nullptr || wish[0] != '0') && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
}

// Configures the tile registers of this thread for its lifetime: 16 rows of 64 bytes each.
class MatrixUnit {
 public:
  MatrixUnit() {
    if (!matrix_tiles_granted()) return;
    alignas(64) uint8_t shape[64] = {};
    shape[0] = 1;
    for (int i = 0; i < 8; i++) shape[16 + 2 * i] = 64, shape[48 + i] = 16;
    _tile_loadconfig(shape);
  }
  ~MatrixUnit() {
    if (matrix_tiles_granted()) _tile_release();
  }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// Rows and columns are multiples of 16, depth (in pairs) too; strides in 32-bit words.
struct TileOperands {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  int64_t depth;
  float* c;
  int64_t c_stride;
};

#define FATUI_LOAD_C(n, p) \
  if (add) _tile_loadd(n, p, c_bytes); \
  else _tile_zero(n)

// Up to two tiles by two.
template <bool two_rows, bool two_columns>
void tile_block(const TileOperands& o, int64_t row, int64_t column, bool add) {
  const int64_t a_bytes = o.a_stride * 4, b_bytes = o.b_stride * 4, c_bytes = o.c_stride * 4;
  const float* a = o.a + row * o.a_stride;
  const float* b = o.b + column;
  float* c = o.c + row * o.c_stride + column;
  FATUI_LOAD_C(0, c);
  if constexpr (two_columns) { FATUI_LOAD_C(1, c + 16); }
  if constexpr (two_rows) { FATUI_LOAD_C(2, c + 16 * o.c_stride); }
  if constexpr (two_rows && two_columns) { FATUI_LOAD_C(3, c + 16 * o.c_stride + 16); }
  for (int64_t k = 0; k < o.depth; k += 16) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b + k * o.b_stride, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (two_columns) { _tile_loadd(7, b + k * o.b_stride + 16, b_bytes); _tile_dpbf16ps(1, 4, 7); }
    if constexpr (two_rows) { _tile_loadd(5, a + 16 * o.a_stride + k, a_bytes); _tile_dpbf16ps(2, 5, 6); }
    if constexpr (two_rows && two_columns) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (two_columns) _tile_stored(1, c + 16, c_bytes);
  if constexpr (two_rows) _tile_stored(2, c + 16 * o.c_stride, c_bytes);
  if constexpr (two_rows && two_columns) _tile_stored(3, c + 16 * o.c_stride + 16, c_bytes);
}
#undef FATUI_LOAD_C

inline void multiply_tiles(const TileOperands& o, int64_t rows, int64_t columns, bool add) {
  for (int64_t row = 0; row < rows; row += 32)
    for (int64_t column = 0; column < columns; column += 32) {
      const bool two_rows = row + 16 < rows, two_columns = column + 16 < columns;
      if (two_rows && two_columns) tile_block<true, true>(o, row, column, add);
      else if (two_rows) tile_block<true, false>(o, row, column, add);
      else if (two_columns) tile_block<false, true>(o, row, column, add);
      else tile_block<false, false>(o, row, column, add);
    }
}

}  // namespace fatui
#endif
