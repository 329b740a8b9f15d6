// Quantized keys and values: a tile of rows is dequantized on its way to the products, into the tiles that rows of other types
// are converted into. Formats differ in this step only.
#pragma once
#include "tile.hpp"

namespace fatui {

// Writes rows [row, row + rows) of a head as float32 to out, `line` floats apart. A value is scale * number + bias, rounded once
// (twice in mxfp8).
void dequantize(const Tensor& numbers, const Packing& packing, int64_t batch, int64_t head, int64_t row, int64_t rows,
                int64_t columns, float* out, int64_t line);

// Rows as float32, as `floats_of` gives them, of keys or values of either kind.
template <class T>
Floats floats_of(const Tensor& t, const Packing& packing, int64_t batch, int64_t head, int64_t row, int64_t rows,
                 int64_t columns, float* room, int64_t padded, bool in_place = true) {
  if (packing.mode == Mode::none) return floats_of<T>(t, batch, head, row, rows, columns, room, padded, in_place);
  dequantize(t, packing, batch, head, row, rows, columns, room, padded);
  return {room, padded};
}

}  // namespace fatui
