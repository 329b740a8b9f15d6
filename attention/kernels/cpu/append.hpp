// Quantization of new rows into buffers of packed keys or values.
//
//   rows (B, Hkv, S, D) --> numbers, scales, biases (B, Hkv, capacity, .), from row `first` on
//
// The result is that of mx.quantize on the CPU, bit for bit: the same operations in the same order, those of the small-float
// formats rounded to the type of the rows.
#pragma once
#include "problem.hpp"

namespace fatui {

struct NewRows {
  Tensor rows;
  Tensor numbers;   // in words; rows are contiguous, as are those of scales and biases
  Packing packing;  // scales and biases have the type of the rows, or are bytes
  int64_t batch = 0, heads = 0, count = 0, width = 0, first = 0;
};

FATUI_PART void quantize_into(const NewRows& keys, const NewRows& values);

}  // namespace fatui
