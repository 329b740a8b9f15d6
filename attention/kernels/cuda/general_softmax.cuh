// What happens to a tile's scores between the two products of general_forward.cu: mask, and online softmax.

// By so many powers of two a maximum may grow before the sums are rescaled: 0 where there are registers to do it always.
constexpr float LAZY = ROW_TILES > 1 && VALUE_DIM > 96 ? 8 : 0;

using Scores = float[ROW_TILES][BLOCK_N / 8][4];
using Output = float[ROW_TILES][VALUE_DIM / 8][4];

// What a lane remembers of its rows; `sum` covers only its own columns until the end.
struct Rows {
  float max[ROW_TILES][2], sum[ROW_TILES][2];
};

// Where the keys of a lane are, two for each accumulator: with a mask they are one run (RunsOfColumns).
DEVICE int first_key_of_lane() { return threadIdx.x % 4 * (MASK ? BLOCK_N / 4 : 2); }
constexpr int KEYS_BETWEEN = MASK ? 2 : 8;  // from one accumulator to the next

// A mask's elements for a lane's scores, as they lie in memory: asked for early, and looked at only when the scores are there.
struct MaskTile {
  static constexpr int BYTES = BLOCK_N / 4 * sizeof(MaskElement), EACH = 4 / sizeof(MaskElement);
  u32 words[2 * ROW_TILES][BYTES / 4];

  // For rows from `first_row` on, 8 apart; beyond the last row and key those are read again.
  DEVICE void read(const MaskArray& mask, const Problem& problem, int batch, int first_head, int first_row, int first_key) {
    const int column = first_key + first_key_of_lane();
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
      const int row = min(first_row + 8 * i, problem.rows() - 1);
      const MaskElement* elements = mask.row(batch, first_head + problem.head_of(row), problem.query_of(row));
      const bool aligned = reinterpret_cast<u64>(elements + column) % (BYTES < 16 ? 8 : 16) == 0;
      if (mask.key_step == 1 && aligned && first_key + BLOCK_N <= problem.keys) read_run(words[i], elements + column);
      else read_each(words[i], elements, mask.key_step, column, problem.keys - 1);
    }
  }

  static DEVICE void read_run(u32 (&words)[BYTES / 4], const MaskElement* run) {
    if (BYTES == 8) {
      const uint2 two = *reinterpret_cast<const uint2*>(run);
      words[0] = two.x, words[1] = two.y;
      return;
    }
#pragma unroll
    for (int i = 0; i < BYTES / 16; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(run)[i];
      words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
  }

  static DEVICE void read_each(u32 (&words)[BYTES / 4], const MaskElement* row, i64 step, int column, int last) {
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) {
      words[i] = 0;
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        words[i] |= static_cast<u32>(row[min(column + i * EACH + j, last) * step]) << (j * 32 / EACH);
      }
    }
  }

  DEVICE float value(int row, int key) const {
    return mask_value(words[row][key / EACH] >> (key % EACH * 32 / EACH) & (EACH == 1 ? ~0u : (1u << 32 / EACH % 32) - 1));
  }
};

// Turns scores into what the softmax takes: capped, scaled if a mask is added, -inf where positions or the mask say no.
DEVICE void rule(Scores& scores, const MaskTile& mask, const Problem& problem, int first_row, int first_key, bool whole) {
  const int column = first_key + first_key_of_lane();
#pragma unroll
  for (int t = 0; t < ROW_TILES; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < BLOCK_N / 4; ++i) {
        float& s = scores[t][i / 2][2 * r + i % 2];
        if (SOFTCAP) s = squash(s, problem.into_cap);
        if (MASK_ADDED) s *= problem.scale_log2;
        if (MASK) s += mask.value(2 * t + r, i);
      }
      if (whole) continue;
      const int query = problem.query_of(first_row + 16 * t + 8 * r);
      const int last = problem.last_seen_by(query) - column, first = problem.first_seen_by(query) - column;
#pragma unroll
      for (int i = 0; i < BLOCK_N / 4; ++i) {
        const int key = i / 2 * KEYS_BETWEEN + i % 2;
        if (key >= last || (WINDOW && key < first)) scores[t][i / 2][2 * r + i % 2] = MINUS_INFINITY;
      }
    }
  }
}

// Online softmax: scores become weights against the row's maximum so far; sums and output follow. A maximum that grows by
// no more than 2^LAZY is left as it was, since the weights stay in range, and the output mostly need not be rescaled.
DEVICE void softmax(Scores& scores, Rows& rows, Output& out, float scale_log2) {
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
      if (LAZY > 0 && (largest - rows.max[t][r]) * scale_log2 <= LAZY) largest = rows.max[t][r];
      const float shift = largest == MINUS_INFINITY ? 0 : largest * scale_log2;  // a row that has seen no key yet
      rescale[t][r] = exp2_fast(rows.max[t][r] * scale_log2 - shift);
      same = same && rescale[t][r] == 1;
      rows.max[t][r] = largest;
      float even = 0, odd = 0;
#pragma unroll
      for (int n = 0; n < BLOCK_N / 8; ++n) {
        even += scores[t][n][2 * r] = exp2_fast(scores[t][n][2 * r] * scale_log2 - shift);
        odd += scores[t][n][2 * r + 1] = exp2_fast(scores[t][n][2 * r + 1] * scale_log2 - shift);
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
