// Rows of packed numbers as the loops read them: bytes, with scales and biases in float32.
#pragma once
#include "quantized.hpp"

namespace fatui {

constexpr int chunk = 16;  // values: every group has a multiple of them
constexpr int64_t most_groups = 512 / chunk;

enum class Number { integer, e2m1, e4m3 };

// Rows of packed numbers, with their scales and biases in float32.
struct Packed {
  const uint8_t* data;
  int64_t stride, rows, groups, group;
  const float *scales, *biases;
};

// Reads scales or biases from an index on, of some rows, one row after another. Writes whole vectors.
void read_groups(const Tensor& t, Mode mode, int64_t at, int64_t rows, int64_t groups, float* out);

// Reads the scales and biases of up to most_quantized_rows rows and calls f(packed rows). Rows whose words are not side by side
// are copied.
template <class F>
void with_packed(const QuantizedRows& q, const F& f) {
  const Packing& packing = q.packing;
  alignas(64) float scales[most_quantized_rows * most_groups + lanes], biases[most_quantized_rows * most_groups + lanes];
  Packed packed{q.data(), q.stride(), q.rows, q.columns / packing.group, packing.group, scales, biases};
  read_groups(packing.scales, packing.mode, q.at(packing.scales), q.rows, packed.groups, scales);
  if (packing.mode == Mode::affine)
    read_groups(packing.biases, packing.mode, q.at(packing.biases), q.rows, packed.groups, biases);
  const int64_t row_bytes = q.bytes();
  if (q.numbers.stride[3] == 1) return f(packed);
  uint32_t words[most_quantized_rows * 512 / 4];
  for (int64_t r = 0; r < q.rows; r++)
    for (int64_t w = 0; w < row_bytes / 4; w++)
      std::memcpy(words + r * row_bytes / 4 + w, packed.data + r * packed.stride + 4 * w * q.numbers.stride[3], 4);
  packed.data = reinterpret_cast<const uint8_t*>(words), packed.stride = row_bytes;
  f(packed);
}

}  // namespace fatui
