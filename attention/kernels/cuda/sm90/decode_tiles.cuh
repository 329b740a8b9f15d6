// Work of the split-K kernels: ROWS rows per block, of all heads that share a key head.

constexpr int THREADS = WARPS * 32;

struct Problem {
  int group, queries, keys, columns;
  float scale_log2, into_cap;
  int window;
  Slopes slopes;  // with ALIBI: from the first head of the plane on
#if SPANS
  int span_first[3], span_last[3];  // query i of a head sees the keys [first, last) of these, i < 3

  DEVICE int of_query(const int (&x)[3], int row) const {
    const int query = row % queries;
    return query == 0 ? x[0] : query == 1 ? x[1] : x[2];
  }
  DEVICE int last_seen_by(int row) const { return of_query(span_last, row); }
  DEVICE int first_seen_by(int row) const { return of_query(span_first, row); }
#else
  DEVICE int last_seen_by(int row) const { return CAUSAL ? min(keys, row % queries + 1 + keys - queries) : keys; }
  DEVICE int first_seen_by(int row) const { return WINDOW ? max(0, row % queries + 1 + keys - queries - window) : 0; }
#endif

  DEVICE int rows() const { return group * queries; }
  // Of one query, rows are heads: no division, which takes as long as an access to shared memory.
  DEVICE int head_of(int row) const { return queries == 1 ? row : row / queries; }
  DEVICE int query_of(int row) const { return queries == 1 ? 0 : row % queries; }
  DEVICE int position_of(int row) const { return row % queries + keys - queries; }
  DEVICE float slope_of(int row) const { return slopes[min(row, rows() - 1) / queries]; }
  // First key that any row sees.
  DEVICE int first_seen_by_all() const { return window > 0 ? max(0, keys + 1 - queries - window) : 0; }
};

// A block's split of the keys of a row tile.
struct Block {
  int split, tile, first_row, plane, batch, head;

  DEVICE Block(const Problem& problem, int kv_heads, int splits) {
    const int row_tiles = (problem.rows() + ROWS - 1) / ROWS;
    tile = splits == 1 ? blockIdx.x : blockIdx.x / static_cast<u32>(splits), split = blockIdx.x - tile * splits;
    plane = row_tiles == 1 ? tile : tile / row_tiles, first_row = (tile - plane * row_tiles) * ROWS;
    batch = plane < kv_heads ? 0 : plane / kv_heads, head = plane - batch * kv_heads;
  }
};
