// Tiles of portable/backward.cu and their products, of tiles in shared memory and of accumulators as left operands.

constexpr int BLOCK_K = BANDS * BAND_TILES * 16, SUB_Q = COLUMN_WARPS > 1 ? BLOCK_Q / COLUMN_WARPS : PART_Q;
constexpr bool EXCHANGE = COLUMN_WARPS > 1;
using KeyTile = Tile<BLOCK_K, HEAD_DIM>;
using ValueTile = Tile<BLOCK_K, VALUE_DIM>;
using QueryTile = Tile<BLOCK_Q, HEAD_DIM>;
using CotangentTile = Tile<BLOCK_Q, VALUE_DIM>;
using ScoreTile = Tile<BLOCK_K, BLOCK_Q>;
constexpr int NUMBER_BYTES = 3 * BLOCK_Q * 4;  // exponent rests, deltas, bases
constexpr int STAGE_BYTES = QueryTile::BYTES + CotangentTile::BYTES + NUMBER_BYTES;
constexpr int KEY_COLUMNS = HEAD_DIM / COLUMN_WARPS, VALUE_COLUMNS = VALUE_DIM / COLUMN_WARPS;  // dK, dV columns per warp
constexpr int SUM_TILES = BLOCK_Q / QUERY_WARPS / 16, SUM_COLUMNS = HEAD_DIM * QUERY_WARPS / WARPS;  // dQ part per warp
static_assert(KEY_COLUMNS % 16 == 0 && VALUE_COLUMNS % 16 == 0 && SUM_COLUMNS % 16 == 0 && SUM_TILES > 0, "whole matrices");
constexpr int PADDED = 64;  // query tile size of the output of portable/rows.cu

using Scores = float[BAND_TILES][SUB_Q / 8][4];
using Operand = u32[BAND_TILES][4];

// sums += rows @ columns^T: rows of a band times queries.
template <class Rows, class Columns, int DEPTH>
DEVICE void multiply_by_columns(Scores& sums, u32 rows, u32 columns) {
  rows += Rows::by_rows(), columns += Columns::by_columns();
#pragma unroll
  for (int step = 0; step < DEPTH / 16; ++step) {
    Operand left;
#pragma unroll
    for (int t = 0; t < BAND_TILES; ++t) load_matrices(left[t], rows + Rows::at(16 * t, 16 * step));
#pragma unroll
    for (int pair = 0; pair < SUB_Q / 16; ++pair) {
      u32 right[4];
      load_matrices(right, columns + Columns::at(16 * pair, 16 * step));
#pragma unroll
      for (int t = 0; t < BAND_TILES; ++t) {
        multiply_add(sums[t][2 * pair], left[t], right[0], right[1]);
        multiply_add(sums[t][2 * pair + 1], left[t], right[2], right[3]);
      }
    }
  }
}

// sums += left (tiles of 16 rows, 16 columns) @ 16 rows of a tile in shared memory.
template <class Right, int TILES, int COLUMNS>
DEVICE void multiply_step(float (&sums)[TILES][COLUMNS / 8][4], const u32 (&left)[TILES][4], u32 right) {
#pragma unroll
  for (int pair = 0; pair < COLUMNS / 16; ++pair) {
    u32 words[4];
    load_matrices_transposed(words, right + Right::at(0, 16 * pair));
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      multiply_add(sums[t][2 * pair], left[t], words[0], words[1]);
      multiply_add(sums[t][2 * pair + 1], left[t], words[2], words[3]);
    }
  }
}

// sums += weights^T @ rows of a tile, with the weights in registers.
template <class Right, int COLUMNS>
DEVICE void multiply_from_registers(float (&sums)[BAND_TILES][COLUMNS / 8][4], const Scores& weights, u32 right) {
  right += Right::by_rows();
#pragma unroll
  for (int step = 0; step < SUB_Q / 16; ++step) {
    Operand left;
#pragma unroll
    for (int t = 0; t < BAND_TILES; ++t) pack_operand(left[t], weights[t][2 * step], weights[t][2 * step + 1]);
    multiply_step<Right, BAND_TILES, COLUMNS>(sums, left, right + Right::at(16 * step, 0));
  }
}

// sums += weights^T @ rows of a tile, with the weights in shared memory, for all queries of the tile.
template <class Right, int COLUMNS>
DEVICE void multiply_from_memory(float (&sums)[BAND_TILES][COLUMNS / 8][4], u32 weights, u32 right) {
  weights += ScoreTile::by_rows(), right += Right::by_rows();
#pragma unroll
  for (int step = 0; step < BLOCK_Q / 16; ++step) {
    Operand left;
#pragma unroll
    for (int t = 0; t < BAND_TILES; ++t) load_matrices(left[t], weights + ScoreTile::at(16 * t, 16 * step));
    multiply_step<Right, BAND_TILES, COLUMNS>(sums, left, right + Right::at(16 * step, 0));
  }
}
