// Masking and online softmax of a tile's scores, between the two products of portable/forward.cu.

// Growth of a row maximum, in powers of two, that does not trigger rescaling; 0 if registers permit rescaling always.
constexpr float LAZY = ROW_TILES > 1 && VALUE_DIM > 96 ? 8 : 0;

using Scores = float[ROW_TILES][BLOCK_N / 8][4];
using Output = float[ROW_TILES][VALUE_DIM / 8][4];

// Softmax state of a lane's rows; `sum` covers only the lane's columns until the epilogue.
struct Rows {
  float max[ROW_TILES][2], sum[ROW_TILES][2];
};

// Mask elements of a tile of scores, in their dtype: loaded early, and converted once the scores are complete.
struct MaskTile {
  MaskPair pairs[2 * ROW_TILES][BLOCK_N / 8];

  // For rows from `first_row` on, 8 apart, and two adjacent keys of every 8; indices beyond the last row and key are
  // clamped.
  DEVICE void read(const MaskArray& mask, const Problem& problem, int batch, int first_head, int first_row, int first_key) {
    const int column = first_key + threadIdx.x % 4 * 2, last = problem.keys - 1;
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
      const int row = min(first_row + 8 * i, problem.rows() - 1);
      const MaskElement* elements = mask.row(batch, first_head + problem.head_of(row), problem.query_of(row));
      if (mask.key_step == 1 && reinterpret_cast<u64>(elements + column) % sizeof(MaskPair) == 0 &&
          first_key + BLOCK_N <= problem.keys) {
#pragma unroll
        for (int n = 0; n < BLOCK_N / 8; ++n) pairs[i][n] = *reinterpret_cast<const MaskPair*>(elements + column + 8 * n);
      } else {
#pragma unroll
        for (int n = 0; n < BLOCK_N / 8; ++n) {
          const int key = column + 8 * n;
          pairs[i][n] = pair_of(elements[min(key, last) * mask.key_step], elements[min(key + 1, last) * mask.key_step]);
        }
      }
    }
  }

  DEVICE float value(int row, int column) const {
    const MaskPair pair = pairs[row][column / 2];
    return mask_value(column % 2 ? second_of(pair) : first_of(pair));
  }
};

// Bits of a lane's rows in a listed tile, shifted so that those of its first two keys come first; all 1 in a full tile.
struct BitRows {
  u32 words[2 * ROW_TILES][BLOCK_N >= 32 ? BLOCK_N / 32 : 1];

  template <class Tiles>
  DEVICE void read(const Tiles& tiles, int tile, int first_row) {
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
#pragma unroll
      for (int j = 0; j < Tiles::WORDS; ++j) {
        words[i][j] = tile < 0 ? ~0u : tiles.word(tile, first_row + 8 * i, 32 * j) >> threadIdx.x % 4 * 2;
      }
    }
  }
  DEVICE bool visible(int row, int key) const { return words[row][key / 32] & 1u << key % 32; }
};

// Slopes of a lane's rows, with ALIBI.
struct RowSlopes {
  float values[ROW_TILES][2];

  DEVICE void read(const Problem& problem, int first_head, int first_row) {
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
      values[i / 2][i % 2] = problem.slopes[first_head + problem.head_of(first_row + 8 * i)];
    }
  }
};

// Prepares scores for the softmax: capped, scaled if a mask is added, biased, -inf where masked by position or by the array.
DEVICE void rule(Scores& scores, const MaskTile& mask, const BitRows& bits, const RowSlopes& slopes, const Problem& problem,
                 int first_row, int first_key, bool whole) {
  const int column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int t = 0; t < ROW_TILES; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float distance = ALIBI ? column - problem.position_of(problem.query_of(first_row + 16 * t + 8 * r)) : 0;
#pragma unroll
      for (int i = 0; i < BLOCK_N / 4; ++i) {
        float& s = scores[t][i / 2][2 * r + i % 2];
        if (SOFTCAP) s = squash(s, problem.into_cap);
        if (MASK_ADDED) s *= problem.score_factor;
        if (ALIBI) s += slopes.values[t][r] * (distance + (i / 2 * 8 + i % 2));
        if (MASK) s += mask.value(2 * t + r, i);
      }
      if (whole) continue;
      const int query = problem.query_of(first_row + 16 * t + 8 * r);
      const int last = problem.last_seen_by(query) - column, first = problem.first_seen_by(query) - column;
#pragma unroll
      for (int i = 0; i < BLOCK_N / 4; ++i) {
        const int key = i / 2 * 8 + i % 2;
        if (key >= last || (WINDOW && key < first) || (LISTS && !bits.visible(2 * t + r, key))) scores[t][i / 2][2 * r + i % 2] = MINUS_INFINITY;
      }
    }
  }
}

// Online softmax: converts scores to weights relative to the running row maximum, and rescales sums and output. A maximum
// that grows by at most LAZY powers of two is not updated: the weights stay in range, and rescaling is mostly avoided.
DEVICE void softmax(Scores& scores, Rows& rows, Output& out, float factor) {
  float rescale[ROW_TILES][2];
  bool same = true;
#pragma unroll
  for (int t = 0; t < ROW_TILES; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = rows.max[t][r];
#pragma unroll
      for (int n = 0; n < BLOCK_N / 8; ++n) largest = fmaxf(largest, fmaxf(scores[t][n][2 * r], scores[t][n][2 * r + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      if (LAZY > 0 && (largest - rows.max[t][r]) * factor <= LAZY) largest = rows.max[t][r];
      const float base = largest == MINUS_INFINITY ? 0 : largest;  // fully masked so far
      rescale[t][r] = exp2_fast((rows.max[t][r] - base) * factor);
      same = same && rescale[t][r] == 1;
      rows.max[t][r] = largest;
      float shift = base * factor;
      if (__builtin_expect(__any_sync(~0u, fabsf(shift) > LARGE_EXPONENT), 0)) {
#pragma unroll
        for (int n = 0; n < BLOCK_N / 8; ++n) scores[t][n][2 * r] -= base, scores[t][n][2 * r + 1] -= base;
        shift = 0;
      }
      float even = 0, odd = 0;
#pragma unroll
      for (int n = 0; n < BLOCK_N / 8; ++n) {
        even += scores[t][n][2 * r] = exp2_fast(scores[t][n][2 * r] * factor - shift);
        odd += scores[t][n][2 * r + 1] = exp2_fast(scores[t][n][2 * r + 1] * factor - shift);
      }
      rows.sum[t][r] = rows.sum[t][r] * rescale[t][r] + (even + odd);
    }
  }
  if (LAZY > 0 && __all_sync(~0u, same)) return;
#pragma unroll
  for (int i = 0; i < ROW_TILES * VALUE_DIM / 2; ++i) {
    const int t = i / (VALUE_DIM / 2), n = i / 4 % (VALUE_DIM / 8);
    out[t][n][i % 4] *= rescale[t][i % 4 / 2];
  }
}
