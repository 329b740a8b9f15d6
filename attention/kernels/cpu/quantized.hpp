// Quantized keys and values. With many query rows a tile is dequantized on its way to the products, into the tiles that rows
// of other types are converted into: formats differ in this step only. With few rows, which read each number once:
//
//   scores   products of integers, if queries have 16 bits, numbers are integers or those of mxfp4, with VNNI of nvfp4, and the CPU
//            is one with AVX2 or AVX-512; elsewhere keys are dequantized in registers
//   output   products of integers, too, if numbers are integers, with AVX-512 those of mxfp4 and nvfp4; elsewhere values are
//            dequantized in registers
//   mxfp8    both in pairs of bfloat16, if queries have 16 bits and the CPU has AVX-512 BF16 and VBMI
#pragma once
#include "tile.hpp"

namespace fatui {

// Rows [row, row + rows) of a head of quantized keys or values, of `columns` values.
struct QuantizedRows {
  const Tensor& numbers;
  const Packing& packing;
  int64_t batch, head, row, rows, columns;

  int64_t at(const Tensor& t, int64_t r = 0) const {
    return batch * t.stride[0] + head * t.stride[1] + (row + r) * t.stride[2];
  }
  const uint8_t* data() const { return static_cast<const uint8_t*>(numbers.data) + 4 * at(numbers); }
  int64_t stride() const { return 4 * numbers.stride[2]; }
  int64_t bytes() const { return columns * packing.bits / 8; }  // of a row
  int64_t groups() const { return columns / packing.group; }
};

// Writes rows as float32 to out, `line` floats apart. A value is scale * number + bias, rounded once (twice in mxfp8).
FATUI_PART void dequantize(const QuantizedRows& rows, float* out, int64_t line);

// Rows as float32, as `floats_of` gives them, of keys or values of either kind.
template <class T>
Floats floats_of(const Tensor& t, const Packing& packing, int64_t batch, int64_t head, int64_t row, int64_t rows,
                 int64_t columns, float* buffer, int64_t padded, bool in_place = true) {
  if (packing.mode == Mode::none) return floats_of<T>(t, batch, head, row, rows, columns, buffer, padded, in_place);
  dequantize({t, packing, batch, head, row, rows, columns}, buffer, padded);
  return {buffer, padded};
}

class Ahead;  // asks for what is read next

constexpr int64_t rows_together = 4;         // query rows of the products with few rows, which are padded to a multiple
constexpr int64_t max_quantized_rows = lanes == 16 ? 128 : 64;  // keys or values of a tile

// S[row][key] of `count` rows, padded as below; entries after the last key, up to a multiple of 16, are undefined.
FATUI_PART void score_quantized(const QuantizedRows& keys, const float* query, int64_t query_line, int64_t count, float* s, int64_t line,
                     Ahead& next);

// O[row][d] += P[row][key] V[key][d] of `count` rows, their lines padded to a multiple of rows_together (1 stays 1).
FATUI_PART void add_quantized(const QuantizedRows& values, const float* p, int64_t p_line, int64_t count, float* output,
                   int64_t output_line, Ahead& next);

// Query rows as integers, q = unit * (256 high + low): words of four high bytes and of four low ones, or numbers of 16 bits, in the
// order of the packed numbers.
class IntegerQueries {
 public:
  // Whether scores over such keys can be computed in integers, and, of one row alone, faster than in float32.
  FATUI_PART static bool take(const Packing& packing, int64_t columns, int64_t rows);

  // Reads rows, `line` floats apart, into `buffer`, 64-byte aligned. False if a number is so large beside the others of its row
  // that integers would lose those.
  FATUI_PART bool read(const float* query, int64_t line, int64_t rows, int64_t columns, const Packing& packing, float largest_share,
            float* buffer);

  // S[row][key], max_quantized_rows floats apart. Rows are padded to a multiple of rows_together, keys to one of 32.
  FATUI_PART void scores(const QuantizedRows& keys, float* s, Ahead& next) const;

 private:
  int64_t row_groups_ = 0;
  const uint8_t* bytes_ = nullptr;  // [4 rows][dims], of 16 bits
  const float* sums_ = nullptr;     // [4 rows][group of dims][16]: in the first of a row's four lanes
  const float* units_ = nullptr;    // [4 rows][16]
};

// O[row][d] += P[row][key] V[key][d], with the products p * scale as integers of 16 bits, whose unit is 2^-15 of the tile's
// largest. The dims of the output are in another order until the end.
struct IntegerSums {
  FATUI_PART static bool take(const Packing& packing, int64_t columns, int64_t rows);

  // Rows of P are max_quantized_rows floats apart. Rows are padded to a multiple of rows_together.
  FATUI_PART static void add(const QuantizedRows& values, const float* p, int64_t count, float* output, int64_t output_line,
                  Ahead& next);

  // Puts the dims of a row in order.
  FATUI_PART static void order(const Packing& packing, int64_t columns, float* output);
};

// Query rows as bfloat16, for keys in e4m3, which bfloat16 holds: one for a number, in which the query is exact but for a unit, or
// a second one for what the first leaves. On CPUs with AVX-512 BF16 and VBMI.
class PairQueries {
 public:
  FATUI_PART static bool take(const Packing& packing, int terms, int64_t rows);

  // Reads rows, `line` floats apart, into `buffer`, 64-byte aligned. `exact_unit`: of queries that are bfloat16 times it; or 0.
  // False if a row's numbers are so small that products with them would count as zero.
  FATUI_PART bool read(const float* query, int64_t line, int64_t rows, int64_t columns, float exact_unit, float* buffer);

  // S[row][key], max_quantized_rows floats apart. Rows are padded to a multiple of rows_together, keys to one of 32.
  FATUI_PART void scores(const QuantizedRows& keys, float* s, Ahead& next) const;

 private:
  int64_t row_groups_ = 0;
  int terms_ = 1;
  float unit_ = 1;
  const uint8_t* bytes_ = nullptr;  // [4 rows][pair of dims][term][row]
};

// O[row][d] += P[row][key] V[key][d], V in e4m3, with one bfloat16 or two for a weight p * scale.
FATUI_PART void add_in_pairs(const QuantizedRows& values, int terms, const float* p, int64_t p_line, int64_t count, float* output,
                  int64_t output_line, Ahead& next);

}  // namespace fatui
