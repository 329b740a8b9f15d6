// Tile loads: query rows are transposed so that a lane is a query; key and value rows are read in place if possible.
#pragma once
#include "schedule.hpp"
#include "vector.hpp"

namespace fatui {

// Floats from one row of a transposed tile to the next. With the stride of a power of two, a column of a tile would share a
// few sets of an L1 of 8 ways, and evict itself.
constexpr int64_t tile_line = registers == 32 ? query_tile : query_tile + 16;

struct boolean_t { uint8_t bits; };
typedef uint8_t Bytes __attribute__((vector_size(lanes)));

// Elements of a boolean mask as words; 0 masks a key.
FATUI_INLINE Vector widen(const boolean_t* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return as<Vector>(__builtin_convertvector(bytes, Words));
}

// The first element of a row; of `const T` to read, of T to write.
template <class T>
T* row_of(const Tensor& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(const_cast<void*>(t.data)) + batch * t.stride[0] + head * t.stride[1] + row * t.stride[2];
}

// Row r of a tile, r < rows: its first element; elements along the row are `stride` apart.
template <class T>
struct Rows {
  const T* row[4 * query_tile];
  int64_t stride, count;
};

template <class T>
Rows<T> rows_of(const Tensor& t, const Item& item) {
  Rows<T> rows;
  rows.stride = t.stride[3];
  rows.count = item.rows();
  const T* data = static_cast<const T*>(t.data) + item.batch * t.stride[0];
  for (int64_t h = 0, r = 0; h < item.heads; h++)
    for (int64_t i = 0; i < item.queries; i++, r++)
      rows.row[r] = data + (item.head + h) * t.stride[1] + (item.query + i) * t.stride[2];
  return rows;
}

// A square at the edge of a tile, or one with strides: what is not there is zero. A function of its own, once for each type,
// as are those below for what is rare: in a loop over a number of vectors known only then they would be in memory, in the
// usual case too.
template <class T>
[[gnu::noinline]] void load_some(const Rows<T>& rows, int64_t row, int64_t column, int64_t columns, Vector (&x)[lanes]) {
  FATUI_ROLLED for (int i = 0; i < lanes; i++)
    x[i] = row + i < rows.count ? widen_strided(rows.row[row + i] + column * rows.stride, rows.stride, columns - column)
                                : Vector{};
}

// A square of the tile, transposed: lane i of the result's vector c is element column + c of row `row + i`.
template <class T>
FATUI_INLINE void load_turned(const Rows<T>& rows, int64_t row, int64_t column, int64_t columns, Vector (&x)[lanes]) {
  if (row + lanes <= rows.count && column + lanes <= columns && rows.stride == 1) {
    FATUI_UNROLL for (int i = 0; i < lanes; i++) x[i] = widen(rows.row[row + i] + column);
  } else {
    Vector some[lanes];
    load_some(rows, row, column, columns, some);
    FATUI_UNROLL for (int i = 0; i < lanes; i++) x[i] = some[i];
  }
  transpose(x);
}

// The first vectors of a square, `line` floats apart.
[[gnu::noinline]] inline void store_some(float* to, int64_t line, const Vector (&x)[lanes], int64_t count) {
  FATUI_ROLLED for (int64_t c = 0; c < count; c++) store(to + c * line, x[c]);
}

// Transposes a tile: out[column][row], `width` (a multiple of lanes) rows, `line` floats apart, scaled by a factor.
template <class T>
void transpose_rows(const Rows<T>& rows, int64_t columns, int64_t width, float* out, float factor = 1.0f,
                    int64_t line = tile_line) {
  for (int64_t row = 0; row < width; row += lanes)
    for (int64_t column = 0; column < columns; column += lanes) {
      Vector x[lanes];
      load_turned(rows, row, column, columns, x);
      if (factor != 1.0f) FATUI_UNROLL for (int c = 0; c < lanes; c++) x[c] *= factor;
      float* to = out + column * line + row;
      if (column + lanes <= columns) {
        FATUI_UNROLL for (int c = 0; c < lanes; c++) store(to + c * line, x[c]);
      } else {
        Vector some[lanes];
        FATUI_UNROLL for (int c = 0; c < lanes; c++) some[c] = x[c];
        store_some(to, line, some, columns - column);
      }
    }
}

// Rows of a tile as float32, for the products: in place if they are float32 already, else a copy in `buffer`, zero-padded to
// `padded` floats per row.
struct Floats {
  const float* data;
  int64_t stride;
};

template <class T>
Floats floats_of(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t columns, float* buffer,
                 int64_t padded, bool in_place = true) {
  const T* data = row_of<const T>(t, batch, head, row);
  if constexpr (std::is_same_v<T, float>)
    if (in_place && t.stride[3] == 1) return {data, t.stride[2]};
  const int64_t whole = t.stride[3] == 1 ? columns / lanes * lanes : 0;
  for (int64_t r = 0; r < rows; r++, data += t.stride[2]) {
    float* to = buffer + r * padded;
    int64_t c = 0;
    for (; c < whole; c += lanes) store(to + c, widen(data + c));
    for (; c < columns; c += lanes) store(to + c, widen_strided(data + c * t.stride[3], t.stride[3], columns - c));
  }
  return {buffer, padded};
}

}  // namespace fatui
