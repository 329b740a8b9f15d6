// Tiles and per-lane state of the split-K kernel: 16 rows per block, of all heads that share a key head.

constexpr int ROWS = 16;
constexpr int THREADS = WARPS * 32;

struct Problem {
  int group, queries, keys, columns;
  float scale_log2, into_cap;
  int window;
  Slopes slopes;  // with ALIBI: from the first head of the plane on

  DEVICE int rows() const { return group * queries; }
  DEVICE int last_seen_by(int row) const { return CAUSAL ? min(keys, row % queries + 1 + keys - queries) : keys; }
  DEVICE int position_of(int row) const { return row % queries + keys - queries; }
  DEVICE float slope_of(int row) const { return slopes[min(row, rows() - 1) / queries]; }
  DEVICE int first_seen_by(int row) const { return WINDOW ? max(0, row % queries + 1 + keys - queries - window) : 0; }
};

// A lane holds rows lane / 4 and lane / 4 + 8 and, of every 8 columns, the two at 2 * (lane % 4).
using Output = float[HEAD_DIM / 8][4];

// Softmax state of a lane's rows; `sum` covers only the lane's columns until the epilogue.
struct Rows {
  float max[2] = {MINUS_INFINITY, MINUS_INFINITY};
  float sum[2] = {0, 0};
  float slope[2] = {0, 0};  // with ALIBI
};
